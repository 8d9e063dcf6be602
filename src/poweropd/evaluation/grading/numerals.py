r"""Numbers written out: 1,234, -3.50, 2/3, `\frac{2}{3}`, `1\frac{2}{3}`, `4.5\times 10^{33}`, `0.1\overline{6}`, 12.5%."""

import re
from dataclasses import dataclass
from fractions import Fraction

LONGEST_NUMERAL = 400  # characters
LARGEST_EXPONENT = 400
FEWEST_DIGITS = 6  # significant ones of a decimal that may stand for a number it only rounds

THOUSANDS = re.compile(r"[-+]?\s*\d{1,3}(?:(?:,\d{3})+|(?: \d{3})+)(?:\.\d+)?\s*%?")
_UNSIGNED = r"(?:\d+\.?\d*|\.\d+)"
_DECIMAL = re.compile(rf"({_UNSIGNED})(?:\s*(?:\\times|\\cdot|\*|x)\s*10\s*\^\s*(?:\{{\s*([-+]?\d+)\s*\}}|(\d)))?")
_POWER = re.compile(r"10\s*\^\s*(?:\{\s*([-+]?\d+)\s*\}|(\d))")
_FRACTION = re.compile(
    rf"(\d*)\s*(?:\\frac\s*(?:\{{\s*(-?{_UNSIGNED})\s*\}}|(\d))\s*(?:\{{\s*({_UNSIGNED})\s*\}}|(\d))|(?<!\d)({_UNSIGNED})\s*/\s*({_UNSIGNED}))"
)
_REPEATING = re.compile(r"(\d*)\.(\d*)\\(?:overline|bar|dot)\s*(?:\{(\d+)\}|(\d))")


@dataclass(frozen=True)
class Numeral:
    """`step` is the worth of one in the last digit of a decimal, 0 for exact numbers; `digits` are its significant ones."""

    value: Fraction
    step: Fraction = Fraction(0)
    digits: int = 0
    percent: bool = False


def read_number(text: str) -> Numeral | None:
    """The number that a text is, None if it is anything else."""
    if len(text) > LONGEST_NUMERAL:
        return None
    text = text.strip()
    if THOUSANDS.fullmatch(text):
        text = text.replace(",", "").replace(" ", "")
    percent = text.endswith("%")
    text = text.rstrip("%").strip()
    negative = text.startswith("-")
    text = text[1:].strip() if text[:1] in ("-", "+") else text
    number = _decimal(text) or _power(text) or _fraction(text) or _repeating(text)
    if number is None:
        return None
    return Numeral(-number.value if negative else number.value, number.step, number.digits, percent)


def same_number(a: Numeral, b: Numeral) -> bool:
    """Whether two numbers are equal.

    A decimal of six significant digits or more also equals the number, no integer, that it is the rounding or truncation
    of: 0.333333 is 1/3, 0.33 is not. Where only one is a percentage, its sign is read as a hundredth or, of numbers from 1,
    as a unit: 50% is 0.5 and is 50, while 50 is not 0.5 and 0.5% is not 0.5.
    """
    if a.percent == b.percent:
        return _close(a, b)
    percentage, other = (a, b) if a.percent else (b, a)
    hundredth = Numeral(percentage.value / 100, percentage.step / 100, percentage.digits)
    return _close(hundredth, other) or (abs(other.value) >= 1 and _close(percentage, other))


def stands_for(decimal: Numeral, value: Fraction) -> bool:
    """Whether the decimal is `value`, or what it is rounded or truncated to."""
    if decimal.value == value:
        return True
    if decimal.digits < FEWEST_DIGITS or value.denominator == 1:
        return False
    rounded = 2 * abs(value - decimal.value) <= decimal.step
    return rounded or 0 <= (value - decimal.value) * (1 if decimal.value > 0 else -1) < decimal.step


def _close(a: Numeral, b: Numeral) -> bool:
    return stands_for(a, b.value) or stands_for(b, a.value)


def _decimal(text: str) -> Numeral | None:
    match = _DECIMAL.fullmatch(text)
    exponent = int(match[2] or match[3] or 0) if match else 0
    if match is None or abs(exponent) > LARGEST_EXPONENT:
        return None
    scale = Fraction(10) ** exponent
    whole, point, decimals = match[1].partition(".")
    if not point and exponent == 0:
        return Numeral(Fraction(int(whole)))
    digits = len((whole + decimals).lstrip("0"))
    return Numeral(Fraction(match[1].rstrip(".") or "0") * scale, scale / 10 ** len(decimals), digits)


def _power(text: str) -> Numeral | None:
    match = _POWER.fullmatch(text)
    exponent = int(match[1] or match[2]) if match else 0
    return Numeral(Fraction(10) ** exponent) if match and abs(exponent) <= LARGEST_EXPONENT else None


def _fraction(text: str) -> Numeral | None:
    match = _FRACTION.fullmatch(text)
    if match is None:
        return None
    whole, *rest = match.groups()
    top, bottom = (Fraction(part.rstrip(".")) for part in rest if part is not None)
    if bottom == 0 or (whole and not 0 <= top < bottom):
        return None
    return Numeral(int(whole or 0) + top / bottom)


def _repeating(text: str) -> Numeral | None:
    match = _REPEATING.fullmatch(text)
    if match is None:
        return None
    start, period = match[2], match[3] or match[4]
    tail = Fraction(int(period), 10 ** len(period) - 1)
    return Numeral(int(match[1] or 0) + (int(start or 0) + tail) / 10 ** len(start))

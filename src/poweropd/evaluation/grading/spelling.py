r"""One spelling of what is written in many ways, and units apart from what they are units of."""

import re
from dataclasses import dataclass

_SPELLINGS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"\\(?:left|right)\s*\.", ""),
        (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits)(?![a-zA-Z])\s*", ""),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\(?:text(?:rm|bf|it|sf|tt|normal)|[mh]box|math(?:rm|it|sf)|operatorname)(?=\s*\{)", r"\\text"),
        (r"\\!\s*", ""),
        (r"\\\\\[\d+[a-z]+\]", r"\\\\"),  # the space between rows of a matrix
        (r"(?<!\\)\\[,;:> ]|\\q?quad(?![a-zA-Z])|~|\s", " "),
        (r"(?<=\d)\{,\}(?=\d)", ","),
        (r"\\%", "%"),
        (r"\\text\s*\{\s*(?:%|percent|per cent)\s*\}|(?<=[\d} ])\s*percent\b", "%"),
        (r"(?:,\s*)?\\text\s*\{\s*,?\s*(?:and|or)\s*\}|(?<=[\d}\])]),?\s+(?:and|or)\s+", ","),
        (r"\^\s*\{?\s*\\circ\s*\}?|\\degree(?![a-zA-Z])|°", r"\\text{degree}"),
        (r"\\(?:geqslant|geq)(?![a-zA-Z])|≥", r"\\ge "),
        (r"\\(?:leqslant|leq)(?![a-zA-Z])|≤", r"\\le "),
        (r"\\varnothing(?![a-zA-Z])|∅", r"\\emptyset "),
        (r"\\lt(?![a-zA-Z])", "<"),
        (r"\\gt(?![a-zA-Z])", ">"),
        (r"\\lbrace(?![a-zA-Z])", r"\\{"),
        (r"\\rbrace(?![a-zA-Z])", r"\\}"),
        (r"\\rightarrow|\\to(?![a-zA-Z])", r"\\to "),
        (r"[−–]", "-"),
        (r"×", r"\\times "),
        (r"π", r"\\pi "),
        (r"∞", r"\\infty "),
        (r"∪", r"\\cup "),
        (r"√(\d+)", r"\\sqrt{\1}"),
        (r"√(?=[({])", r"\\sqrt"),
        (r"[’′']", r"^{\\prime}"),
        (r"\*\*(?=[\d(])", "^"),
        (r"\*\*", ""),  # of Markdown
        (r"np\.(?=[a-z])", r"\\"),
        (r"(?<![\w.\\])(\d+)\.(?=/\d)", r"\1"),  # -1./3
        (r"(?<![\w.\\}])(\d+\.?\d*|\.\d+)[eE]([-+]?\d+)(?!\w)", r"\1\\times 10^{\2}"),
        (r" {2,}", " "),
    ]
]
_DELIMITERS = re.compile(r"(?<!\\)(?:\$|\\[()\[\]])")
_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
_SPACE_BESIDE = re.compile(r"\s*([^\w\s\\])\s*")
_ONE_CHARACTER = re.compile(r"([_^])\{(\w)\}")
_UNIT = re.compile(r"(?<=[\d})%a-zA-Z])\s*\\text\s*\{([^{}]*)\}\s*(?:\^\s*\{?\s*([23])\s*\}?)?$")
_BARE_UNIT = re.compile(r"(?<=[\d})])\s*([a-zA-Z][a-zA-Z ./]*)(?:\^\s*\{?\s*([23])\s*\}?)?$")
# After a number these are part of its value, no unit.
_NO_UNIT = re.compile(
    r"\b(?:hundred|thousand|[mbtr]*illion|dozen|hal(?:f|ve)|third|quarter)s?\b"
    r"|\b(?:pi|sqrt|over|mod|to|factorial|times|and|or|plus|minus|if|for|where|when|is|not|less|more|than)\b",
    re.IGNORECASE,
)

# Known units, each with its ways of being written. Only these can contradict each other; others are dropped unread.
_UNITS = {
    word: words.split()[0]
    for words in [
        "mm millimeter millimeters millimetre millimetres",
        "cm centimeter centimeters centimetre centimetres",
        "m meter meters metre metres",
        "km kilometer kilometers kilometre kilometres",
        "in inch inches",
        "ft foot feet",
        "yd yard yards",
        "mi mile miles",
        "g gram grams",
        "kg kilogram kilograms",
        "lb lbs pound pounds",
        "s sec second seconds",
        "min minute minutes",
        "h hr hrs hour hours",
        "day days",
        "week weeks",
        "month months",
        "year years yr yrs",
        "cent cents",
        "dollar dollars usd",
        "degree degrees deg",
        "radian radians rad",
        "unit units",
        "l liter liters litre litres",
    ]
    for word in words.split()
}
_POWERS = {"square": "2", "sq": "2", "squared": "2", "cubic": "3", "cu": "3", "cubed": "3"}


@dataclass(frozen=True)
class Answer:
    """An answer in one spelling without its unit, and the unit, if it is one of those known."""

    text: str
    unit: str | None = None

    @property
    def plain(self) -> str:
        """What is left when nothing of the spelling can matter."""
        text = _TEXT.sub(r" \1 ", self.text)
        return _ONE_CHARACTER.sub(r"\1\2", _SPACE_BESIDE.sub(r"\1", text)).strip()

    @property
    def is_text(self) -> bool:
        return _TEXT.search(self.text) is not None


def clean(text: str) -> Answer:
    r"""One spelling of what is written in many: `\dfrac` for `\frac`, `\left(` for `(`, `5\text{ cm}` for 5.

    A letter is kept, for m may be a mass: only `\text{m}` is a unit, and known words such as `meters` after a number.
    """
    unit = "dollar" if "\\$" in text else None
    text = _DELIMITERS.sub("", text.replace("\\$", ""))
    for pattern, replacement in _SPELLINGS:
        text = pattern.sub(replacement, text)
    text = text.strip().rstrip(".,;\\").strip()
    quantity, name, certain = split_unit(text)
    return Answer(quantity, name or unit) if certain else Answer(text, unit)


def split_unit(text: str) -> tuple[str, str | None, bool]:
    """Quantity, unit if known, and whether it surely is a unit: a bare letter or an unknown bare word may be none."""
    match = _UNIT.search(text) or _BARE_UNIT.search(text)
    if match is None:
        return text, None, False
    quantity = text[: match.start()].strip()
    words = match[1].replace(".", " ").lower().split()
    if not quantity or quantity.count("{") != quantity.count("}") or _NO_UNIT.search(match[1]):
        return text, None, False
    powers = [match[2]] if match[2] else [_POWERS[word] for word in words if word in _POWERS]
    words = [word for word in words if word not in _POWERS]
    name = _UNITS.get(words[0]) if len(words) == 1 else None
    certain = name is not None or quantity[-1] in ")}%" or quantity[-1].isdigit()
    if match.re is _BARE_UNIT:
        certain = name is not None and len(words[0]) > 1
    return quantity, name and name + "".join(powers), certain

r"""Compare two answers as far as that takes no algebra: spelling, units, words, plain numbers, lists.

Nothing here decides what it is not sure of: that is left to the `algebra` of `compare`.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from poweropd.evaluation.numerals import THOUSANDS, read_number, same_number

Verdict = bool | None  # None: cannot be told
Algebra = Callable[[str, str], Verdict]

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
_NAMED_NUMBER = re.compile(r".*[\d})]\s+(?:[a-zA-Z]{3,}.*|[mgshl](?:\^.*)?)")  # 4 apples, 5 m
_CHOICE = re.compile(r"\(([A-J])\)|([A-J])[.:)]?")
_LABEL = re.compile(r"\(([A-J])\)\s*(-?(?:\d|\\frac|\\sqrt).*|[a-z]+)")
_WORDS = re.compile(r"[a-zA-Z]{2,}(?:[ '-]+[a-zA-Z]+)*")
_BASED = re.compile(r"([0-9A-Z]+)\s*_\s*(?:\{\s*(\d+)\s*\}|(\d+))")
_NAMED = re.compile(
    r"(?:\([a-z](?:_\d)?(?:\s*,\s*[a-z](?:_\d)?)+\)|[a-zA-Z](?:_\d)?)\s*(?:=|\\in(?![a-z]))\s*(?=[(\[]|\\\{)"
)
_PLUS_MINUS = re.compile(r"\\pm(?![a-zA-Z])\s*")
_BRACKET = re.compile(r"\\?[{}]|[()\[\],;]|\\.")

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
# After a number these are part of its value, not a unit.
_NO_UNITS = frozenset(
    [
        "hundred",
        "hundreds",
        "thousand",
        "thousands",
        "million",
        "millions",
        "billion",
        "billions",
        "trillion",
        "trillions",
        "dozen",
        "half",
        "halves",
        "third",
        "thirds",
        "quarter",
        "quarters",
        "pi",
        "sqrt",
        "over",
        "mod",
        "to",
        "factorial",
        "times",
        "and",
        "or",
        "plus",
        "minus",
        "if",
        "for",
        "where",
        "when",
        "is",
        "not",
        "less",
        "more",
        "than",
    ]
)


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
    quantity, name, certain = _split_unit(text)
    return Answer(quantity, name or unit) if certain else Answer(text, unit)


def _split_unit(text: str) -> tuple[str, str | None, bool]:
    """Quantity, unit if known, and whether it surely is a unit: a bare letter or an unknown bare word may be none."""
    match = _UNIT.search(text) or _BARE_UNIT.search(text)
    if match is None:
        return text, None, False
    quantity = text[: match.start()].strip()
    words = match[1].replace(".", " ").lower().split()
    if not quantity or quantity.count("{") != quantity.count("}") or _NO_UNITS.intersection(words):
        return text, None, False
    powers = [match[2]] if match[2] else [_POWERS[word] for word in words if word in _POWERS]
    words = [word for word in words if word not in _POWERS]
    name = _UNITS.get(words[0]) if len(words) == 1 else None
    certain = name is not None or quantity[-1] in ")}%" or quantity[-1].isdigit()
    if match.re is _BARE_UNIT:
        certain = name is not None and len(words[0]) > 1
    return quantity, name and name + "".join(powers), certain


def compare(given: str, gold: str, algebra: Algebra = lambda given, gold: None) -> Verdict:
    r"""Whether two answers are equal, None where that cannot be told.

    Bare lists and sets are equal in any order (a list with its repetitions), tuples and intervals in theirs and with the
    same brackets; a bare list in the right order is also taken for a tuple. Members, and answers that are no lists, are
    compared by `algebra` where plain comparison does not tell.
    """
    answers = clean(given), clean(gold)
    if answers[0].plain and answers[0].plain == answers[1].plain and not _units_differ(*answers):
        return True
    left, right = (members(answer.text) for answer in answers)
    if len(left.parts) != len(right.parts):  # 100,200 may be a number or a list
        if len(left.parts) == 1:
            left = members(answers[0].text, thousands=False)
        else:
            right = members(answers[1].text, thousands=False)
    if len(left.parts) == 1 and len(right.parts) == 1:
        given, gold = left.parts[0], right.parts[0]
        return _compare_single(Answer(given, answers[0].unit), Answer(gold, answers[1].unit), algebra)
    if left.single != right.single and (left.ordered or right.ordered):
        return algebra(answers[0].text, answers[1].text)  # 0 < x < 1 and (0, 1)
    if len(left.parts) != len(right.parts) or (left.brackets != right.brackets and left.brackets and right.brackets):
        return False

    def same(at: int, wanted: str) -> Verdict:
        return compare(left.parts[at], wanted, algebra)

    if left.ordered or right.ordered:
        return _all(same(at, wanted) for at, wanted in enumerate(right.parts))
    return _matched(same, right.parts)


def _all(verdicts: Iterable[Verdict]) -> Verdict:
    unknown = False
    for verdict in verdicts:
        if verdict is False:
            return False
        unknown |= verdict is None
    return None if unknown else True


def _matched(same: Callable[[int, str], Verdict], wanted: Sequence[str]) -> Verdict:
    """Whether every wanted member has a given one of its own."""
    free = list(range(len(wanted)))
    for member in wanted:
        verdicts = []
        for at in free:
            verdicts.append(same(at, member))
            if verdicts[-1]:
                free.remove(at)
                break
        else:
            return None if None in verdicts else False
    return True


def _units_differ(given: Answer, gold: Answer) -> bool:
    """Of two units that both are known; one that a single side states, or `units`, contradicts nothing."""
    return bool(given.unit and gold.unit and given.unit != gold.unit and "unit" not in given.unit + gold.unit)


def _compare_single(given: Answer, gold: Answer, algebra: Algebra) -> Verdict:
    if _units_differ(given, gold):
        return False
    if given.plain and given.plain == gold.plain:
        return True
    label = _LABEL.fullmatch(given.plain)
    if label and not _choice(gold):
        return compare(label[2], gold.text, algebra)
    number, wanted = read_number(given.text), read_number(gold.text)
    if wanted and not number:
        named = _NAMED_NUMBER.fullmatch(given.text)
        quantity, unit, _ = _split_unit(given.text) if named else (given.text, None, False)
        number = read_number(quantity)
        if number and _units_differ(Answer(quantity, unit), gold):
            return False
    if number and wanted:
        return same_number(number, wanted)
    bases = _BASED.fullmatch(given.text), _BASED.fullmatch(gold.text)
    if any(bases):
        return bool(bases[0] and bases[1] and _digits(bases[0]) == _digits(bases[1]))
    verdict = _compare_words(given, gold)
    return algebra(given.text, gold.text) if verdict is None else verdict


def _digits(based: re.Match[str]) -> tuple[str, int]:
    return based[1].lstrip("0"), int(based[2] or based[3])


def _compare_words(given: Answer, gold: Answer) -> Verdict:
    wanted = _choice(gold)
    if wanted:
        label = _LABEL.fullmatch(given.plain)
        chosen = label[1] if label else _choice(given)
        return chosen == wanted if chosen or "(" in gold.text or gold.is_text else None
    words, wanted = _words(given), _words(gold)
    if words and wanted and words == wanted and (len(words) > 2 or words == "no"):
        return True
    return False if (wanted and gold.is_text) or (words and given.is_text) else None


def _choice(answer: Answer) -> str | None:
    match = _CHOICE.fullmatch(answer.plain)
    return match[1] or match[2] if match else None


def _words(answer: Answer) -> str | None:
    text = " ".join(answer.plain.strip('"`').split())
    return text.casefold() if _WORDS.fullmatch(text) else None


@dataclass(frozen=True)
class Members:
    """What a list, set, tuple or interval holds. `brackets` are empty for a bare list, {} for a set."""

    brackets: str
    parts: tuple[str, ...]

    @property
    def ordered(self) -> bool:
        return self.brackets not in ("", "{}")

    @property
    def single(self) -> bool:
        return not self.brackets and len(self.parts) == 1


def members(text: str, *, thousands: bool = True) -> Members:
    r"""The members of an answer; one alone if it is no list. `a \pm b` is two members.

    Args:
        thousands: 1,000 is one number, not two.
    """
    if thousands and THOUSANDS.fullmatch(text):
        return Members("", (text,))
    text = _NAMED.sub("", text, count=1) if _NAMED.match(text) else text
    brackets, inside = _brackets(text)
    parts = _split(inside)
    if brackets == "{}" and any(mark in inside for mark in (":", "|", "\\mid")):  # {x : x > 0}
        return Members("", (text,))
    if brackets not in ("", "{}"):
        return Members(brackets, parts) if len(parts) > 1 else Members("", (text,))
    parts = tuple(each for part in parts for each in _both_signs(part)) or (text,)
    return Members(brackets, tuple(dict.fromkeys(parts)) if brackets else parts)


def _brackets(text: str) -> tuple[str, str]:
    """The pair that encloses the whole text and what is inside; no pair and the text, if none does."""
    opening = re.match(r"\\\{|[(\[]", text)
    depth = 0
    for match in _BRACKET.finditer(text) if opening else ():
        depth += _step(match[0])
        if depth <= 0:
            if depth == 0 and match.end() == len(text):
                return opening[0][-1] + match[0][-1], text[opening.end() : match.start()].strip()  # type: ignore[index, union-attr]
            break
    return "", text


def _split(text: str) -> tuple[str, ...]:
    depth, start, parts = 0, 0, []
    for match in _BRACKET.finditer(text):
        depth += _step(match[0])
        if match[0] in (",", ";") and depth == 0:
            parts.append(text[start : match.start()].strip())
            start = match.end()
    parts.append(text[start:].strip())
    return tuple(part for part in parts if part)


def _step(token: str) -> int:
    return (token in ("(", "[", "{", "\\{")) - (token in (")", "]", "}", "\\}"))


def _both_signs(text: str) -> tuple[str, ...]:
    if len(_PLUS_MINUS.findall(text)) != 1 or "\\mp" in text:
        return (text,)
    return tuple(_PLUS_MINUS.sub(sign, text).strip() for sign in ("+ ", "- "))

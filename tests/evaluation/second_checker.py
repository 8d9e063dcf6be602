r"""Another way to say whether two answers are equal, sharing no code and no idea with the grader.

It reads a small LaTeX by recursive descent straight into numbers of 150 digits, with letters set to arbitrary values, so
that equal expressions are those that agree at several points. What it cannot read surely it does not judge.
"""

import itertools
import random
import re
from dataclasses import dataclass
from typing import Any

import mpmath

_TOKEN = re.compile(r"\\[a-zA-Z]+|\\.|\d+(?:\.\d+)?|\.\d+|[a-zA-Z]|\S")
_SPELLING = [
    (r"\\left\b|\\right\b|\\displaystyle|\\!\s*|\\,|\\;|\\ |\\quad|(?<!\\)\$|\\\$", ""),
    (r"\\[dt]frac", r"\\frac"),
    (r"\\(?:text|mathrm|mbox|textbf)\s*\{\s*,?\s*(?:and|or)\s*\}", ","),
    (r"\^\s*\{?\\circ\}?|°", ""),
    (r"π", r"\\pi "),
    (r"\{,\}", ","),
    (r"(?<=\d)e(-?\d+)", r"\\cdot 10^{\1}"),
]
_UNIT = re.compile(r"(.*[\d}])\s*(\\(?:text|mathrm|mbox)\s*\{\s*[a-z ]+\s*\}\s*(?:\^\{?[23]\}?)?)")
_BARE_UNIT = re.compile(r"\d\s+[a-zA-Z]+(?:\^\d)?")
_THOUSANDS = re.compile(r"-?\d{1,3}(,\d{3})+(\.\d+)?")
_WORD = re.compile(r"(?:\\(?:text|textbf|mathrm)\s*\{\s*([A-Za-z]{3,})\s*\}|([A-Za-z]{3,}))")
_NAME = re.compile(r"(?:[a-zA-Z](?:_\{?\w\}?)?|f\s*\(\s*[a-z]\s*\))\s*=(?!.*[=<>])")
_FUNCTIONS = {
    "\\sin": mpmath.sin,
    "\\cos": mpmath.cos,
    "\\tan": mpmath.tan,
    "\\cot": mpmath.cot,
    "\\ln": mpmath.log,
    "\\exp": mpmath.exp,
    "\\arcsin": mpmath.asin,
}
_CONSTANTS = {"\\pi": lambda: mpmath.pi + 0, "e": lambda: mpmath.e + 0, "i": lambda: mpmath.mpc(0, 1)}
_GREEK = {
    "\\" + name
    for name in [
        "alpha",
        "beta",
        "gamma",
        "delta",
        "lambda",
        "mu",
        "omega",
        "sigma",
        "tau",
        "theta",
        "zeta",
        "hbar",
        "rho",
    ]
}
_CLOSING = {"(": ")", "[": "]", "\\{": "\\}"}
_DIGITS = 150
_POINTS = 3


class _UnreadError(Exception):
    pass


@dataclass(frozen=True)
class _Group:
    """Several values: `kind` is list, set, matrix or the two brackets of a tuple or interval."""

    kind: str
    members: tuple[Any, ...]


def equal(given: str, gold: str) -> bool | None:
    """Whether two answers are equal, None where this checker cannot tell."""
    words = [_WORD.fullmatch(text.strip()) for text in (given, gold)]
    if all(words) and any(word[1] for word in words if word):
        first, second = ((word[1] or word[2]).casefold() for word in words if word)
        return bool(first == second)
    if (_UNIT.fullmatch(given) and _UNIT.fullmatch(gold)) or ("\\$" in given + gold and "\\text" in given + gold):
        return None
    with mpmath.workdps(_DIGITS):
        try:
            verdicts = [_judge(_Reader(given, point), _Reader(gold, point)) for point in range(_POINTS)]
        except (_UnreadError, ZeroDivisionError, ValueError, OverflowError):
            return None
    if False in verdicts:
        return False
    return None if None in verdicts else True


def _judge(given: "_Reader", gold: "_Reader") -> bool | None:
    """Two names may or may not be one, and 8,221 may be a number or a list."""
    if given.name and gold.name and given.name != gold.name:
        return None
    a, b = given.answer(), gold.answer()
    if given.thousands != gold.thousands and (isinstance(a, _Group) or isinstance(b, _Group)):
        return None
    return _same(a, b)


def _same(a: Any, b: Any) -> bool | None:
    if isinstance(a, _Group) != isinstance(b, _Group):
        return None if "list" not in {getattr(a, "kind", ""), getattr(b, "kind", "")} else False
    if not isinstance(a, _Group):
        size = max(abs(a), abs(b))
        difference = abs(a - b)
        if difference <= size * mpmath.mpf(10) ** -(_DIGITS - 30):
            return True
        return (
            False if difference > size * mpmath.mpf("1e-4") or (a == mpmath.nint(a) and b == mpmath.nint(b)) else None
        )
    kinds = {a.kind, b.kind}
    if len(kinds) == 2 and kinds != {"list", "set"}:
        return None
    if kinds <= {"list", "set"}:
        if len(a.members) != len(b.members):
            return False if kinds == {"list"} else None
        orders = itertools.permutations(b.members) if len(b.members) <= 6 else iter(())
        results = [_each(a.members, order) for order in orders]
        return None if not results else True if True in results else None if None in results else False
    return _each(a.members, b.members) if len(a.members) == len(b.members) else False


def _each(a: Any, b: Any) -> bool | None:
    results = [_same(x, y) for x, y in zip(a, b, strict=True)]
    return False if False in results else None if None in results else True


class _Reader:
    """One text at one point: the values of its letters are a function of letter and point alone."""

    def __init__(self, text: str, point: int) -> None:
        for pattern, replacement in _SPELLING:
            text = re.sub(pattern, replacement, text)
        text = text.strip().rstrip(".").strip()
        unit = _UNIT.fullmatch(text)
        if _BARE_UNIT.fullmatch(text) or (unit and re.search("illion|thousand|dozen", unit[2])):
            raise _UnreadError
        text = unit[1] if unit else text
        self.thousands = _THOUSANDS.fullmatch(text) is not None
        text = text.replace(",", "") if self.thousands else text
        name = _NAME.match(text)
        self.name = name[0].replace(" ", "") if name else ""
        text = text.split("=", 1)[1] if name else text
        if re.search(
            r"[<>=%&|;:'_]\s*$|[<>=%|;:']|\d\s*_|\d\s+\d|\.\.|\d,\d{3}(?!\d)|[a-zA-Z]{4}",
            re.sub(r"\\[a-zA-Z]+", "", text),
        ):
            raise _UnreadError
        self._tokens = _TOKEN.findall(text)
        self._at = 0
        self._point = point

    def answer(self) -> Any:
        members = [self._member()]
        while self._take(","):
            members.append(self._member())
        if self._at < len(self._tokens):
            raise _UnreadError
        return members[0] if len(members) == 1 else _Group("list", tuple(members))

    def _peek(self) -> str:
        return self._tokens[self._at] if self._at < len(self._tokens) else ""

    def _next(self) -> str:
        self._at += 1
        if self._at > len(self._tokens):
            raise _UnreadError
        return self._tokens[self._at - 1]

    def _take(self, token: str) -> bool:
        found = self._peek() == token
        self._at += found
        return found

    def _member(self) -> Any:
        if self._peek() in ("(", "[", "\\{"):
            start = self._at
            opening = self._next()
            members = [self._member()]
            while self._take(","):
                members.append(self._member())
            if len(members) > 1 or opening == "\\{":
                closing = self._next()
                if closing not in _CLOSING.values() or self._peek() not in ("", ",", ")", "\\}"):
                    raise _UnreadError
                return _Group("set" if opening == "\\{" else opening + closing, tuple(members))
            self._at = start
        if self._peek() == "\\begin":
            return self._matrix()
        return self._sum()

    def _matrix(self) -> _Group:
        begin = "".join(self._next() for _ in range(len("pmatrix") + 3))
        if begin not in ("\\begin{pmatrix}", "\\begin{bmatrix}"):
            raise _UnreadError
        cells, columns = [self._sum()], []
        while self._peek() != "\\end":
            columns.append(self._next())
            if columns[-1] not in ("&", "\\\\"):
                raise _UnreadError
            cells.append(self._sum())
        self._at = len(self._tokens)
        return _Group("matrix" + "".join(columns), tuple(cells))

    def _sum(self) -> Any:
        sign = -1 if self._take("-") else 1
        self._take("+")
        total = sign * self._product()
        while self._peek() in ("+", "-"):
            total = total + self._product() if self._next() == "+" else total - self._product()
        return total

    def _product(self) -> Any:
        value = self._power()
        while True:
            token = self._peek()
            if token in ("\\cdot", "\\times", "*"):
                self._next()
                value = value * (-self._power() if self._take("-") else self._power())
            elif token == "/":
                self._next()
                value = value / self._power()
            elif token and (
                token[0].isalnum() or token in ("(", "[", "{") or (token[0] == "\\" and token[1:].isalpha())
            ):
                if token == "\\end":
                    return value
                mixed = token == "\\frac" and self._tokens[self._at - 1].isdigit()
                if token[0].isdigit():
                    raise _UnreadError
                factor = self._power()
                value = value + factor if mixed else value * factor
            else:
                return value

    def _power(self) -> Any:
        value = self._atom()
        while self._peek() in ("^", "!"):
            if self._next() == "!":
                if value != mpmath.nint(value) or not 0 <= value < 1000:
                    raise _UnreadError
                value = mpmath.factorial(value)
            else:
                value = self._raised(value, self._argument())
        return value

    def _raised(self, base: Any, exponent: Any) -> Any:
        if abs(exponent) > 5000:
            raise _UnreadError
        return base**exponent

    def _argument(self) -> Any:
        """What follows a macro: a group, or one character."""
        if self._take("{"):
            value = self._sum()
            if not self._take("}"):
                raise _UnreadError
            return value
        token = self._next()
        if token[0].isdigit():
            if len(token) > 1:
                self._tokens[self._at - 1 : self._at] = [token[0], token[1:]]
            return mpmath.mpf(token[0])
        self._at -= 1
        return self._atom()

    def _atom(self) -> Any:
        token = self._next()
        if token[0].isdigit() or token[0] == ".":
            return mpmath.mpf(token)
        if token in ("(", "[", "{"):
            value = self._sum()
            if self._next() != {"(": ")", "[": "]", "{": "}"}[token]:
                raise _UnreadError
            return value
        if token == "\\frac":
            return self._argument() / self._argument()
        if token == "\\binom":
            return mpmath.binomial(self._argument(), self._argument())
        if token == "\\sqrt":
            degree = self._sum() if self._take("[") else 2
            if degree != 2 and not self._take("]"):
                raise _UnreadError
            return mpmath.root(self._argument(), int(degree))
        if token in _FUNCTIONS:
            return self._function(_FUNCTIONS[token])
        if token in _CONSTANTS:
            return _CONSTANTS[token]()
        if token in _GREEK or (len(token) == 1 and token.isascii() and token.isalpha()):
            return self._letter(token)
        raise _UnreadError

    def _function(self, function: Any) -> Any:
        if self._take("^"):
            raise _UnreadError
        if self._peek() in ("(", "{"):
            return function(self._atom())
        value = self._atom()
        return function(value * self._atom()) if self._peek().isalpha() else function(value)

    def _letter(self, name: str) -> Any:
        if self._take("_"):
            name += "_" + (self._next() if self._peek() != "{" else "".join(self._next() for _ in range(3))[1:2])
        if self._peek() == "(" and name in ("f", "g", "u", "x", "I"):
            raise _UnreadError
        return mpmath.mpf(random.Random(f"{name}{self._point}").randint(10**6, 10**7)) / 10**6

r"""Lists, sets, tuples and intervals, taken apart."""

import re
from dataclasses import dataclass

from poweropd.evaluation.grading.numerals import THOUSANDS

_NAMED = re.compile(
    r"(?:\([a-z](?:_\d)?(?:\s*,\s*[a-z](?:_\d)?)+\)|[a-zA-Z](?:_\d)?)\s*(?:=|\\in(?![a-z]))\s*(?=[(\[]|\\\{)"
)
_PLUS_MINUS = re.compile(r"\\pm(?![a-zA-Z])\s*")
_BRACKET = re.compile(r"\\?[{}]|[()\[\],;]|\\.")


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

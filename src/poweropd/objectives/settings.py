"""What an objective can be set to: numbers within a range, and choices."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal

Value = float | str


@dataclass(frozen=True)
class Number:
    """A number between `low` and `high`; the bounds themselves only as far as the range is `closed`."""

    default: float
    help: str
    low: float = float("-inf")
    high: float = float("inf")
    closed: Literal["", "low", "both"] = ""
    integer: bool = False
    excluded: tuple[float, ...] = ()

    @property
    def accepted(self) -> str:
        kind = "a whole number in " if self.integer else ""
        but = f" without {' and '.join(f'{value:g}' for value in self.excluded)}" if self.excluded else ""
        left, right = "[" if self.closed else "(", "]" if self.closed == "both" else ")"
        return f"{kind}{left}{self.low:g}, {self.high:g}{right}{but}"

    def problem(self, value: Any) -> str | None:
        """What is wrong with a value, or None."""
        fits = isinstance(value, int | float) and not isinstance(value, bool) and value not in self.excluded
        fits = fits and (self.low < value or (self.closed != "" and value == self.low))
        fits = fits and (value < self.high or (self.closed == "both" and value == self.high))
        fits = fits and (not self.integer or value == int(value))
        return None if fits else f"{value!r} is outside {self.accepted}; {self.help}"


@dataclass(frozen=True)
class Choice:
    """One of some words. `refused` gives the reason why a word that one might expect is not among them."""

    default: str
    help: str
    options: tuple[str, ...]
    refused: Mapping[str, str] = field(default_factory=dict)

    @property
    def accepted(self) -> str:
        return " | ".join(self.options)

    def problem(self, value: Any) -> str | None:
        """What is wrong with a value, or None."""
        if value in self.options:
            return None
        reason = self.refused.get(str(value)) or f"accepted: {', '.join(self.options)}{nearest(value, self.options)}"
        return f"{value!r} is not accepted; {reason}"


Setting = Number | Choice


def nearest(name: Any, known: Any) -> str:
    """`; did you mean 'power'?`, or nothing."""
    match = get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {match[0]!r}?" if match else ""


def fill(known: Mapping[str, Setting], given: Mapping[str, Any], owner: str) -> tuple[dict[str, Value], list[str]]:
    """Every setting with its value, the default where none is given, and what is wrong with those given."""
    problems = [
        f"objective.{key}: {owner} has no such setting{nearest(key, known) or _known(known)}"
        for key in given
        if key not in known
    ]
    values: dict[str, Value] = {}
    for key, setting in known.items():
        value = given.get(key, setting.default)
        if key in given and (problem := setting.problem(value)):
            problems.append(f"objective.{key}: {problem}")
        else:
            values[key] = float(value) if isinstance(setting, Number) else str(value)
    return values, problems


def _known(known: Mapping[str, Setting]) -> str:
    return f"; known: {', '.join(known) or 'none'}"

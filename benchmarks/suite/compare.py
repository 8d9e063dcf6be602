"""Ratios of contestants, turn by turn."""

import statistics
from typing import Any, NamedTuple

from suite.contests import OURS

Turn = dict[str, Any]


class Spread(NamedTuple):
    """The median of some numbers, the least and the most of them, and how many there are."""

    median: float
    least: float
    most: float
    turns: int

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        return cls(statistics.median(values), min(values), max(values), len(values))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.least:.2f} to {self.most:.2f})"


def turns_of(data: dict[str, Any], contest: str) -> dict[str, list[Turn]]:
    """The turns of a contest's contestants; none if it was not held."""
    return data["contests"].get(contest, {}).get("turns", {})


def cost(turn: Turn, clock: str = "cpu") -> float:
    """Seconds a token where there are tokens: sampled responses differ in length by chance."""
    return turn[clock] / turn.get("tokens", 1)


def ratio(turns: dict[str, list[Turn]], one: str, other: str, *, clock: str = "cpu") -> Spread | None:
    """Seconds of one over those of the other, of turns of the same round; None if either is not there."""
    pairs = list(zip(turns.get(one, []), turns.get(other, []), strict=False))
    return Spread.of([cost(left, clock) / cost(right, clock) for left, right in pairs]) if pairs else None


def best_of(turns: dict[str, list[Turn]], beginning: str) -> str | None:
    """The fastest of the contestants whose names begin so: by the round that all of them were in, the first."""
    members = [name for name in turns if name.startswith(beginning)]
    return min(members, key=lambda name: cost(turns[name][0]), default=None)


def median(turns: list[Turn], key: str) -> float:
    return statistics.median(turn[key] for turn in turns)


def phase(turns: list[Turn], name: str, clock: str = "cpu") -> float:
    """Median seconds of a phase."""
    return statistics.median(turn["laps"][name][clock] for turn in turns)


def beyond_gradients(turns: list[Turn]) -> float:
    """Most memory above the loaded models and what gradients take, in GiB."""
    return max(turn["peak"] - turn["gradient_bytes"] for turn in turns) / 2**30


def ours(turns: dict[str, list[Turn]]) -> list[Turn]:
    return turns.get(OURS, [])

"""Rollouts token by token: which ones the page shows, how strong each token's colour is, what is told of it."""

import math
from dataclasses import dataclass

from poweropd.report.records import Record

STEPS = 6  # of one run that the page shows; of several runs the first and the last
ROLLOUTS = 2  # of a step
OPEN = 400  # tokens of a rollout that are seen at once
MOST = 1500  # tokens of a rollout that are on the page
VISIBLE = {"\n": "↵\n", "\t": "→\t", "\r": "␍"}


@dataclass(frozen=True)
class Token:
    """One token as the page shows it.

    Attributes:
        strength: 0 to 1, how far the reward is from 0 on the scale of all rollouts shown.
        values: reward, log-probability under student and under teacher, with spaces between; `-` where not known.
    """

    text: str
    sign: str
    strength: float
    values: str


@dataclass(frozen=True)
class Rollout:
    id: str
    prompt: str
    finish_reason: str
    tokens: list[Token]
    length: int

    @property
    def open(self) -> list[Token]:
        return self.tokens[:OPEN]

    @property
    def folded(self) -> list[Token]:
        return self.tokens[OPEN:]

    @property
    def left_out(self) -> int:
        return self.length - len(self.tokens)


@dataclass(frozen=True)
class Step:
    number: int
    rollouts: list[Rollout]


def chosen(records: list[Record], most_steps: int = STEPS) -> list[tuple[int, list[Record]]]:
    """The first rollouts of a few steps, evenly spread from the earliest to the latest."""
    steps = sorted({record["step"] for record in records})
    if len(steps) > most_steps:
        steps = [steps[round(i * (len(steps) - 1) / (most_steps - 1))] for i in range(most_steps)]
    return [(step, [record for record in records if record["step"] == step][:ROLLOUTS]) for step in steps]


def full_scale(records: list[Record]) -> float:
    """The reward that has full colour: of 100 rewards that are not 0, 95 are nearer to 0. 0 if there are none."""
    sizes = sorted(
        abs(weight) for record in records for weight in record.get("weights") or [] if weight and math.isfinite(weight)
    )
    return sizes[min(int(0.95 * len(sizes)), len(sizes) - 1)] if sizes else 0.0


def rollout(record: Record, scale: float) -> Rollout:
    texts = record["tokens"]
    weights, student, teacher = (
        _filled(record.get(key) or [], len(texts)) for key in ("weights", "student_logprobs", "teacher_logprobs")
    )
    shown = [_token(*values, scale) for values in zip(texts[:MOST], weights, student, teacher, strict=False)]
    return Rollout(str(record["id"]), record["prompt"], record["finish_reason"], shown, len(texts))


def _filled(values: list[float | None], count: int) -> list[float | None]:
    """Tokens that were not trained on have no values."""
    return [*values, *[None] * (count - len(values))]


def _token(text: str, weight: float | None, student: float | None, teacher: float | None, scale: float) -> Token:
    strength = min(abs(weight) / scale, 1.0) if weight is not None and math.isfinite(weight) and scale else 0.0
    sign = "" if not strength or weight is None else "up" if weight > 0 else "down"
    values = " ".join("-" if value is None else f"{value:.4g}" for value in (weight, student, teacher))
    return Token(visible(text), sign, round(strength, 2), values)


def visible(text: str) -> str:
    """The token with its line ends, and other marks that leave no trace, made visible."""
    if not text:
        return "∅"
    if text.isspace() and "\n" not in text:
        text = text.replace(" ", "␣")
    return "".join(
        VISIBLE.get(letter) or (chr(0x2400 + ord(letter)) if ord(letter) < 32 else letter) for letter in text
    )

"""The least that a step can take: FLOP counted from shapes over the best measured rate, bytes over that of memory."""

from dataclasses import dataclass
from typing import Any

from suite.shapes import SHAPES, Shape, Size

BYTES = 4  # of an fp32 number


@dataclass(frozen=True)
class Rates:
    """The best of this machine, a second of one processor: FLOP in either precision, and bytes."""

    fp32: float
    bf16: float
    memory: float


@dataclass(frozen=True)
class Work:
    """What a phase cannot do without."""

    flop: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flop + other.flop, self.bytes + other.bytes)

    def __mul__(self, times: float) -> "Work":
        return Work(self.flop * times, self.bytes * times)

    def seconds(self, rates: Rates) -> float:
        """Of processor time, in fp32, with arithmetic and memory traffic at the same time."""
        return max(self.flop / rates.fp32, self.bytes / rates.memory)


def rates_of(data: dict[str, Any]) -> Rates | None:
    """The best of all shapes and rounds that were measured; None if none were."""
    turns = data["contests"].get("rates", {}).get("turns", {}).get("machine", [])
    if not turns:
        return None

    def best(dtype: str) -> float:
        return max(rate["cpu"] for turn in turns for name, rate in turn["products"].items() if name.endswith(dtype))

    return Rates(best("float32"), best("bfloat16"), max(turn["memory"]["cpu"] for turn in turns))


def body(size: Size, rows: int, length: int, before: int = 0) -> Work:
    """A forward pass of `rows` sequences of `length` tokens behind `before` others: linear maps and causal attention."""
    tokens = rows * length
    attended = rows * (length * before + length * (length + 1) / 2)
    return Work(2.0 * size.body_parameters * tokens + 4.0 * size.hidden * attended * size.layers)


def head(size: Size, vocabulary: int, tokens: int) -> Work:
    return Work(2.0 * vocabulary * size.hidden * tokens)


def teacher_scoring(shape: Shape, rows: int, prompt: int, response: int, *, full: bool) -> Work:
    """A full-vocabulary objective takes the teacher's hidden states here, and its logits in the update."""
    work = body(shape.teacher, rows, prompt + response)
    return work if full else work + head(shape.teacher, shape.vocabulary, rows * response)


def update(shape: Shape, rows: int, prompt: int, response: int, *, full: bool) -> Work:
    """Forward and backward of the student: three products a map."""
    student = body(shape.student, rows, prompt + response) + head(shape.student, shape.vocabulary, rows * response)
    work = student * 3
    return work + head(shape.teacher, shape.vocabulary, rows * response) if full else work


def whole_step_statistics(shape: Shape, rows: int, prompt: int, response: int) -> Work:
    """What an objective adds that needs every reward of the step before the first gradient."""
    return body(shape.student, rows, prompt + response) + head(shape.student, shape.vocabulary, rows * response)


def rollout(shape: Shape, rows: int, prompt: int, response: int) -> Work:
    """Prompts at once, then token by token: each reads every weight, and the keys and values so far."""
    size = shape.student
    cached = (
        2 * size.layers * size.heads // 2 * size.head_dim * BYTES
    )  # of a token, half as many heads of keys and values
    read = shape.parameters("student") * BYTES * response + rows * cached * sum(range(prompt, prompt + response))
    arithmetic = body(size, rows, prompt + response) + head(size, shape.vocabulary, rows * response)
    return arithmetic + Work(bytes=read)


def optimizer(shape: Shape) -> Work:
    """AdamW reads weight, gradient and two moments and writes three of them; clipping reads and writes the gradient."""
    return Work(bytes=9.0 * BYTES * shape.parameters("student"))


def of_step(shape: str, rows: int, prompt: int, response: int, *, full: bool) -> dict[str, Work]:
    """The phases of a whole step, as `suite.ours` names them."""
    pair = SHAPES[shape]
    return {
        "rollout": rollout(pair, rows, prompt, response),
        "teacher": teacher_scoring(pair, rows, prompt, response, full=full),
        "update": update(pair, rows, prompt, response, full=full),
        "optimizer": optimizer(pair),
    }

"""Responses under way, side by side."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from poweropd.rollout.engine import Sampling
from poweropd.rollout.sampling import draw, uniforms
from poweropd.types import Prompt


class Request(NamedTuple):
    """A response to be drawn; `place` is where it belongs in the results."""

    place: int
    prompt: Prompt
    sample: int


class Answer(NamedTuple):
    """A response that has ended."""

    request: Request
    ids: list[int]
    logprobs: list[float]


class Move(NamedTuple):
    """Which rows stay: the first `rows`, with rows `sources` from behind them in the places of `gaps` among them."""

    rows: int
    gaps: Tensor
    sources: Tensor

    @classmethod
    def without(cls, leaving: Tensor) -> "Move":
        """The move after which rows where `leaving` [rows] is true are gone, and as many as can be stand where they did."""
        staying = (~leaving).nonzero()[:, 0]
        gaps = leaving[: len(staying)].nonzero()[:, 0]
        return cls(len(staying), gaps, staying[len(staying) - len(gaps) :])


class Batch:
    """Rows of responses under way, on the models' device; the first `len(self)` are in use.

    Args:
        rows: most rows in use.
        seed: of their uniform numbers.
    """

    def __init__(self, rows: int, sampling: Sampling, seed: int, device: torch.device) -> None:
        shape = (rows, sampling.max_new_tokens)
        self._sampling = sampling
        self._seed = seed
        self._requests: list[Request] = []
        self._stop_ids = torch.tensor(sampling.stop_ids, dtype=torch.long, device=device)
        self._noise = torch.zeros(shape, dtype=torch.float64, device=device)
        self._ids = torch.zeros(shape, dtype=torch.long, device=device)
        self._logprobs = torch.zeros(shape, dtype=torch.float32, device=device)
        self._lengths = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self._last = torch.zeros(rows, dtype=torch.long, device=device)

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def last_ids(self) -> Tensor:
        """[rows] the token drawn last in each."""
        return self._last[: len(self)]

    def add(self, requests: Sequence[Request]) -> None:
        """Rows behind those there are."""
        count = self._sampling.max_new_tokens
        noise = [uniforms(each.prompt, each.sample, seed=self._seed, count=count) for each in requests]
        new = slice(len(self), len(self) + len(requests))
        self._noise[new] = torch.stack(noise).to(self._noise.device)
        self._lengths[new] = 0
        self._requests += requests

    @torch.inference_mode()
    def draw(self, logits: Tensor) -> None:
        """Draw the next token of the last `len(logits)` rows from logits [rows, V]."""
        rows = slice(len(self) - len(logits), len(self))
        places = self._lengths[rows]
        ids, logprobs = draw(logits, self._noise[rows].gather(1, places)[:, 0], self._sampling)
        self._ids[rows].scatter_(1, places, ids[:, None])
        self._logprobs[rows].scatter_(1, places, logprobs[:, None])
        self._last[rows] = ids
        places += 1

    def take_ended(self) -> tuple[list[Answer], Move | None]:
        """The responses that have ended, without which the others go on; how rows have moved, if any has ended."""
        lengths = self._lengths[: len(self), 0]
        ended = (self.last_ids[:, None] == self._stop_ids).any(1) | (lengths == self._sampling.max_new_tokens)
        if not ended.any():
            return [], None
        rows = ended.nonzero()[:, 0]
        width = int(lengths[rows].max())
        columns = zip(
            [self._requests[row] for row in rows.tolist()],
            lengths[rows].tolist(),
            self._ids[rows, :width].tolist(),
            self._logprobs[rows, :width].tolist(),
            strict=True,
        )
        answers = [Answer(request, ids[:length], values[:length]) for request, length, ids, values in columns]
        move = Move.without(ended)
        for each in (self._noise, self._ids, self._logprobs, self._lengths, self._last):
            each[move.gaps] = each[move.sources]
        for gap, source in zip(move.gaps.tolist(), move.sources.tolist(), strict=True):
            self._requests[gap] = self._requests[source]
        del self._requests[move.rows :]
        return answers, move

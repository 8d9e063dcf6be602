"""The protocol of every rollout backend."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from poweropd.types import Prompt, Rollout


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn. Truncations apply in this order: temperature, top_k, top_p, min_p.

    Attributes:
        temperature: 0 is greedy.
        top_k: keep this many tokens; 0 keeps all.
        top_p: keep the likeliest tokens that hold this much probability.
        min_p: drop tokens less likely than this share of the likeliest.
        max_new_tokens: response tokens at most.
        samples_per_prompt: responses to each prompt.
        stop_ids: tokens that end a response and are part of it.
    """

    stop_ids: tuple[int, ...]
    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    samples_per_prompt: int = 1

    @property
    def is_plain(self) -> bool:
        """Whether tokens are drawn from the whole softmax at temperature 1."""
        return self.temperature == 1 and not self.top_k and self.top_p >= 1 and self.min_p <= 0


class RolloutEngine(Protocol):
    """Gives responses to train on: drawn from the current student, from its teacher, or taken from the data."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, *, seed: int) -> list[Rollout]:
        """Responses to every prompt, the samples of one prompt together, in the order of the prompts.

        The same prompts, sampling, seed and weights give the same rollouts; a sample does not depend on what else is
        in the call, up to rounding. `rollout_logprobs` are those of the distribution sampled from; NaN where an engine
        cannot tell.
        """
        ...

    def update_weights(self, *, version: int) -> None:
        """Sample from the student's weights as they are now, after `version` optimizer steps."""
        ...


class Sampler(RolloutEngine, Protocol):
    """An engine that draws from models."""

    def fingerprint(self) -> str:
        """A hash of all that decides its draws beside what `generate` is told: above all, every weight."""
        ...

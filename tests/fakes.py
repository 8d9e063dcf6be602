"""In-memory engine and teacher: they keep the protocols' promises without a model."""

from collections.abc import Sequence

import torch

from poweropd.objectives import Needs
from poweropd.objectives.fused import LMHead
from poweropd.rollout.engine import Sampling
from poweropd.types import Prompt, Rollout, TeacherScores


class FakeEngine:
    """Answers every prompt with its own tokens reversed and an end token."""

    def __init__(self) -> None:
        self.version = 0

    def update_weights(self, *, version: int) -> None:
        self.version = version

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, *, seed: int) -> list[Rollout]:
        return [
            self._rollout(prompt, sampling, sample)
            for prompt in prompts
            for sample in range(sampling.samples_per_prompt)
        ]

    def _rollout(self, prompt: Prompt, sampling: Sampling, sample: int) -> Rollout:
        whole = (*reversed(prompt.prompt_ids), sampling.stop_ids[0])
        ids = whole[: sampling.max_new_tokens]
        reason = "stop" if len(ids) == len(whole) else "length"
        return Rollout(prompt, ids, (-0.5,) * len(ids), reason, sample, self.version)


class FakeTeacher:
    """Gives token t the log-probability -t/1000, and hidden states that are the token id."""

    provides: frozenset[Needs] = frozenset({"nothing", "sampled", "full"})
    head: LMHead | None = LMHead(torch.ones(512, 1), vocab_size=512)

    def score(self, rollouts: Sequence[Rollout], *, needs: Needs) -> list[TeacherScores]:
        ids = [torch.tensor(rollout.response_ids, dtype=torch.float32) for rollout in rollouts]
        if needs == "nothing":
            return [TeacherScores() for _ in rollouts]
        if needs == "full":
            return [TeacherScores(hidden=row[:, None]) for row in ids]
        return [TeacherScores(logprobs=-row / 1000, entropies=torch.ones_like(row)) for row in ids]

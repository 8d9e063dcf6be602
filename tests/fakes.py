"""In-memory engine and teacher: they keep the protocols' promises without a model."""

from collections.abc import Sequence

import torch

from poweropd.objectives import Needs
from poweropd.objectives.lm_head import Distribution, LMHead
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

    provides: frozenset[Needs] = frozenset({"nothing", "sampled", "top_k", "full"})
    head = LMHead(torch.ones(512, 1), vocab_size=512)

    def score(self, rollouts: Sequence[Rollout], *, needs: Needs, k: int = 0) -> list[TeacherScores]:
        return [self._scores(torch.tensor(rollout.response_ids), needs, k) for rollout in rollouts]

    def _scores(self, ids: torch.Tensor, needs: Needs, k: int) -> TeacherScores:
        if needs == "nothing":
            return TeacherScores()
        if needs == "full":
            return TeacherScores(distribution=Distribution((ids[:, None].float(),), (self.head,)))
        logprobs, entropies = -ids / 1000, torch.ones(len(ids))
        if needs == "sampled":
            return TeacherScores(logprobs, entropies)
        return TeacherScores(logprobs, entropies, torch.arange(k).expand(len(ids), k), torch.zeros(len(ids), k))

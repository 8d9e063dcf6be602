"""The data's golden answers in the place of rollouts: supervised training through the same loop."""

from collections.abc import Sequence

from poweropd.errors import ConfigError
from poweropd.rollout.engine import Sampling
from poweropd.types import FinishReason, Prompt, Rollout


class GoldenEngine:
    """Gives each prompt's golden answer, cut at `max_new_tokens`. Nothing is sampled: the log-probabilities are 0."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, *, seed: int) -> list[Rollout]:
        return [self._rollout(prompt, sampling.max_new_tokens) for prompt in prompts]

    def update_weights(self, *, version: int) -> None:
        """Golden answers do not depend on the weights."""

    def _rollout(self, prompt: Prompt, limit: int) -> Rollout:
        if prompt.golden_ids is None:
            raise ConfigError(f"prompt {prompt.id} has no golden answer; set data.golden to the column that holds it")
        ids = prompt.golden_ids[:limit]
        reason: FinishReason = "stop" if len(ids) == len(prompt.golden_ids) else "length"
        return Rollout(prompt, ids, (0.0,) * len(ids), reason, source="golden")

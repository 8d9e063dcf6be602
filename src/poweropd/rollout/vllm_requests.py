"""What is asked of vLLM for one sample, and what its answer says: the same in this process and over HTTP."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from poweropd.errors import ConfigError, RolloutError
from poweropd.rollout.engine import Sampling
from poweropd.rollout.sampling import draw_key
from poweropd.teacher.vllm_http import MOST_NAMED_IDS
from poweropd.types import FinishReason, Prompt, Rollout

NEVER = -1e30  # added to a logit, it leaves no probability
MOST_BIASED_IDS = 1024  # that vLLM's GPU sampler takes of a request
TEMPERATURES = (0.01, 2.0)  # beside 0; vLLM raises lower ones and refuses higher ones
SEEDS = 2**63


def check_sampling(sampling: Sampling, key: str) -> None:
    """Raises ConfigError for what vLLM would sample otherwise than it says.

    vLLM truncates by min_p, then top_k, then top_p, each from what the one before has left. Without min_p that is our
    order; min_p and top_k commute; min_p before top_p is another distribution than top_p before min_p.
    """
    lowest, highest = TEMPERATURES
    if sampling.temperature and not lowest <= sampling.temperature <= highest:
        raise ConfigError(
            f"{key}.temperature {sampling.temperature:g}: vLLM samples at 0, or from {lowest:g} to {highest:g}; choose "
            "another, or set rollout.engine: hf"
        )
    if sampling.min_p > 0 and sampling.top_p < 1:
        raise ConfigError(
            f"{key}: vLLM applies min_p ({sampling.min_p:g}) before top_p ({sampling.top_p:g}), which is another distribution "
            "than ours; set one of them alone, or rollout.engine: hf"
        )


@dataclass(frozen=True)
class Requests:
    """How one student is sampled from.

    Attributes:
        vocab_size: ids at or above it are padding and get no probability.
        head_rows: of the student's LM head, padding included.
        end_ids: end tokens that count as one outcome: any is drawn, and told as the first, with the probability of all.
    """

    vocab_size: int
    head_rows: int
    end_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if (padding := self.head_rows - self.vocab_size) > MOST_BIASED_IDS:
            raise ConfigError(
                f"the student's LM head has {padding} rows beyond the {self.vocab_size} tokens shared with the teacher, and "
                f"vLLM can leave out {MOST_BIASED_IDS}; set rollout.engine: hf"
            )
        if len(self.end_ids) > MOST_NAMED_IDS:
            raise ConfigError(
                f"the models have {len(self.end_ids)} end tokens, and vLLM tells {MOST_NAMED_IDS} log-probabilities; set "
                "objective.end_token: keep, or rollout.engine: hf"
            )

    def parameters(self, prompt: Prompt, sample: int, sampling: Sampling, *, seed: int) -> dict[str, Any]:
        """Of vLLM's `SamplingParams`. Its server, or `LLM`, must have the logprobs mode `processed_logprobs`."""
        parameters: dict[str, Any] = {
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "seed": draw_key(prompt, sample, seed=seed) % SEEDS,
            "max_tokens": sampling.max_new_tokens,
            "stop_token_ids": list(sampling.stop_ids),
            "ignore_eos": True,  # the model's own end tokens are no others than stop_ids
            "logprobs": len(self.end_ids),
            "detokenize": False,
        }
        if self.end_ids:
            parameters["logprob_token_ids"] = list(self.end_ids)
        if self.vocab_size < self.head_rows:
            parameters["logit_bias"] = dict.fromkeys(range(self.vocab_size, self.head_rows), NEVER)
        return parameters

    def rollout(
        self,
        prompt: Prompt,
        sample: int,
        sampling: Sampling,
        ids: Sequence[int],
        logprobs: Sequence[Mapping[int, float]],
        version: int,
    ) -> Rollout:
        """The rollout that an answer is.

        Args:
            ids: as drawn.
            logprobs: for each, those that were asked for by id; its own is among them.

        Raises:
            RolloutError: the answer was broken off, or is none to what was asked.
        """
        stopped = bool(ids) and ids[-1] in sampling.stop_ids
        whole = stopped or len(ids) == sampling.max_new_tokens
        if not whole or len(logprobs) != len(ids) or max(ids) >= self.vocab_size:
            raise RolloutError(
                f"vLLM answered prompt {prompt.id} with {len(ids)} tokens and {len(logprobs)} log-probabilities, neither to an "
                f"end token nor to the budget of {sampling.max_new_tokens}, or with padding; look after its log"
            )
        reason: FinishReason = "stop" if stopped else "length"
        last = self.end_ids[0] if ids[-1] in self.end_ids else ids[-1]
        told = [self._logprob(id, found) for id, found in zip(ids, logprobs, strict=True)]
        if sampling.temperature == 0:
            told = [0.0] * len(ids)
        return Rollout(prompt, (*ids[:-1], last), tuple(told), reason, sample, version)

    def _logprob(self, id: int, found: Mapping[int, float]) -> float:
        if id not in self.end_ids:
            return min(found[id], 0.0)
        return min(math.log(sum(math.exp(found[end]) for end in self.end_ids)), 0.0)

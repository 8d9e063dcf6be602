"""What flows through the program: Prompt -> Rollout -> ScoredRollout -> TokenBatch -> UpdateResult.

Three rules, enforced where the data is built (`batching.collate`):

1. Alignment. Index n of every per-token tensor speaks of `target_ids[n]`, which `loss_positions[n]` predicts.
2. Normalisation. A loss is a sum over loss tokens, divided once by their count over the whole optimizer step.
3. Log-probabilities. `rollout_logprobs` are those of the distribution that was sampled from (after temperature, top-k,
   top-p, min-p); `student_logprobs` and `teacher_logprobs` are full-softmax, at temperature 1, fp32.
"""

from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor

from poweropd.objectives.lm_head import Distribution
from poweropd.objectives.positions import TokenInputs

FinishReason = Literal["stop", "length"]
Source = Literal["student", "teacher", "golden", "mixture"]
"""Who wrote a response: a model by sampling, the data (`golden`), or both models token by token (`mixture`)."""


@dataclass(frozen=True)
class Prompt:
    """A tokenised prompt with what is known of its answer.

    Example: `Prompt("gsm8k-7", (151644, 872, ...), text="Natalia sold ...", answer="72")`.

    Attributes:
        id: unique within its data set.
        prompt_ids: the chat-templated prompt.
        text: the user's question, for people to read.
        answer: reference answer, for grading.
        golden_ids: a whole golden response with its end token, where the data has worked answers.
        teacher: the name of the one that judges the answers, where each data set has its own.
    """

    id: str
    prompt_ids: tuple[int, ...]
    text: str = ""
    answer: str | None = None
    golden_ids: tuple[int, ...] | None = None
    teacher: str | None = None


@dataclass(frozen=True)
class Rollout:
    """One response to a prompt.

    Example: `Rollout(prompt, response_ids=(15, 22, 0), rollout_logprobs=(-0.1, -2.3, -0.4), finish_reason="stop")`:
    the last response token is the end token, and each has its log-probability under the distribution sampled from.

    Attributes:
        sample: which of the prompt's samples this is.
        policy_version: optimizer steps taken by the weights that sampled it.
        source: who wrote it. The `rollout_logprobs` are those of the distribution sampled from, whoever's it is; of a
            golden answer they are 0, because nothing was sampled, and NaN where the engine cannot tell.
    """

    prompt: Prompt
    response_ids: tuple[int, ...]
    rollout_logprobs: tuple[float, ...]
    finish_reason: FinishReason
    sample: int = 0
    policy_version: int = 0
    source: Source = "student"

    def __len__(self) -> int:
        """Response tokens."""
        return len(self.response_ids)


@dataclass(frozen=True)
class TeacherScores:
    """What a teacher (or the reference) says of one rollout's T response tokens: as much as was asked for.

    Attributes:
        logprobs: [T] log p of each response token.
        entropies: [T] of its distribution at each, in nats.
        top_ids, top_logprobs: [T, k], its likeliest tokens at each and log p of them, descending.
        distribution: its whole distribution at each.
        top1_ids: [T], its likeliest token at each; None where it cannot tell.
    """

    logprobs: Tensor | None = None
    entropies: Tensor | None = None
    top_ids: Tensor | None = None
    top_logprobs: Tensor | None = None
    distribution: Distribution | None = None
    top1_ids: Tensor | None = None


@dataclass(frozen=True)
class ScoredRollout:
    """A rollout with the scores of its teacher and, where an objective asks for it, of the frozen initial student."""

    rollout: Rollout
    scores: TeacherScores = field(default_factory=TeacherScores)
    reference: TeacherScores = field(default_factory=TeacherScores)


@dataclass(frozen=True)
class TokenBatch:
    """Rollouts as tensors, end to end: S tokens that are fed to a model, N loss tokens.

    Example: prompt (1, 2), response (3, 0), then prompt (4), response (5)::

        input_ids          1 2 3 4    the last token of a row predicts nothing and is not fed
        lengths            3, 1
        loss_positions     1 2 3      where the loss tokens are predicted
        inputs.target_ids  3 0 5      the loss tokens
        rows, places       0 0 1, 0 1 0

    Attributes:
        input_ids: [S].
        lengths: of the rows; they sum to S.
        loss_positions: [N], among the S.
        inputs: what is known of the loss tokens.
        rows: [N], the row of each loss token.
        places: [N], its place in the response, from 0.
        ends: [N] bool, whether a response stopped with it.
        own_logprobs: [N], the sampler's log-probability of it, where that was the student as it is now and told; else NaN.
    """

    input_ids: Tensor
    lengths: tuple[int, ...]
    loss_positions: Tensor
    inputs: TokenInputs
    rows: Tensor
    places: Tensor
    ends: Tensor
    own_logprobs: Tensor

    @property
    def num_loss_tokens(self) -> int:
        return len(self.inputs)

    def to(self, device: torch.device | str) -> Self:
        moved: dict[str, Any] = {
            f.name: value.to(device) for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, inputs=self.inputs.to(device), **moved)


@dataclass(frozen=True)
class UpdateResult:
    """One optimizer step: `grad_norm` is the global norm before clipping, `lr` the learning rate used."""

    grad_norm: float
    lr: float

"""When a run must stop, or say loudly that something is wrong."""

from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedTokenizerBase

from poweropd.errors import NonFiniteError
from poweropd.types import Rollout
from poweropd.update import GradientResult

MISMATCH_ALARM = 0.05  # nats; rounding between sampler and trainer is far below, another model or template far above


def refuse_non_finite(
    result: GradientResult, grad_norm: float, rollouts: Sequence[Rollout], tokenizer: PreTrainedTokenizerBase, step: int
) -> None:
    """Stop before an update that would spoil the weights.

    Raises:
        NonFiniteError: the loss or its gradient is not finite; names step, prompt, token and reward of the first cause.
    """
    if torch.isfinite(torch.tensor([result.loss, grad_norm])).all():
        return
    for rollout, terms in zip(rollouts, result.terms, strict=True):
        bad = ~(torch.isfinite(terms.logprobs) & torch.isfinite(terms.weights))
        if bad.any():
            at = int(bad.nonzero()[0])
            token = tokenizer.decode([rollout.response_ids[at]])
            raise NonFiniteError(
                f"step {step}: not finite at token {at} ({token!r}) of the response to prompt {rollout.prompt.id}: reward "
                f"{terms.weights[at]:g}, log-probability {terms.logprobs[at]:g} (student), "
                f"{terms.teacher_logprobs[at]:g} (teacher). No update was made, try a lower learning rate"
            )
    raise NonFiniteError(
        f"step {step}: loss {result.loss:g}, gradient norm {grad_norm:g}, though every reward is finite: the backward "
        "pass overflowed. No update was made, try a lower learning rate or precision float32"
    )


def mismatch_warning(metrics: Mapping[str, float]) -> str | None:
    """A warning when the trainer's log-probabilities are not those the rollouts were drawn with."""
    mismatch = metrics.get("rollout/mismatch", 0.0)
    if mismatch <= MISMATCH_ALARM:
        return None
    return (
        f"rollout/mismatch is {mismatch:.3g} nats a token: the sampler and the trainer disagree about the student. "
        "Check precision, and that the weights were synchronised"
    )

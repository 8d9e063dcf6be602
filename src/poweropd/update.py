"""One gradient from scored rollouts: micro-batches, one student forward each, one denominator for all."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from poweropd.batching import collate, group_by_tokens
from poweropd.objectives import Objective
from poweropd.objectives.loss import loss_of, unshaped_terms
from poweropd.objectives.objective import Shaped
from poweropd.objectives.shaping import StepTokens
from poweropd.objectives.sweeps import LossTerms
from poweropd.policy import Student
from poweropd.types import ScoredRollout, TokenBatch


@dataclass(frozen=True)
class RolloutTerms:
    """What the loss saw of one rollout's trained tokens, [T] each, on the CPU.

    Attributes:
        places: where they stand in the response.
        logprobs, entropies: the student's.
        teacher_logprobs: the teacher's of the same tokens; NaN where no teacher was asked.
        advantages: what scales -log q of the token; 0 where the objective is exact.
        divergences: exact ones of the position; 0 where the objective is sampled.
        reference_kl: KL(student || initial student), exact or log q - log reference; 0 where it is not asked for.
        teacher_entropies, top1_agreement: see `LossTerms`.
    """

    places: Tensor
    logprobs: Tensor
    entropies: Tensor
    teacher_logprobs: Tensor
    advantages: Tensor
    divergences: Tensor
    reference_kl: Tensor
    teacher_entropies: Tensor
    top1_agreement: Tensor


@dataclass(frozen=True, order=True)
class NonFiniteToken:
    """A token whose signal (advantage or divergence) or whose log-probability by the student is not finite."""

    rollout: int
    place: int
    signal: float
    logprob: float
    teacher_logprob: float


@dataclass(frozen=True)
class GradientResult:
    """The gradient itself lies in the student's parameters.

    Attributes:
        terms: of the first rollouts, as many as were to be kept, in the order given.
        non_finite: the first token in that order that spoilt the loss, if one did.
    """

    loss: float
    num_loss_tokens: int
    terms: list[RolloutTerms]
    non_finite: NonFiniteToken | None = None


@dataclass(frozen=True)
class MicroBatches:
    """How rollouts become tensors.

    Attributes:
        tokens: padded tokens of one forward and backward pass.
        pad_id: see `collate`.
        masked_end_ids: end tokens that are not trained on.
        masked_ids: tokens that are never trained on.
        importance_cap: largest importance weight of off-policy tokens; None: they are not weighted.
    """

    tokens: int
    pad_id: int
    masked_end_ids: Sequence[int] = ()
    masked_ids: Sequence[int] = ()
    importance_cap: float | None = None


Watch = Callable[[TokenBatch, LossTerms], None]
"""Sees each micro-batch once, with what the loss saw of its tokens, on the student's device."""


def accumulate_gradient(
    student: Student,
    scored: Sequence[ScoredRollout],
    objective: Objective,
    how: MicroBatches,
    *,
    weight: float = 1.0,
    watch: Watch | None = None,
    keep: int | None = None,
) -> GradientResult:
    """Add `weight` times the gradient of the objective over all rollouts to the student's parameters.

    The result does not depend on how the rollouts fall into micro-batches. An objective that needs the whole step costs
    one more student forward, without gradient.

    Args:
        watch: is shown every micro-batch.
        keep: of how many rollouts the terms are kept, from the first; None: of all.
    """
    groups = list(_groups(scored, how.tokens))
    batches = [_batch([scored[index] for index in group], student, how) for group in groups]
    num_loss_tokens = sum(batch.num_loss_tokens for batch in batches)
    shaped = _shape(student, batches, groups, scored, objective)
    loss = 0.0
    terms: dict[int, RolloutTerms] = {}
    culprits: list[NonFiniteToken] = []
    for group, batch, shape in zip(groups, batches, shaped, strict=True):
        found = loss_of(
            objective,
            student.hidden_at_loss(batch),
            student.head,
            batch.inputs,
            denominator=max(num_loss_tokens, 1) / weight,
            shaped=shape,
            importance_cap=how.importance_cap or torch.inf,
        )
        found.loss.backward()
        found_loss = found.loss.item()
        loss += found_loss
        if not math.isfinite(found_loss):
            culprits = sorted(culprits + _first_non_finite(group, batch, found))[:1]
        if watch is not None:
            watch(batch, found)
        for row, index in enumerate(group):
            if keep is None or index < keep:
                terms[index] = RolloutTerms(*(column[batch.rows == row].cpu() for column in (batch.places, *found[1:])))
    return GradientResult(loss, num_loss_tokens, [terms[index] for index in sorted(terms)], next(iter(culprits), None))


def _first_non_finite(group: Sequence[int], batch: TokenBatch, terms: LossTerms) -> list[NonFiniteToken]:
    """The first such token of a micro-batch; nothing if every one is finite."""
    signal = terms.advantages + terms.divergences
    bad = (~(terms.logprobs.isfinite() & signal.isfinite())).nonzero()[:, 0].tolist()
    if not bad:
        return []
    rollout, place, at = min((group[int(batch.rows[at])], int(batch.places[at]), at) for at in bad)
    numbers = (column[at].item() for column in (signal, terms.logprobs, terms.teacher_logprobs))
    return [NonFiniteToken(rollout, place, *numbers)]


def _groups(scored: Sequence[ScoredRollout], tokens: int) -> Iterator[list[int]]:
    """Rollouts of one micro-batch: of similar length, and judged by the same teacher."""
    by_teacher: dict[tuple[int, ...], list[int]] = {}
    for index, item in enumerate(scored):
        distribution = item.scores.distribution
        heads = () if distribution is None else tuple(id(head) for head in distribution.heads)
        by_teacher.setdefault(heads, []).append(index)
    for members in by_teacher.values():
        for group in group_by_tokens([scored[index].rollout for index in members], tokens):
            yield [members[place] for place in group]


def _batch(scored: Sequence[ScoredRollout], student: Student, how: MicroBatches) -> TokenBatch:
    batch = collate(scored, pad_id=how.pad_id, masked_end_ids=how.masked_end_ids, masked_ids=how.masked_ids)
    batch = batch.to(student.device)
    rollout_logprobs = batch.inputs.rollout_logprobs
    if how.importance_cap is None or rollout_logprobs is None or rollout_logprobs.isnan().all():
        return replace(batch, inputs=replace(batch.inputs, rollout_logprobs=None))
    # The sampler knows no merged end token: its probability and the trainer's are not of one event.
    merged = torch.tensor(student.head.end_ids, dtype=torch.long, device=student.device)
    rollout_logprobs = rollout_logprobs.masked_fill(torch.isin(batch.inputs.target_ids, merged), torch.nan)
    return replace(batch, inputs=replace(batch.inputs, rollout_logprobs=rollout_logprobs))


@torch.no_grad()
def _shape(
    student: Student,
    batches: Sequence[TokenBatch],
    groups: Sequence[list[int]],
    scored: Sequence[ScoredRollout],
    objective: Objective,
) -> list[Shaped] | list[None]:
    """What whole-step shaping makes of each micro-batch, before any update; nothing where it is not needed."""
    if not objective.needs_whole_step:
        return [None] * len(batches)
    prompts: dict[str, int] = {}
    of_prompt = torch.tensor([prompts.setdefault(item.rollout.prompt.id, len(prompts)) for item in scored])
    parts = []
    for group, batch in zip(groups, batches, strict=True):
        found = unshaped_terms(objective, student.hidden_at_loss(batch), student.head, batch.inputs)
        rollouts = torch.tensor(group)[batch.rows.cpu()]
        parts.append(
            StepTokens(
                logprobs=found.logprobs,
                entropies=found.entropies,
                teacher_logprobs=found.teacher_logprobs,
                rewards=found.advantages,
                divergences=found.divergences,
                reference_kl=found.reference_kl,
                rollouts=rollouts.to(student.device),
                prompts=of_prompt[rollouts].to(student.device),
            )
        )
    whole = objective.shape(StepTokens.cat(parts))
    lengths = [batch.num_loss_tokens for batch in batches]
    return [Shaped(*part) for part in zip(whole.advantages.split(lengths), whole.weights.split(lengths), strict=True)]

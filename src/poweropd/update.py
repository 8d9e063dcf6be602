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
from poweropd.objectives.positions import Positions
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
        tokens: of one forward and backward pass, with padding where the student cannot do without (`Student.packed`).
        masked_end_ids: end tokens that are not trained on.
        masked_ids: tokens that are never trained on.
        importance_cap: largest importance weight of off-policy tokens; None: they are not weighted.
        rollouts_tell: whether the `rollout_logprobs` of the student's rollouts are those of its whole softmax at
            temperature 1, in the precision of the update.
    """

    tokens: int
    masked_end_ids: Sequence[int] = ()
    masked_ids: Sequence[int] = ()
    importance_cap: float | None = None
    rollouts_tell: bool = False


Watch = Callable[[TokenBatch, LossTerms], None]
"""Sees each micro-batch once, with what the loss saw of its tokens, on the student's device."""


def accumulate_gradient(
    student: Student,
    scored: Sequence[ScoredRollout],
    objective: Objective,
    how: MicroBatches,
    *,
    weight: float = 1.0,
    version: int | None = None,
    watch: Watch | None = None,
    keep: int | None = None,
) -> GradientResult:
    """Add `weight` times the gradient of the objective over all rollouts to the student's parameters.

    The result does not depend on how the rollouts fall into micro-batches. An objective that needs the whole step costs
    one more student forward, without gradient, unless the rollouts tell what that would find.

    Args:
        version: optimizer steps that the student has taken; rollouts of older versions are off-policy. None: none is, and
            none tells.
        watch: is shown every micro-batch.
        keep: of how many rollouts the terms are kept, from the first; None: of all.
    """
    groups = list(_groups(scored, how.tokens, packed=student.packed))
    batches = [_batch([scored[index] for index in group], student, how, version) for group in groups]
    num_loss_tokens = sum(batch.num_loss_tokens for batch in batches)
    tell = how.rollouts_tell and all(item.rollout.policy_version == version for item in scored)
    shaped = _shape(student, batches, groups, scored, objective, rollouts_tell=tell)
    loss = torch.zeros((), dtype=torch.float64, device=student.device)  # read at the end: nothing waits for it before
    seen: list[tuple[list[int], TokenBatch, LossTerms]] = []
    terms: dict[int, RolloutTerms] = {}
    for group, batch, shape in zip(groups, batches, shaped, strict=True):
        found = loss_of(
            objective,
            student.hidden_at_loss(batch),
            student.head,
            batch.inputs,
            denominator=max(num_loss_tokens, 1) / weight,
            shaped=shape,
            importance_cap=how.importance_cap or torch.inf,
            in_place=True,
        )
        found.loss.backward()
        found = found._replace(loss=found.loss.detach())
        loss += found.loss
        seen.append((group, batch, found))
        if watch is not None:
            watch(batch, found)
        terms |= _terms_to_keep(group, batch, found, len(scored) if keep is None else keep)
    total = loss.item()
    culprits = [] if math.isfinite(total) else [token for each in seen for token in _first_non_finite(*each)]
    return GradientResult(
        total, num_loss_tokens, [terms[index] for index in sorted(terms)], min(culprits, default=None)
    )


def _terms_to_keep(group: Sequence[int], batch: TokenBatch, found: LossTerms, keep: int) -> dict[int, RolloutTerms]:
    """The terms of those rollouts of a micro-batch that are among the first `keep`."""
    if min(group, default=keep) >= keep:
        return {}
    counts = batch.rows.bincount(minlength=len(group)).tolist()
    columns = zip(*(column.cpu().split(counts) for column in (batch.places, *found[1:])), strict=True)
    return {index: RolloutTerms(*own) for index, own in zip(group, columns, strict=True) if index < keep}


def _first_non_finite(group: Sequence[int], batch: TokenBatch, terms: LossTerms) -> list[NonFiniteToken]:
    """The first such token of a micro-batch; nothing if every one is finite."""
    signal = terms.advantages + terms.divergences
    bad = (~(terms.logprobs.isfinite() & signal.isfinite())).nonzero()[:, 0].tolist()
    if not bad:
        return []
    rollout, place, at = min((group[int(batch.rows[at])], int(batch.places[at]), at) for at in bad)
    numbers = (column[at].item() for column in (signal, terms.logprobs, terms.teacher_logprobs))
    return [NonFiniteToken(rollout, place, *numbers)]


def _groups(scored: Sequence[ScoredRollout], tokens: int, *, packed: bool) -> Iterator[list[int]]:
    """Rollouts of one micro-batch: of similar length, and judged by the same teacher."""
    by_teacher: dict[tuple[int, ...], list[int]] = {}
    for index, item in enumerate(scored):
        distribution = item.scores.distribution
        heads = () if distribution is None else tuple(id(head) for head in distribution.heads)
        by_teacher.setdefault(heads, []).append(index)
    for members in by_teacher.values():
        for group in group_by_tokens([scored[index].rollout for index in members], tokens, packed=packed):
            yield [members[place] for place in group]


def _batch(scored: Sequence[ScoredRollout], student: Student, how: MicroBatches, version: int | None) -> TokenBatch:
    batch = collate(scored, masked_end_ids=how.masked_end_ids, masked_ids=how.masked_ids, version=version)
    if how.importance_cap is None:
        batch = replace(batch, inputs=replace(batch.inputs, rollout_logprobs=None))
    return batch.to(student.device)


@torch.no_grad()
def _shape(
    student: Student,
    batches: Sequence[TokenBatch],
    groups: Sequence[list[int]],
    scored: Sequence[ScoredRollout],
    objective: Objective,
    *,
    rollouts_tell: bool,
) -> list[Shaped] | list[None]:
    """What whole-step shaping makes of each micro-batch, before any update; nothing where it is not needed."""
    if not objective.needs_whole_step or not batches:
        return [None] * len(batches)
    tell = rollouts_tell and objective.shapes_by_logprobs_alone
    tell = tell and not torch.stack([batch.own_logprobs.isnan().any() for batch in batches]).any()
    prompts: dict[str, int] = {}
    of_prompt = torch.tensor([prompts.setdefault(item.rollout.prompt.id, len(prompts)) for item in scored])
    parts = []
    for group, batch in zip(groups, batches, strict=True):
        rollouts = torch.tensor(group, device=student.device)[batch.rows]
        seen = _told_by_rollouts(batch, objective) if tell else _seen_by_student(student, batch, objective)
        parts.append(StepTokens(**seen, rollouts=rollouts, prompts=of_prompt.to(student.device)[rollouts]))
    whole = objective.shape(StepTokens.cat(parts))
    lengths = [batch.num_loss_tokens for batch in batches]
    return [Shaped(*part) for part in zip(whole.advantages.split(lengths), whole.weights.split(lengths), strict=True)]


def _seen_by_student(student: Student, batch: TokenBatch, objective: Objective) -> dict[str, Tensor]:
    """What `StepTokens` has of the tokens of a batch, from a student forward."""
    found = unshaped_terms(objective, student.hidden_at_loss(batch), student.head, batch.inputs)
    names = ("logprobs", "entropies", "teacher_logprobs", "divergences", "reference_kl")
    return {"rewards": found.advantages} | {name: getattr(found, name) for name in names}


def _told_by_rollouts(batch: TokenBatch, objective: Objective) -> dict[str, Tensor]:
    """The same without a forward, as far as `Objective.shapes_by_logprobs_alone`: the rest is NaN."""
    at = Positions(logprobs=batch.own_logprobs, **batch.inputs.rows(slice(None)))
    unknown = torch.full_like(at.logprobs, torch.nan)
    return {
        "rewards": objective.score(at),
        "logprobs": at.logprobs,
        "entropies": unknown,
        "teacher_logprobs": unknown if at.teacher_logprobs is None else at.teacher_logprobs,
        "divergences": unknown,
        "reference_kl": unknown if at.reference_logprobs is None else at.logprobs - at.reference_logprobs,
    }

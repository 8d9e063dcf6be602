"""One gradient from scored rollouts: micro-batches, one student forward each, one denominator for all."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from poweropd.batching import collate, group_by_tokens
from poweropd.objectives import Objective, RewardStatistics
from poweropd.objectives.fused import LMHead, token_scores
from poweropd.objectives.loss import TeacherOutputs, loss_of
from poweropd.policy import Student
from poweropd.types import ScoredRollout, TokenBatch


@dataclass(frozen=True)
class RolloutTerms:
    """What the loss saw of one rollout's trained tokens, [T] each, on the CPU.

    Attributes:
        logprobs, entropies: the student's.
        teacher_logprobs: the teacher's of the same tokens; NaN where no teacher was asked.
        weights: the advantage of a sampled objective, the divergence of a full one.
    """

    logprobs: Tensor
    entropies: Tensor
    teacher_logprobs: Tensor
    weights: Tensor


@dataclass(frozen=True)
class GradientResult:
    """`terms` are those of each rollout, in the order given; the gradient itself lies in the student's parameters."""

    loss: float
    num_loss_tokens: int
    terms: list[RolloutTerms]


def accumulate_gradient(
    student: Student,
    scored: Sequence[ScoredRollout],
    objective: Objective,
    *,
    teacher_head: LMHead | None,
    tokens_per_micro_batch: int,
    pad_id: int,
    masked_end_ids: Sequence[int] = (),
) -> GradientResult:
    """Add the gradient of the objective over all rollouts to the student's parameters.

    The result does not depend on how the rollouts fall into micro-batches. Objectives that need the reward statistics of
    the whole batch cost one more student forward, without gradient.

    Args:
        teacher_head: for objectives that need the full distribution.
        tokens_per_micro_batch: padded tokens of one forward and backward pass.
        masked_end_ids: end tokens that are not trained on.
    """
    groups = group_by_tokens([item.rollout for item in scored], tokens_per_micro_batch)
    batches = [
        collate([scored[index] for index in group], pad_id=pad_id, masked_end_ids=masked_end_ids).to(student.device)
        for group in groups
    ]
    num_loss_tokens = sum(batch.num_loss_tokens for batch in batches)
    statistics = _statistics(student, batches, objective) if objective.needs_batch_statistics else None
    loss = 0.0
    terms: dict[int, RolloutTerms] = {}
    for group, batch in zip(groups, batches, strict=True):
        found = loss_of(
            objective,
            student.hidden_at_loss(batch),
            student.head,
            batch.loss_positions(batch.target_ids),
            _teacher_outputs(batch, teacher_head),
            denominator=max(num_loss_tokens, 1),
            statistics=statistics,
        )
        found.loss.backward()
        loss += found.loss.item()
        lengths = batch.loss_mask.sum(1).tolist()
        columns = (values.cpu().split(lengths) for values in found[1:])
        terms |= zip(group, (RolloutTerms(*rows) for rows in zip(*columns, strict=True)), strict=True)
    return GradientResult(loss, num_loss_tokens, [terms[index] for index in range(len(scored))])


def _teacher_outputs(batch: TokenBatch, head: LMHead | None) -> TeacherOutputs:
    logprobs = None if batch.teacher_logprobs is None else batch.loss_positions(batch.teacher_logprobs)
    return TeacherOutputs(logprobs=logprobs, hidden=batch.teacher_hidden, head=head)


@torch.no_grad()
def _statistics(student: Student, batches: Sequence[TokenBatch], objective: Objective) -> RewardStatistics:
    """Of the rewards of every loss token, before any update."""
    total = RewardStatistics()
    for batch in batches:
        targets = batch.loss_positions(batch.target_ids)
        scores = token_scores(student.hidden_at_loss(batch), student.head, targets)
        total += RewardStatistics.of(objective.reward(scores.logprobs, _teacher_outputs(batch, None).logprobs))
    return total

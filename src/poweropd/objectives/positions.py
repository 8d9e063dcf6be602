"""What an objective may look at: B positions at a time, of what is known of N tokens."""

from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from poweropd.objectives.lm_head import Distribution, LMHead


@dataclass(frozen=True, eq=False)
class _Known:
    """What is known of tokens beside the student's own numbers; None where nobody was asked.

    Attributes:
        target_ids: [N], the tokens.
        teacher_logprobs: [N] log p of them.
        teacher_entropies: [N] of the teacher's distribution they came after, in nats.
        top_ids, top_logprobs: [N, k], the teacher's likeliest tokens and log p of them, descending.
        top1_ids: [N], the teacher's likeliest token.
        rollout_logprobs: [N] under the distribution sampled from, where that was not the student as it is now; NaN where it was.
        reference_logprobs: [N] under the frozen initial student.
    """

    target_ids: Tensor
    teacher_logprobs: Tensor | None = None
    teacher_entropies: Tensor | None = None
    top_ids: Tensor | None = None
    top_logprobs: Tensor | None = None
    top1_ids: Tensor | None = None
    rollout_logprobs: Tensor | None = None
    reference_logprobs: Tensor | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class TokenInputs(_Known):
    """All that a loss is given of N tokens: what is known of them, and whole distributions of teacher and reference."""

    teacher: Distribution | None = None
    reference: Distribution | None = None

    def __len__(self) -> int:
        return len(self.target_ids)

    def rows(self, rows: slice) -> dict[str, Tensor]:
        """Every per-token tensor, cut."""
        named = ((f.name, getattr(self, f.name)) for f in fields(self))
        return {name: value[rows] for name, value in named if isinstance(value, Tensor)}

    def to(self, device: torch.device | str) -> Self:
        """On another device; distributions stay where they are."""
        moved: dict[str, Any] = {name: value.to(device) for name, value in self.rows(slice(None)).items()}
        return replace(self, **moved)

    def canonical(self, head: LMHead) -> Self:
        """With merged end tokens under one id."""
        return replace(self, target_ids=head.canonical(self.target_ids))


@dataclass(frozen=True, eq=False, kw_only=True)
class Positions(_Known):
    """What an objective looks at: B tokens as the student stands to them now.

    Attributes:
        logprobs: [B] log q of the targets, detached.
        student: [B, V] log q, with its graph where the objective has an exact part.
        teacher, reference: [B, V] log p and log-probabilities of the reference.
    """

    logprobs: Tensor
    student: Tensor | None = field(default=None, repr=False)
    teacher: Tensor | None = field(default=None, repr=False)
    reference: Tensor | None = field(default=None, repr=False)

    @classmethod
    def of_distributions(cls, student: Tensor, teacher: Tensor) -> Self:
        """From log q and log p [B, V] alone, with the teacher's likeliest token in the place of the sampled one."""
        target_ids = teacher.argmax(dim=-1)
        logprobs, teacher_logprobs = (
            rows.gather(-1, target_ids[:, None])[:, 0] for rows in (student.detach(), teacher)
        )
        return cls(target_ids, teacher_logprobs, logprobs=logprobs, student=student, teacher=teacher)

    def with_top(self, k: int) -> Self:
        """With the teacher's entropies and k likeliest tokens, from its whole distribution where they are not given."""
        if self.top_ids is not None or self.teacher is None:
            return self
        top = self.teacher.topk(min(k, self.teacher.shape[-1]), dim=-1)
        entropies = -(self.teacher.exp() * self.teacher).sum(-1)
        return replace(self, top_ids=top.indices, top_logprobs=top.values, teacher_entropies=entropies)


def importance_weights(at: Positions, cap: float) -> Tensor | float:
    """`min(q / probability sampled with, cap)` of off-policy tokens, 1 of the student's own; detached.

    Unbiased for the token at its prefix where the cap is not met; the prefixes stay those that were sampled.
    """
    if at.rollout_logprobs is None:
        return 1.0
    ratio = (at.logprobs - at.rollout_logprobs).clamp(max=80).exp().clamp(max=cap)
    return torch.where(at.rollout_logprobs.isnan(), 1.0, ratio)

"""From an objective and the models' outputs to the loss of a micro-batch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from poweropd.objectives.csiszar import reverse_kl
from poweropd.objectives.divergences import Divergence
from poweropd.objectives.fused import LossTerms, fused_loss, loss_terms
from poweropd.objectives.lm_head import LMHead
from poweropd.objectives.objective import Objective, Shaped
from poweropd.objectives.positions import Positions, TokenInputs, importance_weights

REFERENCE_KL: Divergence = reverse_kl()


@dataclass(frozen=True)
class _BoundLoss:
    """An objective, and what whole-step shaping made of the tokens of a micro-batch: a `fused.Loss`.

    `is_first_pass`: the advantage is still to be shaped, and weighted only then.
    """

    objective: Objective
    shaped: Shaped | None = None
    importance_cap: float = float("inf")
    is_first_pass: bool = False

    @property
    def has_score(self) -> bool:
        return self.objective.has_score

    @property
    def has_exact(self) -> bool:
        return self.objective.has_exact

    @property
    def looks_at_student(self) -> bool:
        return self.objective.looks_at_student and self.shaped is None

    def advantage(self, at: Positions, rows: slice) -> Tensor:
        score = self.objective.score(at) if self.shaped is None else self.shaped.advantages[rows]
        if self.is_first_pass:
            return score
        return (score + self.objective.beside_shaping(at)) * importance_weights(at, self.importance_cap)

    def exact(self, at: Positions, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        divergences = self.objective.exact(at)
        reference_kl = torch.zeros_like(at.logprobs)
        if at.reference is not None:
            assert at.student is not None
            reference_kl = REFERENCE_KL.value(at.student, at.reference)
        value = divergences if self.shaped is None else self.shaped.weights[rows] * divergences
        return value + self.objective.reference_weight * reference_kl, divergences, reference_kl


def loss_of(
    objective: Objective,
    hidden: Tensor,
    head: LMHead,
    inputs: TokenInputs,
    *,
    denominator: float,
    shaped: Shaped | None = None,
    importance_cap: float = float("inf"),
) -> LossTerms:
    """The loss of the objective on N tokens: a sum over tokens divided by `denominator`.

    Args:
        hidden: [N, H] student hidden states that predict the targets, with their graph.
        head: the student's LM head.
        inputs: what the objective needs of the teacher and of the reference.
        denominator: loss tokens of the whole optimizer step, over micro-batches and ranks.
        shaped: what `Objective.shape` made of these tokens, where the objective needs the whole step.
        importance_cap: largest importance weight of tokens that were not sampled from the student.

    Raises:
        ValueError: the teacher gives less than the objective needs, or the whole step is needed and not there.
    """
    if objective.needs_whole_step and shaped is None:
        raise ValueError(f"objective {objective.name} needs the rewards of the whole step: see `Objective.shape`")
    return fused_loss(hidden, head, inputs, _BoundLoss(objective, shaped, importance_cap), denominator)


def unshaped_terms(objective: Objective, hidden: Tensor, head: LMHead, inputs: TokenInputs) -> LossTerms:
    """What each token is by itself, without a gradient: the first pass of an objective that needs the whole step."""
    return loss_terms(hidden, head, inputs, _BoundLoss(objective, is_first_pass=True))

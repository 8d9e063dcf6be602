"""From an objective and the models' outputs to the loss of a micro-batch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from poweropd.objectives.csiszar import reverse_kl
from poweropd.objectives.divergences import Divergence
from poweropd.objectives.fused import fused_loss, loss_terms
from poweropd.objectives.lm_head import LMHead
from poweropd.objectives.objective import Objective, Shaped
from poweropd.objectives.positions import Positions, TokenInputs, importance_weights
from poweropd.objectives.sweeps import Exact, LossTerms

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

    @property
    def knows_slope(self) -> bool:
        return self.objective.knows_slope

    @property
    def is_reverse_kl(self) -> bool:
        return self.objective.is_reverse_kl and self.shaped is None

    def exact(self, at: Positions, rows: slice) -> Exact:
        divergences, slope = (
            self.objective.exact_with_slope(at) if self.knows_slope else (self.objective.exact(at), None)
        )
        values, reference_kl = divergences, torch.zeros_like(at.logprobs)
        if self.shaped is not None:
            weights = self.shaped.weights[rows]
            values, slope = weights * values, None if slope is None else weights[:, None] * slope
        if at.reference is not None:
            assert at.student is not None
            coefficient = self.objective.reference_weight
            if slope is None:
                reference_kl = REFERENCE_KL.value(at.student, at.reference)
            else:
                reference_kl, further = REFERENCE_KL.with_slope(at.student, at.reference)
                slope = slope.add_(further, alpha=coefficient)
            values = values + coefficient * reference_kl
        return Exact(values, divergences, reference_kl, slope)


def loss_of(
    objective: Objective,
    hidden: Tensor,
    head: LMHead,
    inputs: TokenInputs,
    *,
    denominator: float,
    shaped: Shaped | None = None,
    importance_cap: float = float("inf"),
    in_place: bool = False,
) -> LossTerms:
    """The loss of the objective on N tokens: a sum over tokens divided by `denominator`.

    Args:
        hidden: [N, H] student hidden states that predict the targets, with their graph.
        head: the student's LM head.
        inputs: what the objective needs of the teacher and of the reference.
        denominator: loss tokens of the whole optimizer step, over micro-batches and ranks.
        shaped: what `Objective.shape` made of these tokens, where the objective needs the whole step.
        importance_cap: largest importance weight of tokens that were not sampled from the student.
        in_place: see `fused_loss`.

    Raises:
        ValueError: the teacher gives less than the objective needs, or the whole step is needed and not there.
    """
    if objective.needs_whole_step and shaped is None:
        raise ValueError(f"objective {objective.name} needs the rewards of the whole step: see `Objective.shape`")
    bound = _BoundLoss(objective, shaped, importance_cap)
    return fused_loss(hidden, head, inputs, bound, denominator, in_place=in_place)


def unshaped_terms(objective: Objective, hidden: Tensor, head: LMHead, inputs: TokenInputs) -> LossTerms:
    """What each token is by itself, without a gradient: the first pass of an objective that needs the whole step."""
    return loss_terms(hidden, head, inputs, _BoundLoss(objective, is_first_pass=True))

"""From an objective and the two models' outputs to the loss of a micro-batch."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from poweropd.objectives.fused import LMHead, LossTerms, full_loss, sampled_loss
from poweropd.objectives.shaping import RewardStatistics
from poweropd.objectives.table import Objective


@dataclass(frozen=True)
class TeacherOutputs:
    """What the teacher says of N tokens: as much of it as the objective needs.

    Attributes:
        logprobs: [N] log p of the sampled tokens, for sampled objectives.
        hidden: [N, H of the teacher] last hidden states, for full-vocabulary objectives.
        head: the teacher's LM head, for the same.
    """

    logprobs: Tensor | None = None
    hidden: Tensor | None = None
    head: LMHead | None = None


def loss_of(
    objective: Objective,
    hidden: Tensor,
    head: LMHead,
    target_ids: Tensor,
    teacher: TeacherOutputs,
    *,
    denominator: float,
    statistics: RewardStatistics | None = None,
) -> LossTerms:
    """The loss of the objective on N tokens: a sum over tokens divided by `denominator`.

    Args:
        hidden: [N, H] student hidden states that predict the targets, with their graph.
        head: the student's LM head.
        target_ids: [N].
        teacher: what the objective needs of it (`objective.needs`).
        denominator: loss tokens of the whole optimizer step, over micro-batches and ranks.
        statistics: of the rewards of the whole step, where the objective needs them.

    Raises:
        ValueError: the teacher gives less than the objective needs, or the statistics are missing.
    """
    if objective.needs == "full":
        if teacher.hidden is None or teacher.head is None:
            raise ValueError(f"objective {objective.name} needs the teacher's full distribution, which is not there")
        return full_loss(hidden, head, target_ids, teacher.hidden, teacher.head, objective.full, denominator)
    if objective.needs_batch_statistics and statistics is None:
        raise ValueError(f"objective {objective.name} needs the reward statistics of the whole batch")
    if teacher.logprobs is None and objective.needs == "sampled":
        raise ValueError(f"objective {objective.name} needs the teacher's log-probabilities, which are not there")
    logprobs = (
        torch.full_like(target_ids, torch.nan, dtype=torch.float32) if teacher.logprobs is None else teacher.logprobs
    )
    advantage = partial(objective.sampled, statistics=statistics)
    return sampled_loss(hidden, head, target_ids, logprobs, advantage, denominator)

"""Several teachers as one: their mixture, or each for its own prompts."""

from collections.abc import Mapping, Sequence

import torch

from poweropd.batching import group_by_tokens
from poweropd.objectives import Needs
from poweropd.objectives.fused import TokenScores, distribution_scores
from poweropd.objectives.lm_head import Distribution
from poweropd.teacher.scorer import TeacherScorer, teacher_scores
from poweropd.types import Rollout, TeacherScores


class MixtureTeacher:
    """Judges by `sum_i w_i p_i`, the mixture of the members' probabilities at every token.

    Entropies and likeliest tokens of a mixture cannot be had from those of its members, so every member is asked for
    its whole distribution, whatever the objective needs; the scores are then exact.

    Args:
        members: with heads of one `vocab_size` and `end_ids`, on one device.
        weights: share of each, positive, summing to 1.
        tokens_per_batch: tokens whose hidden states are held at a time, where numbers are asked for.

    Raises:
        ValueError: a member does not give whole distributions.
    """

    provides: frozenset[Needs] = frozenset({"nothing", "sampled", "top_k", "full"})

    def __init__(
        self, members: Sequence[TeacherScorer], weights: Sequence[float], *, tokens_per_batch: int = 16384
    ) -> None:
        if any("full" not in member.provides for member in members):
            raise ValueError("a mixture needs the whole distributions of its teachers; choose ones in this process")
        self._members = members
        self._weights = tuple(weights)
        self._tokens_per_batch = tokens_per_batch

    def score(self, rollouts: Sequence[Rollout], *, needs: Needs, k: int = 0) -> list[TeacherScores]:
        if needs == "nothing":
            return [TeacherScores()] * len(rollouts)
        if needs == "full":
            return [TeacherScores(distribution=distribution) for distribution in self._distributions(rollouts)]
        scores: dict[int, TeacherScores] = {}
        for group in group_by_tokens(rollouts, self._tokens_per_batch, packed=True):
            asked = [rollouts[index] for index in group]
            for index, rollout, distribution in zip(group, asked, self._distributions(asked), strict=True):
                target_ids = torch.tensor(rollout.response_ids, device=distribution.hidden[0].device)
                found = distribution_scores(distribution, target_ids, k=k if needs == "top_k" else 0)
                scores[index] = teacher_scores(TokenScores(*(column.cpu() for column in found)), needs)
        return [scores[index] for index in range(len(rollouts))]

    def _distributions(self, rollouts: Sequence[Rollout]) -> list[Distribution]:
        each = zip(*(member.score(rollouts, needs="full") for member in self._members), strict=True)
        return [self._mixture([scores.distribution for scores in own if scores.distribution]) for own in each]

    def _mixture(self, members: Sequence[Distribution]) -> Distribution:
        return Distribution(
            hidden=tuple(hidden for member in members for hidden in member.hidden),
            heads=tuple(head for member in members for head in member.heads),
            weights=tuple(
                share * weight
                for share, member in zip(self._weights, members, strict=True)
                for weight in member.weights
            ),
        )


class RoutedTeacher:
    """Has each rollout judged by the teacher that its prompt names.

    Args:
        by_name: every teacher that a prompt may name.
    """

    def __init__(self, by_name: Mapping[str, TeacherScorer]) -> None:
        self._by_name = by_name
        self.provides: frozenset[Needs] = frozenset.intersection(*(teacher.provides for teacher in by_name.values()))

    def score(self, rollouts: Sequence[Rollout], *, needs: Needs, k: int = 0) -> list[TeacherScores]:
        places: dict[str, list[int]] = {}
        for place, rollout in enumerate(rollouts):
            places.setdefault(str(rollout.prompt.teacher), []).append(place)
        scores: dict[int, TeacherScores] = {}
        for name, own in places.items():
            asked = [rollouts[place] for place in own]
            scores |= zip(own, self._by_name[name].score(asked, needs=needs, k=k), strict=True)
        return [scores[place] for place in range(len(rollouts))]

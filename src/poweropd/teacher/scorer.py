"""The protocol of every teacher."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from poweropd.errors import ConfigError
from poweropd.objectives import Needs, Objective
from poweropd.objectives.fused import TokenScores
from poweropd.types import Rollout, ScoredRollout, TeacherScores


class TeacherScorer(Protocol):
    """Judges rollouts.

    Attributes:
        provides: the `needs` of objectives that this teacher can serve.
    """

    provides: frozenset[Needs]

    def score(self, rollouts: Sequence[Rollout], *, needs: Needs, k: int = 0) -> list[TeacherScores]:
        """Scores of every rollout, in order, full-softmax at temperature 1.

        `sampled` gives log-probabilities of every response token, entropies and likeliest tokens, fp32, or None in the
        place of the last two from a teacher that cannot tell; `top_k` also the k likeliest tokens; `full` the whole
        distributions instead; `nothing` asks for nothing.
        """
        ...


def teacher_scores(found: TokenScores, needs: Needs) -> TeacherScores:
    """What was found of a rollout's tokens, as far as it was asked for."""
    scores = TeacherScores(found.logprobs, found.entropies, top1_ids=found.top1_ids)
    return replace(scores, top_ids=found.top_ids, top_logprobs=found.top_logprobs) if needs == "top_k" else scores


GIVES = {
    "sampled": "log-probabilities of sampled tokens",
    "top_k": "its likeliest tokens",
    "full": "its whole distribution",
}


def check_serves(objective: Objective, teacher: TeacherScorer) -> None:
    """Raises ConfigError if the teacher cannot give what the objective needs."""
    if objective.needs in teacher.provides:
        return
    given = " and ".join(text for needs, text in GIVES.items() if needs in teacher.provides)
    can_sample = objective.estimator != "sampled" and "sampled" in objective.row.estimators
    raise ConfigError(
        f"objective {objective} needs of the teacher {GIVES[objective.needs]}, and this teacher gives {given} only; "
        + ("set objective.estimator=sampled" if can_sample else "choose an objective such as power or log_ratio")
    )


def judge(
    rollouts: Sequence[Rollout], objective: Objective, teacher: TeacherScorer, reference: TeacherScorer | None = None
) -> list[ScoredRollout]:
    """Rollouts with all that an objective needs of the teacher and of the frozen initial student."""
    scores = teacher.score(rollouts, needs=objective.needs, k=objective.k)
    if reference is None:
        return [ScoredRollout(*pair) for pair in zip(rollouts, scores, strict=True)]
    references = reference.score(rollouts, needs=objective.needs_of_reference)
    return [ScoredRollout(*three) for three in zip(rollouts, scores, references, strict=True)]

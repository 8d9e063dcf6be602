"""The protocol of every teacher."""

from collections.abc import Sequence
from typing import Protocol

from poweropd.objectives import Needs
from poweropd.objectives.fused import LMHead
from poweropd.types import Rollout, TeacherScores


class TeacherScorer(Protocol):
    """Judges rollouts.

    Attributes:
        provides: the `needs` of objectives that this teacher can serve.
        head: its LM head, for objectives that need its full distribution; None if it cannot give one.
    """

    provides: frozenset[Needs]
    head: LMHead | None

    def score(self, rollouts: Sequence[Rollout], *, needs: Needs) -> list[TeacherScores]:
        """Scores of every rollout, in order: log-probabilities and entropies for `sampled`, hidden states for `full`.

        Log-probabilities are full-softmax at temperature 1, fp32, one for every response token.
        """
        ...

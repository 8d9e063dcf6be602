"""Whether a teacher's scores can be relied on: the same when asked again, in another batch, and of the model as it is here."""

from collections.abc import Sequence
from dataclasses import dataclass

from poweropd.errors import TeacherError
from poweropd.teacher.scorer import TeacherScorer
from poweropd.types import Rollout, TeacherScores

TOLERANCE = 1e-3  # nats
COARSE_TOLERANCE = 0.25  # half-precision matmuls round differently in another batch shape


@dataclass(frozen=True)
class Findings:
    """Largest differences between scores of one token, in nats.

    Attributes:
        repeated: when the same is asked twice.
        batched: when every text is asked for alone.
        local: from a forward of the model here; None where none was made.
        tolerance: that of the last two; fp32 scores must agree within 1e-3.
        repeat_tolerance: that of the first.
    """

    repeated: float
    batched: float
    local: float | None
    tolerance: float
    repeat_tolerance: float

    def __str__(self) -> str:
        here = "" if self.local is None else f", {self.local:.1e} from a forward of the model here"
        return f"scores of one text differ by {self.repeated:.1e} when repeated, {self.batched:.1e} when batched{here} (nats)"

    @property
    def problem(self) -> str | None:
        """Why no run should be trained on these scores."""
        if not self.repeated <= self.repeat_tolerance or not self.batched <= self.tolerance:
            return "it is not deterministic"
        if self.local is not None and not self.local <= self.tolerance:
            return "it is not the model that is here"
        return None


def probe(
    teacher: TeacherScorer,
    rollouts: Sequence[Rollout],
    *,
    exact: bool,
    batches_with_others: bool = False,
    local: TeacherScorer | None = None,
) -> Findings:
    """Score some rollouts several times.

    Args:
        exact: whether the teacher computes in fp32.
        batches_with_others: whether a repetition may fall into another batch, which is the server's choice.
        local: the same model here, in the same precision.
    """
    together, again = (teacher.score(rollouts, needs="sampled") for _ in range(2))
    alone = [teacher.score([rollout], needs="sampled")[0] for rollout in rollouts]
    here = None if local is None else _gap(together, local.score(rollouts, needs="sampled"))
    tolerance = TOLERANCE if exact else COARSE_TOLERANCE
    repeat_tolerance = tolerance if batches_with_others else TOLERANCE
    return Findings(_gap(together, again), _gap(together, alone), here, tolerance, repeat_tolerance)


def refuse_unreliable(name: str, findings: Findings) -> None:
    """Raises TeacherError if no run should be trained on the scores of the teacher `name`."""
    if findings.problem:
        raise TeacherError(
            f"{name} cannot be relied on, {findings.problem}: {findings}. Look after its server and weights"
        )


def _gap(scores: Sequence[TeacherScores], others: Sequence[TeacherScores]) -> float:
    gaps = [
        (one.logprobs - other.logprobs).abs().max().item()
        for one, other in zip(scores, others, strict=True)
        if one.logprobs is not None and other.logprobs is not None
    ]
    return max(gaps)

"""Teachers that cannot be relied on are told from those that can."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from conftest import make_model, make_rollouts
from poweropd.errors import TeacherError
from poweropd.objectives import Needs
from poweropd.teacher.hf import HFTeacher
from poweropd.teacher.probe import Findings, probe, refuse_unreliable
from poweropd.types import Rollout, TeacherScores

LENGTHS = [(3, 5), (9, 20), (1, 2)]


class Wavering(HFTeacher):
    """Off by a little, by call or by the company a rollout is in."""

    def __init__(self, by_call: float = 0.0, by_batch: float = 0.0) -> None:
        super().__init__(make_model(), vocab_size=512)
        self._by_call, self._by_batch, self._calls = by_call, by_batch, 0

    def score(self, rollouts: Sequence[Rollout], *, needs: Needs, k: int = 0) -> list[TeacherScores]:
        self._calls += 1
        shift = self._by_call * self._calls + self._by_batch * len(rollouts)
        return [replace(own, logprobs=own.logprobs + shift) for own in super().score(rollouts, needs=needs, k=k)]


def found(teacher: HFTeacher, **settings: object) -> Findings:
    return probe(teacher, make_rollouts(LENGTHS), **{"exact": True, **settings})


def test_a_model_here_is_reliable() -> None:
    findings = found(HFTeacher(make_model(), vocab_size=512), local=HFTeacher(make_model(), vocab_size=512))
    assert findings.problem is None
    assert max(findings.repeated, findings.batched, findings.local) < 1e-4
    refuse_unreliable("teacher", findings)


@pytest.mark.parametrize(
    ("teacher", "settings", "problem"),
    [
        (Wavering(by_call=2e-3), {}, "it is not deterministic"),
        (Wavering(by_call=2e-3), {"exact": False}, "it is not deterministic"),
        (Wavering(by_call=2e-3), {"exact": False, "batches_with_others": True}, None),
        (Wavering(by_call=2e-3), {"exact": True, "batches_with_others": True}, "it is not deterministic"),
        (Wavering(by_batch=2e-3), {}, "it is not deterministic"),
        (Wavering(by_batch=2e-3), {"exact": False}, None),
        (Wavering(by_batch=0.2), {"exact": False}, "it is not deterministic"),
        (Wavering(by_call=torch.nan), {"exact": False}, "it is not deterministic"),
        (HFTeacher(make_model(seed=1), vocab_size=512), {}, "it is not the model that is here"),
    ],
)
def test_what_is_refused(teacher: HFTeacher, settings: dict, problem: str | None) -> None:
    other = isinstance(teacher, Wavering)
    findings = found(teacher, **settings, local=None if other else HFTeacher(make_model(), vocab_size=512))
    assert findings.problem == problem
    if problem is not None:
        with pytest.raises(
            TeacherError, match=f"teacher math cannot be relied on, {problem}: scores of one text differ by"
        ):
            refuse_unreliable("teacher math", findings)

"""Any objective with any teacher that can serve it: one loss and one gradient."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from conftest import CHAT_END, END, make_model, make_rollouts
from poweropd.objectives import OBJECTIVES, Objective, build
from poweropd.policy import Student
from poweropd.sections import OptimizerConfig
from poweropd.teacher.cache import CachedTeacher
from poweropd.teacher.ensemble import MixtureTeacher
from poweropd.teacher.hf import HFTeacher
from poweropd.teacher.scorer import TeacherScorer, judge
from poweropd.types import Rollout
from poweropd.update import MicroBatches, accumulate_gradient
from serving import served, serving

ENDS = (END, CHAT_END)
GRID = [
    (name, estimator)
    for name, row in OBJECTIVES.items()
    for estimator in (row.estimators if len(row.estimators) > 1 else (None,))
]
Teachers = dict[str, tuple[str, TeacherScorer]]


def hf() -> HFTeacher:
    return HFTeacher(make_model(seed=1, rows=528), vocab_size=512, end_ids=ENDS)


def other() -> HFTeacher:
    return HFTeacher(make_model(hidden_size=24, seed=2), vocab_size=512, end_ids=ENDS)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Teachers]:
    """Each with the name of the local one that it must agree with."""
    with ExitStack() as stack:
        server = stack.enter_context(serving(make_model(seed=1, rows=528)))

        def remote() -> TeacherScorer:
            return served(server, end_ids=ENDS, tokens_per_batch=40)

        def cached(teacher: TeacherScorer) -> CachedTeacher:
            folder: Path = tmp_path_factory.mktemp("cache")
            return CachedTeacher(teacher, folder, fingerprint="a", vocab_size=512, end_ids=ENDS)

        of_remote = cached(remote())
        yield {
            "hf": ("hf", hf()),
            "served": ("hf", remote()),
            "served, written to a cache": ("hf", of_remote),
            "served, read from a cache": ("hf", of_remote),
            "mixture": ("mixture", MixtureTeacher([hf(), other()], [0.6, 0.4])),
            "mixture with a served one": ("mixture", MixtureTeacher([remote(), other()], [0.6, 0.4])),
        }


@pytest.fixture(scope="module")
def rollouts() -> list[Rollout]:
    torch.manual_seed(0)
    made = make_rollouts([(3, 5), (9, 2), (6, 12), (3, 5)])
    return [replace(rollout, prompt=replace(rollout.prompt, id=f"p{place // 2}")) for place, rollout in enumerate(made)]


def loss_and_gradient(
    objective: Objective, teacher: TeacherScorer, rollouts: list[Rollout], tokenizer: PreTrainedTokenizerBase
) -> tuple[float, list[Tensor]]:
    model = make_model()
    student = Student(model, tokenizer, OptimizerConfig(), vocab_size=512, end_ids=ENDS, steps=1)
    reference = HFTeacher(make_model(), vocab_size=512, end_ids=ENDS)
    scored = judge(rollouts, objective, teacher, reference if objective.needs_of_reference != "nothing" else None)
    result = accumulate_gradient(student, scored, objective, MicroBatches(tokens=30))
    return result.loss, [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize(("name", "estimator"), GRID)
def test_one_loss_and_one_gradient(
    name: str,
    estimator: str | None,
    teachers: Teachers,
    rollouts: list[Rollout],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    objective = build(name) if estimator is None else build(name, estimator=estimator)
    if objective.row.on_golden_answers:
        rollouts = [replace(rollout, source="golden") for rollout in rollouts]
    able = {own: pair for own, pair in teachers.items() if objective.needs in pair[1].provides}
    assert able.keys() >= {"hf", "served", "mixture with a served one"}
    found = {own: loss_and_gradient(objective, teacher, rollouts, tokenizer) for own, (_, teacher) in able.items()}
    for own, (expected, _) in able.items():
        (loss, gradient), (right, right_gradient) = found[own], found[expected]
        assert loss == pytest.approx(right, abs=1e-4), own
        size = torch.stack([part.norm() for part in right_gradient]).norm()
        assert size > 0
        torch.testing.assert_close(gradient, right_gradient, rtol=0, atol=1e-4 * max(size.item(), 1.0))

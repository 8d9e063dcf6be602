"""When rollouts are drawn, with which weights, and what a checkpoint keeps of them."""

import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from conftest import RECIPE
from fakes import FakeEngine
from poweropd.config import load_recipe
from poweropd.console import ConsoleObserver
from poweropd.rollout.engine import Sampling
from poweropd.rollout.schedule import Schedule
from poweropd.train import train
from poweropd.types import Prompt, Rollout
from recording import lasting_metrics

SAMPLING = Sampling(stop_ids=(0,), max_new_tokens=8, samples_per_prompt=2)
STEPS = 7


def prompts_of(step: int) -> list[Prompt]:
    return [Prompt(f"{step}-{place}", (3 + step, 4 + place)) for place in range(2)]


def schedule_of(engine: FakeEngine, staleness: int, steps: int = STEPS) -> Schedule:
    return Schedule(engine, SAMPLING, prompts_of, lambda step: step, steps=steps, staleness=staleness)


@pytest.mark.parametrize(
    ("staleness", "versions"), [(0, [0, 1, 2, 3, 4, 5, 6]), (1, [0, 0, 1, 2, 3, 4, 5]), (3, [0, 0, 0, 0, 3, 3, 3])]
)
def test_rollouts_are_as_old_as_their_step_says(staleness: int, versions: list[int]) -> None:
    with schedule_of(FakeEngine(), staleness) as schedule:
        for step, version in enumerate(versions):
            rollouts = schedule.take(step)
            assert [rollout.prompt.id for rollout in rollouts] == [f"{step}-{place}" for place in (0, 0, 1, 1)]
            assert {rollout.policy_version for rollout in rollouts} == {version}
            assert step - version <= staleness


@pytest.mark.parametrize("staleness", [0, 1, 2, 3])
@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_a_checkpoint_keeps_what_was_drawn_ahead(staleness: int, stop: int) -> None:
    with schedule_of(FakeEngine(), staleness) as schedule:
        expected = [schedule.take(step) for step in range(STEPS)]
    with schedule_of(FakeEngine(), staleness) as schedule:
        found = [schedule.take(step) for step in range(stop)]
        state = schedule.state()
    with schedule_of(FakeEngine(), staleness) as schedule:
        schedule.load_state(state)
        assert found + [schedule.take(step) for step in range(stop, STEPS)] == expected
    with schedule_of(FakeEngine(), staleness, steps=stop + 1) as shorter:
        shorter.load_state(state)
        assert shorter.take(stop) == expected[stop]
        assert shorter.state() == {"ahead": {}}


class SlowEngine(FakeEngine):
    """Draws no step after the first until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.let_go = threading.Event()
        self.drawing = 0

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, *, seed: int) -> list[Rollout]:
        if seed > 0 and not self.let_go.wait(60):
            raise AssertionError("nobody let it go")
        if seed == 3:
            raise ValueError("no more")
        return super().generate(prompts, sampling, seed=seed)


def test_the_next_rollouts_are_drawn_while_a_step_trains() -> None:
    engine = SlowEngine()
    with schedule_of(engine, 1) as schedule:
        schedule.take(0)  # returns, though the rollouts of step 1 cannot be drawn yet
        engine.let_go.set()
        schedule.finish()
        schedule.take(1)
        schedule.take(2)
        with pytest.raises(ValueError, match="no more"):
            schedule.take(3)


SETTINGS = ["train.steps=6", "train.prompts_per_step=8", "sampling.max_new_tokens=16", "data.limit=40", "checkpoint.every=3",
            "evaluation.data.limit=4", "evaluation.samples=1", "evaluation.every=2", "evaluation.teacher=false",
            "optimizer.schedule=constant", "rollout.max_staleness=2"]  # fmt: skip


class Interrupting(ConsoleObserver):
    """Stops a run at once after five steps."""

    def on_step(self, step: int, steps: int, metrics: dict[str, float]) -> None:
        if step == 5:
            raise KeyboardInterrupt


def run(out: Path, observer: type[ConsoleObserver] = ConsoleObserver, *, resume: bool = False) -> None:
    recipe = load_recipe(out / "recipe.yaml") if resume else load_recipe(RECIPE, SETTINGS)
    with observer(Console(quiet=True)) as watching:
        train(recipe, out, watching, resume=resume)


def test_a_run_ahead_of_itself_knows_how_old_its_rollouts_are_and_resumes_to_the_bit(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(whole)
    lines = lasting_metrics(whole)
    assert [line["staleness/mean"] for line in lines] == [0, 1, 2, 1, 2, 1]
    assert lines[0]["rollout/mismatch"] < 1e-4
    for line in lines[1:]:
        assert "rollout/mismatch" not in line
        assert "kl/k1" not in line
        assert line["rollout/off_policy"] > 1e-3
    with pytest.raises(KeyboardInterrupt):
        run(parts, Interrupting)
    state = torch.load(parts / "checkpoints/step-000003/state.pt", weights_only=True)
    assert [*state["schedule"]["ahead"]] == [3, 4]
    run(parts, resume=True)
    assert lasting_metrics(parts) == lines
    ours, theirs = (load_file(out / "student" / "model.safetensors") for out in (parts, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

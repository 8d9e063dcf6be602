"""Each pathology is named when it is there, from the step at which it began, and never on a healthy or merely noisy run."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from fixtures import FIXTURE, REAL, edit_summaries, lines, summary, variant, write_lines

from poweropd.report.pathologies import Pathology, pathologies
from poweropd.report.runs import read_run

BEGIN = 30
Record = dict[str, Any]
TAIL = {"reward/min": -20.0, "reward/p1": -6.0, "reward/p50": 0.0, "reward/p99": 0.3}
ILL: dict[str, tuple[str, Record]] = {
    "tail": ("Heavy negative tail", TAIL),
    "length": ("Length inflation", {"length/mean": 150.0}),
    "truncation": ("Truncation lock", {"truncation": 0.95}),
    "repetition": ("Repetition", {"repetition": 0.4}),
    "ends": ("End-token mismatch", {"end_token/log_ratio": -7.0}),
    "never ends": ("Fewer answers end", {"end_token/share": 0.2}),
    "collapse": ("Mode collapse", {"entropy/student": 0.05, "top1_agreement": 0.5}),
    "mismatch": ("Sampler mismatch", {"rollout/mismatch": 0.3}),
    "staleness": ("Stale rollouts", {"staleness/mean": 9.0}),
}


def found(folder: Path) -> list[Pathology]:
    return pathologies(read_run(folder))


def only(folder: Path) -> Pathology:
    (pathology,) = found(folder)
    assert pathology.what.endswith(".")
    assert pathology.try_.endswith(".")
    return pathology


def when(condition: Callable[[int], bool], values: Record) -> Callable[[Record], Record]:
    return lambda record: {**record, **values} if condition(record["step"]) else record


@pytest.mark.parametrize("folder", [FIXTURE, REAL], ids=["made up", "real"])
def test_a_healthy_run(folder: Path) -> None:
    assert found(folder) == []


def test_what_is_shown_of_a_healthy_run_could_have_alarmed() -> None:
    """The real run has logged all that is looked at, long enough."""
    run = read_run(REAL)
    keys = {key for _, values in ILL.values() for key in values} | {
        "entropy/teacher",
        "grad_norm/median_ratio",
        "kl/k1",
    }
    assert all(len(run.column(key)[1]) >= 79 for key in keys)
    assert any("gradient_share" in record for record in run.positions)


@pytest.mark.parametrize("case", ILL)
def test_what_lasts_is_named_from_its_first_step(case: str, tmp_path: Path) -> None:
    name, values = ILL[case]
    pathology = only(variant(tmp_path / "run", when(lambda step: step >= BEGIN, values)))
    assert (pathology.name, pathology.run, pathology.step) == (name, "run", BEGIN)


@pytest.mark.parametrize("case", ILL)
def test_single_steps_are_not(case: str, tmp_path: Path) -> None:
    assert found(variant(tmp_path / "run", when(lambda step: step % 10 == 5, ILL[case][1]))) == []


@pytest.mark.parametrize("case", ILL)
def test_noise_around_what_lasts_does_not_hide_it(case: str, tmp_path: Path) -> None:
    name, values = ILL[case]
    folder = variant(tmp_path / "run", when(lambda step: step >= BEGIN and step % 5 != 2, values))
    assert only(folder).name == name


def test_a_tail_of_a_reward_that_is_wide_on_both_sides_is_none(tmp_path: Path) -> None:
    folder = variant(tmp_path / "run", lambda record: {**record, **TAIL, "reward/p99": 5.0})
    assert found(folder) == []


def test_a_log_ratio_may_have_a_tail_where_the_reward_has_none(tmp_path: Path) -> None:
    values = {key.replace("reward", "log_ratio"): value for key, value in TAIL.items()}
    assert found(variant(tmp_path / "run", lambda record: {**record, **values})) == []


def test_answers_may_grow_as_long_as_the_teacher_s(tmp_path: Path) -> None:
    folder = variant(tmp_path / "run", when(lambda step: step >= BEGIN, {"length/mean": 150.0}))
    edit_summaries(folder, lambda place, record: {**record, "mean_length": 140.0 if place == "teacher" else 40.0})
    assert found(folder) == []


def test_a_budget_that_was_always_too_small_is_a_note(tmp_path: Path) -> None:
    pathology = only(variant(tmp_path / "run", lambda record: {**record, "truncation": 1.0}))
    assert (pathology.name, pathology.severity, pathology.step) == ("Truncation", "note", 0)


def test_entropy_that_falls_while_nothing_gets_worse_is_no_collapse(tmp_path: Path) -> None:
    assert found(variant(tmp_path / "run", when(lambda step: step >= BEGIN, {"entropy/student": 0.05}))) == []


def test_entropy_that_falls_with_pass_at_k_is_one(tmp_path: Path) -> None:
    folder = variant(tmp_path / "run", when(lambda step: step >= BEGIN, {"entropy/student": 0.05}))
    edit_summaries(folder, lambda place, record: {**record, "pass_at_4": 0.4} if place == "000060" else record)
    pathology = only(folder)
    assert pathology.name == "Mode collapse"
    assert "Pass@k fell from" in pathology.what


@pytest.mark.parametrize(
    ("shares", "named"), [([0.5, 0.3, 0.1, 0.05, 0.03, 0.02], True), ([0.03, 0.03, 0.06, 0.2, 0.3, 0.38], False)]
)
def test_early_concentration(shares: list[float], tmp_path: Path, *, named: bool) -> None:
    """Answers of 60 tokens: their first 5 % are the bins 0 and 1 and half of 2-3."""
    folder = variant(tmp_path / "run", lambda record: {**record, "length/mean": 60.0})
    edit_summaries(folder, lambda place, record: {**record, "mean_length": 60.0})
    positions = [
        {"step": step, "first": 2 ** (at - 1) if at else 0, "last": 2**at - 1, "tokens": 10, "gradient_share": share}
        for step in range(0, 60, 5)
        for at, share in enumerate(shares if step >= 20 else [0.03, 0.03, 0.06, 0.2, 0.3, 0.38])
    ]
    write_lines(folder, "positions", positions)
    assert [(pathology.name, pathology.step) for pathology in found(folder)] == (
        [("Early-position concentration", 20)] if named else []
    )


def test_early_concentration_at_one_logged_step_is_none(tmp_path: Path) -> None:
    folder = variant(tmp_path / "run", lambda record: {**record, "length/mean": 60.0})
    edit_summaries(folder, lambda place, record: {**record, "mean_length": 60.0})
    records = lines(folder, "positions")
    write_lines(folder, "positions", [{**r, "gradient_share": float(r["first"] == 0)} if r["step"] == 30 else r for r in records])  # fmt: skip
    assert found(folder) == []


@pytest.mark.parametrize(("steps", "named"), [((20, 33, 41), True), ((20, 41), False), ((24, 200, 400), False)])
def test_gradient_spikes(steps: tuple[int, ...], tmp_path: Path, *, named: bool) -> None:
    stride = 8 if 400 in steps else 1
    folder = variant(tmp_path / "run", lambda record: {**record, "step": stride * record["step"]})
    records = lines(folder, "metrics")
    write_lines(
        folder, "metrics", [{**r, "grad_norm/median_ratio": 40.0} if r["step"] in steps else r for r in records]
    )
    assert [(p.name, p.step) for p in found(folder)] == ([("Gradient spikes", 20)] if named else [])


@pytest.mark.parametrize(
    ("learns", "moves", "named"), [(False, False, True), (True, False, False), (False, True, False)]
)
def test_no_learning(tmp_path: Path, *, learns: bool, moves: bool, named: bool) -> None:
    def change(record: Record) -> Record:
        wiggle = 0.01 * (record["step"] % 3)
        return {**record, "kl/k1": 0.5 + wiggle - (0.004 * record["step"] if moves else 0)}

    folder = variant(tmp_path / "run", change)
    if not learns:
        shutil.rmtree(folder / "eval" / "000060")
        shutil.copytree(folder / "eval" / "000000", folder / "eval" / "000060")
    assert [p.name for p in found(folder)] == (["No learning"] if named else [])


def test_a_teacher_that_is_no_better(tmp_path: Path) -> None:
    folder = variant(tmp_path / "run")
    for benchmark in ("gsm8k", "math500"):
        first = summary(folder, "000000", benchmark)
        (folder / "eval" / "teacher" / f"{benchmark}.json").write_text(json.dumps(first))
    pathology = only(folder)
    assert (pathology.name, pathology.severity, pathology.step) == ("Weak teacher", "warn", 0)
    assert "+0.000 [-0.074, +0.074] over 100 problems" in pathology.what
    edit_summaries(folder, lambda place, record: {**record, "correct": dict(list(record["correct"].items())[:10])})
    assert only(folder).severity == "note"


def test_several_are_told_in_the_order_in_which_they_began(tmp_path: Path) -> None:
    def change(record: Record) -> Record:
        late = {"repetition": 0.5} if record["step"] >= 20 else {}
        return {**record, **late, **({"truncation": 1.0} if record["step"] >= 40 else {})}

    names = [(pathology.name, pathology.step) for pathology in found(variant(tmp_path / "run", change))]
    assert names == [("Repetition", 20), ("Truncation lock", 40)]


def with_recipe(folder: Path, sections: dict[str, Record]) -> Path:
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    for name, values in sections.items():
        recipe[name] = {**recipe.get(name, {}), **values}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.mark.parametrize(
    ("case", "sections", "tip"),
    [
        ("tail", {"objective": {"name": "power"}}, "objective.name power"),
        ("truncation", {"objective": {"name": "clip"}}, "objective.name power"),
        ("truncation", {"guard": {"action": "stop"}}, "guard.action"),
        ("repetition", {"guard": {"action": "raise_reference_kl"}}, "guard.action"),
        ("repetition", {"objective": {"golden": 0.1}}, "objective.golden"),
        ("ends", {"objective": {"end_token": "map"}}, "objective.end_token: map"),
        ("collapse", {"sampling": {"temperature": 1}}, "sampling.temperature 1"),
        ("collapse", {"objective": {"name": "forward_kl"}}, "a forward KL"),
        ("staleness", {"rollout": {"importance": "token"}}, "rollout.importance: token"),
    ],
)
def test_what_the_recipe_has_is_not_advised(case: str, sections: dict[str, Record], tip: str, tmp_path: Path) -> None:
    folder = variant(tmp_path / "run", when(lambda step: step >= BEGIN, ILL[case][1]))
    without = {"objective": {"name": "log_ratio", "end_token": "keep"}, "sampling": {"temperature": 0.7}}
    assert tip in only(with_recipe(folder, without)).try_
    assert tip not in only(with_recipe(folder, sections)).try_


@pytest.mark.parametrize(("end_token", "names"), [("map", ["Truncation lock"]),
                                                  ("keep", ["End-token mismatch", "Truncation lock"])])  # fmt: skip
def test_rollouts_that_grow_into_the_budget(end_token: str, names: list[str], tmp_path: Path) -> None:
    def change(record: Record) -> Record:
        cut = min(1.0, record["step"] / 40)
        return {**record, "truncation": cut, "end_token/share": 1 - cut, "end_token/log_ratio": 0.01}

    folder = with_recipe(variant(tmp_path / "run", change), {"objective": {"end_token": end_token}})
    assert [pathology.name for pathology in found(folder)] == names


def test_noise_alone_is_no_learning(tmp_path: Path) -> None:
    """The distances of a run whose learning rate was 1e-12."""
    distances = [
        0.151, 0.103, 0.183, 0.112, 0.124, 0.054, 0.093, 0.245, 0.13, 0.12, 0.19, 0.08, 0.15, 0.11, 0.16,
        0.14, 0.1, 0.17, 0.09, 0.15, 0.13, 0.12, 0.184, 0.192, 0.128, 0.134, 0.053, 0.078, 0.035, 0.077,
    ]  # fmt: skip
    folder = variant(
        tmp_path / "run", lambda record: {**record, "kl/k1": distances[record["step"]]} if record["step"] < 30 else None
    )
    shutil.rmtree(folder / "eval" / "000060")
    shutil.rmtree(folder / "eval" / "000030")
    shutil.copytree(folder / "eval" / "000000", folder / "eval" / "000030")
    assert [pathology.name for pathology in found(folder)] == ["No learning"]

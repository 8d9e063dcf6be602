"""The benchmark suite: that the naive way computes the same, that contests are held, and what is made of their results."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import ROOT
from poweropd.update import accumulate_gradient
from suite import naive, ours, tables
from suite.compare import ratio
from suite.contests import Contest, Contestant
from suite.floor import Rates, body, head, rates_of, update
from suite.referee import hold
from suite.results import FOLDER, Results, slug
from suite.shapes import SHAPES, Size, build, random_rollouts
from suite.targets import Verdict, targets

PAGE = ROOT / "docs" / "performance.md"
WORK = {"rollouts": 3, "prompt": 5, "response": 7}


@pytest.mark.parametrize("way", naive.WAYS)
def test_the_naive_way_has_the_gradient_of_ours(way: str) -> None:
    pairs = random_rollouts(SHAPES["quickstart"], WORK["rollouts"], prompt=WORK["prompt"], response=WORK["response"])
    own = ours.kit("quickstart", "power", settings={"alpha": 1.0})
    found = accumulate_gradient(own.student, own.judge(ours.as_rollouts(pairs)), own.objective, own.how)

    step, together = naive.WAYS[way]
    student, teacher = build(own.shape, "student"), build(own.shape, "teacher")
    groups = [pairs] if together is None else [pairs[at : at + together] for at in range(0, len(pairs), together)]
    loss = step(student, teacher, [naive.batch_of(group) for group in groups], 1.0)

    assert loss == pytest.approx(found.loss, rel=1e-4)
    for expected, parameter in zip(own.student.model.parameters(), student.parameters(), strict=True):
        assert expected.grad is not None
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-3, atol=1e-6)


def test_shapes_count_their_parameters() -> None:
    for shape in SHAPES.values():
        if shape.vocabulary == 512:
            for role in ("student", "teacher"):
                counted = sum(parameter.numel() for parameter in build(shape, role).parameters())
                assert shape.parameters(role) == pytest.approx(counted, rel=0.005)


def test_flop_of_a_body_and_of_an_update() -> None:
    size = Size(64, 1)
    maps = 64 * 64 * 3 + 3 * 64 * 192
    assert body(size, 2, 3).flop == 2 * maps * 6 + 4 * 64 * 2 * 6  # 1 + 2 + 3 keys a row
    shape = SHAPES["real vocabulary"]
    three_of_student = 3 * (body(shape.student, 1, 9) + head(shape.student, shape.vocabulary, 4)).flop
    assert update(shape, 1, 5, 4, full=False).flop == three_of_student
    assert update(shape, 1, 5, 4, full=True).flop == three_of_student + 2 * shape.vocabulary * 512 * 4


def test_a_contest_alternates_and_keeps_what_was_measured(tmp_path: Path) -> None:
    score = {"shape": "quickstart", "rollouts": 1, "prompt": 4, "response": 4, "alpha": 1.0}
    contest = Contest(
        "small",
        (
            Contestant("poweropd", "suite.ours:score", {**score, "objective": "power"}),
            Contestant("naive, window", "suite.naive:score", {**score, "way": "window"}, group="naive"),
            Contestant("naive, one pass", "suite.naive:score", {**score, "way": "one pass"}, group="naive"),
            Contestant("broken", "suite.naive:score", {**score, "way": "none such"}),
            Contestant("peer", "peers.trl_chunked:score", {}, is_peer=True),
        ),
        rounds=2,
    )
    said: list[str] = []
    results = Results(tmp_path / "here.json", {}, keep=False)
    hold(contest, results, peers=None, threads=1, say=said.append)

    entry = json.loads((tmp_path / "here.json").read_text())["contests"]["small"]
    assert entry["done"]
    counts = {name: len(turns) for name, turns in entry["turns"].items()}
    assert counts.pop("poweropd") == 2
    assert sorted(counts.values()) == [1, 2]  # the slower of the naive ones went home
    assert "none such" in entry["failed"]["broken"]
    assert "make benchmark" in entry["failed"]["peer"]
    order = [line.split()[0] for line in said if "CPU s" in line]
    assert order == ["poweropd", "naive,", "naive,", "naive,", "poweropd"]  # the second round goes backwards
    losses = [turn["loss"] for turns in entry["turns"].values() for turn in turns]
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-4)
    assert all(turn["cpu"] > 0 and turn["peak"] >= 0 for turns in entry["turns"].values() for turn in turns)
    assert Results(tmp_path / "here.json", {}, keep=True).is_done("small")


def test_ratios_are_of_turns_of_the_same_round() -> None:
    turns = {"a": [{"cpu": 1.0}, {"cpu": 4.0}, {"cpu": 3.0}], "b": [{"cpu": 2.0}, {"cpu": 4.0}]}
    assert ratio(turns, "a", "b") == (0.75, 0.5, 1.0, 2)
    assert ratio(turns, "a", "c") is None
    longer = {"a": [{"cpu": 4.0, "tokens": 8}], "b": [{"cpu": 2.0, "tokens": 2}]}
    assert ratio(longer, "a", "b") == (0.5, 0.5, 0.5, 1)


@pytest.mark.parametrize(
    ("ours_takes", "bf16", "verdicts"), [(1.0, 1.0, ("met", "not applicable")), (9.0, 3.0, ("missed", "not measured"))]
)
def test_verdicts(ours_takes: float, bf16: float, verdicts: tuple[Verdict, Verdict]) -> None:
    product = {"float32": 2.0, "bfloat16": bf16}
    data: dict[str, Any] = {
        "contests": {
            "rates": {"turns": {"machine": [_rates(product)]}},
            "score and update, sampled": {
                "turns": {
                    "poweropd": [{"cpu": ours_takes, "tokens": 1024}],
                    "TRL chunked": [{"cpu": 10.0, "tokens": 1024}],
                    "naive, window": [{"cpu": 5.0, "tokens": 1024}],
                }
            },
        }
    }
    found = {row.what: row.verdict for row in targets(data)}
    assert found["sampled scoring and update, over TRL chunked"] == verdicts[0]
    assert found["sampled scoring and update, bf16 heads, over TRL chunked"] == verdicts[1]
    assert {row.verdict for row in targets({"contests": {}})} == {"not measured"}


def _rates(product: dict[str, float]) -> dict[str, Any]:
    products = {f"square, {dtype}": {"wall": rate, "cpu": rate} for dtype, rate in product.items()}
    return {"products": products, "memory": {"wall": 1.0, "cpu": 1.0}}


def test_rates_are_the_best_of_all() -> None:
    turns = [_rates({"float32": 1.0, "bfloat16": 5.0}), _rates({"float32": 2.0, "bfloat16": 4.0})]
    assert rates_of({"contests": {"rates": {"turns": {"machine": turns}}}}) == Rates(2.0, 5.0, 1.0)
    assert rates_of({"contests": {}}) is None


def test_tables_go_between_their_markers_and_nowhere_else(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table: memory -->\nold\n<!-- end -->\nafter\n")
    turn = {"peak": 3 * 2**30, "gradient_bytes": 2**30, "cpu": 1.5}
    tables.write({"contests": {"memory": {"turns": {"power, 1,024 tokens": [turn]}}}}, page)
    assert page.read_text().startswith("before\n<!-- table: memory -->\n| objective |")
    assert "| power | 1,024 tokens | 2.00 | 1.5 |\n<!-- end -->\nafter\n" in page.read_text()
    page.write_text("<!-- table: nothing -->\n<!-- end -->\n")
    with pytest.raises(ValueError, match="no table 'nothing'"):
        tables.write({"contests": {}}, page)


def test_the_page_shows_a_committed_file_of_results(tmp_path: Path) -> None:
    copy = tmp_path / "performance.md"
    shown = []
    for path in FOLDER.glob("*-cores.json"):
        data = json.loads(path.read_text())
        if "contests" in data:
            copy.write_text(PAGE.read_text())
            tables.write(data, copy)
            shown.append(copy.read_text())
    assert PAGE.read_text() in shown


@pytest.mark.parametrize(
    ("cpu", "cores", "name"),
    [
        ("Intel(R) Xeon(R) Processor", 2, "intel-xeon-2-cores"),
        ("AMD EPYC 7763 64-Core Processor", 8, "amd-epyc-7763-8-cores"),
        ("Apple M2", 8, "apple-m2-8-cores"),
        ("Intel(R) Core(TM) i7-9750H CPU @ 2.60GHz", 6, "intel-core-i7-9750h-6-cores"),
    ],
)
def test_machines_have_readable_names(cpu: str, cores: int, name: str) -> None:
    assert slug(cpu, cores) == name


def test_contestants_of_the_suite_exist() -> None:
    """Those of the peers are read, since their packages are not here."""
    import importlib

    from suite.contests import contests

    for contest in contests(full=True, bf16=True):
        for contestant in contest.contestants:
            module, name = contestant.function.split(":")
            if contestant.is_peer:
                assert f"\ndef {name}(" in (ROOT / "benchmarks" / f"{module.replace('.', '/')}.py").read_text()
            else:
                assert callable(getattr(importlib.import_module(module), name))
    assert sys.modules["suite.ours"].score is ours.score

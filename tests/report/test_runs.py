"""Run directories of every kind become records: finished, interrupted, half-written, empty, older, damaged."""

import json
import shutil
from pathlib import Path

import pytest
from fixtures import FIXTURE, drawn, edit_summaries, lines, summary, variant, write_lines

from poweropd.errors import RunError
from poweropd.report.html import write_report
from poweropd.report.pathologies import pathologies
from poweropd.report.runs import RunData, read_run
from poweropd.report.tables import results_table, tables
from poweropd.report.verdict import headline, verdict


def everything(run: RunData) -> str:
    """All that is made of a run, so that a broken one is seen to break nothing."""
    assert all(not figure.is_empty for figure in drawn([run]).values())
    assert all(len(row) == len(table.headings) for table in tables([run]) for row in table.rows)
    assert 1 <= len(verdict([run])) <= 4
    pathologies(run)
    headline(run)
    return " ".join(verdict([run]))


def test_a_finished_run() -> None:
    run = read_run(FIXTURE)
    assert run.name == "fixture_run"
    assert run.objective == "power alpha=5"
    assert run.models == "student student-0.6b, teacher teacher-4b"
    assert [record["step"] for record in run.metrics] == list(range(60))
    assert list(run.evaluations) == [0, 30, 60]
    assert all(list(model) == ["gsm8k", "math500"] for model in (*run.evaluations.values(), *run.teachers.values()))
    assert run.evaluations[60]["math500"] == summary(FIXTURE, "000060", "math500")
    assert run.steps_taken == run.steps_planned == 60
    assert (run.signal, run.status, run.skipped_lines, run.left_out) == ("reward", "finished", 0, [])
    assert {record["step"] for record in run.last_logged("positions")} == {59}
    everything(run)


def test_lines_that_are_no_records_are_skipped_and_counted(tmp_path: Path) -> None:
    folder = variant(tmp_path / "run")
    whole = (folder / "metrics.jsonl").read_text().splitlines()
    bad = ["[1, 2]", "7", "null", '"text"', "\x00\x00", '{"loss": 1.0}', '{"step": "two"}', '{"step": tru', "é\udcff"]
    mixed = [*whole[:10], *bad, *whole[10:-1], whole[-1][:-30]]
    (folder / "metrics.jsonl").write_bytes("\n".join(mixed).encode("utf-8", "surrogateescape"))
    (folder / "rollouts.jsonl").write_text("{\n")
    (folder / "positions.jsonl").write_bytes(b"\xff\xfe")
    run = read_run(folder)
    assert [record["step"] for record in run.metrics] == list(range(59))
    assert run.skipped_lines == len(bad) + 1 + 1 + 1
    everything(run)


def test_values_that_are_no_numbers_are_not_drawn(tmp_path: Path) -> None:
    values = [None, "x", float("nan"), float("-inf"), True, [1], 0.5]

    def change(record: dict) -> dict:
        return {**record, "kl/k1": values[record["step"] % len(values)]} if record["step"] < 14 else record

    run = read_run(variant(tmp_path / "run", change))
    steps, found = run.column("kl/k1")
    assert steps[:3] == [6, 13, 14]
    assert found[:2] == [0.5, 0.5]
    everything(run)


def test_a_run_being_written_or_interrupted(tmp_path: Path) -> None:
    folder = variant(tmp_path / "run", lambda record: record if record["step"] < 33 else None)
    shutil.rmtree(folder / "eval" / "000060")
    (folder / "summary.json").unlink()
    manifest = json.loads((folder / "manifest.json").read_text())
    for status, told in (("interrupted", "was interrupted after 33 of 60 steps"), ("running", "is still running"),
                         ("failed", "failed after 33 of 60 steps")):  # fmt: skip
        (folder / "manifest.json").write_text(json.dumps({**manifest, "status": status}))
        sentences = verdict([read_run(folder)])
        assert told in sentences[0]
        assert "in 30 steps" in sentences[1]
    (folder / "manifest.json").write_text("{")
    assert "does not say whether it finished" in everything(read_run(folder))


def test_a_recipe_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(FIXTURE / "recipe.yaml", folder)
    run = read_run(folder)
    assert (run.metrics, run.evaluations, run.steps_taken) == ([], {}, 0)
    assert everything(run) == "Nothing has been logged yet: there is a recipe and no step."
    assert drawn([run]) == {}
    assert tables([run]) == []
    (folder / "recipe.yaml").write_text("objective: power\n")  # sections of another form, or none
    assert "Nothing has been logged yet" in everything(read_run(folder))


def test_an_older_run_has_fewer_figures(tmp_path: Path) -> None:
    old = ("step", "loss", "reward/mean", "reward/min", "log_ratio/mean", "length/mean", "grad_norm", "time/step")
    folder = variant(tmp_path / "run", lambda record: {key: record[key] for key in old})
    (folder / "distributions.jsonl").unlink()
    fields = ("step", "first", "last", "tokens", "reward/mean", "reward/min", "reward/max")
    write_lines(folder, "positions", [{key: record[key] for key in fields} for record in lines(folder, "positions")])
    for place in ("teacher", "000000", "000060"):
        (folder / "eval" / place / "gsm8k.json").unlink()
    shutil.rmtree(folder / "eval" / "000030")
    keep = ("avg_at_4", "pass_at_4", "mean_length", "truncation", "intervals", "problems", "samples", "status")
    edit_summaries(folder, lambda place, record: {key: record[key] for key in keep})
    run = read_run(folder)
    text = everything(run)
    assert "paired" not in text
    assert "the two 95 % intervals" in text
    assert {table.title for table in tables([run])} == {"Results", "Cost", "Grading"}
    assert {"accuracy", "reward-by-position", "gradient-norm"} <= drawn([run]).keys()
    assert not {"kl", "reward-distribution", "reward-plane", "gradient-share", "memory"} & drawn([run]).keys()
    assert "lowest to the highest token" in drawn([run])["reward-by-position"].caption


def test_evaluations_that_are_not_whole_are_left_out_and_named(tmp_path: Path) -> None:
    folder = variant(tmp_path / "run")
    edit_summaries(folder, lambda place, record: {**record, "finished": place != "000060"})
    for name, text in (("math500", "{"), ("gsm8k", '{"samples": "many", "problems": 1}')):
        (folder / "eval" / "000030" / f"{name}.json").write_text(text)
    (folder / "eval" / "000045").mkdir()
    (folder / "eval" / "12x").mkdir()
    run = read_run(folder)
    assert list(run.evaluations) == [0]
    assert run.left_out == [
        "gsm8k in eval/000030 (not readable)", "math500 in eval/000030 (not readable)",
        "gsm8k in eval/000060 (not finished)", "math500 in eval/000060 (not finished)",
    ]  # fmt: skip
    text = everything(run)
    assert "evaluated before training alone" in text
    assert "the estimate of KL(student || teacher) went from" in text


def test_several_teachers(tmp_path: Path) -> None:
    folder = variant(tmp_path / "run")
    (folder / "eval" / "teacher").rename(folder / "eval" / "teacher-math")
    shutil.copytree(folder / "eval" / "teacher-math", folder / "eval" / "teacher-base-2")
    run = read_run(folder)
    assert list(run.teachers) == ["teacher base-2", "teacher math"]
    assert "teacher math has" in headline(run)
    assert "gap" not in headline(run)
    names = [row[0] for row in results_table([run]).rows]  # equal results, yet two teachers
    assert names == ["teacher base-2", "teacher math", "student before", "student after"]
    assert [line.name for line in drawn([run])["accuracy"].lines] == ["run", "teacher base-2", "teacher math"]


def test_what_is_no_run_directory(tmp_path: Path) -> None:
    shutil.copytree(FIXTURE, tmp_path / "power-5")
    cases = {
        "power-6": rf"power-6 is no run directory: there is nothing of that name; did you mean {tmp_path}/power-5\?",
        "zzzz": "there is nothing of that name; give the directory that `--out` named",
        "empty": "there is no readable recipe.yaml in it",
        "list": "its recipe.yaml holds no sections",
        "broken": "there is no readable recipe.yaml in it",
        "binary": "there is no readable recipe.yaml in it",
    }
    for name, content in (("empty", None), ("list", b"- 1\n"), ("broken", b"a: [\n"), ("binary", b"\xff\xfe\x00")):
        (tmp_path / name).mkdir()
        if content is not None:
            (tmp_path / name / "recipe.yaml").write_bytes(content)
    for name, told in cases.items():
        with pytest.raises(RunError, match=told) as error:
            read_run(tmp_path / name)
        assert "\n" not in str(error.value)
    with pytest.raises(RunError, match="is no run directory"):
        read_run(tmp_path / "power-5" / "recipe.yaml")


@pytest.mark.parametrize("end", ["\u2028", "\u2029", "\x85", "\x0b", "\x1c"])
def test_other_ends_of_lines_than_those_of_json_are_text(end: str, tmp_path: Path) -> None:
    folder = variant(tmp_path / "run")
    records = [{**record, "prompt": f"one{end}two"} for record in lines(folder, "rollouts")]
    text = "\n".join(json.dumps(record, ensure_ascii=end < " ") for record in records)
    (folder / "rollouts.jsonl").write_text(f"{text}\r\n\n", encoding="utf-8")
    run = read_run(folder)
    assert (run.rollouts, run.skipped_lines) == (records, 0)


ODD_LINES = {
    "metrics": {"step": [None, "1", True, 1e308, 10**400]},
    "positions": {
        "first": [-1, None, 0.5, 10**9], "last": [-1, "x"], "tokens": [0, None, [1]], "reward/mean": [None, "x", [1], 1e308],
    },
    "distributions": {
        "reward": [5, "x", {"counts": 1}, {"counts": [1], "edges": None}, {"counts": [1], "edges": [1, 0]},
                   {"counts": [-1], "edges": [0, 1]}],
        "plane": [[1], "x", {"edges": None, "cells": []}, {"edges": [0, 1], "cells": [[0]]},
                  {"edges": [0, 1], "cells": [[0, 1, 1, 0.5]]}, {"edges": [0, 1], "cells": [[-1, 0, 1, 0.5]]},
                  {"edges": [0, 1], "cells": [[0, 0, 1, None]]}],
    },
    "rollouts": {
        "tokens": [None, "text", [1], {}], "weights": ["x", 5, [[1]], {"a": 1}], "student_logprobs": [7, ["x"]],
        "teacher_logprobs": [True, [False]], "prompt": [None, 5], "finish_reason": [None, []],
    },
}  # fmt: skip


@pytest.mark.parametrize("log", ODD_LINES)
def test_lines_of_odd_values_are_skipped_and_counted(log: str, tmp_path: Path) -> None:
    folder = variant(tmp_path / "run")
    good = lines(folder, log)
    odd = [{**good[-1], key: value} for key, values in ODD_LINES[log].items() for value in values]
    write_lines(folder, log, [*good, *odd])
    with (folder / f"{log}.jsonl").open("a") as file:
        file.write("[" * 100_000)
    run = read_run(folder)
    assert getattr(run, log) == good
    assert run.skipped_lines == len(odd) + 1
    everything(run)


@pytest.mark.parametrize("size", [1e308, -1e308, 10**400])
def test_numbers_too_large_to_add_are_gaps(size: float, tmp_path: Path) -> None:
    run = read_run(
        variant(tmp_path / "run", lambda record: {**record, **dict.fromkeys(record.keys() - {"step"}, size)})
    )
    assert len(run.metrics) == 60
    assert run.column("loss") == ([], [])
    everything(run)


@pytest.mark.parametrize(
    "odd",
    [
        {"samples": 0}, {"samples": True}, {"samples": 4.0}, {"problems": 0}, {"problems": 1.5}, {"avg_at_4": 1e308},
        {"intervals": [1]}, {"intervals": {"avg_at_4": [1]}}, {"intervals": {"avg_at_4": "ab"}}, {"status": ["x"]},
        {"status": {"correct": "x"}}, {"correct": {"a": 5}}, {"correct": {"a": -1}}, {"correct": {"a": 1.5}},
        {"correct": {"a": "x"}}, {"correct": ["a"]},
    ],
)  # fmt: skip
def test_summaries_of_odd_values_are_left_out_and_named(odd: dict, tmp_path: Path) -> None:
    folder = variant(tmp_path / "run")
    edit_summaries(folder, lambda place, record: {**record, **odd} if place == "000030" else record)
    run = read_run(folder)
    assert list(run.evaluations) == [0, 60]
    assert run.left_out == [f"{name} in eval/000030 (not readable)" for name in ("gsm8k", "math500")]
    everything(run)


def test_a_manifest_a_summary_and_a_recipe_of_odd_values(tmp_path: Path) -> None:
    folder = variant(tmp_path / "run")
    (folder / "manifest.json").write_text('{"status": ["x"], "machine": [1], "versions": "s", "gradient_of": {}, "git_commit": null}')  # fmt: skip
    (folder / "summary.json").write_text('{"seconds": "many"}')
    (folder / "recipe.yaml").write_text("teachers: {math: 5}\nstudent: {model: [1]}\n1: 2\n")
    (folder / "eval" / "0²").mkdir()
    text = (folder / "rollouts.jsonl").read_text().replace('"prompt": "', '"prompt": "\\ud83d')
    (folder / "rollouts.jsonl").write_text(text)
    run = read_run(folder)
    assert run.manifest == {}
    assert {f"{key} in manifest.json (not readable)" for key in ("status", "machine", "versions", "gradient_of")} == set(run.left_out)  # fmt: skip
    everything(run)
    good = read_run(FIXTURE)
    write_report([good, run], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "run: not shown: status in manifest.json (not readable)" in page

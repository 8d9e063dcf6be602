"""The page: self-contained, for finished, interrupted and half-written runs, alone and side by side."""

import json
import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from conftest import RECIPE
from poweropd.cli import app
from poweropd.errors import RunError
from poweropd.report.figure import Figure
from poweropd.report.figures import figures
from poweropd.report.html import write_report
from poweropd.report.image import save_figures
from poweropd.report.runs import RunData, read_run
from poweropd.report.tables import results_table
from poweropd.report.verdict import comparison, headline


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report") / "run"
    settings = [
        "train.steps=3", "train.prompts_per_step=4", "sampling.max_new_tokens=24", "data.limit=20",
        "evaluation.data.limit=4", "evaluation.samples=2", "log.rollouts_every=1",
    ]  # fmt: skip
    sets = [part for setting in settings for part in ("--set", setting)]
    result = CliRunner().invoke(app, ["train", str(RECIPE), "--out", str(out), *sets])
    assert result.exit_code == 0, result.output
    return out


def drawn(runs: list[RunData]) -> list[Figure]:
    return [figure for section in figures(runs) for figure in section.figures]


def test_the_page_holds_everything_and_needs_no_network(run: Path) -> None:
    page = (run / "report.html").read_text()
    summary = json.loads((run / "summary.json").read_text())
    assert f"{summary['before']['held_out']['avg_at_2']:.3f}" in page
    for title in (figure.title for figure in drawn([read_run(run)])):
        assert f">{title}</h3>" in page
    loaded = re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="([^"]+)"', page)
    assert loaded == ["data:,"]  # no icon is asked for
    assert len(page) < 6 * 2**20


def test_table_and_headline(run: Path) -> None:
    data = read_run(run)
    table = results_table([data])
    assert table.headings[1:3] == ["Avg@2", "Pass@2"]
    assert [row[0] for row in table.rows] == ["teacher", "student before", "student after"]
    assert headline(data).startswith("Avg@2 on held-out problems went from")


def test_several_runs_side_by_side(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(run, other)
    runs = [read_run(run, "one"), read_run(other, "two")]
    write_report(runs, tmp_path / "page.html")
    assert "2 runs compared" in (tmp_path / "page.html").read_text()
    assert comparison(runs) == "The recipes are equal."
    recipe = other / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("alpha: 5", "alpha: 1").replace("seed: 0", "seed: 7"))
    differing = comparison([runs[0], read_run(other)])
    assert differing == "The recipes differ in objective.alpha, train.seed, evaluation.seed; all else is equal."
    names = {line.name for figure in drawn(runs) for line in figure.lines}
    assert {"one", "two", "teacher"} <= names
    save_figures(drawn(runs)[:4], tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_stopped_early_still_has_a_page(run: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(run, broken)
    shutil.rmtree(broken / "eval")
    for name in ("summary.json", "rollouts.jsonl", "positions.jsonl"):
        (broken / name).unlink()
    metrics = broken / "metrics.jsonl"
    metrics.write_text(metrics.read_text()[:-50])
    data = read_run(broken)
    assert data.skipped_lines == 1
    assert len(data.metrics) == 2
    write_report([data], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "1 log line that cannot be read was left out" in page
    metrics.write_text("")
    write_report([read_run(broken)], tmp_path / "empty.html")


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is no run directory"):
        read_run(tmp_path)


def test_text_from_models_is_escaped(run: Path, tmp_path: Path) -> None:
    hostile = tmp_path / "hostile"
    shutil.copytree(run, hostile)
    record = json.loads((hostile / "rollouts.jsonl").read_text().splitlines()[0])
    record["tokens"][0] = record["prompt"] = "<script>alert(1)</script>"
    (hostile / "rollouts.jsonl").write_text(json.dumps(record) + "\n")
    write_report([read_run(hostile)], tmp_path / "page.html")
    assert "<script>alert(1)" not in (tmp_path / "page.html").read_text()

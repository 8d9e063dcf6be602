"""`poweropd report`, on runs that have logged a little and nothing else."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from conftest import RECIPE
from poweropd.cli import app
from poweropd.config import load_recipe


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two of the same name, in different folders."""
    lines = [json.dumps({"step": step, "grad_norm": 1 / (step + 1), "length/mean": 9.0}) for step in range(3)]
    paths = [tmp_path / parent / "run" for parent in ("a", "b")]
    for path in paths:
        path.mkdir(parents=True)
        (path / "recipe.yaml").write_text(load_recipe(RECIPE, None).to_yaml(), encoding="utf-8")
        (path / "metrics.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return paths


def test_a_page_and_figures_of_runs_told_apart_by_their_paths(runs: list[Path], tmp_path: Path) -> None:
    page, figures = tmp_path / "new" / "page.html", tmp_path / "figures"
    arguments = ["report", *map(str, runs), "--out", str(page), "--figures", str(figures), "--format", "pdf"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    drawn = sorted(figures.iterdir())
    assert result.output == f"report   {page}\nfigures  {len(drawn)} in {figures}\n"
    assert {path.suffix for path in drawn} == {".pdf"}
    text = page.read_text(encoding="utf-8")
    assert all(f'<figure id="{path.stem}"' in text for path in drawn)
    assert all(f"</span> {path}</label>" in text for path in runs)


def test_a_format_without_a_folder_is_refused(runs: list[Path]) -> None:
    result = CliRunner().invoke(app, ["report", *map(str, runs), "--format", "pdf"])
    assert result.exit_code == 1
    assert result.stderr.strip() == "error: --format pdf is of the files that --figures DIR writes; add --figures DIR"


def test_a_file_where_the_folder_of_figures_should_be(runs: list[Path], tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    arguments = ["report", str(runs[0]), "--out", str(tmp_path / "page.html"), "--figures", str(tmp_path / "taken")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "there is a file of that name; give a folder" in result.stderr


@pytest.mark.parametrize(
    ("out", "told"),
    [
        ("taken/page.html", "the page cannot be written there"),
        ("/proc/page.html", "the page cannot be written there"),
        ("folder", "there is a folder of that name; give a file such as"),
    ],
)
def test_a_page_that_cannot_be_written(out: str, told: str, runs: list[Path], tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    (tmp_path / "folder").mkdir()
    result = CliRunner().invoke(app, ["report", str(runs[0]), "--out", str(tmp_path / out)])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: --out ")
    assert told in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("again", ["run", "run/", "../a/run"])
def test_a_run_given_twice_is_refused(again: str, runs: list[Path], tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["report", str(runs[0]), f"{runs[0].parent}/{again}"])
    assert result.exit_code == 1
    assert "given twice: give each run once" in " ".join(result.stderr.split())

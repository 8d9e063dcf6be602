"""Run directories: locked, never written over, rewound to a checkpoint."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from poweropd.errors import RunError
from poweropd.runlog import RunDirectory, status_of


def test_a_directory_in_use_is_refused_to_another_process(tmp_path: Path) -> None:
    code = f"from pathlib import Path; from poweropd.runlog import RunDirectory; RunDirectory.open(Path({str(tmp_path)!r}))"
    with RunDirectory.create(tmp_path, "a: 1\n"):
        got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert "is in use by another process" in got.stderr
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_nothing_is_written_over(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path / "run", "a: 1\n") as run:
        run.set_status("finished")
    with pytest.raises(RunError, match="holds a finished run, which is never written over"):
        RunDirectory.create(tmp_path / "run", "b: 1\n")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(RunError, match="holds other files"):
        RunDirectory.create(tmp_path / "mine", "b: 1\n")


def test_a_run_that_made_nothing_gives_its_place_to_the_next(tmp_path: Path) -> None:
    """A misspelt model name: the user mends it and starts again with the same --out."""
    with RunDirectory.create(tmp_path, "a: 1\n") as run:
        run.set_status("failed", error="there is no folder")
    with RunDirectory.create(tmp_path, "b: 1\n") as run:
        run.set_status("running")
        run.append("metrics", {"step": 0})
        run.set_status("failed")
    assert (tmp_path / "recipe.yaml").read_text() == "b: 1\n"
    assert "error" not in json.loads((tmp_path / "manifest.json").read_text())
    with pytest.raises(RunError, match="holds a failed run, which is never written over"):
        RunDirectory.create(tmp_path, "c: 1\n")


def test_a_directory_without_a_run_cannot_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no run to resume"):
        RunDirectory.open(tmp_path)


def test_logs_rewind_to_a_checkpoint(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path, "a: 1\n") as run:
        run.append("metrics", {"step": 0})
        sizes = run.log_sizes()
        run.append("metrics", {"step": 1}, {"step": 2})
        run.append("rollouts", {"text": "é"})
    with RunDirectory.open(tmp_path) as run:
        run.rewind_logs(sizes)
        run.append("metrics", {"step": 1, "again": True})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 0}, {"step": 1, "again": True}]
    assert (tmp_path / "rollouts.jsonl").read_text() == ""


def test_the_manifest_says_where_and_with_what(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path, "a: 1\n") as run:
        run.set_status("running")
        run.set_status("finished", data_fingerprint="abc")
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["status"] == status_of(tmp_path) == "finished"
    assert manifest["data_fingerprint"] == "abc"
    assert {"torch", "transformers", "poweropd"} <= set(manifest["versions"])
    assert manifest["machine"]["cores"] >= 1
    assert status_of(tmp_path / "absent") == "unknown"

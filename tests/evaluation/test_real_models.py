"""Evaluations of real models in real processes: killed and gone on with, and within a training run."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from conftest import RECIPE
from poweropd.cli import app
from poweropd.report.runs import read_run

QUESTION = "State the final answer to the following arithmetic problem: {} + {} ="


def write_problems(path: Path, count: int) -> None:
    rows = [{"problem": QUESTION.format(n % 7 + 1, 3 * n + 2), "answer": str(n % 7 + 3 * n + 3)} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    write_problems(tmp_path / "sums.jsonl", 24)
    settings = ["--samples", "2", "--batch", "8", "--max-new-tokens", "60", "--grading", "exact"]
    return ["evaluate", "quickstart:student", "--data", str(tmp_path / "sums.jsonl"), *settings]


def test_killed_and_started_again_equals_not_killed(command: list[str], tmp_path: Path) -> None:
    run = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "whole")])
    assert run.exit_code == 0, run.output
    broken = [sys.executable, "-m", "poweropd", *command, "--out", str(tmp_path / "broken")]
    process = subprocess.Popen(broken, stdout=subprocess.DEVNULL)
    samples, deadline = tmp_path / "broken" / "sums.jsonl", time.monotonic() + 120
    while not (samples.is_file() and samples.read_bytes()) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = samples.read_text().splitlines()
    assert 8 <= len(before) < 48, "it was not killed in the middle"
    assert not json.loads((tmp_path / "broken" / "sums.json").read_text())["finished"]

    again = subprocess.run(broken, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert samples.read_text().splitlines()[: len(before) // 2 * 2] == before[: len(before) // 2 * 2]
    for name in ("sums.json", "sums.jsonl"):
        assert (tmp_path / "broken" / name).read_text() == (tmp_path / "whole" / name).read_text()


def test_a_run_is_evaluated_on_benchmarks_and_between_on_a_subset(tmp_path: Path) -> None:
    for name in ("aime24", "aime25"):
        write_problems(tmp_path / f"{name}.jsonl", 30)
    settings = [
        "train.steps=2", "train.prompts_per_step=2", "data.limit=20", "sampling.max_new_tokens=8",
        "evaluation.data=null", "evaluation.benchmarks=[aime25, aime24]", f"evaluation.folder={tmp_path}",
        "evaluation.samples=2", "evaluation.subset=3", "evaluation.every=1", f"evaluation.cache={tmp_path / 'cache'}",
    ]  # fmt: skip
    sets = [part for setting in settings for part in ("--set", setting)]
    out = tmp_path / "run"
    run = CliRunner().invoke(app, ["train", str(RECIPE), "--out", str(out), *sets])
    assert run.exit_code == 0, run.output
    asked = {
        place: {name: json.loads((out / "eval" / place / f"{name}.json").read_text()) for name in ("aime24", "aime25")}
        for place in ("teacher", "000000", "000001", "000002")
    }
    assert {place: each["aime24"]["problems"] for place, each in asked.items()} == {
        "teacher": 30, "000000": 30, "000001": 3, "000002": 30,
    }  # fmt: skip
    assert asked["000001"]["aime24"]["correct"].keys() < asked["000000"]["aime24"]["correct"].keys()
    assert asked["000000"]["aime24"]["settings"]["model"] != asked["000002"]["aime24"]["settings"]["model"]
    assert len(list((tmp_path / "cache").glob("*.json"))) == 8
    summary = json.loads((out / "summary.json").read_text())
    assert summary["after"]["aime25"]["title"] == "AIME25"
    assert "AIME24" in (out / "student" / "README.md").read_text()
    assert read_run(out).name == "run"

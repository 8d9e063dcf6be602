"""`poweropd quickstart` as a user runs it, and its comparison of objectives."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from conftest import RECIPE
from poweropd.config import load_recipe
from poweropd.console import ConsoleObserver
from poweropd.quickstart.compare import COMPARED, Arm, train_all

TINY = [
    "train.steps=2",
    "train.prompts_per_step=4",
    "sampling.max_new_tokens=16",
    "data.limit=20",
    "evaluation.data.limit=4",
    "evaluation.samples=2",
]


def arm(name: str, out: Path) -> Arm:
    return Arm(name, load_recipe(RECIPE, [*COMPARED[name], *TINY]), out / name)


def test_arms_share_prompts_and_evaluations_and_one_that_fails_costs_only_itself(tmp_path: Path) -> None:
    """Real processes. The third arm cannot run: its place is taken."""
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "mine.txt").write_text("not a run")
    arms = [arm(name, tmp_path) for name in ("power 5", "log_ratio", "clip", "sft")]
    console = Console(record=True, width=200, force_terminal=False)
    with ConsoleObserver(console) as observer:
        runs = train_all(arms, observer)
    assert [run.name for run in runs] == ["power 5", "log_ratio", "sft"]
    said = console.export_text()
    assert said.count("warning: clip: ") == said.count("clip holds other files") == 1
    assert said.count("evaluate teacher 4/4") == said.count("evaluate student before 4/4") == 1
    assert all(f"{run.name} 2/2" in said for run in runs)
    first = [{line["prompt"] for line in run.rollouts if line["step"] == 0} for run in runs]
    assert first[0] == first[1] == first[2]
    assert runs[0].evaluations[0] == runs[1].evaluations[0]
    assert runs[0].metrics[0]["log_ratio/min"] == runs[1].metrics[0]["log_ratio/min"]  # the same samples too
    assert runs[0].metrics[0]["reward/min"] != runs[1].metrics[0]["reward/min"]


def test_the_first_arm_that_fails_ends_the_comparison(tmp_path: Path) -> None:
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "mine.txt").write_text("not a run")
    with ConsoleObserver(Console(quiet=True)) as observer, pytest.raises(Exception, match="sft"):
        train_all([arm("sft", tmp_path)], observer)


@pytest.mark.slow
def test_the_quickstart_brings_the_student_closer_to_the_teacher(tmp_path: Path) -> None:
    """The whole command, on the terms the README promises; improvement beyond both intervals."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "poweropd", "quickstart", "--out", str(out)]
    got = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1500)
    assert got.returncode == 0, got.stderr
    summary = json.loads((out / "summary.json").read_text())
    before, after, teacher = (summary[name]["held_out"] for name in ("before", "after", "teacher"))
    for evaluation in (before, after, teacher):
        assert {"avg_at_8", "pass_at_8", "mean_length", "truncation"} <= evaluation.keys()
    assert teacher["avg_at_8"] >= 0.85
    assert 0.2 <= before["avg_at_8"] <= 0.5
    assert after["intervals"]["avg_at_8"][0] > before["intervals"]["avg_at_8"][1]
    assert after["mean_length"] < before["mean_length"]
    assert "What to try next" in got.stdout
    assert (out / "report.html").is_file()


ORPHAN = """
import multiprocessing, sys, threading, time
from poweropd.quickstart.compare import _end_with_parent

def arm():
    threading.Thread(target=_end_with_parent, daemon=True).start()
    time.sleep(600)

if __name__ == "__main__":
    process = multiprocessing.get_context("spawn").Process(target=arm)
    process.start()
    print(process.pid, flush=True)
    process.join()
"""


def test_a_killed_comparison_leaves_no_arm_behind(tmp_path: Path) -> None:
    script = tmp_path / "orphan.py"
    script.write_text(ORPHAN)
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    arm = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and _is_running(arm):
        time.sleep(0.05)
    assert not _is_running(arm)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{process}/stat").read_text().split()[2] if Path("/proc").is_dir() else True

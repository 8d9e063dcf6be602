"""How long it takes to begin: seconds by the clock on the wall, each start in a process of its own."""

import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from suite.shapes import ROOT
from suite.turns import Turns

HELP = [sys.executable, "-m", "poweropd", "--help"]
UNEVALUATED = ["--set", "evaluation.data=null"]


def measure(turns: Turns) -> None:
    """`poweropd --help`, the first line and the first step of a quickstart, and the import of a TRL trainer."""
    peers = os.environ.get("BENCHMARK_PEERS")
    for turn in range(turns.count):
        turns.begin()
        found = {"help": whole(HELP), "first step, unevaluated": first_step(UNEVALUATED)}
        if turn == 0:  # both models' evaluations take long
            found["first step"] = first_step([])
        if peers:
            found["trl import"] = whole([peers, "-c", "from trl import DistillationTrainer"])
        turns.end(seconds=found)


def whole(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def first_step(settings: list[str]) -> float:
    """Until the first training step of the quickstart's recipe is reported.

    Args:
        settings: none: as `poweropd quickstart` runs it, with both models evaluated before.
    """
    recipe = ROOT / "recipes" / "quickstart.yaml"
    with TemporaryDirectory() as folder:
        out = str(Path(folder) / "run")
        command = [sys.executable, "-m", "poweropd"]
        command += ["train", str(recipe), "--out", out, *settings] if settings else ["quickstart", "--out", out]
        start = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as running:
            assert running.stdout is not None
            for line in running.stdout:
                if "train 1/" in line:
                    break
            seconds = time.perf_counter() - start
            running.kill()
    return seconds

"""Several processes train as one does: real ones, started by torchrun, on 127.0.0.1."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import RECIPE
from every_rank import run

SMALL = [
    "train.steps=3",
    "train.prompts_per_step=7",
    "train.tokens_per_micro_batch=200",
    "sampling.max_new_tokens=16",
    "data.limit=60",
    "evaluation.data=null",
    "log.rollouts_every=1",
    "checkpoint.every=2",
]
OBJECTIVES = {
    "sampled": ["objective={name: power, alpha: 5, normalize: zscore}"],
    "top_k": ["objective={name: forward_kl, estimator: top_k}"],
    "full": ["objective={name: reverse_kl}"],
    "selected by entropy": ["objective={name: reopold}"],
    "with others of the prompt, reference and golden answers": [
        "objective={name: log_ratio, baseline: leave_one_out, reference_kl: 0.1, golden: 0.1}",
        "sampling.samples_per_prompt=2",
    ],
}
SHARDED = ["train.sharding=fsdp"]
EXACT, HALF = 1e-5, 2e-2
Job = tuple[str | None, list[str], str]


def started(folder: Path, jobs: Sequence[Job], processes: int) -> subprocess.Popen:
    """torchrun with jobs for every rank, one after the other."""
    plan = folder / "jobs.json"
    plan.write_text(json.dumps(jobs))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.Popen(
        [*launcher, str(Path(__file__).with_name("every_rank.py")), str(plan)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def together(folder: Path, jobs: Sequence[Job], processes: int = 2) -> str:
    process = started(folder, jobs, processes)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def metrics(out: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("time/", "tokens_per", "memory/"))} for line in lines]


def assert_same_run(out: Path, alone: Path, tolerance: float = EXACT) -> None:
    """Every metric of every step, and the weights at the end."""
    steps, expected = metrics(out), metrics(alone)
    assert len(steps) == len(expected)
    for got, wanted in zip(steps, expected, strict=True):
        assert got.keys() == wanted.keys()
        for key, value in wanted.items():
            assert got[key] == pytest.approx(value, rel=tolerance, abs=tolerance / 10), (wanted["step"], key)
    weights, others = (load_file(folder / "student" / "model.safetensors") for folder in (out, alone))
    assert weights.keys() == others.keys()
    for name, weight in others.items():
        assert (weights[name] - weight).norm() <= tolerance * weight.norm(), name

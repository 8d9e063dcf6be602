"""A real process, killed and resumed, ends with the very parameters of the run that was not killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import CHAT_END, END, RECIPE
from recording import lasting_metrics

COMMAND = [sys.executable, "-m", "poweropd", "train"]
SETTINGS = [
    "train.steps=6",
    "train.prompts_per_step=8",
    "train.seed=3",
    "train.tokens_per_micro_batch=400",
    "checkpoint.every=2",
    "log.rollouts_every=2",
    "sampling.max_new_tokens=24",
    "data.limit=60",
    "evaluation.data.limit=4",
    "evaluation.samples=2",
    "evaluation.every=3",
]
SETS = [part for setting in SETTINGS for part in ("--set", setting)]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def start(out: Path, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [*COMMAND, *arguments, "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=ENVIRONMENT,
    )


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "student" / "model.safetensors")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("unbroken") / "run"
    finish(start(out, str(RECIPE), *SETS))
    return out


def steps_logged(out: Path) -> int:
    path = out / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.is_file() else 0


MOMENTS: dict[str, Callable[[Path], bool]] = {
    "before any checkpoint": lambda out: steps_logged(out) >= 1,
    "between checkpoints": lambda out: steps_logged(out) >= 3,
    "while a checkpoint is written": lambda out: any((out / "checkpoints").glob(".step-*.partial")),
    "during the evaluation in the middle": lambda out: steps_logged(out) >= 3 and not (out / "eval/000003").exists(),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_resumed_equals_not_killed(moment: str, unbroken: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(out, str(RECIPE), *SETS)
    while not MOMENTS[moment](out) and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (out / "summary.json").exists(), "the run ended before it could be killed"

    finish(start(out, "--resume"))
    expected, got = weights(unbroken), weights(out)
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert lasting_metrics(out) == lasting_metrics(unbroken)
    for name in ("rollouts.jsonl", "positions.jsonl", "distributions.jsonl", "eval/000006/held_out.jsonl"):
        assert (out / name).read_text() == (unbroken / name).read_text(), name
    summaries = [json.loads((run / "summary.json").read_text()) for run in (unbroken, out)]
    for summary in summaries:
        summary.pop("seconds")
    assert summaries[0] == summaries[1]


def test_interrupt_saves_and_resumes(unbroken: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(out, str(RECIPE), *SETS)
    while steps_logged(out) < 1:
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 130, output
    assert "stopping after this step" in output
    assert "Traceback" not in output
    assert json.loads((out / "manifest.json").read_text())["status"] == "interrupted"
    finish(start(out, "--resume"))
    assert all(torch.equal(a, b) for a, b in zip(weights(unbroken).values(), weights(out).values(), strict=True))


def test_a_finished_run_is_neither_repeated_nor_written_over(unbroken: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in unbroken.rglob("*.safetensors")}
    assert "is finished, all 6 steps" in finish(start(unbroken, "--resume"))
    again = start(unbroken, str(RECIPE), *SETS)
    output, _ = again.communicate(timeout=300)
    assert again.returncode == 1
    assert "holds a finished run, which is never written over" in output
    assert {path: path.stat().st_mtime_ns for path in unbroken.rglob("*.safetensors")} == before


def test_a_finished_run_can_be_made_longer(unbroken: Path, tmp_path: Path) -> None:
    """Six steps and one more are seven steps, since the schedule is constant."""
    out = tmp_path / "longer"
    shutil.copytree(unbroken, out)
    finish(start(out, "--resume", "--set", "train.steps=7"))
    direct = tmp_path / "direct"
    finish(start(direct, str(RECIPE), *SETS, "--set", "train.steps=7"))
    assert all(torch.equal(a, b) for a, b in zip(weights(direct).values(), weights(out).values(), strict=True))


def test_resume_refuses_another_recipe(unbroken: Path) -> None:
    process = start(unbroken, "--resume", "--set", "optimizer.lr=1")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "was started otherwise. On --resume only train.steps" in output


def test_a_damaged_checkpoint_is_named(unbroken: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(unbroken, out)
    (out / "summary.json").unlink()
    state = out / "checkpoints" / "step-000006" / "state.pt"
    state.write_bytes(state.read_bytes()[:-100])
    process = start(out, "--resume")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "step-000006 is damaged" in output
    assert "the last good one is step-000004" in output
    shutil.rmtree(state.parent)
    finish(start(out, "--resume"))
    assert all(torch.equal(a, b) for a, b in zip(weights(unbroken).values(), weights(out).values(), strict=True))


def test_the_student_loads_with_transformers_alone(unbroken: Path) -> None:
    folder = unbroken / "student"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert set(model.generation_config.eos_token_id) == {END, CHAT_END}
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Solve 2 + 2"}], add_generation_prompt=True, return_tensors="pt"
    )
    assert model.generate(**prompt, max_new_tokens=5).shape[1] > prompt["input_ids"].shape[1]
    card = (folder / "README.md").read_text()
    assert "base_model: quickstart:student" in card
    assert "power alpha=5" in card
    assert "| after |" in card


def test_the_run_directory_is_the_whole_record(unbroken: Path) -> None:
    names = {path.name for path in unbroken.iterdir()}
    assert {
        "recipe.yaml",
        "manifest.json",
        "metrics.jsonl",
        "rollouts.jsonl",
        "positions.jsonl",
        "distributions.jsonl",
        "summary.json",
        "report.html",
    } <= names
    summary = json.loads((unbroken / "summary.json").read_text())
    for when in ("before", "after", "teacher"):
        assert {"avg_at_2", "pass_at_2", "mean_length", "truncation"} <= summary[when]["held_out"].keys()
    assert summary["seconds"] > 0
    manifest = json.loads((unbroken / "manifest.json").read_text())
    assert manifest["status"] == "finished"
    rollout = json.loads((unbroken / "rollouts.jsonl").read_text().splitlines()[0])
    assert len(rollout["tokens"]) == len(rollout["weights"]) == len(rollout["teacher_logprobs"])


def test_a_student_held_by_reference_and_golden_answers_resumes_too(tmp_path: Path) -> None:
    """The reference is the student before the first step, and its coefficient is where it was."""
    held = [
        "train.steps=5",
        "evaluation.data=null",
        "objective={name: log_ratio, reference_kl: 0.5, reference_kl_schedule: adaptive, reference_kl_target: 1.0e-4, "
        "golden: 0.1, golden_schedule: linear, discount: 0.5}",
        "rollout.sources={student: 0.5, teacher: 0.3, golden: 0.2}",
    ]
    sets = [*SETS, *(part for setting in held for part in ("--set", setting))]
    finish(start(tmp_path / "unbroken", str(RECIPE), *sets))
    out = tmp_path / "run"
    process = start(out, str(RECIPE), *sets)
    while steps_logged(out) < 3 and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (out / "summary.json").exists(), "the run ended before it could be killed"
    finish(start(out, "--resume"))
    assert lasting_metrics(out) == lasting_metrics(tmp_path / "unbroken")
    coefficients = [line["reference_kl/coefficient"] for line in lasting_metrics(out)]
    assert len(set(coefficients)) == 5  # it did move, and went on from where it was
    golden = [line.get("golden/coefficient", 0.0) for line in lasting_metrics(out)]
    assert golden == pytest.approx([0.1, 0.075, 0.05, 0.025, 0.0])

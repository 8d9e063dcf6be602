"""Several processes train as one does: real ones, started by torchrun, on 127.0.0.1."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from safetensors.torch import load_file

from conftest import RECIPE
from every_rank import run
from poweropd.batching import shared_out
from poweropd.config import load_recipe
from poweropd.errors import ConfigError, RunError
from poweropd.types import Prompt, Rollout
from recording import lasting_metrics

SMALL = [
    "train.steps=3",
    "train.prompts_per_step=7",
    "train.tokens_per_micro_batch=200",
    "sampling.max_new_tokens=16",
    "data.limit=60",
    "evaluation.data=null",
    "log.rollouts_every=1",
    "checkpoint.every=1",
    "checkpoint.keep=9",
]
SHARDED = ["train.sharding=fsdp"]
EXACT = 1e-5  # relative
ROUNDING = 4e-6  # of numbers that are differences of larger ones
CASES = {
    "sampled": ["objective={name: power, alpha: 5, normalize: zscore}"],
    "top_k": ["objective={name: forward_kl, estimator: top_k}"],
    "full": ["objective={name: reverse_kl}"],
}
FURTHER = {
    "tokens selected by entropy": ["objective={name: reopold, switch: 0}"],
    "baseline of other samples, reference, golden answers": [
        "objective={name: log_ratio, baseline: leave_one_out, reference_kl: 0.1, golden: 0.1}",
        "sampling.samples_per_prompt=2",
    ],
    "fewer prompts than processes": ["train.prompts_per_step=1"],
    "recomputed activations": ["student.gradient_checkpointing=true"],
    "drawn ahead": ["rollout.max_staleness=2"],
    "adapters": ["student.lora={rank: 4}"],
    "evaluations": [
        "evaluation.data={source: reasoning_gym, families: {gcd: {}}, prompt: question, split: held_out, limit: 5}",
        "evaluation.every=2",
    ],
}
HALF_PRECISION = ["student.precision=bfloat16", "rollout.sources={golden: 1}"]  # rounding would draw other answers
GONE = "one of the 2 processes of this run is gone, or cannot be reached; go on with --resume"
Job = tuple[str | None, list[str], str]


def started(folder: Path, jobs: Sequence[Sequence], processes: int = 2) -> subprocess.Popen:
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


def errors(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("error: ")]


def together(folder: Path, jobs: Sequence[Job], processes: int = 2) -> str:
    process = started(folder, jobs, processes)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def assert_same_run(out: Path, alone: Path) -> None:
    """Every metric of every step, and the weights at the end."""
    steps, expected = lasting_metrics(out), lasting_metrics(alone)
    assert len(steps) == len(expected)
    for got, wanted in zip(steps, expected, strict=True):
        assert got.keys() == wanted.keys()
        for key, value in wanted.items():
            close = pytest.approx(value, rel=EXACT, abs=ROUNDING)
            assert got[key] == close, (wanted["step"], key)
    weights, others = (load_file(folder / "student" / "model.safetensors") for folder in (out, alone))
    assert weights.keys() == others.keys()
    for name, weight in others.items():
        assert (weights[name] - weight).norm() <= EXACT * weight.norm(), name


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case by this process."""
    folder = tmp_path_factory.mktemp("alone")
    for name, settings in CASES.items():
        run(str(RECIPE), [*SMALL, *settings], str(folder / name))
    return folder


@pytest.fixture(scope="module")
def two(alone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cases by two processes, whole and sharded, the teacher too; what is resumed there; and last, one is killed."""
    folder = tmp_path_factory.mktemp("two")
    jobs: list[Job] = []
    for name, settings in CASES.items():
        jobs.append((str(RECIPE), [*SMALL, *settings], str(folder / name)))
        sharded = [*SHARDED, "teacher.sharding=fsdp"]
        jobs.append((str(RECIPE), [*SMALL, *settings, *sharded], str(folder / f"{name} sharded")))
    for name, settings in {"resumed": [], "resumed sharded": SHARDED}.items():
        copy_at(alone / "sampled", folder / name, step=2)
        jobs.append((None, settings, str(folder / name)))
    fail_together(folder, [*jobs, failing(folder / "failed", "kill")], GONE)
    return folder


def failing(out: Path, kind: str) -> tuple:
    """A job of which the second process fails after the second step."""
    return str(RECIPE), [*SMALL, *CASES["full"], *SHARDED], str(out), (1, 2, kind)


def fail_together(folder: Path, jobs: Sequence[Sequence], line: str) -> None:
    """Jobs of which the last one fails: all processes end by themselves, and one of them says why."""
    process = started(folder, jobs)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1, output
    assert errors(output) == [f"error: {line}"], output
    assert "[rank" not in output, "a traceback of a process"


def copy_at(run: Path, to: Path, step: int) -> None:
    """A run as it was when that many steps had been saved."""
    shutil.copytree(run, to)
    (to / "summary.json").unlink()
    for checkpoint in (to / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)


@pytest.mark.parametrize("how", ["", " sharded"])
@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one_does(name: str, how: str, alone: Path, two: Path) -> None:
    assert_same_run(two / f"{name}{how}", alone / name)


@pytest.mark.parametrize("name", ["resumed", "resumed sharded"])
def test_a_run_of_one_process_is_resumed_by_two(name: str, alone: Path, two: Path) -> None:
    assert_same_run(two / name, alone / "sampled")


def test_a_sharded_run_of_two_processes_is_resumed_by_one(alone: Path, two: Path, tmp_path: Path) -> None:
    copy_at(two / "full sharded", tmp_path / "run", step=1)
    run(None, [], str(tmp_path / "run"))
    assert_same_run(tmp_path / "run", alone / "full")


def test_one_record_is_kept(alone: Path, two: Path) -> None:
    for name in ("rollouts.jsonl", "positions.jsonl", "distributions.jsonl"):
        logs = [[json.loads(line) for line in (run / "full" / name).read_text().splitlines()] for run in (alone, two)]
        assert [line["step"] for line in logs[0]] == [line["step"] for line in logs[1]], name
    responses = [
        [line["tokens"] for line in map(json.loads, (run / "full/rollouts.jsonl").open())] for run in (alone, two)
    ]
    assert responses[0] == responses[1]
    assert json.loads((two / "full" / "manifest.json").read_text())["status"] == "finished"


def test_a_sharded_checkpoint_of_another_model_or_with_damage_is_refused(two: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    copy_at(two / "full sharded", out, step=2)
    recipe = out / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("quickstart:student", "quickstart:teacher"))
    with pytest.raises(
        RunError, match=r"the checkpoint is of another model: .* is \(512, \d+\) in it and \(512, \d+\)"
    ):
        run(None, [], str(out))
    shard = next((out / "checkpoints" / "step-000002" / "shards").glob("__1_*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(
        RunError, match=r"damaged: shards/__1_0.distcp does not match its hash.*last good one is step-000001"
    ):
        run(None, [], str(out))


def assert_goes_on(out: Path, line: str, alone: Path) -> None:
    assert json.loads((out / "manifest.json").read_text())["error"] == line
    run(None, [], str(out))
    assert_same_run(out, alone / "full")


def test_when_one_process_is_killed_all_end_and_the_run_goes_on(alone: Path, two: Path) -> None:
    assert_goes_on(two / "failed", GONE, alone)


@pytest.mark.slow
def test_an_error_of_one_process_is_the_one_line_of_all(alone: Path, tmp_path: Path) -> None:
    line = "no room after step 2"
    fail_together(tmp_path, [failing(tmp_path / "failed", "raise")], line)
    assert_goes_on(tmp_path / "failed", line, alone)


@pytest.mark.slow
def test_a_signal_to_the_launcher_stops_all_after_the_step(alone: Path, tmp_path: Path) -> None:
    """Steps enough to be still at it; then it goes on to the fourth."""
    out = tmp_path / "run"
    process = started(tmp_path, [(str(RECIPE), [*SMALL, *CASES["full"], "train.steps=400"], str(out))])
    while not (out / "metrics.jsonl").is_file() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert "interrupted" in output
    assert errors(output) == []
    assert json.loads((out / "manifest.json").read_text())["status"] == "interrupted"
    done = len(lasting_metrics(out))
    assert 0 < done < 400
    together(tmp_path, [(None, [f"train.steps={done + 1}"], str(out))])
    assert len(lasting_metrics(out)) == done + 1


@pytest.mark.slow
def test_further_cases_by_two_and_four_processes(tmp_path: Path) -> None:
    for name, settings in FURTHER.items():
        run(str(RECIPE), [*SMALL, *settings], str(tmp_path / name))
    for processes in (2, 4):
        ways = {"": [], " sharded": SHARDED}
        folders = {f"{name}{way} by {processes}": (name, more) for name in FURTHER for way, more in ways.items()}
        jobs = [
            (str(RECIPE), [*SMALL, *FURTHER[name], *more], str(tmp_path / to)) for to, (name, more) in folders.items()
        ]
        together(tmp_path, jobs, processes)
        for to, (name, _) in folders.items():
            assert_same_run(tmp_path / to, tmp_path / name)
        if processes == 2:
            continue
        evaluation = "eval/000002/held_out.jsonl"
        assert (tmp_path / "evaluations by 4" / evaluation).read_text() == (
            tmp_path / "evaluations" / evaluation
        ).read_text()


@pytest.mark.slow
def test_half_precision(tmp_path: Path) -> None:
    run(str(RECIPE), [*SMALL, *HALF_PRECISION], str(tmp_path / "alone"))
    jobs = [
        (str(RECIPE), [*SMALL, *HALF_PRECISION, *more], str(tmp_path / name))
        for name, more in {"two": [], "two sharded": SHARDED}.items()
    ]
    together(tmp_path, jobs)
    expected = lasting_metrics(tmp_path / "alone")
    for name in ("two", "two sharded"):
        for got, wanted in zip(lasting_metrics(tmp_path / name), expected, strict=True):
            for key in ("loss", "grad_norm", "entropy/student", "reward/mean"):
                assert got[key] == pytest.approx(wanted[key], rel=2e-2), key


@pytest.mark.slow
def test_a_run_goes_from_one_number_of_processes_to_another(alone: Path, two: Path, tmp_path: Path) -> None:
    """Sharded by two, one step by four, the last one whole by two."""
    out = tmp_path / "run"
    copy_at(two / "sampled sharded", out, step=1)
    together(tmp_path, [(None, ["train.steps=2"], str(out))], processes=4)
    together(tmp_path, [(None, ["train.steps=3", "train.sharding=none"], str(out))], processes=2)
    assert_same_run(out, alone / "sampled")


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (["rollout.sources={teacher: 1}"], "teacher is sharded and only scores; leave it out, or use sharding: none"),
        (["teacher.cache=scores"], "leave out engine, quantization, offload and cache"),
    ],
)
def test_what_a_sharded_teacher_cannot_do_is_refused(settings: list[str], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        load_recipe(RECIPE, ["teacher.sharding=fsdp", *settings])


def test_rollouts_are_shared_out_by_tokens_and_prompts_stay_together() -> None:
    def rollout(prompt: str, tokens: int) -> Rollout:
        return Rollout(Prompt(prompt, (1,)), (5,) * tokens, (0.0,) * tokens, "length")

    rollouts = [rollout("a", 9), rollout("a", 1), rollout("b", 4), rollout("c", 5), rollout("d", 1)]
    assert shared_out(rollouts, 1) == [[0, 1, 2, 3, 4]]
    assert shared_out(rollouts, 2) == [[0, 1], [2, 3, 4]]
    assert shared_out(rollouts[:2], 3) == [[0, 1], [], []]

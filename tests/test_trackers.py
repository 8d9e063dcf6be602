"""Trackers: what a run logs is what they show, resumed or not; and nothing they do can hurt it."""

import json
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from conftest import RECIPE, ROOT
from poweropd import trackers
from poweropd.config import load_recipe
from poweropd.errors import ConfigError
from poweropd.runlog import MANIFEST, Status
from poweropd.trackers import Guarded, require
from poweropd.train import train

SETTINGS = [
    "train.steps=6",
    "train.prompts_per_step=2",
    "sampling.max_new_tokens=12",
    "data.limit=20",
    "evaluation.data.limit=2",
    "evaluation.samples=2",
    "evaluation.every=2",
    "checkpoint.every=3",
    "log.project=a-project",
]
STEPS = list(range(1, 7))
EVALUATIONS = [0, 2, 4, 6]


class Watcher:
    """Keeps what it is told, and pulls the plug after `stop_after` steps."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.said: list[str] = []
        self.warnings: list[str] = []
        self._stop_after = stop_after

    def say(self, text: str) -> None:
        self.said.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def on_evaluation(self, name: str, done: int, total: int, accuracy: float | None) -> None: ...

    def on_step(self, step: int, steps: int, metrics: dict[str, float]) -> None:
        if step == self._stop_after:
            raise KeyboardInterrupt


def run(out: Path, *names: str) -> Watcher:
    watcher = Watcher()
    train(load_recipe(RECIPE, [*SETTINGS, f"log.trackers=[{','.join(names)}]"]), out, watcher)
    return watcher


def run_and_resume(out: Path, *names: str) -> Watcher:
    """Stopped at once in step 5, after the evaluation at step 4; resumed from the checkpoint of step 3."""
    recipe = load_recipe(RECIPE, [*SETTINGS, f"log.trackers=[{','.join(names)}]"])
    with pytest.raises(KeyboardInterrupt):
        train(recipe, out, Watcher(stop_after=5))
    watcher = Watcher()
    train(recipe, out, watcher, resume=True)
    return watcher


def logged(out: Path) -> dict[str, dict[int, float]]:
    """Every metric by steps taken, as the run directory has it; some are not there in every step."""
    found: dict[str, dict[int, float]] = {}
    for line in (out / "metrics.jsonl").read_text().splitlines():
        metrics = json.loads(line)
        step = metrics.pop("step") + 1
        for name, value in metrics.items():
            found.setdefault(name, {})[step] = value
    return found


def measured(out: Path, measure: str) -> list[float]:
    return [json.loads((out / f"eval/{step:06d}/held_out.json").read_text())[measure] for step in EVALUATIONS]


def events(out: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(out / "tensorboard"))
    accumulator.Reload()
    return accumulator


@pytest.mark.parametrize("how", [run, run_and_resume])
def test_tensorboard_shows_what_the_run_logged(how: Callable[..., Watcher], tmp_path: Path) -> None:
    out = tmp_path / "run"
    watcher = how(out, "tensorboard")
    assert not watcher.warnings
    assert f"tensorboard: tensorboard --logdir {out / 'tensorboard'}" in watcher.said
    read = events(out)
    metrics = logged(out)
    assert set(metrics) <= set(read.Tags()["scalars"])
    assert list(metrics["loss"]) == STEPS
    for name, values in metrics.items():
        shown = read.Scalars(name)
        assert [(event.step, event.value) for event in shown] == [
            (step, np.float32(value)) for step, value in values.items()
        ], name
    for measure in ("avg_at_2", "pass_at_2", "mean_length", "truncation"):
        shown = read.Scalars(f"eval/held_out/{measure}")
        assert [event.step for event in shown] == EVALUATIONS
        assert [event.value for event in shown] == [np.float32(value) for value in measured(out, measure)]
        assert [event.step for event in read.Scalars(f"eval/teacher/held_out/{measure}")] == [0]
    assert b"prompts_per_step: 2" in read.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0]


def test_a_tracked_run_is_the_same_run(tmp_path: Path) -> None:
    run(tmp_path / "tracked", "tensorboard")
    run(tmp_path / "alone")
    assert not (tmp_path / "alone" / "tensorboard").exists()
    lines = [
        [
            {
                name: value
                for name, value in json.loads(line).items()
                if not name.startswith(("time/", "tokens_per", "memory/"))
            }
            for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        ]
        for name in ("tracked", "alone")
    ]
    assert lines[0] == lines[1]
    weights = [(tmp_path / name / "student" / "model.safetensors").read_bytes() for name in ("tracked", "alone")]
    assert weights[0] == weights[1]


class Broken:
    """A network that is down."""

    address = "nowhere"

    def __init__(self, *_: object) -> None: ...

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        raise ConnectionError("no route to host")

    def finish(self, status: Status) -> None:
        raise ConnectionError("no route to host")


def test_a_tracker_that_fails_is_warned_of_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(trackers.TRACKERS, "trackio", Broken)
    monkeypatch.setattr("poweropd.train.require", lambda names: None)  # it is not the package that is used
    watcher = run(tmp_path / "run", "trackio", "tensorboard")
    assert len(watcher.warnings) == 1
    assert (
        "trackio fails, and may lack metrics; metrics.jsonl has them all (ConnectionError: no route"
        in watcher.warnings[0]
    )
    assert json.loads((tmp_path / "run" / MANIFEST).read_text())["status"] == "finished"
    assert [event.step for event in events(tmp_path / "run").Scalars("loss")] == STEPS  # the other one goes on


def test_a_tracker_that_hangs_keeps_nobody_waiting() -> None:
    release, seen = threading.Event(), []

    class Stuck(Broken):
        def log(self, step: int, metrics: Mapping[str, float]) -> None:
            release.wait(60)
            seen.append((step, metrics["loss"]))

        def finish(self, status: Status) -> None:
            seen.append(status)

    warnings: list[str] = []
    guarded = Guarded("stuck", Stuck(), warnings.append)
    metrics = {"loss": 1.0}
    for step in range(3):
        guarded.log(step, metrics)
        metrics["loss"] += 1  # what is logged is what it was then
    guarded.finish("failed", seconds=0.05)
    assert seen == []
    assert warnings == ["stuck has not finished after 0.05 s; what it shows may lack the end of the run"]
    release.set()
    guarded._thread.join(60)
    assert seen == [(0, 1.0), (1, 2.0), (2, 3.0), "failed"]


@pytest.mark.parametrize(
    ("error", "status"), [(None, "finished"), (KeyboardInterrupt, "interrupted"), (ValueError, "failed")]
)
def test_a_tracker_is_told_how_the_run_ended(
    error: type[BaseException] | None, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    class Listener(Broken):
        def finish(self, status: Status) -> None:
            told.append(status)

    monkeypatch.setitem(trackers.TRACKERS, "wandb", Listener)
    recipe = load_recipe(RECIPE, ["log.trackers=[wandb, wandb]"])  # named twice, opened once
    try:
        with trackers.Trackers(recipe, None, Watcher(), resume=False) as opened:  # type: ignore[arg-type]
            opened.start(0)
            if error:
                raise error
    except (KeyboardInterrupt, ValueError):
        pass
    assert told == [status]


@pytest.fixture
def _nothing_installed(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the folder the user stands in, where the runs of wandb lie in a folder of that name."""
    (own_folder / "wandb").mkdir()
    for name in trackers.TRACKERS:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "path", [str(own_folder)])


@pytest.mark.usefixtures("_nothing_installed")
def test_what_is_not_installed_is_said_before_anything_starts(own_folder: Path) -> None:
    recipe = load_recipe(RECIPE, ["log.trackers=[wandb, tensorboard]"])
    with pytest.raises(ConfigError) as error:
        train(recipe, own_folder / "run", Watcher())
    assert str(error.value) == (
        "log.trackers: not installed: wandb, tensorboard. Install with: pip install wandb tensorboard; or leave them out"
    )
    assert not (own_folder / "run").exists()


def test_what_is_installed_or_not_asked_for_passes() -> None:
    require([])
    require(["tensorboard"])


def test_unknown_trackers_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"log\.trackers\.0: input should be 'tensorboard', 'wandb' or 'trackio'"):
        load_recipe(RECIPE, ["log.trackers=[mlflow]"])


def test_a_tracker_that_cannot_start_stops_the_run_before_its_first_step(tmp_path: Path) -> None:
    class Blocker(Watcher):
        def say(self, text: str) -> None:
            (tmp_path / "run" / "tensorboard").touch()  # a file where event files would have their folder

    recipe = load_recipe(RECIPE, [*SETTINGS, "log.trackers=[tensorboard]"])
    with pytest.raises(
        ConfigError, match=r"log\.trackers: tensorboard cannot start: .*; leave it out of log\.trackers"
    ):
        train(recipe, tmp_path / "run", Blocker())
    assert not (tmp_path / "run" / "eval").exists()


def installed(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(find_spec(name) is None, reason=f"{name} is not installed: pip install {name}")


def wandb_records(file: Path) -> Iterator[object]:
    """The records of a .wandb file: a header of 7 bytes, then LevelDB's log format of 32 KiB blocks."""
    from wandb.proto import wandb_internal_pb2

    data, place, parts = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:  # the rest of a block that no record fits in
            place += left
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # full, last
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


@installed("wandb")
def test_wandb_goes_on_with_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    out = tmp_path / "my-run"
    watcher = run_and_resume(out, "wandb")
    assert not watcher.warnings
    sessions, identities, exits = [], set(), []
    for file in sorted(out.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime):
        rows = {}
        for record in wandb_records(file):
            kind = record.WhichOneof("record_type")  # type: ignore[attr-defined]
            if kind == "run":
                identities.add((record.run.run_id, record.run.display_name, record.run.project))  # type: ignore[attr-defined]
            elif kind == "exit":
                exits.append(record.exit.exit_code)  # type: ignore[attr-defined]
            elif kind == "history":
                items = {
                    "/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item
                }  # type: ignore[attr-defined]
                rows[record.history.step.num] = items  # type: ignore[attr-defined]
        sessions.append(rows)
    assert identities == {(json.loads((out / MANIFEST).read_text())["wandb_id"], "my-run", "a-project")}
    assert exits == [1, 0]
    first, second = sessions
    assert list(first) == [0, 1, 2, 3, 4, 5]
    assert list(second) == [4, 5, 6]
    assert {step: row["loss"] for step, row in (first | second).items() if step} == logged(out)["loss"]
    assert [(first | second)[step]["eval/held_out/avg_at_2"] for step in EVALUATIONS] == measured(out, "avg_at_2")
    assert "eval/teacher/held_out/avg_at_2" in first[0]


@installed("trackio")
def test_trackio_goes_on_with_the_same_run(tmp_path: Path) -> None:
    """In processes of their own: trackio decides on import where it keeps its runs."""
    out = tmp_path / "my-run"
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT / "src"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    )
    code = f"from pathlib import Path; import test_trackers as t; assert not t.run_and_resume(Path({str(out)!r}), 'trackio').warnings"

    def python(*arguments: str) -> str:
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def points(metric: str) -> list[tuple[int, float]]:
        place = ["--project", "a-project", "--run", "my-run", "--metric", metric]
        values = json.loads(python("-m", "trackio.cli", "get", "metric", *place, "--json"))["values"]
        return [(point["step"], point["value"]) for point in values]

    assert "Resumed existing run: my-run" in python("-c", code)
    losses = list(logged(out)["loss"].items())
    assert points("loss") == losses[:5] + losses[3:]  # steps 4 and 5 were taken twice, with the same result
    accuracies = list(zip(EVALUATIONS, measured(out, "avg_at_2"), strict=True))
    assert points("eval/held_out/avg_at_2") == accuracies[:3] + accuracies[2:]
    assert [step for step, _ in points("eval/teacher/held_out/avg_at_2")] == [0]

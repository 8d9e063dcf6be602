"""A run directory: the record of a run, and the only thing that reporting reads."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Self, TextIO

from poweropd.errors import RunError
from poweropd.locking import locked

Status = Literal["running", "finished", "interrupted", "failed"]
LOGS = ("metrics", "rollouts", "positions", "distributions")
RECIPE, MANIFEST, SUMMARY, LOCK = "recipe.yaml", "manifest.json", "summary.json", ".lock"
CHECKPOINTS, STUDENT = "checkpoints", "student"


class RunDirectory:
    """An open run directory, locked against other processes until `close`.

    Attributes:
        path: the directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = locked(path / LOCK, str(path))
        self._logs: dict[str, TextIO] = {}

    @classmethod
    def create(cls, path: Path, recipe_yaml: str) -> Self:
        """Start a new run, in a new directory or in one whose run ended before it made anything.

        Raises:
            RunError: there is something in the directory already, or it cannot be made.
        """
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"cannot make run directory {path}: {error.strerror}") from None
        names = {entry.name for entry in path.iterdir()} - {LOCK}
        made_nothing = names <= {RECIPE, MANIFEST} and status_of(path) in ("failed", "interrupted")
        if names and not made_nothing:
            what = f"a {status_of(path)} run" if MANIFEST in names else "other files"
            raise RunError(f"{path} holds {what}, which is never written over. Use --resume, or another --out")
        run = cls(path)
        (path / MANIFEST).unlink(missing_ok=True)
        run.write_text(RECIPE, recipe_yaml)
        return run

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open an existing run to go on with it.

        Raises:
            RunError: there is none, or another process has it.
        """
        if not (path / RECIPE).is_file():
            raise RunError(f"{path} holds no run to resume: there is no {RECIPE} in it. Start one without --resume")
        return cls(path)

    def close(self) -> None:
        for log in self._logs.values():
            log.close()
        self._logs.clear()
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write_text(self, name: str, text: str) -> None:
        """Write a file of the run: the old or the new text is there, never a part."""
        partial = self.path / f".{name}.partial"
        partial.write_text(text, encoding="utf-8")
        partial.replace(self.path / name)

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        self.write_text(name, json.dumps(value, indent=2) + "\n")

    def append(self, log: str, *records: Mapping[str, Any]) -> None:
        """Add lines to `<log>.jsonl`."""
        if log not in self._logs:
            self._logs[log] = (self.path / f"{log}.jsonl").open("a", encoding="utf-8")
        self._logs[log].writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        self._logs[log].flush()

    def log_sizes(self) -> dict[str, int]:
        """Bytes of every log, for a checkpoint."""
        return {name: path.stat().st_size for name in LOGS if (path := self.path / f"{name}.jsonl").is_file()}

    def rewind_logs(self, sizes: Mapping[str, int]) -> None:
        """Drop the lines after a checkpoint: the steps they tell of are taken again."""
        for name in LOGS:
            path = self.path / f"{name}.jsonl"
            if path.is_file():
                os.truncate(path, min(sizes.get(name, 0), path.stat().st_size))

    def set_status(self, status: Status, **facts: Any) -> None:
        """Update the manifest."""
        path = self.path / MANIFEST
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"started": _now(), **environment()}
        self.write_json(MANIFEST, {**known, **facts, "status": status, "updated": _now()})


class Unrecorded(RunDirectory):
    """A run directory as all ranks but the first have it: these write nothing of their own."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def close(self) -> None: ...
    def write_text(self, name: str, text: str) -> None: ...
    def append(self, log: str, *records: Mapping[str, Any]) -> None: ...
    def rewind_logs(self, sizes: Mapping[str, int]) -> None: ...
    def set_status(self, status: Status, **facts: Any) -> None: ...


def status_of(path: Path) -> str:
    """The status in a run's manifest."""
    try:
        return str(json.loads((path / MANIFEST).read_text(encoding="utf-8"))["status"])
    except (OSError, ValueError, KeyError):
        return "unknown"


def environment() -> dict[str, Any]:
    """Versions, commit and machine, for the manifest."""
    import torch

    return {
        "command": sys.argv,
        "versions": {name: version(name) for name in ("poweropd", "torch", "transformers", "numpy")},
        "python": platform.python_version(),
        "git_commit": _git_commit(),
        "machine": {
            "platform": platform.platform(),
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
    }


def _git_commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")

"""Run directories to records: all that a report knows, read from files alone."""

import json
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from poweropd.errors import RunError
from poweropd.report.records import MANIFEST, Record, is_number, is_record, is_summary

Summaries = dict[str, Record]  # the summaries of one model, by benchmark
LOGS = ("metrics", "positions", "distributions", "rollouts")
RECIPE = "recipe.yaml"


@dataclass(frozen=True)
class RunData:
    """Everything a report reads of one run; a run that stopped early, or of an earlier version, has less of it.

    Attributes:
        metrics, positions, distributions, rollouts: the lines of the logs, in order; each has a `step`.
        evaluations: summaries by optimizer steps taken, oldest first.
        teachers: summaries by teacher: `teacher`, or `teacher math`, `teacher code`.
        seconds: how long the whole run took; None where it does not say.
        left_out: what is not shown, each with the reason, such as an evaluation still being made.
        skipped_lines: lines of the logs that cannot be read, such as the last of a run being written.
    """

    name: str
    path: Path
    recipe: Record
    manifest: Record
    metrics: list[Record]
    positions: list[Record]
    distributions: list[Record]
    rollouts: list[Record]
    evaluations: dict[int, Summaries]
    teachers: dict[str, Summaries]
    left_out: list[str]
    seconds: float | None
    skipped_lines: int

    @property
    def objective(self) -> str:
        """The objective with its settings: `power alpha=5`."""
        section = self.section("objective")
        settings = {key: value for key, value in section.items() if key not in ("name", "end_token") and value != []}
        return " ".join([self.objective_name, *(f"{key}={_short(value)}" for key, value in settings.items())])

    @property
    def objective_name(self) -> str:
        return str(self.section("objective").get("name", "unknown objective"))

    @property
    def models(self) -> str:
        """`student A, teacher B`, or `student A, teacher math B, teacher code C`."""
        teachers = {f"teacher {name}": section for name, section in self.section("teachers").items()}
        named = {"student": self.section("student"), **(teachers or {"teacher": self.section("teacher")})}
        models = {name: section.get("model") for name, section in named.items() if isinstance(section, dict)}
        return ", ".join(f"{name} {model}" for name, model in models.items() if model)

    @property
    def signal(self) -> str:
        """What the logs call the training signal: `reward` of a sampled objective, `divergence` of an exact one."""
        return "divergence" if any("divergence/mean" in record for record in self.metrics[:1]) else "reward"

    @property
    def status(self) -> str:
        return str(self.manifest.get("status", "unknown"))

    @property
    def steps_taken(self) -> int:
        return int(self.metrics[-1]["step"]) + 1 if self.metrics else 0

    @property
    def steps_planned(self) -> int | None:
        steps = self.section("train").get("steps")
        return steps if isinstance(steps, int) else None

    @property
    def last(self) -> tuple[int, Summaries] | None:
        """The last evaluation of the trained student: optimizer steps taken, and its summaries."""
        trained = [step for step in self.evaluations if step > 0]
        return (max(trained), self.evaluations[max(trained)]) if trained else None

    def section(self, name: str) -> Record:
        """A section of the recipe; empty where it has none."""
        value = self.recipe.get(name)
        return value if isinstance(value, dict) else {}

    def column(self, key: str) -> tuple[list[float], list[float]]:
        """Steps and values of a metric, where it was logged as a finite number."""
        found = [(record["step"], record[key]) for record in self.metrics if is_number(record.get(key))]
        return [step for step, _ in found], [value for _, value in found]

    def last_logged(self, log: str) -> list[Record]:
        """The lines that `positions` or `distributions` has of the last step it knows."""
        records: list[Record] = getattr(self, log)
        return [record for record in records if record["step"] == records[-1]["step"]]


def read_run(path: Path, name: str | None = None) -> RunData:
    """Read a run directory, also one that was interrupted, is still being written or was written by an earlier version.

    Raises:
        RunError: it is no run directory, or its recipe is not readable.
    """
    recipe = _recipe(path)
    logs, skipped = {}, 0
    for log in LOGS:
        logs[log], bad = _lines(path, log)
        skipped += bad
    left_out: list[str] = []
    evaluations = {
        int(folder.name): summaries
        for folder in sorted((path / "eval").glob("[0-9]*"))
        if folder.name.isdecimal() and (summaries := _summaries(folder, left_out))
    }
    teachers = {
        folder.name.replace("-", " ", 1): summaries
        for folder in sorted((path / "eval").glob("teacher*"))
        if (summaries := _summaries(folder, left_out))
    }
    seconds = (_json(path / "summary.json") or {}).get("seconds")
    return RunData(
        name=name or path.resolve().name,
        path=path,
        recipe=recipe,
        manifest=_manifest(path, left_out),
        evaluations=dict(sorted(evaluations.items())),
        teachers=teachers,
        left_out=left_out,
        seconds=seconds if is_number(seconds) else None,
        skipped_lines=skipped,
        **logs,
    )


def _recipe(path: Path) -> Record:
    if not path.exists():
        siblings = [entry.name for entry in path.parent.glob("*") if (entry / RECIPE).is_file()]
        near = get_close_matches(path.name, siblings, n=1)
        advice = f"did you mean {path.parent / near[0]}?" if near else "give the directory that `--out` named"
        raise RunError(f"{path} is no run directory: there is nothing of that name; {advice}")
    try:
        recipe = yaml.safe_load((path / RECIPE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        raise RunError(f"{path} is no run directory: there is no readable {RECIPE} in it") from None
    if not isinstance(recipe, dict):
        raise RunError(f"{path} is no run directory: its {RECIPE} holds no sections such as student and objective")
    return recipe


def _summaries(folder: Path, left_out: list[str]) -> Summaries:
    found = {}
    for path in sorted(folder.glob("*.json")):
        summary = _json(path)
        place = f"{path.stem} in eval/{folder.name}"
        if summary is not None and summary.get("finished") is False:
            left_out.append(f"{place} (not finished)")
        elif summary is None or not is_summary(summary):
            left_out.append(f"{place} (not readable)")
        else:
            found[str(summary.get("benchmark", path.stem))] = summary
    return found


def _manifest(path: Path, left_out: list[str]) -> Record:
    """The part of it that a report tells."""
    found = {}
    for key, value in (_json(path / "manifest.json") or {}).items():
        if isinstance(value, MANIFEST.get(key, ())):
            found[key] = value
        elif key in MANIFEST and value is not None:
            left_out.append(f"{key} in manifest.json (not readable)")
    return found


def _json(path: Path) -> Record | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _lines(folder: Path, log: str) -> tuple[list[Record], int]:
    """The lines that are records of a step, and how many are not."""
    path, bad = folder / f"{log}.jsonl", 0
    records: list[Record] = []
    if path.is_file():
        # not splitlines: a text may hold U+2028, which is no end of a line of JSON
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if is_record(log, record):
                records.append(record)
            else:
                bad += 1
    return records, bad


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)

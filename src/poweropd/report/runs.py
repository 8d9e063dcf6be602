"""Run directories to numbers: what a report shows, read from files alone."""

import json
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import yaml

from poweropd.errors import RunError

Record = dict[str, Any]
STYLES = ("solid", "dot", "dash", "dashdot")
FEW = 3  # runs; with more, a frame shows one line of each and no bands


@dataclass(frozen=True)
class RunData:
    """Everything a report reads of one run; a run that stopped early has less of it.

    Attributes:
        evaluations: summary by optimizer steps taken, oldest first.
        teachers: summary by teacher: `teacher`, or `teacher math`, `teacher code`.
        skipped_lines: lines of the logs that are not whole, such as the last of a run being written.
    """

    name: str
    path: Path
    recipe: Record
    manifest: Record
    metrics: list[Record]
    positions: list[Record]
    rollouts: list[Record]
    evaluations: dict[int, Record]
    teachers: dict[str, Record]
    summary: Record | None
    skipped_lines: int

    @property
    def objective(self) -> str:
        """The objective with its settings: `power alpha=5`."""
        section = self.recipe["objective"]
        settings = {key: value for key, value in section.items() if key not in ("name", "end_token") and value != []}
        return " ".join([section["name"], *(f"{key}={_short(value)}" for key, value in settings.items())])

    @property
    def models(self) -> str:
        """`student A, teacher B`, or `student A, teacher math B, teacher code C`."""
        several = self.recipe.get("teachers") or {}
        teachers = {f"teacher {name}": section for name, section in several.items()} or {
            "teacher": self.recipe["teacher"]
        }
        named = {"student": self.recipe["student"], **teachers}
        return ", ".join(f"{name} {section['model']}" for name, section in named.items())

    @property
    def signal(self) -> str:
        """What the metrics call the training signal: `reward` or `divergence`."""
        return "divergence" if self.metrics and "divergence/mean" in self.metrics[0] else "reward"

    def column(self, key: str) -> tuple[list[float], list[float]]:
        """Steps and values of a metric, where it was logged."""
        found = [(record["step"], record[key]) for record in self.metrics if key in record]
        return [step for step, _ in found], [value for _, value in found]


@dataclass(frozen=True)
class Series:
    """A line: points, and optionally a band around it. `style` is one of `STYLES`."""

    name: str
    x: list[float]
    y: list[float]
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    style: str = "solid"
    run: int = 0  # which run it belongs to: decides the colour


@dataclass(frozen=True)
class Figure:
    """A plot, before anything draws it."""

    title: str
    x_label: str
    y_label: str
    series: list[Series]
    caption: str = ""
    log_x: bool = False
    log_y: bool = False


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def read_run(path: Path, name: str | None = None) -> RunData:
    """Read a run directory, also one that was interrupted or is still being written.

    Raises:
        RunError: it is no run directory, or its recipe is not readable.
    """
    try:
        recipe = yaml.safe_load((path / "recipe.yaml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        raise RunError(f"{path} is no run directory: there is no readable recipe.yaml in it") from None
    logs, skipped = {}, 0
    for log in ("metrics", "positions", "rollouts"):
        logs[log], bad = _lines(path / f"{log}.jsonl")
        skipped += bad
    evaluations = {
        int(folder.name): summary
        for folder in sorted((path / "eval").glob("[0-9]*"))
        for summary in map(_json, folder.glob("*.json"))
        if summary is not None
    }
    teachers = {
        folder.name.replace("-", " ", 1): summary
        for folder in sorted((path / "eval").glob("teacher*"))
        for summary in map(_json, folder.glob("*.json"))
        if summary is not None
    }
    return RunData(
        name=name or path.resolve().name,
        path=path,
        recipe=recipe,
        manifest=_json(path / "manifest.json") or {},
        evaluations=evaluations,
        teachers=teachers,
        summary=_json(path / "summary.json"),
        skipped_lines=skipped,
        **logs,
    )


def _json(path: Path) -> Record | None:
    try:
        value: Record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value


def _lines(path: Path) -> tuple[list[Record], int]:
    records, bad = [], 0
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                bad += 1
    return records, bad


def accuracy_key(run: RunData) -> str:
    """`avg_at_8`, or whatever k the run was evaluated with."""
    k = next((summary["samples"] for summary in run.evaluations.values()), run.recipe["evaluation"]["samples"])
    return f"avg_at_{k}"


def figures(runs: list[RunData]) -> list[Figure]:
    """The curves of one run, or of several in one frame each."""
    return [figure for figure in (*_evaluation_figures(runs), *_training_figures(runs)) if figure.series]


def _evaluation_figures(runs: list[RunData]) -> list[Figure]:
    banded = len(runs) <= FEW

    def over_training(key_of: Any, label: str, title: str, caption: str) -> Figure:
        series = []
        for index, run in enumerate(runs):
            key = key_of(run)
            points = [(step, summary) for step, summary in run.evaluations.items() if key in summary]
            bands = [summary["intervals"][key] for _, summary in points]
            if points:
                steps: list[float] = [step for step, _ in points]
                values = [summary[key] for _, summary in points]
                low, high = ([band[side] for band in bands if banded] for side in (0, 1))
                series.append(Series(run.name, steps, values, low, high, run=index))
        first = runs[0]
        span = [min(x for s in series for x in s.x), max(x for s in series for x in s.x)] if series else []
        for (name, summary), style in zip(first.teachers.items() if series else (), cycle(STYLES[2:]), strict=False):
            level = summary[key_of(first)]
            series.append(Series(name, span, [level, level], style=style, run=-1))
        return Figure(title, "optimizer steps", label, series, caption)

    return [
        over_training(
            accuracy_key,
            "accuracy, mean of samples",
            "Accuracy on held-out problems",
            "The band is the 95 % bootstrap interval over problems." if banded else "",
        ),
        over_training(lambda run: "mean_length", "tokens", "Length of an answer", ""),
        over_training(
            lambda run: "truncation", "share of answers", "Answers cut at the budget", "An answer that never ends."
        ),
    ]


def _training_figures(runs: list[RunData]) -> list[Figure]:
    def metric(title: str, label: str, *keys: str, caption: str = "", log_y: bool = False) -> Figure:
        series = []
        keys = keys if len(runs) <= FEW else keys[:1]
        for index, run in enumerate(runs):
            for key, style in zip(keys, STYLES, strict=False):
                steps, values = run.column(key.replace("signal", run.signal))
                if values:
                    part = "" if len(keys) == 1 else f" {key.rpartition('/')[2]}"
                    name = f"{run.name}{part}" if len(runs) > 1 else (part.strip() or run.name)
                    series.append(Series(name, steps, values, style=style, run=index))
        return Figure(title, "optimizer step", label, series, caption, log_y=log_y)

    sampled = all(run.signal == "reward" for run in runs)
    return [
        metric(
            "Training signal",
            "reward" if sampled else "reward or divergence",
            "signal/mean",
            caption="The mean over the tokens of a step: the reward of a sampled objective, the divergence of a "
            "full-vocabulary one. Between objectives the scales differ: compare shapes.",
        ),
        metric(
            "The tail of the log-ratio",
            "nats",
            "log_ratio/min",
            "log_ratio/p1",
            caption="log p(teacher) - log p(student): the most negative token of each step (and, of few runs, the first "
            "percentile), whatever the objective.",
        ),
        metric(
            "What the reward descends",
            "divergence",
            "divergence/estimate",
            caption="The f-divergence of which the sampled reward is the exact gradient, estimated from the student's own "
            "tokens: the reverse KL for the log-ratio, others for clip and tanh. PowerOPD's is of another kind.",
        ),
        metric("KL to the initial student", "nats", "reference_kl/mean"),
        metric("Gradient norm before clipping", "norm", "grad_norm", log_y=True),
        metric("Length of a rollout", "tokens", "length/mean"),
        metric("Rollouts cut at the budget", "share", "truncation"),
        metric("Entropy of the next token", "nats", "entropy/student", "entropy/teacher"),
        metric("Seconds of a step", "seconds", "time/step", "time/rollout", "time/teacher", "time/update"),
    ]


def results_table(runs: list[RunData]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: the teachers, the student before, and after each run; accuracy with its 95 % interval."""
    first = runs[0]
    accuracy = accuracy_key(first)
    k = accuracy.rpartition("_")[2]
    headings = ["", f"Avg@{k}", f"Pass@{k}", "length", "cut", "minutes"]

    def row(name: str, summary: Record, seconds: float | None = None) -> list[str]:
        minutes = "" if seconds is None else f"{seconds / 60:.1f}"
        low, high = summary["intervals"][accuracy]
        return [
            name,
            f"{summary[accuracy]:.3f} [{low:.3f}, {high:.3f}]",
            f"{summary[f'pass_at_{k}']:.3f}",
            f"{summary['mean_length']:.1f}",
            f"{summary['truncation']:.1%}",
            minutes,
        ]

    rows = [row(name, summary) for name, summary in first.teachers.items()]
    if 0 in first.evaluations:
        rows.append(row("student before", first.evaluations[0]))
    for run in runs:
        trained = {step: summary for step, summary in run.evaluations.items() if step > 0}
        if trained:
            name = run.name if len(runs) > 1 else "student after"
            rows.append(row(name, trained[max(trained)], run.summary["seconds"] if run.summary else None))
    return headings, rows


def headline(run: RunData) -> str:
    """The answer first: did the student come closer to the teacher?"""
    key = accuracy_key(run)
    trained = [step for step in run.evaluations if step > 0]
    if not trained or 0 not in run.evaluations:
        return "This run has no evaluation before and after training, so its curves must speak."
    before, after = run.evaluations[0][key], run.evaluations[max(trained)][key]
    name = f"Avg@{key.rpartition('_')[2]}"
    text = f"{name} on held-out problems went from {before:.3f} to {after:.3f} in {max(trained)} steps"
    levels = {name: summary[key] for name, summary in run.teachers.items()}
    if len(levels) > 1:
        text += f"; {', '.join(f'{name} has {level:.3f}' for name, level in levels.items())}"
    for level in levels.values() if len(levels) == 1 else ():
        if level > before:
            gap = (after - before) / (level - before)
            text += f"; the teacher has {level:.3f}, so {gap:.0%} of the gap is closed"
    return text + "."


def comparison(runs: list[RunData]) -> str:
    """What a comparison may be read as: the settings in which its runs differ."""
    recipes = [_flat(run.recipe) for run in runs]
    keys = dict.fromkeys(key for recipe in recipes for key in recipe)
    differing = [key for key in keys if any(recipe.get(key) != recipes[0].get(key) for recipe in recipes)]
    if not differing:
        return "The recipes are equal."
    return f"The recipes differ in {', '.join(differing)}; all else is equal."


def _flat(values: Record, above: str = "") -> Record:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    flat: Record = {}
    for key, value in values.items():
        name = f"{above}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat

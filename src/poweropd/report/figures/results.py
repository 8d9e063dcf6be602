"""Accuracy, length and truncation of evaluations over training: the paper's Fig. 1, 3 and 4."""

from dataclasses import replace
from itertools import cycle
from math import isnan

from poweropd.evaluation.metrics import Estimate
from poweropd.evaluation.summary import in_paper_order
from poweropd.report.figure import TEACHER, Figure, Line
from poweropd.report.figures.curves import FEW, STYLES
from poweropd.report.runs import RunData, Summaries
from poweropd.report.scores import Shared, distinct, mean, on_shared_problems, samples, title
from poweropd.report.verdict import counted

Points = list[tuple[int, Estimate]]
BAND = "The band is the 95 % bootstrap interval over problems."


def result_figures(runs: list[RunData]) -> list[Figure]:
    """The mean over benchmarks, and accuracy on each where there are several."""
    models = [model for run in runs for model in (*run.evaluations.values(), *run.teachers.values())]
    names = in_paper_order(list({name: None for model in models for name in model}))
    each = [_accuracy(_on(runs, name), name) for name in names] if len(names) > 1 else []
    return [
        _accuracy(runs),
        *each,
        _measure(
            runs, "answer-length", "Length of an answer", "tokens", "mean_length",
            "Healthy: the student's answers become about as long as the teacher's.",
        ),
        _measure(
            runs, "answers-cut", "Answers cut at the budget", "share of answers", "truncation",
            "Answers that reached the budget of tokens without an end. Healthy: few, and no more than before training.",
        ),
    ]  # fmt: skip


def _accuracy(runs: list[RunData], benchmark: str = "") -> Figure:
    """Of every evaluation, on the problems that all were asked."""
    places = [(index, step, summaries) for index, run in enumerate(runs) for step, summaries in run.evaluations.items()]
    teachers = _teachers(runs)
    models = [*(summaries for _, _, summaries in places), *teachers.values()]
    shared = on_shared_problems(models)
    levels = shared.accuracy if shared is not None else [mean(summaries, "avg") for summaries in models]
    curves: dict[int, Points] = {}
    for (index, step, _), level in zip(places, levels, strict=False):
        if level is not None:
            curves.setdefault(index, []).append((step, level))
    known = dict(zip(teachers, levels[len(places) :], strict=True)) if models else {}
    caption = "The mean over samples, problems and benchmarks. " if not benchmark and _several(models) else ""
    caption += "Healthy: the student rises towards the teacher and stays there."
    if shared is None and models:
        caption += " The evaluations share no problem, so their levels do not compare."
    elif shared is not None and not (shared.whole and all(len(model) == len(shared.benchmarks) for model in models)):
        caption += f" On what every evaluation asked: {_asked(shared, models[0])}."
    shown = models[0][benchmark] if benchmark and models else {}
    named = f"Accuracy on {title(shown, benchmark)}" if benchmark else "Accuracy on held-out problems"
    key = f"accuracy-{benchmark.replace('_', '-')}" if benchmark else "accuracy"
    return _figure(runs, key, named, f"Avg@{samples(*models)}", curves, known, caption)


def _asked(shared: Shared, summaries: Summaries) -> str:
    names = ", ".join(title(summaries[name], name) for name in shared.benchmarks)
    return f"{names}, {counted(shared.problems, 'problem')}" if shared.problems is not None else names


def _measure(runs: list[RunData], key: str, named: str, label: str, measure: str, caption: str) -> Figure:
    """On whatever problems each evaluation asked: summaries do not tell these measures by problem."""
    curves = {
        index: [(step, level) for step, found in run.evaluations.items() if (level := mean(found, measure)) is not None]
        for index, run in enumerate(runs)
    }
    models = [summaries for run in runs for summaries in run.evaluations.values()]
    asked = {tuple(sorted((name, summary["problems"]) for name, summary in model.items())) for model in models}
    if len(asked) > 1:
        caption += " Not every evaluation asked the same problems."
    return _figure(
        runs, key, named, label, curves,
        {name: mean(summaries, measure) for name, summaries in _teachers(runs).items()}, caption,
    )  # fmt: skip


def _figure(
    runs: list[RunData],
    key: str,
    named: str,
    label: str,
    curves: dict[int, Points],
    teachers: dict[str, Estimate | None],
    caption: str,
) -> Figure:
    lines = []
    for index, points in curves.items():
        if points:
            banded = len(runs) <= FEW and not any(isnan(level.low) for _, level in points)
            low, high = ([level[side] for _, level in points if banded] for side in (1, 2))
            steps: list[float] = [step for step, _ in points]
            lines.append(Line(runs[index].name, steps, [level.mean for _, level in points], low, high, run=index))
    if lines:
        span = [min(x for line in lines for x in line.x), max(x for line in lines for x in line.x)]
        for (name, level), style in zip(teachers.items(), cycle(STYLES[2:]), strict=False):
            if level is not None:
                lines.append(Line(name, span, [level.mean, level.mean], style=style, run=TEACHER))
        caption += f" {BAND}" if any(line.low for line in lines) else ""
    return Figure(key, named, "optimizer steps", label, lines, caption=caption)


def _teachers(runs: list[RunData]) -> dict[str, Summaries]:
    return distinct((name, run.name, summaries) for run in runs for name, summaries in run.teachers.items())


def _on(runs: list[RunData], benchmark: str) -> list[RunData]:
    """The runs as if they had been evaluated on one benchmark alone."""

    def only(models: dict, /) -> dict:
        return {place: {benchmark: model[benchmark]} for place, model in models.items() if benchmark in model}

    return [replace(run, evaluations=only(run.evaluations), teachers=only(run.teachers)) for run in runs]


def _several(models: list[Summaries]) -> bool:
    return any(len(model) > 1 for model in models)

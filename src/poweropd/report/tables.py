"""The tables of a report: results, benchmarks side by side, cost, grading, and pairs of models on the same problems."""

from dataclasses import dataclass
from statistics import fmean, median

from poweropd.evaluation.metrics import Paired
from poweropd.evaluation.summary import in_paper_order
from poweropd.report.records import Record
from poweropd.report.runs import RunData, Summaries
from poweropd.report.scores import compare, distinct, estimate, mean, samples, title
from poweropd.report.verdict import interval, ranking

PHASES = ("rollout", "teacher", "update")
STATUSES = ("correct", "wrong", "no_answer", "unparsable", "timeout")
FORMS = {"mean_length": ".1f", "truncation": ".1%", "repetition": ".1%"}
BENCHMARK_ROWS = (("avg", "Avg@{k}"), ("pass", "Pass@{k}"), ("mean_length", "length"))
BRACKETS = "In brackets: the 95 % bootstrap interval over problems."


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column names the rows, `note` says how to read it."""

    title: str
    headings: list[str]
    rows: list[list[str]]
    note: str


@dataclass(frozen=True)
class _Model:
    """A row: a model as it was evaluated; `run` where it is a run's trained student."""

    name: str
    summaries: Summaries
    run: RunData | None = None


def tables(runs: list[RunData]) -> list[Table]:
    """All tables that have something to show, the results first."""
    every = [results_table(runs), _benchmarks(runs), _pairs(runs), _efficiency(runs), _grading(runs)]
    return [table for table in every if table.rows]


def results_table(runs: list[RunData]) -> Table:
    """The teachers, the student before, and after each run; the mean over benchmarks where there are several."""
    models = _models(runs)
    k = samples(*(model.summaries for model in models)) if models else "k"
    measures = {"avg": f"Avg@{k}", "pass": f"Pass@{k}", "maj": f"Maj@{k}", "mean_length": "length",
                "truncation": "cut", "repetition": "repeated"}  # fmt: skip
    kept = {
        measure: heading
        for measure, heading in measures.items()
        if measure not in ("maj", "repetition") or any(mean(model.summaries, measure) for model in models)
    }
    rows = [[model.name, *(_cell(model, measure) for measure in kept), _minutes(model)] for model in models]
    several = any(len(model.summaries) > 1 for model in models)
    note = f"{BRACKETS} Cut: answers that reached the budget of tokens."
    if "repetition" in kept:
        note += " Repeated: answers that end going round in circles."
    if several:
        note += " Every figure is the mean over the benchmarks."
    if len({tuple(sorted(model.summaries)) for model in models}) > 1 or _differ_in_problems(models):
        note += " Not every model was asked the same problems: the paired comparisons take those both were asked."
    return Table("Results", ["", *kept.values(), "minutes"], rows, note)


def _models(runs: list[RunData]) -> list[_Model]:
    """Teachers and the untrained student once where the runs share them, else those of each run."""
    named = [(name, run.name, summaries) for run in runs for name, summaries in run.teachers.items()]
    named += [("student before", run.name, run.evaluations[0]) for run in runs if 0 in run.evaluations]
    models = [_Model(name, summaries) for name, summaries in distinct(named).items()]
    for run in runs:
        if run.last is not None:
            models.append(_Model(run.name if len(runs) > 1 else "student after", run.last[1], run))
    return models


def _differ_in_problems(models: list[_Model]) -> bool:
    asked = [{name: int(summary["problems"]) for name, summary in model.summaries.items()} for model in models]
    return any(one != asked[0] for one in asked)


def _benchmarks(runs: list[RunData]) -> Table:
    """The paper's Tables 2 and 3: benchmarks in its order of columns, then their mean; rows by model and measure."""
    models = _models(runs)
    names = in_paper_order(list({name: None for model in models for name in model.summaries}))
    if len(names) < 2:
        return Table("Benchmarks", [], [], "")
    known: dict[str, Record] = {name: summary for model in models for name, summary in model.summaries.items()}
    k = samples(*(model.summaries for model in models))
    rows = []
    for measure, heading in BENCHMARK_ROWS:
        cells = [[*(_at(model, name, measure) for name in names), _mean(model, names, measure)] for model in models]
        best = [_best(models, column) if measure != "mean_length" else [] for column in zip(*cells, strict=True)]
        for place, (model, row) in enumerate(zip(models, cells, strict=True)):
            shown = [_benchmark_cell(value, measure, star=place in best[at]) for at, value in enumerate(row)]
            rows.append([f"{heading.format(k=k)} {model.name}", *shown])
    note = (
        "Accuracy in percent, length in tokens; the mean is over the benchmarks, where a model was asked all of them."
    )
    trained = sum(model.run is not None for model in models)
    note += " * marks the best student of a column." if trained else ""
    return Table("Benchmarks", ["", *(title(known[name], name) for name in names), "mean"], rows, note)


def _at(model: _Model, benchmark: str, measure: str) -> float | None:
    found = estimate(model.summaries[benchmark], measure) if benchmark in model.summaries else None
    return found.mean if found is not None else None


def _mean(model: _Model, benchmarks: list[str], measure: str) -> float | None:
    found = mean(model.summaries, measure)
    return found.mean if found is not None and all(name in model.summaries for name in benchmarks) else None


def _best(models: list[_Model], column: tuple[float | None, ...]) -> list[int]:
    """The students, trained or not, with the highest value; none where there is but one student."""
    students = {
        place: value
        for place, (model, value) in enumerate(zip(models, column, strict=True))
        if value is not None and (model.run is not None or model.name.startswith("student before"))
    }
    return [place for place, value in students.items() if value == max(students.values())] if len(students) > 1 else []


def _benchmark_cell(value: float | None, measure: str, *, star: bool) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if measure == "mean_length" else f"{100 * value:.1f}{'*' if star else ''}"


def _pairs(runs: list[RunData]) -> Table:
    """Each run against its untrained student, and the best run against every other."""
    pairs: list[tuple[str, Paired | None]] = []
    for run in runs:
        if run.last is not None and 0 in run.evaluations:
            name = f"{run.name}: after" if len(runs) > 1 else "after"
            pairs.append((f"{name} - before", compare(run.evaluations[0], run.last[1])))
            for teacher, summaries in run.teachers.items() if len(runs) == 1 else ():
                pairs.append((f"{teacher} - after", compare(run.last[1], summaries)))
    ranked = [run for run, _ in ranking(runs)]
    for other in ranked[1:]:
        if ranked[0].last is not None and other.last is not None:
            pairs.append((f"{ranked[0].name} - {other.name}", compare(other.last[1], ranked[0].last[1])))
    rows = [
        [name, interval(found.difference, sign=True), str(found.gained), str(found.lost), str(found.problems)]
        for name, found in pairs
        if found is not None
    ]
    note = (
        "The difference of the shares of correct samples on the same problems, with its 95 % interval from resampled "
        "problems: one that leaves out 0 is told apart from chance. Gained: problems that the first model solves in at "
        "least half of its samples and the second does not; lost: the other way round."
    )
    if len(ranked) > 2:
        note += " The best of many is partly the luckiest: a lead that barely leaves out 0 may not come back."
    return Table("On the same problems", ["", "difference", "gained", "lost", "problems"], rows, note)


def _efficiency(runs: list[RunData]) -> Table:
    """The paper's Table 4."""
    rows = []
    for run in runs:
        steps = run.column("time/step")[1]
        if not steps:
            continue
        total = sum(steps)
        speed, memory = run.column("tokens_per_second")[1], run.column("memory/peak")[1]
        rows.append(
            [
                run.name,
                f"{median(steps):.2f}",
                f"{fmean(speed):,.0f}" if speed else "",
                f"{max(memory):.1f}" if memory else "",
                *(f"{sum(run.column(f'time/{phase}')[1]) / total:.0%}" if total else "" for phase in PHASES),
                f"{total / 3600:.2f}",
            ]
        )
    headings = ["", "s/step", "tokens/s", "peak GiB", *PHASES, "hours"]
    note = (
        "Seconds of the median step; tokens trained on per second, the mean over steps; shares of the time of all steps; "
        "hours of all steps, without evaluations and checkpoints. Between machines these do not compare."
    )
    return Table("Cost", headings, rows, note)


def _grading(runs: list[RunData]) -> Table:
    """How samples were graded, where a grade other than correct and wrong occurs."""
    rows, unusual = [], False
    for model in _models(runs):
        counts: dict[str, int] = {}
        for summary in model.summaries.values():
            for status, count in (summary.get("status") or {}).items():
                counts[status] = counts.get(status, 0) + count
        unusual |= any(counts.get(status) for status in counts if status not in STATUSES[:2])
        if counts:
            rows.append([model.name, *(str(counts.get(status, 0)) for status in STATUSES)])
    note = (
        "Samples by grade. Many without an answer, or with one that cannot be parsed, say that the prompt or the budget of "
        "tokens is at fault rather than the model."
    )
    return Table("Grading", ["", *(status.replace("_", " ") for status in STATUSES)], rows if unusual else [], note)


def _cell(model: _Model, measure: str) -> str:
    value = mean(model.summaries, measure)
    if value is None:
        return ""
    if measure == "avg":
        return interval(value)
    return f"{value.mean:{FORMS.get(measure, '.3f')}}"


def _minutes(model: _Model) -> str:
    seconds = model.run.seconds if model.run is not None else None
    return "" if seconds is None else f"{seconds / 60:.1f}"

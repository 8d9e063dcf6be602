"""Evaluations as tables of text: benchmarks in the column order of the paper, and their mean."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from poweropd.errors import RunError
from poweropd.evaluation.metrics import Estimate, bootstrap, bootstrap_of_means, paired, pass_at_k
from poweropd.evaluation.summary import Summaries, in_paper_order, pass_ks, solved


class Table(NamedTuple):
    headings: list[str]
    rows: list[list[str]]


def results(summaries: Summaries, further_ks: tuple[int, ...] = ()) -> Table:
    """A row a measure, a column a benchmark; accuracies in percent with their 95 % interval.

    With several benchmarks the last column is their mean; the interval of Avg@k there is of problems resampled within
    each.
    """
    names = in_paper_order(summaries)
    k = summaries[names[0]]["samples"]
    passes = sorted({n for n in (*pass_ks(k), *further_ks) if n > 1})
    shown = {
        f"avg_at_{k}": f"Avg@{k}",
        **({f"pass_at_{n}": f"Pass@{n}" for n in passes} | {f"maj_at_{k}": f"Maj@{k}"} if k > 1 else {}),
        "mean_length": "length",
        "truncation": "cut",
        "repetition": "repetitive",
    }
    estimates = {name: _estimates(summaries[name], further_ks) for name in names}
    rows = []
    for key, label in shown.items():
        scale = 1.0 if key == "mean_length" else 100.0
        row = [label]
        for name in names:
            mean, low, high = (scale * value for value in estimates[name][key])
            row.append(f"{mean:.1f} [{low:.1f}, {high:.1f}]")
        if len(names) > 1:
            mean = scale * sum(estimates[name][key].mean for name in names) / len(names)
            row.append(f"{mean:.1f}" + (_mean_interval(summaries) if key == f"avg_at_{k}" else ""))
        rows.append(row)
    headings = ["", *(summaries[name]["title"] for name in names), *(["mean"] if len(names) > 1 else [])]
    return Table(headings, [*rows, ["problems", *(str(summaries[name]["problems"]) for name in names)]])


def _estimates(summary: Mapping[str, Any], further_ks: tuple[int, ...]) -> dict[str, Estimate]:
    told = {key: Estimate(summary[key], *interval) for key, interval in summary["intervals"].items()}
    k = summary["samples"]
    passed = {n: [pass_at_k(k, correct, n) for correct in summary["correct"].values()] for n in further_ks}
    return told | {f"pass_at_{n}": bootstrap(values) for n, values in passed.items()}


def _mean_interval(summaries: Summaries) -> str:
    estimate = bootstrap_of_means([list(solved(summary).values()) for summary in summaries.values()])
    return f" [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"


def statuses(summaries: Summaries) -> str:
    """How all answers were graded: `412 correct, 80 wrong, 8 no_answer`."""
    counts: dict[str, int] = {}
    for summary in summaries.values():
        for status, count in summary["status"].items():
            counts[status] = counts.get(status, 0) + count
    return ", ".join(f"{count} {status}" for status, count in sorted(counts.items(), key=lambda item: -item[1]))


def comparison(mine: Summaries, theirs: Summaries) -> Table:
    """This evaluation minus another on the problems that both asked, a row a benchmark.

    Raises:
        RunError: they share none.
    """
    rows = []
    for name in in_paper_order(mine):
        if name in theirs and set(mine[name]["correct"]) & set(theirs[name]["correct"]):
            found = paired(solved(theirs[name]), solved(mine[name]))
            mean, low, high = (100 * value for value in found.difference)
            told = [f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]", *map(str, (found.gained, found.lost, found.problems))]
            rows.append([mine[name]["title"], *told])
    if not rows:
        raise RunError(
            f"nothing to compare: one evaluation has {', '.join(mine)}, the other {', '.join(theirs)}, and no problem is in both"
        )
    return Table(["", "difference of Avg@k", "gained", "lost", "problems"], rows)

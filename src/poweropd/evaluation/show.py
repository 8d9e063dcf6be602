"""Evaluations as tables of text: benchmarks in the column order of the paper, and their mean."""

from collections.abc import Collection, Container, Mapping
from math import isnan, nan
from typing import Any, NamedTuple

from poweropd.errors import RunError
from poweropd.evaluation.metrics import FEW_PROBLEMS, Estimate, bootstrap, bootstrap_of_means, paired, pass_at_k
from poweropd.evaluation.record import differences
from poweropd.evaluation.summary import Summaries, in_paper_order, pass_ks, solved

SIDE_BY_SIDE = 2  # benchmarks; of more, the intervals have rows of their own
ASIDE = ("model", "problems", "stop_ids")  # settings that two models may well differ in


class Table(NamedTuple):
    headings: list[str]
    rows: list[list[str]]


def results(summaries: Summaries, further_ks: tuple[int, ...] = ()) -> Table:
    """A row a measure, a column a benchmark; shares in percent, with their 95 % interval beside or, of many, below.

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
        cells = [Estimate(*(scale * value for value in estimates[name][key])) for name in names]
        if len(names) > 1:
            mean = sum(cell.mean for cell in cells) / len(cells)
            cells.append(_mean(summaries) if key == f"avg_at_{k}" else Estimate(mean, nan, nan))
        if len(names) <= SIDE_BY_SIDE:
            rows.append([label, *(_with_interval(cell) for cell in cells)])
        else:
            rows.append([label, *(f"{cell.mean:.1f}" for cell in cells)])
            rows.append(["", *(_interval(cell) for cell in cells)])
    headings = ["", *(summaries[name]["title"] for name in names), *(["mean"] if len(names) > 1 else [])]
    return Table(headings, [*rows, ["problems", *(str(summaries[name]["problems"]) for name in names)]])


def _with_interval(cell: Estimate) -> str:
    return f"{cell.mean:.1f}" + ("" if isnan(cell.low) else f" [{cell.low:.1f}, {cell.high:.1f}]")


def _interval(cell: Estimate) -> str:
    return "" if isnan(cell.low) else f"{cell.low:.0f}-{cell.high:.0f}"


def _estimates(summary: Mapping[str, Any], further_ks: tuple[int, ...]) -> dict[str, Estimate]:
    told = {key: Estimate(summary[key], *interval) for key, interval in summary["intervals"].items()}
    k = summary["samples"]
    passed = {n: [pass_at_k(k, correct, n) for correct in summary["correct"].values()] for n in further_ks}
    return told | {f"pass_at_{n}": bootstrap(values) for n, values in passed.items()}


def _mean(summaries: Summaries) -> Estimate:
    """Of Avg@k over benchmarks, in percent."""
    found = bootstrap_of_means([list(solved(summary).values()) for summary in summaries.values()])
    return Estimate(*(100 * value for value in found))


def statuses(summaries: Summaries) -> str:
    """How all answers were graded: `412 correct, 80 wrong, 8 no_answer`."""
    counts: dict[str, int] = {}
    for summary in summaries.values():
        for status, count in summary["status"].items():
            counts[status] = counts.get(status, 0) + count
    return ", ".join(f"{count} {status}" for status, count in sorted(counts.items(), key=lambda item: -item[1]))


def comparison(mine: Summaries, theirs: Summaries, same: Mapping[str, Container[str]]) -> Table:
    """This evaluation minus another on the problems that both asked, a row a benchmark.

    Args:
        same: of each benchmark the ids under which both asked the same problem.

    Raises:
        RunError: they share none.
    """
    rows = []
    for name in in_paper_order(mine):
        ours = {problem: share for problem, share in solved(mine[name]).items() if problem in same.get(name, ())}
        others = solved(theirs[name]) if name in theirs else {}
        if ours.keys() & others.keys():
            found = paired(others, ours)
            mean, low, high = (100 * value for value in found.difference)
            told = [f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]", *map(str, (found.gained, found.lost, found.problems))]
            rows.append([mine[name]["title"], *told])
    if not rows:
        raise RunError(
            f"nothing to compare: one evaluation has {', '.join(mine)}, the other {', '.join(theirs)}, and no problem is in both"
        )
    return Table(["", "difference of Avg@k", "gained", "lost", "problems"], rows)


def cautions(mine: Summaries, theirs: Summaries, same: Mapping[str, Collection[str]]) -> list[str]:
    """What a comparison must be read with: settings that differ, problems left out, and too few of them."""
    told = []
    for name in mine:
        if name in theirs:
            asked = mine[name]["correct"].keys() & theirs[name]["correct"].keys()
            settings = {key: value for key, value in mine[name]["settings"].items() if key not in ASIDE}
            if differ := differences(theirs[name]["settings"], settings):
                told.append(f"{name}: made otherwise: {differ}")
            if len(asked) > len(same[name]):
                told.append(
                    f"{name}: {len(asked) - len(same[name])} ids stand for another problem there, and are left out"
                )
            if 0 < len(same[name]) < FEW_PROBLEMS:
                told.append(f"{name}: on so few problems the interval is too narrow; trust it from {FEW_PROBLEMS} on")
    return told

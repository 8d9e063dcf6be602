"""Metrics over optimizer steps as lines that stay small, however long the run was."""

from collections.abc import Callable
from itertools import cycle, pairwise

from poweropd.report.figure import Figure, Line, Style
from poweropd.report.runs import RunData

STYLES: tuple[Style, ...] = ("solid", "dot", "dash", "dashdot")
FEW = 3  # runs; with more, a frame shows one line of each and no bands
MOST_POINTS = 600  # of a line


def metric(
    runs: list[RunData], key: str, title: str, label: str, *columns: str, caption: str = "", log_y: bool = False
) -> Figure:
    """Columns of metrics.jsonl over the steps; of many runs the first column alone."""
    named = [(column.rpartition("/")[2] if "/" in column else "step", column) for column in columns]
    return over_steps(runs, key, title, label, lambda _: named, caption=caption, log_y=log_y)


def over_steps(
    runs: list[RunData],
    key: str,
    title: str,
    label: str,
    columns_of: Callable[[RunData], list[tuple[str, str]]],
    *,
    caption: str,
    log_y: bool = False,
) -> Figure:
    """As `metric`; `columns_of` a run gives (part of the line's name, column), which may differ between runs."""
    lines = []
    for index, run in enumerate(runs):
        columns = columns_of(run)
        for (part, column), style in zip(columns if len(runs) <= FEW else columns[:1], cycle(STYLES), strict=False):
            steps, values = thinned(*run.column(column))
            if values:
                shown = part if len(columns) > 1 else ""
                name = " ".join(filter(None, [run.name if len(runs) > 1 or not shown else "", shown]))
                lines.append(Line(name, steps, values, style=style, run=index))
    return Figure(key, title, "optimizer step", label, lines, caption=caption, log_y=log_y)


def thinned(x: list[float], y: list[float], limit: int = MOST_POINTS) -> tuple[list[float], list[float]]:
    """At most `limit` points: the lowest and the highest of each of `limit / 2` equal stretches, in their order.

    So no extreme is lost: the minimum and the maximum of the whole are among them, and so are the first and last point.
    """
    if len(x) <= limit:
        return x, y
    stretches = limit // 2 - 1  # two points remain for the ends
    bounds = [round(place * len(x) / stretches) for place in range(stretches + 1)]
    kept = {0, len(x) - 1}
    for start, stop in pairwise(bounds):
        kept |= {min(range(start, stop), key=y.__getitem__), max(range(start, stop), key=y.__getitem__)}
    return [x[place] for place in sorted(kept)], [y[place] for place in sorted(kept)]

"""A figure as what Plotly draws, as words, and as numbers."""

import math
from html import escape
from itertools import pairwise
from typing import Any

import plotly.graph_objects as go

from poweropd.report.colours import MANY, colour, mark
from poweropd.report.figure import TEACHER, Bars, Figure, Line, Plane
from poweropd.report.tables import Table

Json = dict[str, Any]
MOST_POINTS = 1000  # of a line; about two a pixel of the page
MOST_ROWS = 50  # of a table of numbers
MOST_LETTERS = 48  # of a name in a legend


def spec(figure: Figure) -> Json:
    """Traces and layout, as JSON. The page adds what depends on its theme; `meta` of a trace is its run's number."""
    marked = len({line.run for line in figure.lines if line.run != TEACHER}) > 1
    traces = [trace for line in figure.lines for trace in _line(line, marked=marked)]
    traces += [_bars(bars, log_y=figure.log_y) for bars in figure.bars]
    if figure.plane:
        traces.append(_plane(figure.plane, figure))
    return {"traces": [trace.to_plotly_json() for trace in traces], "layout": _layout(figure).to_plotly_json()}


def _layout(figure: Figure) -> go.Layout:
    entries = len(figure.lines) + len(figure.bars)
    heights = [
        *(y for line in figure.lines for y in line.y),
        *(height for bars in figure.bars for height in bars.heights),
    ]
    x_axis = _axis(figure.x_label, [x for line in figure.lines for x in line.x], log=figure.log_x)
    y_axis = _axis(figure.y_label, heights, log=figure.log_y)
    x_axis |= {"hoverformat": ".6~g", "unifiedhovertitle": {"text": f"{_label(figure.x_label)} %{{x}}"}}
    if not any(height < 0 for height in heights):
        y_axis["rangemode"] = "nonnegative"  # a flat line at 0 has no space below
    if figure.log_y and figure.bars:
        lowest = min(_least(bars) for bars in figure.bars)
        y_axis["autorangeoptions"] = {"minallowed": math.log10(lowest / 2)}
    if figure.plane and figure.plane.x_edges == figure.plane.y_edges:
        x_axis |= {"constrain": "domain"}
        y_axis |= {"constrain": "domain", "scaleanchor": "x"}
    return go.Layout(
        height=400 if figure.plane else 290,  # without the legend, whose rows depend on the width of the page
        margin={"l": 60, "r": 12, "t": 12, "b": 40},
        hovermode="closest" if figure.plane else "x unified",
        showlegend=entries > 1,
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "title": {"text": ""}},
        xaxis=x_axis,
        yaxis=y_axis,
    )


def _axis(label: str, values: list[float], *, log: bool) -> Json:
    """A logarithmic axis that spans little has 1, 2, 5, 10 as ticks; Plotly would fill it with others."""
    title: Json = {"title": {"text": _label(label)}}
    if not log:
        return title
    positive = [value for value in values if math.isfinite(value) and value > 0]
    narrow = positive and max(positive) < 1e3 * min(positive)
    return title | {"type": "log", "tickformat": "~g", "dtick": "D2" if narrow else None}


def _line(line: Line, *, marked: bool) -> list[go.Scatter]:
    """The line, on its band if it has one."""
    kept = _kept(line.y)
    x, y = _numbers(line.x, kept), _numbers(line.y, kept)
    of_teacher = line.run == TEACHER
    few = len(x) < MANY
    drawn = go.Scatter(
        x=x,
        y=y,
        name=_label(line.name),
        legendgroup=line.name,
        meta=line.run,
        mode="lines+markers" if (few or marked) and not of_teacher else "lines",
        line={"color": colour(line.run), "dash": line.style, "width": 2},
        marker={"symbol": mark(line.run)[0], "size": 7, "maxdisplayed": 0 if few else 8},
        hovertemplate="%{y:.4g}",
    )
    if not line.low:
        return [drawn]
    low, high = _numbers(line.low, kept), _numbers(line.high, kept)
    drawn.customdata = list(zip(low, high, strict=True))
    drawn.hovertemplate = "%{y:.4g} [%{customdata[0]:.4g}, %{customdata[1]:.4g}]"
    red, green, blue = (int(colour(line.run)[at : at + 2], 16) for at in (1, 3, 5))
    band = go.Scatter(
        x=[*x, *reversed(x)],
        y=[*high, *reversed(low)],
        mode="lines",
        fill="toself",
        fillcolor=f"rgba({red},{green},{blue},0.16)",
        line={"width": 0},
        legendgroup=line.name,
        meta=line.run,
        showlegend=False,
        hoverinfo="skip",
    )
    return [band, drawn]


def _bars(bars: Bars, *, log_y: bool) -> go.Scatter:
    """The outline of the histogram. An empty bin has no logarithm: there it goes to below every other."""
    heights, edges = _numbers(bars.heights), _numbers(bars.edges)
    told = [[low, high, height] for (low, high), height in zip(pairwise(edges), heights, strict=True)]
    floor = _least(bars) / 10 if log_y else 0
    return go.Scatter(
        x=edges,
        y=[height or floor for height in [*heights, *heights[-1:]]],  # the last step ends at the last edge
        customdata=[*told, *told[-1:]],
        name=_label(bars.name),
        meta=bars.run,
        mode="lines",
        line={"shape": "hv", "color": colour(bars.run), "width": 1.6},
        fill=None if log_y else "tozeroy",
        hovertemplate="%{customdata[2]:.4~g} in %{customdata[0]:.4~g} to %{customdata[1]:.4~g}",
    )


def _least(bars: Bars) -> float:
    """The smallest height of a bin that is not empty."""
    return min((height for height in bars.heights if height > 0), default=1.0)


def _plane(plane: Plane, figure: Figure) -> go.Heatmap:
    count = "<br>%{customdata} tokens" if plane.counts else ""
    return go.Heatmap(
        x=_numbers(plane.x_edges),
        y=_numbers(plane.y_edges),
        z=[_numbers(row) for row in plane.values],
        customdata=plane.counts or None,
        meta=TEACHER,
        zmid=0 if plane.diverging else None,
        colorscale=None if plane.diverging else "Cividis",  # the page knows the diverging one
        colorbar={
            "title": {"text": _label(plane.value_label), "side": "right"},
            "thickness": 12,
            "outlinewidth": 0,
            "len": 0.85,
        },
        hoverongaps=False,
        hovertemplate=f"{_label(figure.x_label)} %{{x:.3~g}}<br>{_label(figure.y_label)} %{{y:.3~g}}<br>"
        f"{_label(plane.value_label)} %{{z:.4g}}{count}<extra></extra>",
    )


def description(figure: Figure) -> str:
    """What the plot shows, in a sentence, for those who cannot see it."""
    axes = f"{figure.y_label} over {figure.x_label}"
    if figure.plane:
        cells = [value for row in figure.plane.values for value in row if value is not None]
        span = f", from {min(cells):.3g} to {max(cells):.3g}" if cells else ""
        return f"{figure.title}. {figure.plane.value_label} by {axes}: {len(cells)} cells{span}."
    parts = []
    for line in figure.lines:
        points = [(x, y) for x, y in zip(line.x, line.y, strict=True) if _number(y) is not None]
        if points:
            (first, start), (last, end) = points[0], points[-1]
            parts.append(f"{line.name}: {start:.3g} at {first:g}, {end:.3g} at {last:g}")
    for bars in figure.bars:
        if bars.heights:
            peak = bars.heights.index(max(bars.heights))
            low, high = bars.edges[peak], bars.edges[peak + 1]
            parts.append(f"{bars.name}: highest, {bars.heights[peak]:.3g}, between {low:.3g} and {high:.3g}")
    rest = f"; and {len(parts) - 6} more" if len(parts) > 6 else ""
    return f"{figure.title}. {axes}. {'; '.join(parts[:6])}{rest}."


def numbers(figure: Figure) -> Table:
    """The data as text, thinned to `MOST_ROWS` rows."""
    if figure.plane:
        return _cells(figure)
    if figure.bars:
        headings = [f"{figure.x_label}, from", "to", *(bars.name for bars in figure.bars)]
        by_bin: dict[tuple[float, float], list[str]] = {}
        for column, bars in enumerate(figure.bars):
            for edges, height in zip(pairwise(bars.edges), bars.heights, strict=True):
                by_bin.setdefault(edges, [""] * len(figure.bars))[column] = _text(height)
        rows = [[_text(low), _text(high), *cells] for (low, high), cells in sorted(by_bin.items())]
        return _table(figure, headings, rows)
    by_x: dict[float, list[str]] = {}
    for column, line in enumerate(figure.lines):
        for at, (x, y) in enumerate(zip(line.x, line.y, strict=True)):
            band = f" [{_text(line.low[at])}, {_text(line.high[at])}]" if line.low else ""
            by_x.setdefault(x, [""] * len(figure.lines))[column] = _text(y) + band
    rows = [[_text(x), *cells] for x, cells in sorted(by_x.items())]
    return _table(figure, [figure.x_label, *(line.name for line in figure.lines)], rows)


def _cells(figure: Figure) -> Table:
    assert figure.plane
    plane = figure.plane
    rows = []
    for i, row in enumerate(plane.values):
        for j, value in enumerate(row):
            if value is not None:
                x, y = (
                    f"{_text(edges[k])} to {_text(edges[k + 1])}"
                    for edges, k in ((plane.x_edges, j), (plane.y_edges, i))
                )
                rows.append([x, y, _text(value), *([str(plane.counts[i][j])] if plane.counts else [])])
    headings = [figure.x_label, figure.y_label, plane.value_label, *(["tokens"] if plane.counts else [])]
    return _table(figure, headings, rows)


def _table(figure: Figure, headings: list[str], rows: list[list[str]]) -> Table:
    if len(rows) <= MOST_ROWS:
        return Table(figure.title, headings, rows, "")
    spread = [rows[round(i * (len(rows) - 1) / (MOST_ROWS - 1))] for i in range(MOST_ROWS)]
    return Table(figure.title, headings, spread, f"{MOST_ROWS} of {len(rows)} rows, evenly spread.")


def _kept(y: list[float]) -> list[int]:
    """Indices of the points to draw: of each stretch of a long line the lowest and the highest, so that no peak is lost."""
    if len(y) <= MOST_POINTS:
        return list(range(len(y)))
    stretches = MOST_POINTS // 2 - 1
    ends = [round(i * len(y) / stretches) for i in range(stretches + 1)]
    finite = [value if math.isfinite(value) else 0.0 for value in y]
    kept = {0, len(y) - 1}
    for start, end in pairwise(ends):
        kept |= {min(range(start, end), key=finite.__getitem__), max(range(start, end), key=finite.__getitem__)}
    return sorted(kept)


def _numbers(values: list[float] | list[float | None], kept: list[int] | None = None) -> list[float | None]:
    return [_number(values[at]) for at in (range(len(values)) if kept is None else kept)]


def _label(text: str) -> str:
    """For Plotly, which reads a little HTML in its labels; a long name is cut."""
    return escape(text if len(text) <= MOST_LETTERS else f"{text[: MOST_LETTERS - 1]}…", quote=False)


def _number(value: float | None) -> float | None:
    """Six digits of it; None for what JSON does not know and no axis shows."""
    if value is None or not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(f"{value:.6g}")


def _text(value: float) -> str:
    return f"{value:.4g}" if not float(value).is_integer() or abs(value) >= 1e15 else f"{int(value)}"

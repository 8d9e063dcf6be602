"""Figures as PNG or PDF, for a README or a paper."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from poweropd.errors import RunError
from poweropd.report.colours import MANY, colour, mark
from poweropd.report.figure import TEACHER, Bars, Figure, Line, Plane

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Format = Literal["png", "pdf"]
DASHES = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-."}
WIDTH, HEIGHT = 5.5, 3.4  # inches: the width of a page of text, so that 9 pt is 9 pt in print
TEXT: Any = {
    "font.size": 9, "axes.titlesize": 9, "axes.titleweight": "bold", "legend.fontsize": 8,
    "pdf.fonttype": 42, "ps.fonttype": 42,  # fonts as fonts, which journals ask for
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3, "grid.linewidth": 0.6,
}  # fmt: skip


def save_each(figures: list[Figure], folder: Path, kind: Format = "png") -> list[Path]:
    """Draw every figure that is not empty into a file of its own, `<key>.png` or `<key>.pdf`.

    Raises:
        RunError: `folder` cannot be a folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise RunError(f"--figures {folder}: there is a file of that name; give a folder") from None
    except OSError as error:
        raise RunError(f"--figures {folder}: the folder cannot be made: {error.strerror}") from None
    paths = []
    for figure in figures:
        if not figure.is_empty:
            paths.append(folder / f"{figure.key}.{kind}")
            save_figures([figure], paths[-1], columns=1)
    return paths


def save_figures(figures: list[Figure], path: Path, *, columns: int = 2) -> None:
    """Draw figures side by side into one file; its suffix decides the format."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    rows = -(-len(figures) // columns)
    with mpl.rc_context(TEXT):
        canvas, axes = plt.subplots(
            rows, columns, figsize=(WIDTH * columns, HEIGHT * rows + 0.4), squeeze=False, layout="constrained"
        )
        for figure, axis in zip(figures, axes.flat, strict=False):
            _draw(figure, axis)
        for axis in axes.flat[len(figures) :]:
            axis.set_visible(False)
        entries = {
            label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
        }
        if len(entries) > 1:
            canvas.legend(
                entries.values(),
                entries.keys(),
                loc="outside lower center",
                ncols=min(len(entries), 3 * columns),
                frameon=False,
            )
        canvas.savefig(path, dpi=200)
        plt.close(canvas)


def _draw(figure: Figure, axis: "Axes") -> None:
    marked = len({line.run for line in figure.lines if line.run != TEACHER}) > 1
    for line in figure.lines:
        _line(line, axis, marked=marked)
    for bars in figure.bars:
        _bars(bars, axis)
    if figure.plane:
        _plane(figure.plane, axis)
    axis.set_title(_plain(figure.title), loc="left")
    axis.set(xlabel=_plain(figure.x_label), ylabel=_plain(figure.y_label))
    axis.set_xscale("log" if figure.log_x else "linear")
    axis.set_yscale("log" if figure.log_y else "linear")


def _line(line: Line, axis: "Axes", *, marked: bool) -> None:
    few = len(line.x) < MANY
    shown = (few or marked) and line.run != TEACHER
    axis.plot(
        line.x,
        line.y,
        DASHES[line.style],
        color=colour(line.run),
        label=_plain(line.name),
        linewidth=1.5,
        marker=mark(line.run)[1] if shown else None,
        markersize=4,
        markevery=None if few else max(len(line.x) // 8, 1),
    )
    if line.low:
        axis.fill_between(line.x, line.low, line.high, color=colour(line.run), alpha=0.15, linewidth=0)


def _bars(bars: Bars, axis: "Axes") -> None:
    axis.stairs(bars.heights, bars.edges, color=colour(bars.run), label=_plain(bars.name), linewidth=1.4)
    axis.stairs(bars.heights, bars.edges, color=colour(bars.run), fill=True, alpha=0.12)


def _plane(plane: Plane, axis: "Axes") -> None:
    import numpy as np
    from matplotlib.colors import LinearSegmentedColormap

    values = np.array([[np.nan if value is None else value for value in row] for row in plane.values], dtype=float)
    if plane.diverging:
        reach = float(np.nanmax(np.abs(values))) if np.isfinite(values).any() else 1.0
        scale: dict[str, Any] = {
            "cmap": LinearSegmentedColormap.from_list("reward", ["#D55E00", "#F0F1F3", "#0072B2"]),
            "vmin": -(reach or 1.0), "vmax": reach or 1.0,
        }  # fmt: skip
    else:
        scale = {"cmap": "cividis"}
    drawn = axis.pcolormesh(plane.x_edges, plane.y_edges, values, rasterized=True, **scale)
    axis.figure.colorbar(drawn, ax=axis, label=_plain(plane.value_label))
    if plane.x_edges == plane.y_edges:
        axis.set_aspect("equal")


def _plain(text: str) -> str:
    """A dollar sign is one: no formula begins there."""
    return text.replace("$", r"\$")

"""Figures as PNG or PDF, for a README or a paper."""

from pathlib import Path

from poweropd.report.figure import Figure
from poweropd.report.html import COLOURS, TEACHER_COLOUR


def save_figures(figures: list[Figure], path: Path, *, columns: int = 2) -> None:
    """Draw figures side by side into one file; its suffix decides the format."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    rows = -(-len(figures) // columns)
    canvas, axes = plt.subplots(
        rows, columns, figsize=(6.2 * columns, 3.4 * rows + 0.6), squeeze=False, layout="constrained"
    )
    for figure, axis in zip(figures, axes.flat, strict=False):
        for series in figure.lines:
            colour = TEACHER_COLOUR if series.run < 0 else COLOURS[series.run % len(COLOURS)]
            style = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-."}[series.style]
            axis.plot(series.x, series.y, style, color=colour, label=series.name, linewidth=1.8)
            if series.low:
                axis.fill_between(series.x, series.low, series.high, color=colour, alpha=0.1, linewidth=0)
        axis.set(title=figure.title, xlabel=figure.x_label, ylabel=figure.y_label)
        axis.set_yscale("log" if figure.log_y else "linear")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(figures) :]:
        axis.set_visible(False)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6), frameon=False)
    canvas.savefig(path, dpi=150)
    plt.close(canvas)

"""Colours and marks of the runs, on the page and on paper alike."""

from poweropd.report.figure import TEACHER

# Okabe and Ito's colours, told apart by people with any colour vision, in light and dark.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8a6d3b", "#7fd35f", "#9467bd", "#bcbd22")
TEACHER_COLOUR = "#888888"

# Colour is never the only carrier. Of each mark: Plotly's name, matplotlib's, the character.
MARKS = (
    ("circle", "o", "●"), ("square", "s", "■"), ("diamond", "D", "◆"), ("triangle-up", "^", "▲"),
    ("triangle-down", "v", "▼"), ("cross", "P", "✚"), ("x", "X", "✖"), ("star", "*", "★"), ("pentagon", "p", "⬟"),
    ("hexagon", "h", "⬢"),
)  # fmt: skip
MANY = 12  # points; a line of fewer has a mark on each


def colour(run: int) -> str:
    return TEACHER_COLOUR if run == TEACHER else COLOURS[run % len(COLOURS)]


def mark(run: int) -> tuple[str, str, str]:
    """Shifted by one against the colours each time that these begin again, so that no two of 100 runs look the same."""
    return MARKS[(run + run // len(COLOURS)) % len(MARKS)]

"""What a figure is, before anything draws it: `html` for a screen, `image` for a paper."""

from dataclasses import dataclass, field
from typing import Literal

Style = Literal["solid", "dot", "dash", "dashdot"]
TEACHER = -1  # in the place of a run's number: belongs to no run, drawn in grey


@dataclass(frozen=True)
class Line:
    """Points joined by a line, and optionally a band around it.

    Attributes:
        low, high: the band, one of each a point; empty for none.
        run: number of the run it belongs to, which decides its colour, or `TEACHER`.
    """

    name: str
    x: list[float]
    y: list[float]
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    style: Style = "solid"
    run: int = 0


@dataclass(frozen=True)
class Bars:
    """A histogram: `heights[i]` between `edges[i]` and `edges[i + 1]`."""

    name: str
    edges: list[float]
    heights: list[float]
    run: int = 0


@dataclass(frozen=True)
class Plane:
    """A grid of cells coloured by `values[row][column]`, blank where None; diverging around 0 if `diverging`.

    `x_edges` has one entry more than there are columns, `y_edges` than rows. `counts`, of the same shape as `values`,
    is told on hover.
    """

    x_edges: list[float]
    y_edges: list[float]
    values: list[list[float | None]]
    value_label: str
    counts: list[list[int]] = field(default_factory=list)
    diverging: bool = True


@dataclass(frozen=True)
class Figure:
    """A plot of lines or bars, or of one plane.

    Attributes:
        key: stable and short, in lower case with dashes; names the file that `--figures` writes and the page's anchor.
        caption: what is seen, how to read it, and what a healthy run looks like.
    """

    key: str
    title: str
    x_label: str
    y_label: str
    lines: list[Line] = field(default_factory=list)
    bars: list[Bars] = field(default_factory=list)
    plane: Plane | None = None
    caption: str = ""
    log_x: bool = False
    log_y: bool = False

    @property
    def is_empty(self) -> bool:
        return not (self.lines or self.bars or self.plane)


@dataclass(frozen=True)
class Section:
    """Figures that answer one question."""

    title: str
    figures: list[Figure]

"""The application that all verbs belong to, what they share, and how errors and warnings reach the user."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

# Before torch loads: OpenMP threads that spin while they wait make a busy machine many times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from poweropd.errors import UserError

app = typer.Typer(
    name="poweropd",
    help="Distil a large language model into a small one on the small one's own answers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
WIDEST = 400  # columns; a number that is cut off is no number
console = Console(highlight=False, soft_wrap=True)

Sets = Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help="Change a setting of the recipe.")]
Debug = Annotated[bool, typer.Option(help="Show the traceback of an error.")]


@contextmanager
def plain_errors(debug: bool) -> Iterator[None]:
    """A user's error is its message alone: exit 1. An interrupted command exits 130."""
    try:
        yield
    except UserError as error:
        if debug:
            raise
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"error: {error}", markup=False)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        if debug:
            raise
        advice = "`poweropd train --resume --out DIR` goes on with a run, the same command with an evaluation"
        Console(stderr=True, soft_wrap=True).print(f"interrupted; {advice}", markup=False)
        raise typer.Exit(130) from None


def in_one_line(message: Warning | str, category: type[Warning], filename: str, *_: Any) -> str:
    """Our warnings are for the user; those of libraries say where they come from."""
    place = "" if Path(__file__).parents[1] in Path(filename).parents else f"{filename}: "
    return f"warning: {place}{message}\n"


def print_table(table: Any) -> None:
    drawn = Table(box=SIMPLE, pad_edge=False)
    for heading in table.headings:
        drawn.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for row in table.rows:
        drawn.add_row(*row)
    console.print(drawn, width=WIDEST)


def free(path: Path) -> Path:
    """The path, or the first of path-2, path-3, ... that does not exist."""
    candidates = (path.with_name(f"{path.name}-{number}") for number in range(2, 10_000))
    return path if not path.exists() else next(candidate for candidate in candidates if not candidate.exists())

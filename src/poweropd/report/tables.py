"""What a table is, before anything draws it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """Rows of text; the first cell of a row is its heading."""

    title: str
    headings: list[str]
    rows: list[list[str]]
    note: str

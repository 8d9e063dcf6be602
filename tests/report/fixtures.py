"""The committed runs, one made up and one real, and variants of the first."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from poweropd.report.figure import Figure
from poweropd.report.figures import figures
from poweropd.report.runs import RunData

FIXTURE = Path(__file__).with_name("fixture_run")
REAL = Path(__file__).with_name("real_run")  # `poweropd train recipes/quickstart.yaml`, kept by keep_run.py
Record = dict[str, Any]


def variant(folder: Path, change: Callable[[Record], Record | None] = lambda record: record) -> Path:
    """A copy of the run whose every metrics line is changed; None drops the line."""
    shutil.copytree(FIXTURE, folder)
    changed = [change(dict(record)) for record in lines(folder, "metrics")]
    write_lines(folder, "metrics", [record for record in changed if record is not None])
    return folder


def lines(folder: Path, log: str) -> list[Record]:
    return [json.loads(line) for line in (folder / f"{log}.jsonl").read_text().splitlines()]


def write_lines(folder: Path, log: str, records: list[Record]) -> None:
    (folder / f"{log}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def summary(folder: Path, place: str, benchmark: str) -> Record:
    return json.loads((folder / "eval" / place / f"{benchmark}.json").read_text())


def edit_summaries(folder: Path, change: Callable[[str, Record], Record]) -> None:
    """Every summary of a run, told its place."""
    for path in (folder / "eval").glob("*/*.json"):
        path.write_text(json.dumps(change(path.parent.name, json.loads(path.read_text()))))


def drawn(runs: list[RunData]) -> dict[str, Figure]:
    """Every figure of every section, by key."""
    return {figure.key: figure for section in figures(runs) for figure in section.figures}

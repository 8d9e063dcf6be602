"""Runs to their page: what the other modules found, put together."""

from pathlib import Path

import yaml

from poweropd.errors import RunError
from poweropd.report.figures import figures
from poweropd.report.page import Content, render
from poweropd.report.pathologies import pathologies
from poweropd.report.runs import RunData
from poweropd.report.tables import Table, tables
from poweropd.report.verdict import counted, flat, verdict


def write_report(runs: list[RunData], path: Path) -> None:
    """One page about a run, or about several side by side, that needs no network.

    Raises:
        RunError: a run is given twice, or the page cannot be written.
    """
    _refuse_twins(runs)
    if path.is_dir():
        raise RunError(f"--out {path}: there is a folder of that name; give a file such as {path / 'report.html'}")
    page = render(content(runs)).encode(errors="replace")  # half a surrogate pair in a text is no letter
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(page)
        partial.replace(path)
    except OSError as error:
        raise RunError(f"--out {path}: the page cannot be written there: {error.strerror}") from None


def _refuse_twins(runs: list[RunData]) -> None:
    known: dict[Path, RunData] = {}
    for run in runs:
        if (first := known.setdefault(run.path.resolve(), run)) is not run:
            both = f"{run.path} is" if run.path == first.path else f"{first.path} and {run.path} are one run,"
            raise RunError(f"{both} given twice: give each run once")


def content(runs: list[RunData]) -> Content:
    alone = len(runs) == 1
    return Content(
        title=f"{runs[0].objective}: {runs[0].name}" if alone else f"{len(runs)} runs compared",
        runs=[run.name for run in runs],
        verdict=[*verdict(runs), *(_follows(runs[0]) if alone else [])],
        pathologies=[pathology for run in runs for pathology in pathologies(run)],
        tables=[*tables(runs), *([] if alone else _gradients(runs))],
        sections=figures(runs),
        rollouts={run.name: run.rollouts for run in runs},
        differences=None if alone else _differences(runs),
        recipes={run.name: yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=True) for run in runs},
        machine=_machine(runs),
        notes=_notes(runs),
    )


def _follows(run: RunData) -> list[str]:
    """What the objective's expected update is the gradient of, as the trainer wrote it down."""
    text = run.manifest.get("gradient_of")
    return [f"The expected update follows the gradient of {text}."] if text else []


def _gradients(runs: list[RunData]) -> list[Table]:
    rows = [[run.name, str(text)] for run in runs if (text := run.manifest.get("gradient_of"))]
    return [Table("What the expected update follows", ["", "the gradient of"], rows, "")] if rows else []


def _differences(runs: list[RunData]) -> Table:
    recipes = [flat(run.recipe) for run in runs]
    rows = [
        [key, *(_shown(recipe.get(key, "")) for recipe in recipes)]
        for key in dict.fromkeys(key for recipe in recipes for key in recipe)
        if any(recipe.get(key) != recipes[0].get(key) for recipe in recipes)
    ]
    note = "Every other setting is equal." if rows else "Every setting is equal."
    return Table("Settings that differ", ["setting", *(run.name for run in runs)], rows, note)


def _shown(value: object) -> str:
    return "none" if value is None else str(value)


def _machine(runs: list[RunData]) -> Table:
    """What each run ran on."""
    columns = [_facts(run) for run in runs]
    rows = [
        [key, *(column.get(key, "") for column in columns)]
        for key in dict.fromkeys(key for column in columns for key in column)
    ]
    return Table("Machine and versions", ["", *(run.name for run in runs)], rows, "")


def _facts(run: RunData) -> dict[str, str]:
    machine = run.manifest.get("machine") or {}
    facts = {
        "models": run.models,
        "status": run.manifest.get("status"),
        "started": run.manifest.get("started"),
        "seconds": None if run.seconds is None else f"{run.seconds:.0f}",
        "seed": run.section("train").get("seed"),
        "GPU": machine.get("gpu"),
        "processor": machine.get("processor"),
        "cores": machine.get("cores"),
        "platform": machine.get("platform"),
        "commit": (run.manifest.get("git_commit") or "")[:12],
        "Python": run.manifest.get("python"),
        **(run.manifest.get("versions") or {}),
    }
    return {key: str(value) for key, value in facts.items() if value not in (None, "")}


def _notes(runs: list[RunData]) -> list[str]:
    notes = []
    for run in runs:
        if run.skipped_lines:
            lines = counted(run.skipped_lines, "log line")
            notes.append(
                f"{run.name}: {lines} that cannot be read {'was' if run.skipped_lines == 1 else 'were'} left out."
            )
        if run.left_out:
            notes.append(f"{run.name}: not shown: {', '.join(run.left_out)}.")
    return notes

"""`poweropd quickstart`: the embedded pair through the whole program, and the comparison of objectives."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from poweropd.config import Recipe, load_recipe
from poweropd.console import ConsoleObserver
from poweropd.report.html import write_report
from poweropd.report.png import save_figures
from poweropd.report.runs import RunData, figures, headline, read_run, results_table
from poweropd.train import train

RECIPE = Path(__file__).with_name("recipe.yaml")

# One seed, one set of prompts, one learning rate; only the objective differs. `sft` has no teacher: it is the control
# that trains on the data's worked answers.
COMPARED: dict[str, list[str]] = {
    "log_ratio": ["objective.name=log_ratio"],
    "clip": ["objective.name=clip"],
    "tanh": ["objective.name=tanh"],
    "zscore": ["objective.name=zscore"],
    "power 0.5": ["objective.alpha=0.5"],
    "power 1": ["objective.alpha=1"],
    "power 5": ["objective.alpha=5"],
    "power 50": ["objective.alpha=50"],
    "reverse_kl": ["objective.name=reverse_kl"],
    "sft": ["objective.name=sft", "rollout.engine=golden"],
}

NEXT = """\
What to try next
  poweropd quickstart --compare                       every objective of the paper on this pair
  poweropd train recipes/quickstart.yaml --set objective.alpha=1
  poweropd doctor YOUR_RECIPE.yaml                    check a pair of your own before you train it
  recipes/                                            real models; README.md shows how to start one"""


def run_quickstart(out: Path, console: Console, *, steps: int | None, seed: int) -> None:
    """Evaluate, distil with PowerOPD, evaluate, report."""
    run = _run(_recipe([], steps, seed), out, console)
    write_report([run], out / "report.html")
    _print_results([run], console)
    console.print(headline(run), markup=False)
    console.print(f"\nstudent  {out / 'student'}\nreport   {out / 'report.html'}\n\n{NEXT}", markup=False)


def run_comparison(out: Path, console: Console, *, steps: int | None, seed: int) -> None:
    """Train the student with every objective of `COMPARED`, one table and one figure.

    What all runs share, the evaluations of the teacher and of the untrained student, is done once.
    """
    runs: list[RunData] = []
    for number, (name, overrides) in enumerate(COMPARED.items(), start=1):
        console.print(f"\n{number} of {len(COMPARED)}: {name}", markup=False)
        place = out / name.replace(" ", "_")
        shared = runs[0].path / "eval" if runs else None
        runs.append(_run(_recipe(overrides, steps, seed), place, console, name=name, shared_evaluations=shared))
    write_report(runs, out / "report.html")
    save_figures(figures(runs)[:4], out / "compare.png")
    _print_results(runs, console)
    console.print(f"\nreport   {out / 'report.html'}\nfigure   {out / 'compare.png'}", markup=False)


def _recipe(overrides: list[str], steps: int | None, seed: int) -> Recipe:
    values = [f"train.seed={seed}", *([] if steps is None else [f"train.steps={steps}"])]
    return load_recipe(RECIPE, [*overrides, *values])


def _run(
    recipe: Recipe, out: Path, console: Console, *, name: str | None = None, shared_evaluations: Path | None = None
) -> RunData:
    with ConsoleObserver(console) as observer:
        train(recipe, out, observer, known_evaluations=shared_evaluations)
    return read_run(out, name)


def _print_results(runs: list[RunData], console: Console) -> None:
    headings, rows = results_table(runs)
    table = Table(*headings)
    for row in rows:
        table.add_row(*row)
    console.print()
    console.print(table)

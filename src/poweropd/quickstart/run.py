"""`poweropd quickstart`: the embedded pair through the whole program."""

from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from poweropd.config import Recipe, load_recipe
from poweropd.console import ConsoleObserver
from poweropd.quickstart.compare import COMPARED, Arm, train_all
from poweropd.report.figures import figures
from poweropd.report.html import write_report
from poweropd.report.image import save_figures
from poweropd.report.runs import RunData, read_run
from poweropd.report.tables import results_table
from poweropd.report.verdict import headline
from poweropd.train import train

RECIPE = Path(__file__).with_name("recipe.yaml")
PICTURED = ("accuracy", "answer-length", "answers-cut", "gradient-norm")

ON_PAGE_ONLY = ("Maj@8", "repeated")  # columns for which a terminal has no room

NEXT = """\
What to try next
  poweropd quickstart --compare                       every objective of the paper on this pair
  poweropd train recipes/quickstart.yaml --set objective.alpha=1
  poweropd doctor YOUR_RECIPE.yaml                    check a pair of your own before you train it
  recipes/                                            real models; README.md shows how to start one"""


def run_quickstart(out: Path, console: Console, *, steps: int | None, seed: int) -> None:
    """Evaluate, distil with PowerOPD, evaluate, report."""
    with ConsoleObserver(console) as observer:
        train(_recipe([], steps, seed), out, observer)
    run = read_run(out)
    write_report([run], out / "report.html")
    _print_results([run], console)
    console.print(headline(run), markup=False)
    console.print(f"\nstudent  {out / 'student'}\nreport   {out / 'report.html'}\n\n{NEXT}", markup=False)


def run_comparison(out: Path, console: Console, *, steps: int | None, seed: int) -> None:
    """Train the student with every objective of `COMPARED`: one table and one figure."""
    cache = f"evaluation.cache={out / 'evaluations'}"
    arms = [
        Arm(name, _recipe([*overrides, cache], steps, seed), out / name.replace(" ", "_"))
        for name, overrides in COMPARED.items()
    ]
    with ConsoleObserver(console) as observer:
        runs = train_all(arms, observer)
    write_report(runs, out / "report.html")
    drawn = [figure for section in figures(runs) for figure in section.figures if figure.key in PICTURED]
    save_figures(drawn, out / "compare.png")
    _print_results(runs, console)
    console.print(f"report   {out / 'report.html'}\nfigure   {out / 'compare.png'}", markup=False)


def _recipe(overrides: list[str], steps: int | None, seed: int) -> Recipe:
    values = [f"train.seed={seed}", f"evaluation.seed={seed}", *([] if steps is None else [f"train.steps={steps}"])]
    return load_recipe(RECIPE, [*overrides, *values])


def _print_results(runs: list[RunData], console: Console) -> None:
    results = results_table(runs)
    places = [place for place, heading in enumerate(results.headings) if heading not in ON_PAGE_ONLY]
    table = Table(box=SIMPLE, pad_edge=False)
    for place in places:
        heading = results.headings[place]
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for row in results.rows:
        table.add_row(*(row[place] for place in places))
    console.print()
    console.print(table)

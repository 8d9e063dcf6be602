"""The verbs around a training run: quickstart, train, doctor."""

from pathlib import Path
from typing import Annotated, Any

import typer

from poweropd.cli.shared import Debug, Sets, app, console, free, plain_errors


@app.command()
def quickstart(
    out: Annotated[
        Path | None, typer.Option(help="Run directory; by default runs/quickstart, or the next free name.")
    ] = None,
    compare: Annotated[bool, typer.Option(help="Train every baseline too, with equal seeds and prompts.")] = False,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps of each run.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of data order and samples.")] = 0,
    debug: Debug = False,
) -> None:
    """Distil the embedded pair on this machine, without a network: evaluate, distil, evaluate, report.

    Example: `poweropd quickstart --compare`
    """
    with plain_errors(debug):
        from poweropd.quickstart.run import run_comparison, run_quickstart

        name = "compare" if compare else "quickstart"
        (run_comparison if compare else run_quickstart)(
            out or free(Path("runs") / name), console, steps=steps, seed=seed
        )


@app.command()
def train(
    recipe: Annotated[Path | None, typer.Argument(help="YAML recipe; not needed with --resume.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Run directory; by default runs/<recipe>, or the next free name.")
    ] = None,
    sets: Sets = None,
    resume: Annotated[bool, typer.Option(help="Go on with the run in --out, bit for bit.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Check the recipe and print it with every default.")] = False,
    debug: Debug = False,
) -> None:
    """Train a student as a recipe says.

    Example: `poweropd train recipes/quickstart.yaml --out runs/mine --set train.steps=20`
    """
    with plain_errors(debug):
        from poweropd.config import load_recipe
        from poweropd.distributed import joined

        if dry_run and recipe is not None:
            _dry_run(load_recipe(recipe, sets))
            return
        with joined() as world:
            _train(*world.on_main(lambda: _asked(recipe, out, sets, resume=resume)), resume=resume, world=world)


def _asked(recipe: Path | None, out: Path | None, sets: list[str] | None, *, resume: bool) -> tuple[Any, Path]:
    """The recipe to train, and where."""
    from poweropd.config import load_recipe
    from poweropd.errors import ConfigError
    from poweropd.train import recipe_to_resume

    if resume:
        if out is None:
            raise ConfigError("--resume needs --out: the run directory to go on with")
        return recipe_to_resume(out, sets), out
    if recipe is None:
        raise ConfigError("give a recipe, for example recipes/quickstart.yaml, or --resume --out DIR")
    return load_recipe(recipe, sets), out or free(Path("runs") / recipe.stem)


def _train(recipe: Any, out: Path, *, resume: bool, world: Any) -> None:
    """Start the recipe or resume the run; then write the report. Of several processes, the first speaks."""
    from rich.console import Console

    from poweropd.console import ConsoleObserver
    from poweropd.report.html import write_report
    from poweropd.report.runs import read_run
    from poweropd.report.verdict import headline
    from poweropd.train import train as run_training

    with ConsoleObserver(console if world.is_main else Console(quiet=True)) as observer:
        run_training(recipe, out, observer, resume=resume, world=world)
    if not world.is_main:
        return
    run = read_run(out)
    write_report([run], out / "report.html")
    console.print(headline(run), markup=False)
    console.print(f"student  {out / 'student'}\nreport   {out / 'report.html'}", markup=False)


def _dry_run(recipe: Any) -> None:
    from poweropd.evaluation.benchmarks import benchmark
    from poweropd.models import is_local

    console.print(recipe.to_yaml(), markup=False, end="")
    objective = recipe.objective.build()
    rest = {key: value for key, value in objective.settings.items() if key not in objective.given}
    console.print(
        f"# objective {objective.name}, what is not set: {', '.join(f'{k}: {v}' for k, v in rest.items())}",
        markup=False,
    )
    models = [recipe.student.model, *(teacher.model for teacher in recipe.named_teachers.values())]
    remote = [name for name in models if not is_local(name)]
    remote += [teacher.url for teacher in recipe.named_teachers.values() if teacher.url is not None]
    remote += [data.path for data in recipe.data_sections.values() if data.source == "hub"]
    for name in recipe.evaluation.benchmarks:
        benchmark(name)  # refuses an unknown one
    if remote:
        console.print(
            f"The recipe is valid. Not looked at, because they are not on this machine: {', '.join(remote)}. "
            "`poweropd doctor` loads and checks them.",
            markup=False,
        )
        return
    _print_checks(recipe)


@app.command()
def doctor(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe.")], sets: Sets = None, debug: Debug = False
) -> None:
    """Every start-up check of a recipe, without training.

    Example: `poweropd doctor recipes/quickstart.yaml`
    """
    with plain_errors(debug):
        from poweropd.config import load_recipe

        _print_checks(load_recipe(recipe, sets))


def _print_checks(recipe: Any) -> None:
    from poweropd.doctor import examine

    failed = 0
    for check in examine(recipe):
        style = {"ok": "green", "warn": "yellow", "fail": "red"}[check.verdict]
        console.print(f"[{style}]{check.verdict:<5}[/{style}] {check.name:<20} ", end="")
        console.print(check.message, markup=False)
        failed += check.verdict == "fail"
    if failed:
        raise typer.Exit(1)

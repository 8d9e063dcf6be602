"""The `poweropd` command. Heavy imports happen inside the verbs, so that --help is instant."""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

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
OVERLAP_FOUND = 3  # exit code of `data check`, apart from that of errors
console = Console(highlight=False, soft_wrap=True)

Out = Annotated[Path, typer.Option(help="Directory to write; never written over.")]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help="Change a setting of the recipe.")]
Precision = Literal["auto", "float32", "bfloat16"]
GradingMode = Literal["math", "exact"]
PictureFormat = Literal["png", "pdf"]
Debug = Annotated[bool, typer.Option(help="Show the traceback of an error.")]


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
    with _plain_errors(debug):
        from poweropd.quickstart.run import run_comparison, run_quickstart

        name = "compare" if compare else "quickstart"
        (run_comparison if compare else run_quickstart)(
            out or _free(Path("runs") / name), console, steps=steps, seed=seed
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
    with _plain_errors(debug):
        from poweropd.config import load_recipe
        from poweropd.errors import ConfigError

        if resume:
            if out is None:
                raise ConfigError("--resume needs --out: the run directory to go on with")
            _train(None, out, sets)
            return
        if recipe is None:
            raise ConfigError("give a recipe, for example recipes/quickstart.yaml, or --resume --out DIR")
        loaded = load_recipe(recipe, sets)
        if dry_run:
            _dry_run(loaded)
        else:
            _train(loaded, out or _free(Path("runs") / recipe.stem), sets)


def _train(recipe: Any, out: Path, sets: list[str] | None) -> None:
    """Start `recipe`, or resume the run in `out` when it is None; then write the report."""
    from poweropd.console import ConsoleObserver
    from poweropd.report.html import write_report
    from poweropd.report.runs import read_run
    from poweropd.report.verdict import headline
    from poweropd.train import recipe_to_resume
    from poweropd.train import train as run_training

    with ConsoleObserver(console) as observer:
        run_training(recipe or recipe_to_resume(out, sets), out, observer, resume=recipe is None)
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
def evaluate(
    model: Annotated[str, typer.Argument(help="Hub id, local folder, `quickstart:student` or `quickstart:teacher`.")],
    benchmark: Annotated[
        list[str] | None,
        typer.Option(help="gsm8k, math500, amc23, aime24, aime25, minerva_math, olympiadbench; several by comma."),
    ] = None,
    preset: Annotated[
        Literal["paper"] | None, typer.Option(help="`paper`: all seven, 8 samples of 4,096 tokens at temperature 0.6.")
    ] = None,
    data: Annotated[
        list[Path] | None, typer.Option(help="Problems of your own with reference answers: .jsonl or .parquet.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where results and samples go; an unfinished evaluation there is gone on with.")
    ] = None,
    benchmarks_folder: Annotated[
        Path | None,
        typer.Option("--folder", help="Benchmarks as <name>.jsonl; those that are not there come from the Hub."),
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="The --out of another evaluation: compare with it, problem by problem.")
    ] = None,
    prompt: Annotated[str, typer.Option(help="Column of --data with the question.")] = "problem",
    answer: Annotated[str, typer.Option(help="Column of --data with the reference answer.")] = "answer",
    template: Annotated[
        str | None, typer.Option(help="The user message; {prompt} becomes the question. Benchmarks have their own.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    chat: Annotated[bool, typer.Option(help="Apply the chat template, or ask with the bare text.")] = True,
    thinking: Annotated[bool | None, typer.Option(help="Thinking mode, where the chat template has one.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Samples per problem; by default 8.")] = None,
    k: Annotated[list[int] | None, typer.Option(min=1, help="Tell Pass@k for this k too; may be repeated.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, help="By default 0.6; 0 is greedy.")] = None,
    top_p: Annotated[float, typer.Option(min=0.01, max=1)] = 1.0,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="By default 1024, or half of a shorter context.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Ask the first problems of each set only.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences decoded together.")] = 64,
    precision: Annotated[Precision, typer.Option(help="Of weights and matmuls.")] = "auto",
    grading: Annotated[GradingMode, typer.Option(help="Compare answers as values or as text.")] = "math",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    debug: Debug = False,
) -> None:
    """Avg@k, Pass@k, Maj@k, length, truncation and repetition of a model, with 95 % intervals; every sample is kept.

    Killed and started again, it samples only what is missing.

    Example: `poweropd evaluate runs/mine/student --benchmark math500,aime24 --against evals/before`
    """
    with _plain_errors(debug):
        from poweropd.console import ConsoleObserver
        from poweropd.evaluation import show
        from poweropd.evaluation.record import read_summaries, same_problems
        from poweropd.evaluation.standalone import Settings, chosen_sets, evaluate_model

        asked = {"template": template, "system": system, "chat": chat, "enable_thinking": thinking, "limit": limit}
        columns = {"prompt": prompt, "answer": answer}
        sets = chosen_sets(_names(benchmark), data or [], benchmarks_folder, preset, columns, asked)
        other = None if against is None else read_summaries(against)
        out = out or Path("evals") / Path(model.rstrip("/").replace(":", "-")).name
        ks = tuple(k or [])
        settings = Settings(samples, temperature, top_p, max_new_tokens, seed, precision, batch, grading, ks)
        with ConsoleObserver(console) as observer:
            summaries = evaluate_model(model, sets, settings, out, observer.on_evaluation, preset=preset)
        _print_table(show.results(summaries, ks))
        console.print(f"in percent, with 95 % intervals over problems; graded {show.statuses(summaries)}", markup=False)
        if other is not None and against is not None:
            same = {name: same_problems(out, against, name) for name in summaries}
            _print_table(show.comparison(summaries, other, same))
            console.print(
                f"percentage points more than {against}; gained and lost: problems now solved in at least half of the "
                "samples, and no longer",
                markup=False,
            )
            for caution in show.cautions(summaries, other, same):
                console.print(caution, style="yellow", markup=False)
        console.print(f"samples and results in {out}", markup=False)


def _print_table(table: Any) -> None:
    drawn = Table(box=SIMPLE, pad_edge=False)
    for heading in table.headings:
        drawn.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for row in table.rows:
        drawn.add_row(*row)
    console.print(drawn, width=WIDEST)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run directories; several are compared.")],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
    figures: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also draw each figure into a file of this folder.")
    ] = None,
    picture: Annotated[PictureFormat | None, typer.Option("--format", help="Of these files; by default png.")] = None,
    debug: Debug = False,
) -> None:
    """One self-contained page about a run, or about several side by side; with --figures also files for a paper.

    Example: `poweropd report runs/quickstart --out report.html --figures figures --format pdf`
    """
    with _plain_errors(debug):
        from poweropd.errors import ConfigError
        from poweropd.report.figures import figures as figures_of
        from poweropd.report.html import write_report
        from poweropd.report.image import save_each
        from poweropd.report.runs import read_run

        if picture and figures is None:
            raise ConfigError(f"--format {picture} is of the files that --figures DIR writes; add --figures DIR")
        names = [path.resolve().name for path in runs]
        same = len(set(names)) < len(names)  # then only the whole path tells two runs apart
        data = [read_run(path, str(path) if same else None) for path in runs]
        write_report(data, out)
        console.print(f"report   {out}", markup=False)
        if figures is not None:
            drawn = [figure for section in figures_of(data) for figure in section.figures]
            files = save_each(drawn, figures, picture or "png")
            console.print(f"figures  {len(files)} in {figures}", markup=False)


@app.command()
def doctor(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe.")], sets: Sets = None, debug: Debug = False
) -> None:
    """Every start-up check of a recipe, without training.

    Example: `poweropd doctor recipes/quickstart.yaml`
    """
    with _plain_errors(debug):
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


@app.command()
def objectives(
    check: Annotated[
        str | None, typer.Option(help="Examine one: a name of the table, or `module:attribute` of a file of yours.")
    ] = None,
    markdown: Annotated[bool, typer.Option(help="As docs/objectives.md.")] = False,
    debug: Debug = False,
) -> None:
    """The table of objectives: equation, what it needs of the teacher, what its gradient is of, source.

    Example: `poweropd objectives --check my_module:my_objective`
    """
    with _plain_errors(debug):
        from poweropd.objectives.describe import as_markdown, facts

        if check is not None:
            _check_objective(check)
        elif markdown:
            sys.stdout.write(as_markdown())
        else:
            from poweropd.objectives import OBJECTIVES

            for name in OBJECTIVES:
                console.print(f"[bold]{name}[/bold]")
                for label, text in facts(name):
                    console.print(f"  {label:<18} {text}", markup=False)


def _check_objective(name: str) -> None:
    from poweropd.errors import ConfigError
    from poweropd.objectives.conformance import check

    try:
        findings = check(name)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    for finding in findings:
        verdict = "[green]ok  [/green]" if finding.holds else "[red]fail[/red]"
        console.print("[dim]-   [/dim]" if finding.reason else verdict, finding.title, end="")
        remark = finding.problem or (f"does not apply: {finding.reason}" if finding.reason else "")
        console.print(f": {remark}" if remark else "", markup=False)
    if not all(finding.holds for finding in findings):
        raise typer.Exit(1)


data_app = typer.Typer(help="Look at training data.", no_args_is_help=True, rich_markup_mode="markdown")
app.add_typer(data_app, name="data")


@data_app.command("check")
def data_check(
    train: Annotated[
        Path, typer.Argument(help="Training problems, .jsonl or .parquet; or a recipe: its data and evaluation.")
    ],
    against: Annotated[
        list[Path] | None, typer.Option(help="Benchmark problems, .jsonl or .parquet; repeatable.")
    ] = None,
    benchmark: Annotated[
        list[str] | None, typer.Option(help="Benchmarks by name, as math500; several by comma.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Benchmarks as <name>.jsonl; those that are not there come from the Hub.")
    ] = None,
    prompt: Annotated[str, typer.Option(help="TRAIN's column with the question; a recipe names its own.")] = "problem",
    against_prompt: Annotated[str, typer.Option(help="Column with the question in --against.")] = "problem",
    out: Annotated[Path | None, typer.Option(help="Write every pair with its texts here, as JSONL.")] = None,
    clean: Annotated[
        Path | None, typer.Option(help="Write the rows of TRAIN that do not overlap here, unchanged.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Training problems that are benchmark problems too: equal, or near by shared 8-grams of words.

    Exits 0 where there is no overlap and 3 where there is, so that a script can ask; 1 is an error.

    Example: `poweropd data check train.jsonl --benchmark math500 --out overlaps.jsonl --clean clean.jsonl`
    """
    with _plain_errors(debug):
        from poweropd.data_check import check

        found = check(
            train, console, against=against or (), benchmarks=_names(benchmark), folder=folder, prompt=prompt,
            against_prompt=against_prompt, out=out, clean=clean,
        )  # fmt: skip
    if found:
        raise typer.Exit(OVERLAP_FOUND)


def _names(options: list[str] | None) -> list[str]:
    """`["a,b", "c"]` as `["a", "b", "c"]`."""
    return [name.strip() for option in options or [] for name in option.split(",") if name.strip()]


def _free(path: Path) -> Path:
    """The path, or the first of path-2, path-3, ... that does not exist."""
    candidates = (path.with_name(f"{path.name}-{number}") for number in range(2, 10_000))
    return path if not path.exists() else next(candidate for candidate in candidates if not candidate.exists())


@contextmanager
def _plain_errors(debug: bool) -> Iterator[None]:
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
        Console(stderr=True).print("interrupted; `poweropd train --resume --out DIR` goes on with a run", markup=False)
        raise typer.Exit(130) from None


def _in_one_line(message: Warning | str, category: type[Warning], filename: str, *_: Any) -> str:
    """Our warnings are for the user; those of libraries say where they come from."""
    place = "" if Path(__file__).parent in Path(filename).parents else f"{filename}: "
    return f"warning: {place}{message}\n"


def main() -> None:
    warnings.formatwarning = _in_one_line  # type: ignore[assignment]
    app()

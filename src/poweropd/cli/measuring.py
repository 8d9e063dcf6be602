"""The verbs that measure and show: evaluate, report, data check."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from poweropd.cli.shared import Debug, app, console, plain_errors, print_table

Precision = Literal["auto", "float32", "bfloat16"]
GradingMode = Literal["math", "exact"]
PictureFormat = Literal["png", "pdf"]
OVERLAP_FOUND = 3  # exit code of `data check`, apart from that of errors


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
    with plain_errors(debug):
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
        print_table(show.results(summaries, ks))
        console.print(f"in percent, with 95 % intervals over problems; graded {show.statuses(summaries)}", markup=False)
        if other is not None and against is not None:
            same = {name: same_problems(out, against, name) for name in summaries}
            print_table(show.comparison(summaries, other, same))
            console.print(
                f"percentage points more than {against}; gained and lost: problems now solved in at least half of the "
                "samples, and no longer",
                markup=False,
            )
            for caution in show.cautions(summaries, other, same):
                console.print(caution, style="yellow", markup=False)
        console.print(f"samples and results in {out}", markup=False)


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
    with plain_errors(debug):
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
    with plain_errors(debug):
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

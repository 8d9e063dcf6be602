"""The verb that looks ahead: plan."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from poweropd.cli.shared import Debug, Sets, app, console, plain_errors

DOES_NOT_FIT = 3  # exit code, apart from that of errors


@app.command()
def plan(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe.")],
    gpu: Annotated[
        str,
        typer.Option(
            help="a100-40, a100-80, h100, h200, b200, l4, l40s, rtx4090, rtx5090, mi300x; or cpu, this machine."
        ),
    ] = "h200",
    gpus: Annotated[int, typer.Option(min=1, help="How many, each with its share of the sequences.")] = 1,
    prompt: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a prompt; by default data.max_prompt_tokens, at most 256.")
    ] = None,
    response: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a response; by default sampling.max_new_tokens.")
    ] = None,
    sets: Sets = None,
    debug: Debug = False,
) -> None:
    """Memory and time of a step on GPUs you may not have yet, from the models' configs; no weights are loaded.

    Says what makes a recipe fit that does not, and exits 3.

    Example: `poweropd plan recipes/paper/qwen3-0.6b-base-from-4b.yaml --gpu l40s --gpus 4`
    """
    with plain_errors(debug):
        from poweropd.config import load_recipe
        from poweropd.plan import show
        from poweropd.plan.advice import advise
        from poweropd.plan.load import Load
        from poweropd.plan.machines import machine
        from poweropd.plan.memory import memory
        from poweropd.plan.timing import seconds, step_time

        chosen = machine(gpu)

        def reload(more: Sequence[str], count: int) -> Load:
            return Load.of(
                load_recipe(recipe, [*(sets or []), *more]), chosen, gpus=count, prompt=prompt, response=response
            )

        load = reload((), gpus)
        needed = memory(load)
        _say(*show.introduction(load))
        _say("", *show.memory_lines(needed), "", *show.time_lines(step_time(load)), "")
        _say(show.verdict(needed))
        if not needed.fits:
            advice = advise(load, reload)
            _say(*show.advised(advice, load, memory(advice.load), seconds(step_time(advice.load))))
            other = show.larger(needed)
            if other is not None and chosen.device == "cuda":
                _say(f"unchanged it fits on {other.name}")
        _say(show.caution(chosen))
    if not needed.fits:
        raise typer.Exit(DOES_NOT_FIT)


def _say(*lines: str) -> None:
    for line in lines:
        console.print(line, markup=False)

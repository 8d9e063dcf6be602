"""What every process of `torchrun` does in tests/test_distributed.py: the runs of a JSON file, one after the other."""

import json
import os
import signal
from pathlib import Path

import typer

from poweropd.cli.shared import plain_errors
from poweropd.config import load_recipe
from poweropd.distributed import ALONE, World, joined
from poweropd.errors import RunError
from poweropd.train import recipe_to_resume, train


class Watcher:
    """Says nothing of a run; on a rank and after a step of choice it is killed, or raises an error.

    Args:
        fault: the step, and what happens then; None: nothing.
    """

    def __init__(self, fault: tuple[int, str] | None = None) -> None:
        self._fault = fault

    def say(self, text: str) -> None: ...
    def warn(self, text: str) -> None: ...
    def on_evaluation(self, name: str, done: int, total: int, accuracy: float | None) -> None: ...

    def on_step(self, step: int, steps: int, metrics: dict[str, float]) -> None:
        if self._fault == (step, "kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        if self._fault == (step, "raise"):
            raise RunError(f"no room after step {step}")


def run(
    recipe: str | None,
    settings: list[str],
    out: str,
    fault: tuple[int, int, str] | None = None,
    world: World = ALONE,
) -> None:
    """One run; resumed where there is no recipe.

    Args:
        fault: rank, step and kind, see `Watcher`.
    """
    chosen = recipe_to_resume(Path(out), settings) if recipe is None else load_recipe(Path(recipe), settings)
    watcher = Watcher((fault[1], fault[2]) if fault and fault[0] == world.rank else None)
    train(chosen, Path(out), watcher, resume=recipe is None, world=world)


def every_run(plan: Path) -> None:
    with plain_errors(debug=False), joined() as world:
        for arguments in json.loads(plan.read_text()):
            run(*arguments, world=world)


if __name__ == "__main__":
    typer.run(every_run)

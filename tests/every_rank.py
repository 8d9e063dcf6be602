"""What every process of `torchrun` does in tests/test_distributed.py: the runs of a JSON file, one after the other."""

import json
import sys
from pathlib import Path

from poweropd.config import load_recipe
from poweropd.distributed import ALONE, World, joined
from poweropd.train import recipe_to_resume, train


class Nobody:
    """Watches a run and says nothing."""

    def say(self, text: str) -> None: ...
    def warn(self, text: str) -> None: ...
    def on_evaluation(self, name: str, done: int, total: int, accuracy: float | None) -> None: ...
    def on_step(self, step: int, steps: int, metrics: dict[str, float]) -> None: ...


def run(recipe: str | None, settings: list[str], out: str, world: World = ALONE) -> None:
    """One run; resumed where there is no recipe."""
    chosen = recipe_to_resume(Path(out), settings) if recipe is None else load_recipe(Path(recipe), settings)
    train(chosen, Path(out), Nobody(), resume=recipe is None, world=world)


if __name__ == "__main__":
    with joined() as world:
        for arguments in json.loads(Path(sys.argv[1]).read_text()):
            run(*arguments, world)

"""The cheapest change of a recipe that makes it fit: each is tried on the model of memory, in the order of what it costs."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from poweropd.plan.load import Load
from poweropd.plan.memory import memory
from poweropd.sections import StudentConfig, TeacherConfig, TrainConfig

LEAST_ROWS = 8  # sequences decoded together, below which decoding is more waiting than work
RANK = 64  # of LoRA
MOST_GPUS = 1024


@dataclass(frozen=True)
class Change:
    """Settings, as `--set` takes them, and GPUs; and what they cost."""

    sets: tuple[str, ...]
    gpus: int
    cost: str


@dataclass(frozen=True)
class Advice:
    """Changes that together make a recipe fit, cheapest first, none of which can be left out; or, if none do, all tried."""

    changes: tuple[Change, ...]
    load: Load
    fits: bool


Reload = Callable[[Sequence[str], int], Load]
"""The load of the recipe with further settings on so many GPUs."""


def advise(load: Load, reload: Reload) -> Advice:
    """
    Args:
        load: one that does not fit.
    """
    taken: list[Change] = []
    for change in _changes(load):
        taken.append(change)
        if _fits(reload, taken, load.gpus):
            break
    for change in list(taken):
        rest = [other for other in taken if other is not change]
        if _fits(reload, rest, load.gpus):
            taken = rest
    found = _with(reload, taken, load.gpus)
    return Advice(tuple(taken), found, memory(found).fits)


def _with(reload: Reload, changes: Sequence[Change], gpus: int) -> Load:
    return reload([setting for change in changes for setting in change.sets], max(gpus, *(change.gpus for change in changes), 1))


def _fits(reload: Reload, changes: Sequence[Change], gpus: int) -> bool:
    return memory(_with(reload, changes, gpus)).fits


def _changes(load: Load) -> Iterator[Change]:
    """In the order of what they cost; each of the later of a kind makes up for the earlier."""
    recipe = load.recipe
    yield from _halved("train.tokens_per_micro_batch", recipe.train.tokens_per_micro_batch, load.fed, load, "more and smaller passes")
    yield from _halved("rollout.sequences_per_batch", load.rows, LEAST_ROWS, load, "more decode steps")
    if not recipe.student.gradient_checkpointing:
        yield Change(("student.gradient_checkpointing=true",), load.gpus, "a third more work in the update")

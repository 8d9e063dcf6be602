"""The cheapest change of a recipe that makes it fit: each is tried on the model of memory, in the order of what it costs."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from poweropd.errors import ConfigError
from poweropd.plan.load import Load
from poweropd.plan.memory import memory
from poweropd.plan.timing import NODE
from poweropd.sections import LoRAConfig, TeacherConfig, TrainConfig

LEAST_ROWS = 8  # sequences decoded together; fewer are more waiting than work
RANK = LoRAConfig().rank


@dataclass(frozen=True)
class Change:
    """Settings, as `--set` takes them, on so many GPUs; and what they cost."""

    sets: tuple[str, ...]
    gpus: int
    cost: str


@dataclass(frozen=True)
class Advice:
    """Changes that together make a recipe fit, cheapest first, none of which can be left out; or, if none do, the furthest of
    each kind. `load` is the recipe's with them."""

    changes: list[Change]
    load: Load
    fits: bool


Reload = Callable[[Sequence[str], int], Load]
"""The load of the recipe with further settings on so many GPUs; raises ConfigError where they do not go together."""


def advise(load: Load, reload: Reload) -> Advice:
    """
    Args:
        load: one that does not fit.
    """

    def changed(changes: Sequence[Change]) -> Load:
        sets = [setting for change in changes for setting in change.sets]
        return reload(sets, max([load.gpus, *(change.gpus for change in changes)]))

    def fit(changes: Sequence[Change]) -> bool:
        try:
            return memory(changed(changes)).fits
        except ConfigError:
            return False

    ladders = [ladder for ladder in _ladders(load) if ladder]
    taken: list[Change] = []
    for ladder in ladders:
        enough = next((change for change in ladder if fit([*taken, change])), None)
        taken.append(enough or ladder[-1])
        if enough is not None:
            break
    else:
        return Advice(taken, changed(taken), fits=False)
    for ladder, change in reversed(list(zip(ladders, taken[:-1], strict=False))):  # what costs most goes first
        place = taken.index(change)
        milder = ([], *([other] for other in ladder[: ladder.index(change)]), [change])
        kept = next(one for one in milder if fit([*taken[:place], *one, *taken[place + 1 :]]))
        taken[place : place + 1] = kept
    return Advice(taken, changed(taken), fits=True)


def _ladders(load: Load) -> Iterator[list[Change]]:
    """Kinds of change in the order of what they cost, each from the mildest on."""
    recipe, gpus = load.recipe, load.gpus
    yield [
        Change((f"train.tokens_per_micro_batch={tokens}",), gpus, "more and smaller passes")
        for tokens in _halves(min(recipe.train.tokens_per_micro_batch, load.sequences * load.fed), load.fed)
    ]
    yield [
        Change((f"rollout.sequences_per_batch={rows}",), gpus, "more decode steps")
        for rows in _halves(load.rows, LEAST_ROWS)
    ]
    if not recipe.student.gradient_checkpointing:
        yield [Change(("student.gradient_checkpointing=true",), gpus, "a third more work in the update")]
    yield list(_of_teachers(load))
    if "sharding" in TrainConfig.model_fields:
        counts = [count for count in (2, 4, NODE) if count > gpus] or [gpus]
        yield [Change(("train.sharding=fsdp",), count, f"{count} GPUs that share one student") for count in counts]
    if recipe.student.lora is None:
        yield [Change((f"student.lora={{rank: {RANK}}}",), gpus, "adapters are trained, not the weights")]


def _of_teachers(load: Load) -> Iterator[Change]:
    """Of all that lie on the GPUs that train."""
    recipe = load.recipe
    keys = ["teacher"] if recipe.teacher is not None else [f"teachers.{name}" for name in recipe.teachers]
    local = [key for key, each in zip(keys, load.teachers, strict=True) if each.local]
    on_gpu = load.machine.device == "cuda"
    ways = (
        (load.gpus > 1, ("sharding=fsdp",), "its layers are gathered for every batch"),
        (on_gpu, ("quantization=8bit",), "scores that are rounded"),
        (on_gpu, ("quantization=4bit",), "scores that are rounded more"),
        (on_gpu, ("offload=true",), "its weights over PCIe for every batch"),
        (True, ("engine=served", "url=http://TEACHER:8100"), "another machine with `poweropd serve-teacher`"),
    )
    for possible, settings, cost in ways:
        exist = all(setting.partition("=")[0] in TeacherConfig.model_fields for setting in settings)
        if local and exist and possible:
            yield Change(tuple(f"{key}.{setting}" for key in local for setting in settings), load.gpus, cost)


def _halves(value: int, least: int) -> Iterator[int]:
    while value > least:
        value = max(least, value // 2)
        yield value

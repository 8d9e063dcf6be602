"""The cheapest change of a recipe that makes it fit: each is tried on the model of memory, in the order of what it costs."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from poweropd.plan.load import Load
from poweropd.plan.memory import memory
from poweropd.plan.timing import NODE
from poweropd.sections import LoRAConfig, TeacherConfig, TrainConfig

LEAST_ROWS = 8  # sequences decoded together; fewer are more waiting than work
RANK = LoRAConfig().rank


@dataclass(frozen=True)
class Change:
    """Settings, as `--set` takes them, and GPUs; and what they cost."""

    sets: tuple[str, ...]
    gpus: int
    cost: str


@dataclass(frozen=True)
class Advice:
    """Changes that together make a recipe fit, cheapest first, none of which can be left out; or all there are, if none do."""

    changes: tuple[Change, ...]
    load: Load
    fits: bool

    @property
    def sets(self) -> list[str]:
        """The settings of all changes, each once."""
        return list({setting.partition("=")[0]: setting for change in self.changes for setting in change.sets}.values())


Reload = Callable[[Sequence[str], int], Load]
"""The load of the recipe with further settings on so many GPUs."""


def advise(load: Load, reload: Reload) -> Advice:
    """
    Args:
        load: one that does not fit.
    """

    def with_all(changes: Sequence[Change]) -> Load:
        sets = [setting for change in changes for setting in change.sets]
        return reload(sets, max([load.gpus, *(change.gpus for change in changes)]))

    def fit(changes: Sequence[Change]) -> bool:
        return memory(with_all(changes)).fits

    taken: list[Change] = []
    for change in _changes(load):
        taken.append(change)
        if fit(taken):
            break
    else:
        return Advice(tuple(taken), with_all(taken), fits=False)
    for change in reversed(taken):  # what costs most and is not needed goes first
        rest = [other for other in taken if other is not change]
        if fit(rest):
            taken = rest
    return Advice(tuple(taken), with_all(taken), fits=True)


def _changes(load: Load) -> Iterator[Change]:
    """In the order of what they cost; of two values of one setting the later counts."""
    recipe, gpus = load.recipe, load.gpus
    micro = recipe.train.tokens_per_micro_batch
    for tokens in _halves(min(micro, load.sequences * load.fed), load.fed):
        yield Change((f"train.tokens_per_micro_batch={tokens}",), gpus, "more and smaller passes")
    for rows in _halves(load.rows, LEAST_ROWS):
        yield Change((f"rollout.sequences_per_batch={rows}",), gpus, "more decode steps")
    if not recipe.student.gradient_checkpointing:
        yield Change(("student.gradient_checkpointing=true",), gpus, "a third more work in the update")
    sections = (
        {"teacher": recipe.teacher} if recipe.teacher else {f"teachers.{n}": c for n, c in recipe.teachers.items()}
    )
    local = [f"{key}." for (key, _), each in zip(sections.items(), load.teachers, strict=True) if each.local]
    for setting, cost in (
        ("quantization=8bit", "scores that are rounded"),
        ("quantization=4bit", "scores that are rounded more"),
        ("offload=true", "its weights over PCIe for every batch"),
        ("url=http://TEACHER-MACHINE:8100", "another machine, with `poweropd serve-teacher`"),
    ):
        name = setting.partition("=")[0]
        if local and name in TeacherConfig.model_fields and (load.machine.device == "cuda" or name == "url"):
            yield Change(tuple(key + setting for key in local), gpus, cost)
    if "sharding" in TrainConfig.model_fields:
        shards = gpus
        while (shards := 2 * shards) <= NODE:
            yield Change(("train.sharding=fsdp",), shards, f"{shards} GPUs that share one student")
    if recipe.student.lora is None:
        yield Change((f"student.lora={{rank: {RANK}}}",), gpus, "adapters are trained, not the weights")


def _halves(value: int, least: int) -> Iterator[int]:
    while value > least:
        value = max(least, value // 2)
        yield value

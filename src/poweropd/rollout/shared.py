"""One engine of several ranks: each answers a part of the prompts."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from poweropd.distributed import World
from poweropd.rollout.engine import RolloutEngine, Sampler, Sampling
from poweropd.types import Prompt, Rollout

T = TypeVar("T")


class SharedEngine:
    """Has every rank answer an equal part of the prompts, and gives all answers to all of them.

    All ranks make the same calls. Samples are pure functions of seed, prompt and sample, so it does not matter who
    draws them.
    """

    def __init__(self, engine: RolloutEngine, world: World) -> None:
        self._engine = engine
        self._world = world

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, *, seed: int) -> list[Rollout]:
        rank, size, count = self._world.rank, self._world.size, len(prompts)
        own = prompts[rank * count // size : (rank + 1) * count // size]
        parts = self._world.each(lambda: self._engine.generate(own, sampling, seed=seed) if own else [])
        return [rollout for part in parts for rollout in part]

    def update_weights(self, *, version: int) -> None:
        self._engine.update_weights(version=version)


def driven(engine: Sampler, world: World, function: Callable[[Sampler], T]) -> T:
    """What a function of rank 0 gives, whose engine is that of all ranks; the others only answer.

    All ranks call. They have the same weights, of which rank 0 takes the fingerprint.
    """
    shared = SharedEngine(engine, world)

    class Driver:
        fingerprint = staticmethod(engine.fingerprint)
        update_weights = staticmethod(shared.update_weights)

        def generate(self, prompts: Sequence[Prompt], sampling: Sampling, *, seed: int) -> list[Rollout]:
            world.broadcast((prompts, sampling, seed))
            return shared.generate(prompts, sampling, seed=seed)

    def drive() -> T:
        try:
            found = function(Driver())
        except Exception:
            world.broadcast(None)
            raise
        world.broadcast(None)
        return found

    if not world.is_main:
        while (call := world.broadcast(None)) is not None:
            asked, sampling, seed = call
            shared.generate(asked, sampling, seed=seed)
    return world.on_main(drive)

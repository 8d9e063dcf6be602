"""When a step's rollouts are drawn: just before it, or while earlier steps train."""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Any, Self

from poweropd.rollout.engine import RolloutEngine, Sampling
from poweropd.types import Prompt, Rollout


class Schedule:
    """Gives every step its rollouts, those of the next steps being drawn while it trains.

    With staleness s > 0, the rollouts of s steps are drawn one step after the other, with the weights that the first of
    the s steps before them begins with: they are 1 to s optimizer steps old when they are trained on. Which weights a
    step's rollouts are of is a function of its number alone, so a run repeats itself to the bit. One-step-off is s = 1.

    Args:
        engine: with weights of its own where s > 0, for it works while the student is trained.
        prompts: of a step.
        seed: of a step.
        steps: of the whole run.
        staleness: s; 0: rollouts are drawn when they are asked for.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        sampling: Sampling,
        prompts: Callable[[int], Sequence[Prompt]],
        seed: Callable[[int], int],
        *,
        steps: int,
        staleness: int = 0,
    ) -> None:
        self._engine = engine
        self._sampling = sampling
        self._prompts = prompts
        self._seed = seed
        self._steps = steps
        self._staleness = staleness
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rollouts")
        self._ahead: dict[int, Future[list[Rollout]]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._worker.shutdown(cancel_futures=True)

    def take(self, step: int) -> list[Rollout]:
        """The rollouts of a step; those of later ones begin to be drawn with the student as it is now.

        Steps are taken in order, each once. It is called between updates: this alone synchronises the engine's weights.
        """
        future = self._ahead.pop(step, None)
        if future is None:
            self._engine.update_weights(version=step)
            rollouts = self._draw(self._prompts(step), self._seed(step))
        else:
            rollouts = future.result()
        if not self._ahead:
            later = range(step + 1, min(step + 1 + self._staleness, self._steps))
            if later:
                self._engine.update_weights(version=step)
            self._ahead = {
                each: self._worker.submit(self._draw, self._prompts(each), self._seed(each)) for each in later
            }
        return rollouts

    def put_back(self, step: int, rollouts: list[Rollout]) -> None:
        """Have a step that was taken, and not trained on, be taken again."""
        self._ahead = {step: _finished(rollouts), **self._ahead}

    def _draw(self, prompts: Sequence[Prompt], seed: int) -> list[Rollout]:
        return self._engine.generate(prompts, self._sampling, seed=seed)

    def finish(self) -> None:
        """Wait until nothing is being drawn, so that the engine may be used for something else."""
        for future in self._ahead.values():
            future.result()

    def state(self) -> dict[str, Any]:
        """What was drawn ahead, with the prompts by their ids; waits for it. What could not be drawn is left out."""
        drawn = {step: future.result() for step, future in self._ahead.items() if future.exception() is None}
        return {"ahead": {step: [_plain(rollout) for rollout in rollouts] for step, rollouts in drawn.items()}}

    def load_state(self, state: dict[str, Any]) -> None:
        """Rollouts of steps that are no longer to be taken are dropped."""
        self._ahead = {}
        for step, plain in state["ahead"].items():
            if step < self._steps:
                self._ahead[step] = _finished(list(_whole(plain, self._prompts(step))))


def _finished(rollouts: list[Rollout]) -> Future[list[Rollout]]:
    future: Future[list[Rollout]] = Future()
    future.set_result(rollouts)
    return future


def _plain(rollout: Rollout) -> dict[str, Any]:
    return {**asdict(replace(rollout, prompt=Prompt("", ()))), "prompt": rollout.prompt.id}


def _whole(plain: Iterable[dict[str, Any]], prompts: Sequence[Prompt]) -> Iterable[Rollout]:
    """Those rollouts that are of the prompts."""
    by_id = {prompt.id: prompt for prompt in prompts}
    return (Rollout(**{**one, "prompt": by_id[one["prompt"]]}) for one in plain if one["prompt"] in by_id)

"""`poweropd quickstart --compare`: every objective on the embedded pair, as many at once as there are cores."""

import multiprocessing
import os
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing.managers import SyncManager
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any

from poweropd.config import Recipe
from poweropd.console import ConsoleObserver
from poweropd.errors import UserError
from poweropd.report.runs import RunData, read_run
from poweropd.train import train

# One seed, one set of prompts, one learning rate; only the objective differs. `sft` has no teacher: it is the control
# that trains on the data's worked answers.
COMPARED: dict[str, list[str]] = {
    "power 5": ["objective.alpha=5"],
    "power 0.5": ["objective.alpha=0.5"],
    "power 1": ["objective.alpha=1"],
    "power 50": ["objective.alpha=50"],
    "log_ratio": ["objective.name=log_ratio"],
    "clip": ["objective.name=clip"],
    "tanh": ["objective.name=tanh"],
    "zscore": ["objective.name=zscore"],
    "reverse_kl": ["objective.name=reverse_kl"],
    "sft": ["objective.name=sft", "rollout.engine=golden"],
}


@dataclass(frozen=True)
class Arm:
    """One run of a comparison."""

    name: str
    recipe: Recipe
    out: Path


def train_all(arms: list[Arm], observer: ConsoleObserver) -> list[RunData]:
    """Train every arm; one that fails is told and left out.

    The first runs alone: the others take over its evaluations of the teacher and of the untrained student. Each of
    the others has a process of its own, `train.threads` threads wide.

    Raises:
        UserError: the first arm failed.
    """
    first, others = arms[0], arms[1:]
    train(first.recipe, first.out, _Named(observer, first.name))
    finished = {first.name}
    shared = first.out / "eval"
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    workers = max(1, (os.cpu_count() or 1) // (first.recipe.train.threads or os.cpu_count() or 1))
    with SyncManager(ctx=context) as manager:
        events: Queue[tuple[str, str, tuple[Any, ...]] | None] = manager.Queue()
        listener = Thread(target=_relay, args=(events, observer), daemon=True)
        listener.start()
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            futures: dict[Future[None], Arm] = {pool.submit(_train_arm, arm, shared, events): arm for arm in others}
            try:
                for future in as_completed(futures):
                    name = futures[future].name
                    try:
                        future.result()
                        finished.add(name)
                    except UserError as error:
                        observer.warn(f"{name}: {error}")
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        events.put(None)
        listener.join()
    return [read_run(arm.out, arm.name) for arm in arms if arm.name in finished]


class _Named:
    """Shows the training of one arm under its name; its evaluations pass in silence."""

    def __init__(self, observer: ConsoleObserver, name: str) -> None:
        self._observer = observer
        self._name = name

    def say(self, text: str) -> None:
        self._observer.say(text)

    def warn(self, text: str) -> None:
        self._observer.warn(f"{self._name}: {text}")

    def on_evaluation(self, name: str, done: int, total: int) -> None:
        if name in ("teacher", "student before"):
            self._observer.on_evaluation(name, done, total)

    def on_step(self, step: int, steps: int, metrics: dict[str, float]) -> None:
        self._observer.on_step(step, steps, metrics, name=self._name)


class _Sent:
    """The observer of an arm in another process: sends what it sees, less what every arm would say alike."""

    def __init__(self, events: "Queue[tuple[str, str, tuple[Any, ...]] | None]", name: str) -> None:
        self._events = events
        self._name = name

    def say(self, text: str) -> None:
        pass

    def warn(self, text: str) -> None:
        self._events.put((self._name, "warn", (text,)))

    def on_evaluation(self, name: str, done: int, total: int) -> None:
        pass

    def on_step(self, step: int, steps: int, metrics: dict[str, float]) -> None:
        self._events.put((self._name, "on_step", (step, steps, metrics)))


def _train_arm(arm: Arm, shared: Path, events: "Queue[tuple[str, str, tuple[Any, ...]] | None]") -> None:
    train(arm.recipe, arm.out, _Sent(events, arm.name), known_evaluations=shared)


def _relay(events: "Queue[tuple[str, str, tuple[Any, ...]] | None]", observer: ConsoleObserver) -> None:
    while (event := events.get()) is not None:
        name, method, arguments = event
        getattr(_Named(observer, name), method)(*arguments)

"""`poweropd quickstart --compare`: every objective on the embedded pair, as many at once as there are cores."""

import multiprocessing
import os
import sys
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.context import SpawnProcess
from multiprocessing.queues import Queue
from pathlib import Path
from threading import Thread

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
    "sft": ["objective.name=sft", "rollout.sources={golden: 1}"],
}

TOLD = 3  # exit code of an arm that failed and said why
Events = Queue  # of (arm, method of its observer, arguments); None ends it


@dataclass(frozen=True)
class Arm:
    """One run of a comparison."""

    name: str
    recipe: Recipe
    out: Path


def train_all(arms: list[Arm], observer: ConsoleObserver) -> list[RunData]:
    """Train every arm; one that fails is told and left out.

    The first runs alone, so that the others find its evaluations of the teacher and of the untrained student in the cache
    of their recipes. Each of the others has a process of its own, `train.threads` threads wide.

    Raises:
        UserError: the first arm failed.
        KeyboardInterrupt: the user stopped the comparison; every arm that ran has stopped after its step.
    """
    first, others = arms[0], arms[1:]
    train(first.recipe, first.out, _Named(observer, first.name))
    cores = os.cpu_count() or 1
    workers = max(1, cores // (first.recipe.train.threads or cores))
    finished = {first.name, *_side_by_side(others, workers, observer)}
    return [read_run(arm.out, arm.name) for arm in arms if arm.name in finished]


def _side_by_side(arms: list[Arm], workers: int, observer: ConsoleObserver) -> set[str]:
    """The names of the arms that finished."""
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    events: Events = context.Queue()
    listener = Thread(target=_relay, args=(events, observer), daemon=True)
    listener.start()
    waiting, finished = list(arms), set()
    running: dict[str, SpawnProcess] = {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                arm = waiting.pop(0)
                process = context.Process(target=_train_arm, args=(arm, events))
                process.start()
                running[arm.name] = process
            connection.wait([process.sentinel for process in running.values()])
            for name, process in list(running.items()):
                if process.exitcode is None:
                    continue
                del running[name]
                if process.exitcode == 0:
                    finished.add(name)
                elif process.exitcode != TOLD:
                    observer.warn(f"{name}: its process ended with exit code {process.exitcode}")
    finally:
        for process in running.values():  # Ctrl-C has reached them too
            process.join()
        events.put(None)
        listener.join()
    return finished


class _Named:
    """Shows the training of one arm under its name; its evaluations pass in silence."""

    def __init__(self, observer: ConsoleObserver, name: str) -> None:
        self._observer = observer
        self._name = name

    def say(self, text: str) -> None:
        self._observer.say(text)

    def warn(self, text: str) -> None:
        self._observer.warn(f"{self._name}: {text}")

    def on_evaluation(self, name: str, done: int, total: int, accuracy: float | None) -> None:
        if name in ("teacher", "student before"):
            self._observer.on_evaluation(name, done, total, accuracy)

    def on_step(self, step: int, steps: int, metrics: dict[str, float]) -> None:
        self._observer.on_step(step, steps, metrics, name=self._name)


class _Sent:
    """The observer of an arm in another process: sends what it sees, less what every arm would say alike."""

    def __init__(self, events: Events, name: str) -> None:
        self._events = events
        self._name = name

    def say(self, text: str) -> None:
        pass

    def warn(self, text: str) -> None:
        self._events.put((self._name, "warn", (text,)))

    def on_evaluation(self, name: str, done: int, total: int, accuracy: float | None) -> None:
        pass

    def on_step(self, step: int, steps: int, metrics: dict[str, float]) -> None:
        self._events.put((self._name, "on_step", (step, steps, metrics)))


def _train_arm(arm: Arm, events: Events) -> None:
    Thread(target=_end_with_parent, daemon=True).start()
    observer = _Sent(events, arm.name)
    try:
        train(arm.recipe, arm.out, observer)
    except UserError as error:
        observer.warn(str(error))
        sys.exit(TOLD)
    except KeyboardInterrupt:
        sys.exit(TOLD)


def _end_with_parent() -> None:
    """A comparison that was killed leaves no arm behind; each can be resumed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _relay(events: Events, observer: ConsoleObserver) -> None:
    while (event := events.get()) is not None:
        name, method, arguments = event
        getattr(_Named(observer, name), method)(*arguments)

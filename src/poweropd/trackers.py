"""Metrics to TensorBoard, Weights & Biases and trackio while a run lasts. A tracker may fail; the run goes on."""

import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from types import TracebackType
from typing import Any, Protocol, Self

from poweropd.config import Recipe
from poweropd.errors import ConfigError
from poweropd.runlog import MANIFEST, RunDirectory, Status

FINISH_SECONDS = 60.0  # for what is still to be sent when a run ends

Metrics = Mapping[str, float]


class Tracker(Protocol):
    """Where metrics go.

    Attributes:
        address: where to look at them.
    """

    address: str

    def log(self, step: int, metrics: Metrics) -> None:
        """Metrics after `step` optimizer steps; steps never fall, and one may come more than once."""
        ...

    def finish(self, status: Status) -> None:
        """Send what is left, and say how the run ended."""
        ...


class Watcher(Protocol):
    """Whoever is told where a run can be seen, and what went wrong with that."""

    def say(self, text: str) -> None: ...
    def warn(self, text: str) -> None: ...


class TensorBoard:
    """Event files in the run directory; those of steps that are taken again are purged."""

    def __init__(self, recipe: Recipe, run: RunDirectory, resumed_at: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = run.path / "tensorboard"
        self.address = f"tensorboard --logdir {folder}"
        self._writer = SummaryWriter(str(folder), purge_step=None if resumed_at is None else resumed_at + 1)
        if resumed_at is None:
            self._writer.add_text("recipe", "".join(f"    {line}\n" for line in recipe.to_yaml().splitlines()), 0)

    def log(self, step: int, metrics: Metrics) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def finish(self, status: Status) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of wandb with an id that the manifest keeps; it leaves out steps it has already, which are the same again."""

    def __init__(self, recipe: Recipe, run: RunDirectory, resumed_at: int | None) -> None:
        import wandb

        known = json.loads((run.path / MANIFEST).read_text(encoding="utf-8")).get("wandb_id")
        name = known or uuid.uuid4().hex[:12]
        run.set_status("running", wandb_id=name)
        self._run = wandb.init(
            project=recipe.log.project,
            id=name,
            name=run.path.resolve().name,
            dir=str(run.path),
            config=recipe.model_dump(mode="json"),
            resume="allow",
            reinit="create_new",
            allow_val_change=True,
            settings=wandb.Settings(console="off"),  # the progress bar is no log
        )
        self.address = f"wandb sync {Path(self._run.dir).parent}" if self._run.offline else str(self._run.url)

    def log(self, step: int, metrics: Metrics) -> None:
        self._run.log(dict(metrics), step=step)

    def finish(self, status: Status) -> None:
        self._run.finish(exit_code=0 if status == "finished" else 1)


class Trackio:
    """A run of trackio by name, in the newest of that name where it goes on; steps that are taken again stand twice."""

    def __init__(self, recipe: Recipe, run: RunDirectory, resumed_at: int | None) -> None:
        import trackio

        self.address = f"trackio show --project {recipe.log.project}"
        self._run = trackio.init(
            project=recipe.log.project,
            name=run.path.resolve().name,
            config=recipe.model_dump(mode="json"),
            resume="never" if resumed_at is None else "allow",
            embed=False,
        )

    def log(self, step: int, metrics: Metrics) -> None:
        self._run.log(dict(metrics), step=step)

    def finish(self, status: Status) -> None:
        self._run.finish()


TRACKERS: dict[str, Callable[[Recipe, RunDirectory, int | None], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "trackio": Trackio,
}
ADVICE = {
    "tensorboard": "leave it out of log.trackers",
    "wandb": "use `wandb login`, set WANDB_MODE=offline, or leave it out of log.trackers",
    "trackio": "leave it out of log.trackers",
}


def require(names: Sequence[str]) -> None:
    """Refuse trackers that are not installed.

    Raises:
        ConfigError: which, and how to install them.
    """
    specs = {name: find_spec(name) for name in names}
    # a folder of runs that is called wandb looks like a package too, but has no origin
    missing = [name for name, spec in specs.items() if spec is None or spec.origin is None]
    if missing:
        raise ConfigError(
            f"log.trackers: not installed: {', '.join(missing)}. Install with: pip install {' '.join(missing)}; or leave "
            f"{'it' if len(missing) == 1 else 'them'} out"
        )


class Guarded:
    """A tracker in a thread of its own: however slow it is, or broken, the run does not notice.

    Args:
        warn: told once of the first error; later metrics are tried all the same, as networks come back.
    """

    def __init__(self, name: str, tracker: Tracker, warn: Callable[[str], None]) -> None:
        self._name = name
        self._tracker = tracker
        self._warn = warn
        self._warned = False
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = Thread(target=self._run, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: Metrics) -> None:
        self._work.put(partial(self._tracker.log, step, dict(metrics)))

    def finish(self, status: Status, seconds: float = FINISH_SECONDS) -> None:
        """Wait for what is still to be sent, but not longer than `seconds`."""
        self._work.put(partial(self._tracker.finish, status))
        self._work.put(None)
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._warn(f"{self._name} has not finished after {seconds:g} s; what it shows may lack the end of the run")

    def _run(self) -> None:
        while (task := self._work.get()) is not None:
            try:
                task()
            except Exception as error:  # whatever a tracker raises, it is no reason to lose a run
                if not self._warned:
                    self._warned = True
                    problem = " ".join(f"{type(error).__name__}: {error}".split())
                    self._warn(f"{self._name} fails, and may lack metrics; metrics.jsonl has them all ({problem})")


class Trackers:
    """The trackers that a recipe asks for, from `start` to the end of the `with` block."""

    def __init__(self, recipe: Recipe, run: RunDirectory, watcher: Watcher, *, resume: bool) -> None:
        self._recipe = recipe
        self._run = run
        self._watcher = watcher
        self._resume = resume
        self._resumed_at: int | None = None
        self._open: list[Guarded] = []

    def __enter__(self) -> Self:
        return self

    def start(self, step: int) -> None:
        """Open them all, to go on after `step` optimizer steps.

        Raises:
            ConfigError: one of them cannot be used.
        """
        self._resumed_at = step if self._resume else None
        for name in dict.fromkeys(self._recipe.log.trackers):
            try:
                tracker = TRACKERS[name](self._recipe, self._run, self._resumed_at)
            except Exception as error:  # each has errors of its own
                problem = " ".join(str(error).split()).rstrip(".")
                raise ConfigError(f"log.trackers: {name} cannot start: {problem}; {ADVICE[name]}") from error
            self._open.append(Guarded(name, tracker, self._watcher.warn))
            self._watcher.say(f"{name}: {tracker.address}")

    def log(self, step: int, metrics: Metrics) -> None:
        """The metrics of optimizer step `step`, counted from 1."""
        for tracker in self._open:
            tracker.log(step, metrics)

    def log_evaluation(self, place: str, benchmark: str, summary: Mapping[str, Any]) -> None:
        """What an evaluation measured, as `eval/<benchmark>/<measure>`; of a teacher, `eval/<teacher>/<benchmark>/...`.

        One that an earlier session of this run has logged is not logged again.

        Args:
            place: of the evaluation below eval/: steps taken, or a teacher.
        """
        step, group = (int(place), "eval") if place.isdigit() else (0, f"eval/{place}")
        if not (self._resumed_at and step <= self._resumed_at):
            self.log(step, {f"{group}/{benchmark}/{measure}": summary[measure] for measure in summary["intervals"]})

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        interrupted = kind is not None and issubclass(kind, KeyboardInterrupt)
        status: Status = "finished" if kind is None else "interrupted" if interrupted else "failed"
        for tracker in self._open:
            tracker.finish(status)

"""How far a run has come: saved, and gone on with."""

import time
from collections.abc import Mapping
from typing import Any, Protocol

from poweropd import checkpoint
from poweropd.errors import RunError
from poweropd.policy import Student
from poweropd.runlog import CHECKPOINTS, RunDirectory


class Stateful(Protocol):
    """Something that decides later steps."""

    def state(self) -> Any: ...
    def load_state(self, state: Any) -> None: ...


class Progress:
    """The checkpoints of a run. Of several ranks, all make the same calls.

    Args:
        parts: what decides later steps beside the student, by name.
        keep: how many checkpoints.
    """

    def __init__(self, run: RunDirectory, student: Student, parts: Mapping[str, Stateful], *, keep: int) -> None:
        self._run = run
        self._root = run.path / CHECKPOINTS
        self._student = student
        self._parts = parts
        self._keep = keep
        self._started = time.monotonic()
        self._seconds_before = 0.0  # of earlier sessions of this run, up to the checkpoint

    @property
    def seconds(self) -> float:
        """That the run has taken, over all sessions."""
        return self._seconds_before + time.monotonic() - self._started

    def save(self, step: int) -> None:
        """Save all that decides the steps after `step` ones.

        Raises:
            RunError: it cannot be written.
        """
        student = self._student
        state = {
            "student": None if student.is_sharded else student.state(),
            "random": checkpoint.random_states(),
            **{name: part.state() for name, part in self._parts.items()},
        }
        meta = {"step": step, "seconds": self.seconds, "logs": self._run.log_sizes()}
        shards = student.shards() if student.is_sharded else None
        try:
            checkpoint.save(self._root, step, state, meta, keep=self._keep, shards=shards, world=student.world)
        except OSError as error:
            newest = checkpoint.newest_step(self._root)
            remains = "there is no earlier one" if newest is None else f"that of step {newest} is intact"
            raise RunError(
                f"cannot save the checkpoint of step {step} in {self._root}: {error.strerror or error}; {remains}. "
                "Make room, then go on with --resume"
            ) from error

    def restore(self) -> int:
        """Take up the newest checkpoint, if there is one; returns the step to go on with.

        Raises:
            RunError: it is damaged, or of another model.
        """
        student = self._student
        loaded = checkpoint.load_latest(self._root, student.world)
        if loaded is None:
            self._run.rewind_logs({})
            return 0
        state, meta = loaded
        step = int(meta["step"])
        if state["student"] is None:
            student.refuse_another(checkpoint.shapes_of_shards(self._root, step))
            checkpoint.read_shards(self._root, step, student.shards())
        else:
            student.load_state(state["student"])
        checkpoint.set_random_states(state["random"])
        for name, part in self._parts.items():
            if name in state:  # checkpoints of earlier versions do not know all of them
                part.load_state(state[name])
        self._run.rewind_logs(meta["logs"])
        self._seconds_before = meta["seconds"]
        return step

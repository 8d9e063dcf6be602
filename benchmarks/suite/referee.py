"""Holds a contest: starts its contestants as processes and asks them for turns, in an order that alternates."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from suite.contests import IDLE_GIB, Contest, Contestant
from suite.results import Results, available_memory

RUN = Path(__file__).parents[1] / "run.py"
TOLD = 300  # characters of what a failed contestant said last


class ContestantError(Exception):
    """A contestant cannot go on, or cannot begin."""


class Process:
    """A contestant that gets ready, and then waits for its turns."""

    def __init__(self, contestant: Contestant, python: Path, turns: int, threads: int) -> None:
        self._errors = TemporaryFile("w+")  # noqa: SIM115
        work = json.dumps(contestant.options)
        self._process = subprocess.Popen(
            [python, RUN, "--work", contestant.function, work, "--turns", str(turns)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment(threads),
        )

    def wait(self) -> None:
        """Until it is ready for its first turn."""
        self._answer()

    def turn(self) -> dict[str, Any]:
        """Ask for a turn and wait for what it measured."""
        assert self._process.stdin is not None
        try:
            print("go", file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise self._failure() from None
        return self._answer(skip_ready=True)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._errors.close()

    def _answer(self, *, skip_ready: bool = False) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            answer = json.loads(line)
            if not (skip_ready and "ready" in answer):
                return answer
        raise self._failure()

    def _failure(self) -> ContestantError:
        code = self._process.wait()
        self._errors.seek(0)
        told = " ".join(self._errors.read().split())[-TOLD:]
        return ContestantError(f"ended with {code}: {told}" if told else f"ended with {code}")


def environment(threads: int) -> dict[str, str]:
    """What contestants share: threads that wait without spinning, and no network."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


def hold(contest: Contest, results: Results, *, peers: Path | None, threads: int, say: Callable[[str], None]) -> None:
    """All turns of a contest, each written as soon as it is there."""
    start = time.monotonic()
    entry = results.open(contest.name, {"threads": threads})
    hall = _Hall(contest, entry, results, peers, threads, say)
    try:
        if contest.rounds + contest.dropped == 1:  # nothing to compare turn by turn: one process at a time
            for contestant in contest.contestants:
                hall.admit(contestant)
                hall.round(counts=True)
                hall.dismiss()
        else:
            hall.admit(*contest.contestants)
            for number in range(contest.dropped + contest.rounds):
                hall.round(counts=number >= contest.dropped, backwards=number % 2 == 1)
    finally:
        hall.dismiss()
    entry |= {"done": True, "seconds": round(time.monotonic() - start)}
    results.save()


class _Hall:
    """The contestants that take part at the moment."""

    def __init__(
        self,
        contest: Contest,
        entry: dict[str, Any],
        results: Results,
        peers: Path | None,
        threads: int,
        say: Callable[[str], None],
    ) -> None:
        self._contest, self._entry, self._results = contest, entry, results
        self._peers, self._threads, self._say = peers, threads, say
        self._present: list[tuple[Contestant, Process]] = []

    def admit(self, *contestants: Contestant) -> None:
        """Start them side by side, and wait for all."""
        turns = self._contest.dropped + self._contest.rounds
        room = available_memory() / 2**30
        for contestant in contestants:
            python = self._peers if contestant.is_peer else Path(sys.executable)
            try:
                if python is None:
                    raise ContestantError("needs the environment that `make benchmark` makes for the peers")
                if contestant.gib > room - IDLE_GIB * len(self._present):
                    raise ContestantError(
                        f"needs {contestant.gib:g} GiB of memory beside the others; {room:.1f} are there"
                    )
                self._present.append((contestant, Process(contestant, python, turns, self._threads)))
            except ContestantError as error:
                self._fail(contestant, error)
        for contestant, process in list(self._present):
            try:
                process.wait()
            except ContestantError as error:
                self._remove(contestant, process, error)

    def round(self, *, counts: bool, backwards: bool = False) -> None:
        """A turn of everyone present."""
        for contestant, process in self._present[:: -1 if backwards else 1]:
            try:
                turn = process.turn()
            except ContestantError as error:
                self._remove(contestant, process, error)
                continue
            said = f"  {contestant.name:<28} {turn['wall']:7.2f} s  {turn['cpu']:7.2f} CPU s"
            if counts:
                self._entry["turns"].setdefault(contestant.name, []).append(turn)
                self._results.save()
            self._say(said if counts else f"{said}, to warm up")
        if counts:
            self._send_the_slower_home()

    def _send_the_slower_home(self) -> None:
        """Of every group, all but the fastest."""
        for group in {contestant.group for contestant, _ in self._present if contestant.group}:
            members = [place for place in self._present if place[0].group == group]
            members.sort(key=lambda place: self._entry["turns"][place[0].name][0]["cpu"])
            for slower in members[1:]:
                slower[1].close()
                self._present.remove(slower)

    def dismiss(self) -> None:
        for _, process in self._present:
            process.close()
        self._present = []

    def _remove(self, contestant: Contestant, process: Process, error: ContestantError) -> None:
        process.close()
        self._present.remove((contestant, process))
        self._fail(contestant, error)

    def _fail(self, contestant: Contestant, error: ContestantError) -> None:
        self._entry["failed"][contestant.name] = str(error)
        self._results.save()
        self._say(f"  {contestant.name}: {error}")

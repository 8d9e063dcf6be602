"""Holds a contest: starts its contestants as processes and asks them for turns, in an order that alternates."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from suite.contests import Contest, Contestant
from suite.results import Results, available_memory

RUN = Path(__file__).parents[1] / "run.py"
TOLD = 300  # characters of what a failed contestant said last


class ContestantError(Exception):
    """A contestant cannot go on, or cannot begin."""


class Process:
    """A contestant that waits for its turns."""

    def __init__(self, contestant: Contestant, python: Path, turns: int, threads: int) -> None:
        room = available_memory() / 2**30
        if room < contestant.gib:
            raise ContestantError(f"needs {contestant.gib:g} GiB of memory, {room:.1f} are available")
        self.name = contestant.name
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
        self._answer()  # ready for the first turn

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
    entry = results.open(contest.name, {"threads": threads})
    hall = _Hall(contest, entry, results, peers, threads, say)
    try:
        if contest.rounds + contest.dropped == 1:  # nothing to compare turn by turn: one process at a time
            for contestant in contest.contestants:
                hall.admit(contestant)
                hall.round(counts=True)
                hall.dismiss()
        else:
            for contestant in contest.contestants:
                hall.admit(contestant)
            for number in range(contest.dropped + contest.rounds):
                hall.round(counts=number >= contest.dropped, backwards=number % 2 == 1)
    finally:
        hall.dismiss()
    entry["done"] = True
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

    def admit(self, contestant: Contestant) -> None:
        python = self._peers if contestant.is_peer else Path(sys.executable)
        try:
            if python is None:
                raise ContestantError("needs the environment that `make benchmark` makes for the peers")
            turns = self._contest.dropped + self._contest.rounds
            self._present.append((contestant, Process(contestant, python, turns, self._threads)))
        except ContestantError as error:
            self._fail(contestant, error)

    def round(self, *, counts: bool, backwards: bool = False) -> None:
        """A turn of everyone present."""
        for contestant, process in self._present[:: -1 if backwards else 1]:
            try:
                turn = process.turn()
            except ContestantError as error:
                process.close()
                self._present.remove((contestant, process))
                self._fail(contestant, error)
                continue
            if counts:
                self._entry["turns"].setdefault(contestant.name, []).append(turn)
                self._results.save()
                rate = f"{turn['tokens'] / turn['wall']:,.0f} tokens/s" if turn.get("tokens") else ""
                self._say(f"  {contestant.name:<28} {turn['wall']:7.2f} s  {turn['cpu']:7.2f} CPU s  {rate}")
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

    def _fail(self, contestant: Contestant, error: ContestantError) -> None:
        self._entry["failed"][contestant.name] = str(error)
        self._results.save()
        self._say(f"  {contestant.name}: {error}")

"""One contestant's side of a contest: work is measured when the referee asks for it, one turn at a time.

A contestant is a process. It sets itself up, then waits; each line on its standard input asks for one turn, each turn is
answered by one line of JSON. So several contestants alternate, each with its models loaded and its libraries warm.
"""

import ctypes
import gc
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any, TextIO

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Turns:
    """Clocks and memory of the turns of this process.

    Args:
        count: turns that will be asked for.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._answers = _own_stdout()
        self._laps: dict[str, dict[str, float]] = {}

    def begin(self) -> None:
        """Wait to be asked, then start the clocks. The process ends here if nobody asks any more."""
        gc.collect()
        _give_back_freed_memory()
        print(json.dumps({"ready": True}), file=self._answers, flush=True)
        if not sys.stdin.readline():
            sys.exit(0)
        _reset_peak()
        self._base = resident()
        self._laps = {}
        self._start = self._last = _clocks()

    def lap(self, phase: str) -> None:
        """Everything since the last lap was `phase`."""
        now = _clocks()
        self._laps[phase] = _difference(self._last, now)
        self._last = now

    def end(self, **facts: Any) -> None:
        """Stop the clocks and answer; `facts` are what else is known of the turn."""
        seconds = _difference(self._start, _clocks())
        memory = {"base": self._base, "peak": max(0, peak() - self._base)}
        print(json.dumps({**seconds, **memory, "laps": self._laps, **facts}), file=self._answers, flush=True)


def resident() -> int:
    """Resident memory of this process, in bytes; where the system does not tell, the most there has been."""
    return _status("VmRSS") or _most_resident()


def peak() -> int:
    """The most resident memory since the peak was last reset, in bytes; where it cannot be reset, ever."""
    return _status("VmHWM") or _most_resident()


def _status(key: str) -> int:
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), 0)


def _most_resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _reset_peak() -> None:
    try:
        CLEAR.write_text("5")
    except OSError:
        return  # not Linux: peaks count from the start of the process


def _give_back_freed_memory() -> None:
    """What a turn has freed must not count as resident before the next one."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _difference(start: tuple[float, float], stop: tuple[float, float]) -> dict[str, float]:
    return {"wall": stop[0] - start[0], "cpu": stop[1] - start[1]}


def _own_stdout() -> TextIO:
    """Standard output for answers alone: what libraries print goes to standard error instead."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers

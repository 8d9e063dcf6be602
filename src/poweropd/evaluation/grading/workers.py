"""Grading processes: started when first needed, killed when they hang, replaced when they die or have grown old."""

import contextlib
import json
import queue
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

STARTUP_SECONDS = 120.0  # a busy machine imports slowly
PATIENCE = 6.0  # seconds by the clock for one of processor time, before a worker is killed
COMPARISONS_PER_WORKER = 2000  # sympy's memory grows slowly


class WorkerPool:
    """Compares pairs of answers in up to `size` processes.

    Args:
        seconds: of processor time for one comparison; a process that has not answered in six times as long by the clock is
            killed.
    """

    def __init__(self, size: int, seconds: float) -> None:
        self._seconds = seconds
        self._slots: queue.LifoQueue[Worker | None] = queue.LifoQueue()  # last used first: one caller needs one process
        for _ in range(size):
            self._slots.put(None)
        self._size = size

    def compare(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[str, bool]]:
        """For every (given, gold), in order: `correct`, `wrong`, `unparsable` or `timeout`, and whether gold is mathematics."""
        if len(pairs) < 2:
            return [self._compare(pair) for pair in pairs]
        with ThreadPoolExecutor(self._size) as threads:
            return list(threads.map(self._compare, pairs))

    def close(self) -> None:
        for _ in range(self._size):
            worker = self._slots.get()
            if worker is not None:
                worker.kill()
            self._slots.put(None)

    def _compare(self, pair: tuple[str, str]) -> tuple[str, bool]:
        worker = self._slots.get()
        try:
            for _ in range(2):  # a worker that died, say by the system's hand, need not have died of this pair
                if worker is None or not worker.fresh:
                    if worker is not None:
                        worker.kill()
                    worker = None
                    worker = Worker(self._seconds)
                reply = worker.ask(pair)
                if reply is not None:
                    return reply
                hung = worker.alive
                worker.kill()
                worker = None
                if hung:
                    break
            return "timeout", True
        finally:
            self._slots.put(worker)


class Worker:
    """One process. A thread of ours reads its lines, so that waiting for one can time out on every system."""

    def __init__(self, seconds: float) -> None:
        self._patience = PATIENCE * seconds
        self._asked = 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "poweropd.evaluation.grading.math_worker", str(seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
        )
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        if self._next_line(STARTUP_SECONDS) != "ready":
            self.kill()
            raise RuntimeError(f"the grading process did not start within {STARTUP_SECONDS:g} s")

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    @property
    def fresh(self) -> bool:
        return self._asked < COMPARISONS_PER_WORKER

    def ask(self, pair: tuple[str, str]) -> tuple[str, bool] | None:
        """Its verdict, None when it gives none in time or dies: of memory, or by a signal."""
        assert self._process.stdin is not None
        self._asked += 1
        try:
            self._process.stdin.write(json.dumps(pair) + "\n")
            self._process.stdin.flush()
        except OSError:
            self._process.wait()
            return None
        line = self._next_line(self._patience)
        if not line:
            return None
        status, readable = json.loads(line)
        return status, readable

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # what it never read cannot be flushed any more
            self._process.stdin.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._lines.put(line.strip())
        self._process.wait()
        self._lines.put("")  # it died

    def _next_line(self, seconds: float) -> str:
        try:
            return self._lines.get(timeout=seconds)
        except queue.Empty:
            return ""

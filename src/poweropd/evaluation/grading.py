"""Grade final answers. Symbolic comparison runs in a process of its own, which a hostile answer may hang or kill."""

import json
import queue
import re
import subprocess
import sys
import threading
from dataclasses import dataclass
from importlib.metadata import version
from typing import Literal, get_args

GradeStatus = Literal["correct", "wrong", "no_answer", "unparsable", "timeout"]
GradingMode = Literal["math", "exact"]
GRADING_VERSION = 2  # raised whenever the same answer could get another grade
STARTUP_SECONDS = 120.0  # a busy machine imports slowly
LONGEST_ANSWER = 1000  # characters; a longer "answer" is not one
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?")
_INTEGER = re.compile(r"-?\d+")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")  # the comma of 1,000, not that of the pair 1,2


@dataclass(frozen=True)
class Grade:
    """`answer` is what was extracted from the response, None if nothing was."""

    status: GradeStatus
    answer: str | None

    @property
    def correct(self) -> bool:
        return self.status == "correct"


def extract_answer(response: str) -> str | None:
    """The final answer of a response: the last `\\boxed{...}`, else after the last `####`, else the last number."""
    boxed = _last_boxed(response)
    if boxed is not None:
        return boxed
    _, marker, after = response.rpartition("####")
    if marker and after.strip():
        return after.strip().splitlines()[0].strip()
    numbers = _NUMBER.findall(response)
    return numbers[-1] if numbers else None


def _last_boxed(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start += len("\\boxed{")
    depth = 1
    for at in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return text[start:at].strip()
    return None


class Grader:
    """Compares answers with references, symbolically where their texts differ.

    Symbolic comparison is math-verify in a child process with a hard time limit. An answer that exceeds it costs its own
    grade: the child is killed and a new one serves the next. Use as a context manager, or call `close`.

    Args:
        mode: `math` compares values; `exact` the texts alone, for tasks where 2/4 is not 1/2.
        seconds: for one comparison.
    """

    def __init__(self, *, mode: GradingMode = "math", seconds: float = 5.0) -> None:
        self._mode = mode
        self._seconds = seconds
        self._worker: _Worker | None = None

    @property
    def version(self) -> str:
        """What grades depend on beside the answer: evaluations of another version are graded again, not sampled."""
        return f"{self._mode} {GRADING_VERSION}, math-verify {version('math-verify')}"

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._worker is not None:
            self._worker.kill()
            self._worker = None

    def grade(self, response: str, reference: str) -> Grade:
        """The grade of a response against a reference answer."""
        answer = extract_answer(response)
        if answer is None:
            return Grade("no_answer", None)
        if len(answer) > LONGEST_ANSWER:
            return Grade("unparsable", answer[:LONGEST_ANSWER])
        given, gold = (_THOUSANDS.sub("", text.strip()) for text in (answer, reference))
        if given == gold:
            return Grade("correct", answer)
        if _INTEGER.fullmatch(given) and _INTEGER.fullmatch(gold):
            return Grade("correct" if int(given) == int(gold) else "wrong", answer)
        if self._mode == "exact":
            return Grade("wrong", answer)
        return Grade(self._compare(answer, reference), answer)

    def _compare(self, answer: str, reference: str) -> GradeStatus:
        if self._worker is None:
            self._worker = _Worker()
        status = self._worker.ask(answer, reference, self._seconds)
        if status == "timeout":
            self.close()
        return status


class _Worker:
    """The child process. A thread of ours reads its lines, so that waiting for one can time out on every system."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "poweropd.evaluation.math_worker"],
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

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line.strip())
        self._lines.put("")  # it died

    def _next_line(self, seconds: float) -> str:
        try:
            return self._lines.get(timeout=seconds)
        except queue.Empty:
            return ""

    def ask(self, answer: str, reference: str, seconds: float) -> GradeStatus:
        """The child's verdict; `timeout` when it gives none in time or dies: of memory, or by a signal."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps([answer, reference]) + "\n")
            self._process.stdin.flush()
        except OSError:
            return "timeout"
        line = self._next_line(seconds)
        return line if line in get_args(GradeStatus) else "timeout"  # type: ignore[return-value]

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

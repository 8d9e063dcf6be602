"""Grade final answers: extract, compare cheaply, and leave what takes algebra to processes that may hang or die of it."""

import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Literal, cast

from poweropd.evaluation.grading.comparison import compare
from poweropd.evaluation.grading.extraction import extract_answer
from poweropd.evaluation.grading.workers import WorkerPool

GradeStatus = Literal["correct", "wrong", "no_answer", "unparsable", "timeout"]
GradingMode = Literal["math", "exact"]
GRADING_VERSION = 1  # raised whenever the same answer could get another grade
LONGEST_ANSWER = 1000  # characters; a longer "answer" is not one, and a longer reference is compared as text
DEEPEST_NESTING = 12  # brackets within brackets; parsing time grows exponentially with them
MOST_REMEMBERED = 100_000
_INTEGER = re.compile(r"-?\d+")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")  # the comma of 1,000, not that of the pair 1,2


@dataclass(frozen=True)
class Grade:
    """`answer` is what was extracted from the response, None if nothing was.

    `status` is one of:
        correct: equal to the reference.
        wrong: not equal, or equality could not be shown. Also every answer that does not have the text of a reference that
            is itself no mathematics.
        no_answer: the response holds no box with anything in it, no `####`, no number.
        unparsable: the answer is nothing that can be compared: no mathematics, or longer or deeper nested than any answer.
        timeout: comparing it ran into the limit of time or memory.
    """

    status: GradeStatus
    answer: str | None

    @property
    def correct(self) -> bool:
        return self.status == "correct"


class Grader:
    """Compares answers with references, symbolically where plain comparison does not tell.

    Symbolic comparison is math-verify in child processes with hard limits of time and memory, started when first needed.
    An answer that exceeds a limit costs its own grade. Use as a context manager, or call `close`.

    Args:
        mode: `math` compares values; `exact` the texts alone, for tasks where 2/4 is not 1/2.
        seconds: of processor time for one comparison, and six times as long by the clock.
        workers: most processes at a time.
    """

    def __init__(self, *, mode: GradingMode = "math", seconds: float = 5.0, workers: int = 2) -> None:
        self._mode = mode
        self._pool = WorkerPool(workers, seconds)
        self._known: dict[tuple[str, str], GradeStatus] = {}
        self._compared_as_text: set[str] = set()

    @property
    def version(self) -> str:
        """What grades depend on beside the answer: evaluations of another version are graded again, not sampled."""
        return f"{self._mode} {GRADING_VERSION}, math-verify {version('math-verify')}"

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._pool.close()

    @property
    def compared_as_text(self) -> frozenset[str]:
        """References met so far that cannot be read as mathematics: only an answer of the same text is correct."""
        return frozenset(self._compared_as_text)

    def grade(self, response: str, reference: str) -> Grade:
        """The grade of a response against a reference answer."""
        return self.grade_many([(response, reference)])[0]

    def grade_many(self, pairs: Iterable[tuple[str, str]]) -> list[Grade]:
        """The grades of (response, reference) pairs, in order. Pairs with the same answer and reference are compared once."""
        questions = [(extract_answer(response), reference) for response, reference in pairs]
        if len(self._known) > MOST_REMEMBERED:
            self._known.clear()
        open_questions = []
        for answer, reference in dict.fromkeys(questions):
            if answer is not None and (answer, reference) not in self._known:
                status = self._grade_plainly(answer, reference)
                if status is None:
                    open_questions.append((answer, reference))
                else:
                    self._known[answer, reference] = status
        for question, (reply, readable) in zip(open_questions, self._pool.compare(open_questions), strict=True):
            self._known[question] = cast(GradeStatus, reply)
            if not readable:
                self._tell_of_text(question[1])
        return [
            Grade("no_answer", None)
            if answer is None
            else Grade(self._known[answer, reference], answer[:LONGEST_ANSWER])
            for answer, reference in questions
        ]

    def _grade_plainly(self, answer: str, reference: str) -> GradeStatus | None:
        if len(answer) > LONGEST_ANSWER or _nesting(answer) > DEEPEST_NESTING:
            return "unparsable"
        if self._mode == "exact" or len(reference) > LONGEST_ANSWER:
            return "correct" if _same_text(answer, reference) else "wrong"
        equal = compare(answer, reference)
        return None if equal is None else "correct" if equal else "wrong"

    def _tell_of_text(self, reference: str) -> None:
        if reference not in self._compared_as_text:
            self._compared_as_text.add(reference)
            warnings.warn(
                f"the reference {reference!r} cannot be read as mathematics: only an answer of the same text is correct",
                stacklevel=4,
            )


def _same_text(answer: str, reference: str) -> bool:
    given, gold = (_THOUSANDS.sub("", text.strip()) for text in (answer, reference))
    if _INTEGER.fullmatch(given) and _INTEGER.fullmatch(gold):  # whatever their leading zeros
        given, gold = (re.sub(r"^(-?)0+(?=\d)", r"\1", text) for text in (given, gold))
    return given == gold


def _nesting(text: str) -> int:
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return deepest

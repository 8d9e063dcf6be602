"""Grading: what is taken for the answer, what each status means, and what the processes are for."""

import os
import signal
import sys
import time
from collections.abc import Iterator

import pytest

from poweropd.evaluation.grading import Grade, Grader, extract_answer, workers
from poweropd.evaluation.grading.math_worker import MEMORY_LIMIT


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader() as grader:
        yield grader


def processes(grader: Grader) -> list[workers.Worker]:
    return [worker for worker in grader._pool._slots.queue if worker is not None]


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("so \\boxed{7}", "7"),
        ("\\boxed{1} no, \\boxed{2}", "2"),
        ("\\boxed{\\frac{1}{2}} done", "\\frac{1}{2}"),
        ("\\boxed{x=\\boxed{5}}", "5"),
        ("\\boxed {7}", "7"),
        ("\\fbox{7}", "7"),
        ("$\\boxed 72.$", "72"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("} and { \\boxed{3} }}", "3"),
        ("\\boxed{a{b}c", None),
        ("\\boxed{4} so \\boxed{\\frac{1", "4"),
        ("\\boxed{} 3", "3"),
        ("#### 42", "42"),
        ("#### 1\n#### 42 \nbye", "42"),
        ("The answer is 1,234.", "1,234"),
        ("The answer is $\\frac{3}{4}$, after 2 steps", "\\frac{3}{4}"),
        ("The answer is (C), not 7", "(C)"),
        ("The final answer is: **8** of 10", "8"),
        ("The answer is 1.\nThe answer is above", "1"),
        ("it is -3/4.", "-3/4"),
        ("pages 3-4", "4"),
        ("7 then 12.5", "12.5"),
        ("about 1.5e-3", "1.5e-3"),
        ("none", None),
        ("", None),
    ],
)
def test_extraction(response: str, answer: str | None) -> None:
    assert extract_answer(response) == answer


@pytest.mark.parametrize(
    "pattern",
    ["\\boxed{", "\\boxed{\\boxed{1", "{", "}", "\\boxed ", "answer is ", "#### ", "1,", "-", "$", "\\(", "1e"],
)
def test_extraction_takes_time_in_proportion_to_the_length(pattern: str) -> None:
    def seconds(length: int) -> float:
        text = pattern * (length // len(pattern))
        start = time.process_time()
        extract_answer(text)
        return time.process_time() - start

    seconds(10_000)
    assert seconds(1_000_000) < 10 + 20 * seconds(100_000)  # quadratic would be 100 times, and minutes


@pytest.mark.parametrize(
    ("response", "reference", "grade"),
    [
        ("\\boxed{\\frac{14}{18}}", "7/9", Grade("correct", "\\frac{14}{18}")),
        ("\\boxed{\\sqrt{8}}", "2\\sqrt{2}", Grade("correct", "\\sqrt{8}")),
        ("\\boxed{\\sqrt{8}}", "2\\sqrt{3}", Grade("wrong", "\\sqrt{8}")),
        ("no idea", "3", Grade("no_answer", None)),
        ("\\boxed{\\frac{}{}}", "3", Grade("unparsable", "\\frac{}{}")),
        ("\\boxed{" + "1" * 2000 + "}", "3", Grade("unparsable", "1" * 1000)),
        ("\\boxed{" + "(" * 25 + "3" + ")" * 25 + "}", "3", Grade("unparsable", "(" * 25 + "3" + ")" * 25)),
    ],
)
def test_every_status(grader: Grader, response: str, reference: str, grade: Grade) -> None:
    assert grader.grade(response, reference) == grade


def test_what_takes_no_algebra_takes_no_process() -> None:
    with Grader() as grader:
        for answer, reference in [
            ("0.5", "1/2"),
            ("2, 1", "1,2"),
            ("(C) 7", "\\text{(C)}"),
            ("50\\%", "0.5"),
            ("8", "9"),
        ]:
            grader.grade(f"\\boxed{{{answer}}}", reference)
        assert not processes(grader)


def test_exact_mode_compares_text() -> None:
    with Grader(mode="exact") as grader:
        assert grader.grade("\\boxed{14/18}", "7/9").status == "wrong"
        assert grader.grade("\\boxed{7/9}", "7/9").status == "correct"
        assert grader.grade("It is 1,000", "1000").status == "correct"
        assert grader.grade("It is 007", "7").status == "correct"
        assert grader.grade("It is -7", "7").status == "wrong"
        assert grader.grade("\\boxed{0}", "00").status == "correct"


def test_many_are_graded_in_order_and_equal_pairs_once() -> None:
    values = [3, 5, 3, 7, 5, 3] * 20
    pairs = [(f"\\boxed{{\\sqrt{{{n * n}x^2}}}}", f"{3}\\sqrt{{x^2}}") for n in values]
    with Grader(workers=2) as grader:
        grades = grader.grade_many(pairs)
        assert [grade.correct for grade in grades] == [n == 3 for n in values]
        assert sum(worker._asked for worker in processes(grader)) == 3
        assert grader.grade(*pairs[0]) == grades[0]
        assert sum(worker._asked for worker in processes(grader)) == 3
        assert len(processes(grader)) <= 2
        assert grader.grade_many([]) == []


def test_a_reference_that_is_no_mathematics_is_compared_as_text_and_told_of() -> None:
    reference = "$f(x)=a x$, where $a$ is \\textit{any} prime $\\equiv 1$"
    with Grader() as grader:
        answers = ["t(0,4]", "\\sqrt{2}+x"]
        with pytest.warns(UserWarning, match="cannot be read as mathematics") as told:
            grades = [grader.grade(f"\\boxed{{{answer}}}", "u(0,4]") for answer in answers]
        assert [grade.status for grade in grades] == ["wrong", "wrong"]
        assert sum("cannot be read" in str(warning.message) for warning in told) == 1
        assert grader.compared_as_text == {"u(0,4]"}
        assert grader.grade("\\boxed{u\\left(0, 4\\right]}", "u(0,4]").status == "correct"
        assert grader.grade(f"\\boxed{{{reference}}}", reference).status == "correct"


def test_a_hopeless_comparison_costs_its_own_grade_and_not_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "PATIENCE", 100.0)  # on a machine busy with other work
    with Grader(seconds=0.5, workers=1) as grader:
        assert grader.grade("\\boxed{((20!)!)!}", "3").status == "timeout"
        (first,) = processes(grader)
        assert grader.grade("\\boxed{\\sqrt{8}}", "2\\sqrt{2}").status == "correct"
        assert processes(grader) == [first]


def test_a_process_that_hangs_is_killed_and_replaced() -> None:
    with Grader(seconds=0.5, workers=1) as grader:
        grader.grade("\\boxed{\\sqrt{8}}", "2\\sqrt{2}")
        (hanging,) = processes(grader)
        os.kill(hanging._process.pid, signal.SIGSTOP)  # nothing that it could do about it itself
        assert grader.grade("\\boxed{\\sqrt{18}}", "3\\sqrt{2}").status == "timeout"
        assert not hanging.alive
        assert grader.grade("\\boxed{\\sqrt{32}}", "4\\sqrt{2}").status == "correct"


def test_an_answer_is_asked_again_where_the_process_died_of_something_else() -> None:
    with Grader(workers=1) as grader:
        grader.grade("\\boxed{\\sqrt{8}}", "2\\sqrt{2}")
        (dying,) = processes(grader)
        dying._process.kill()
        assert grader.grade("\\boxed{\\sqrt{18}}", "3\\sqrt{2}").status == "correct"


def test_an_old_process_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "COMPARISONS_PER_WORKER", 2)
    with Grader(workers=1) as grader:
        seen = set()
        for n in range(2, 7):
            assert grader.grade(f"\\boxed{{\\sqrt{{{2 * n * n}}}}}", f"{n}\\sqrt{{2}}").correct
            seen.add(processes(grader)[0]._process.pid)
    assert len(seen) == 3


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the limits of another process")
def test_processes_are_limited_in_memory_and_write_no_files() -> None:
    import resource

    with Grader(workers=1) as grader:
        grader.grade("\\boxed{\\sqrt{8}}", "2\\sqrt{2}")
        pid = processes(grader)[0]._process.pid
        assert resource.prlimit(pid, resource.RLIMIT_AS) == (MEMORY_LIMIT, MEMORY_LIMIT)
        assert resource.prlimit(pid, resource.RLIMIT_FSIZE) == (0, 0)


def test_closing_ends_the_processes() -> None:
    with Grader() as grader:
        grader.grade("\\boxed{\\sqrt{8}}", "2\\sqrt{2}")
        (worker,) = processes(grader)
    assert not worker.alive
    assert not processes(grader)

"""Grading: what is taken for the answer, what counts as equal, and what a hostile answer costs."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from poweropd.evaluation.grading import Grader, extract_answer


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(seconds=2.0) as grader:
        grader.grade("\\boxed{0.5}", "1/2")  # starts the worker, so that no test pays for it
        yield grader


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("so \\boxed{7}", "7"),
        ("\\boxed{1} no, \\boxed{2}", "2"),
        ("\\boxed{\\frac{1}{2}} done", "\\frac{1}{2}"),
        ("\\boxed{a{b}c", None),
        ("#### 42", "42"),
        ("#### 1\n#### 42 \nbye", "42"),
        ("The answer is 1,234.", "1,234"),
        ("it is -3/4.", "-3/4"),
        ("7 then 12.5", "12.5"),
        ("none", None),
        ("", None),
        ("\\boxed{} 3", ""),
    ],
)
def test_extraction(response: str, answer: str | None) -> None:
    assert extract_answer(response) == answer


@pytest.mark.parametrize(
    ("response", "reference", "status"),
    [
        ("\\boxed{72}", "72", "correct"),
        ("\\boxed{072}", "72", "correct"),
        ("It is 1,072.", "1072", "correct"),
        ("\\boxed{71}", "72", "wrong"),
        ("\\boxed{\\frac{14}{18}}", "7/9", "correct"),
        ("\\boxed{0.5}", "\\frac{1}{2}", "correct"),
        ("\\boxed{x = 5}", "5", "correct"),
        ("\\boxed{(1, 2)}", "(1,2)", "correct"),
        ("\\boxed{\\{1, 2\\}}", "\\{2, 1\\}", "correct"),
        ("\\boxed{2\\sqrt{2}}", "\\sqrt{8}", "correct"),
        ("\\boxed{2}", "\\sqrt{8}", "wrong"),
        ("\\boxed{1,2}", "12", "wrong"),
        ("\\boxed{12}", "1,2", "wrong"),
        ("\\boxed{1,234,567}", "1234567", "correct"),
        ("no idea", "3", "no_answer"),
    ],
)
def test_equality(grader: Grader, response: str, reference: str, status: str) -> None:
    assert grader.grade(response, reference).status == status


def test_exact_mode_compares_text() -> None:
    with Grader(mode="exact") as grader:
        assert grader.grade("\\boxed{14/18}", "7/9").status == "wrong"
        assert grader.grade("\\boxed{7/9}", "7/9").status == "correct"
        assert grader.grade("It is 1,000", "1000").status == "correct"


HOSTILE = [
    "9^{9^{9^{9^{9}}}}",
    "99999999999!",
    "\\int_0^1 x^{x^{x^{x}}} dx",
    "{" * 400 + "1" + "}" * 400,
    "\\sqrt{" * 200 + "2" + "}" * 200,
    "__import__('os').system('touch hacked')",
    "\\sum_{k=1}^{10^{12}} \\frac{1}{k^{k}}",
    "\\frac" * 300,
    "(" * 400,
    "x" * 999,
    "1" * 100_000,
    "\\\\" * 400,
    "\x00\n\r\u2028",
]


def test_a_hostile_answer_costs_one_grade_and_bounded_time(grader: Grader, tmp_path: Path) -> None:
    os.chdir(tmp_path)
    for answer in HOSTILE:
        start = time.monotonic()
        grade = grader.grade(f"\\boxed{{{answer}}}", "3")
        assert not grade.correct
        assert time.monotonic() - start < 2.0 + 5.0  # the limit and a slow machine
        assert grader.grade("\\boxed{\\frac{6}{2}}", "3").status in ("correct", "timeout")  # a fresh worker may be slow
        assert grader.grade("\\boxed{\\frac{6}{2}}", "3").status == "correct"
    assert not list(tmp_path.iterdir())


def test_a_worker_that_dies_is_replaced(grader: Grader) -> None:
    grader.grade("\\boxed{0.5}", "1/2")
    assert grader._worker is not None
    grader._worker._process.kill()
    assert grader.grade("\\boxed{0.25}", "1/4").status == "timeout"
    assert grader.grade("\\boxed{0.25}", "1/4").status == "correct"

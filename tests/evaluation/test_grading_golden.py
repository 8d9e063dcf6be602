"""The golden table: grades that people decided by the mathematics, row by row; and a second checker's view of it."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from second_checker import equal

from poweropd.evaluation.grading import Grader, GradeStatus
from poweropd.evaluation.grading.math_worker import MEMORY_LIMIT

pytestmark = pytest.mark.filterwarnings("ignore:the reference")
ROWS: list[dict[str, Any]] = [
    json.loads(line)
    for line in (Path(__file__).parent / "golden_grades.jsonl").read_text(encoding="utf-8").splitlines()
]
MOST_KNOWN = 0.03


def response(row: dict[str, Any]) -> str:
    return row["response"] if "response" in row else f"So it is $\\boxed{{{row['answer']}}}$."


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(seconds=3) as grader:
        yield grader


@pytest.fixture(scope="module")
def statuses(grader: Grader) -> list[GradeStatus]:
    return [grade.status for grade in grader.grade_many((response(row), row["reference"]) for row in ROWS)]


def test_every_row_has_the_grade_that_it_should(statuses: list[GradeStatus]) -> None:
    different = [
        f"{row.get('answer', row.get('response'))} for {row['reference']}: {status}, not {row['status']} ({row['why']})"
        for row, status in zip(ROWS, statuses, strict=True)
        if "known" not in row and status != row["status"]
    ]
    assert not different, "\n".join(different)


def test_known_disagreements_are_few_and_still_there(statuses: list[GradeStatus]) -> None:
    known = [(row, status) for row, status in zip(ROWS, statuses, strict=True) if "known" in row]
    assert len(known) <= MOST_KNOWN * len(ROWS)
    assert [row for row, status in known if status == row["status"]] == []


def test_no_known_disagreement_counts_a_wrong_answer(statuses: list[GradeStatus]) -> None:
    """What the grader does not see costs a right answer its grade; it never gives a wrong one a grade."""
    assert not [row for row, status in zip(ROWS, statuses, strict=True) if "known" in row and status == "correct"]


def test_the_table_is_large_and_of_every_status() -> None:
    assert len(ROWS) >= 300
    assert {row["status"] for row in ROWS} == {"correct", "wrong", "no_answer", "unparsable", "timeout"}
    assert all(row["why"] for row in ROWS)


def test_a_second_checker_agrees_with_the_table() -> None:
    rows = [row for row in ROWS if "answer" in row and row["status"] in ("correct", "wrong")]
    verdicts = [equal(row["answer"], row["reference"]) for row in rows]
    judged = [(row, verdict) for row, verdict in zip(rows, verdicts, strict=True) if verdict is not None]
    assert len(judged) > 0.4 * len(rows)
    assert [row for row, verdict in judged if verdict != (row["status"] == "correct")] == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_ordinary_answers_take_a_small_part_of_the_memory_allowed() -> None:
    ordinary = [row for row in ROWS if row["status"] in ("correct", "wrong")]
    with Grader(workers=1) as grader:
        grader.grade_many((response(row), row["reference"]) for row in ordinary[::3])
        (worker,) = (worker for worker in grader._pool._slots.queue if worker is not None)
        status = Path(f"/proc/{worker._process.pid}/status").read_text()
    peak = int(status.split("VmPeak:")[1].split()[0]) * 1024
    assert peak < MEMORY_LIMIT / 4

"""The sentences of a verdict claim no more than is known, and are whole English."""

import json
import shutil
from pathlib import Path

import pytest
from fixtures import edit_summaries, variant

from poweropd.report.runs import read_run
from poweropd.report.tables import tables
from poweropd.report.verdict import headline, verdict


def test_one_is_one(tmp_path: Path) -> None:
    folder = variant(tmp_path / "run")
    shutil.rmtree(folder / "eval" / "000030")
    (folder / "eval" / "000060").rename(folder / "eval" / "000001")
    edit_summaries(folder, lambda place, found: {**found, "correct": {"only": 4 if place == "000001" else 0}, "benchmark": "gsm8k"})  # fmt: skip
    text = " ".join(verdict([read_run(folder)]))
    assert "in 1 step," in text
    assert "over 1 problem," in text
    assert "It gained 1 problem and lost 0" in text
    assert "in 1 step (" in headline(read_run(folder))


def test_without_pairs_overlapping_intervals_leave_it_open(tmp_path: Path) -> None:
    """Two intervals may overlap although the difference is certain."""
    folder = variant(tmp_path / "run")
    keep = ("avg_at_4", "problems", "samples")
    ends = {"000000": (0.3, 0.5), "000030": (0.4, 0.6), "000060": (0.45, 0.65), "teacher": (0.7, 0.8)}

    def change(place: str, found: dict) -> dict:
        return {**{key: found[key] for key in keep}, "intervals": {"avg_at_4": ends[place]}}

    edit_summaries(folder, change)
    answer = verdict([read_run(folder)])[0]
    assert answer.startswith("Whether the change is more than chance cannot be told: Avg@4 went from ")
    assert "the two 95 % intervals overlap" in answer
    assert "which may be chance" in headline(read_run(folder))
    edit_summaries(folder, lambda place, found: {**found, "intervals": None})
    assert "overlap" not in verdict([read_run(folder)])[0]


@pytest.mark.parametrize(
    ("status", "told"), [(None, "Nothing has been logged yet"), ("failed", "run failed after 0 of 60")]
)
def test_an_empty_run_is_told_once(status: str | None, told: str, tmp_path: Path) -> None:
    folder = variant(tmp_path / "run", lambda _: None)
    shutil.rmtree(folder / "eval")
    (folder / "manifest.json").write_text(json.dumps({"status": status}))
    (sentence,) = verdict([read_run(folder)])
    assert sentence.startswith(told)


def test_equal_students_share_the_star(tmp_path: Path) -> None:
    runs = [read_run(variant(tmp_path / name)) for name in ("one", "two")]
    (table,) = (table for table in tables(runs) if table.title == "Benchmarks")
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["Avg@4 one"] == rows["Avg@4 two"]
    assert all(cell.endswith("*") for cell in rows["Avg@4 one"])


def test_a_lead_on_few_problems_is_not_called_one(tmp_path: Path) -> None:
    one, two = (variant(tmp_path / name) for name in ("one", "two"))
    for folder, correct in ((one, 4), (two, 0)):
        edit_summaries(folder, lambda place, found, correct=correct: {**found, "correct": {f"{k}": correct for k in range(4)}})  # fmt: skip
    lead = verdict([read_run(one), read_run(two)])[0]
    assert lead.startswith("one has the highest Avg@4, 1.000: ")
    assert "too few for the interval to be trusted" in lead
    assert "a distinguishable lead" not in lead

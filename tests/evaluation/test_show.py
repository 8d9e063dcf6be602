"""Evaluations as tables: the paper's columns, their mean, and a comparison."""

import pytest

from poweropd.errors import RunError
from poweropd.evaluation.show import cautions, comparison, results, statuses
from poweropd.evaluation.summary import summarise


def summary(title: str, correct: list[int], k: int = 4) -> dict:
    samples = [
        {
            "id": str(n), "answer": "1" if place < right else None, "status": "correct" if place < right else "no_answer",
            "length": 10, "finish_reason": "stop", "repetitive": False,
        }
        for n, right in enumerate(correct)
        for place in range(k)
    ]  # fmt: skip
    return {"title": title, **summarise(samples)}


SUMMARIES = {"mine": summary("Mine", [4, 4]), "aime24": summary("AIME24", [0, 2, 4]), "gsm8k": summary("GSM8K", [1, 1])}


def test_columns_are_in_the_order_of_the_paper_and_end_with_the_mean() -> None:
    table = results(SUMMARIES, further_ks=(3,))
    assert table.headings == ["", "GSM8K", "AIME24", "Mine", "mean"]
    rows = {row[0]: row[1:] for row in table.rows if row[0]}
    assert list(rows) == [
        "Avg@4", "Pass@2", "Pass@3", "Pass@4", "Maj@4", "length", "cut", "repetitive", "problems",
    ]  # fmt: skip
    assert table.rows[1][1:3] == ["4-88", "0-100"]  # GSM8K: both problems have 1 of 4
    assert [cell.split()[0] for cell in rows["Avg@4"]] == ["25.0", "50.0", "100.0", "58.3"]
    assert [cell.split()[0] for cell in rows["Pass@3"]] == ["75.0", "66.7", "100.0", "80.6"]
    assert rows["problems"] == ["2", "3", "2"]
    assert statuses(SUMMARIES) == "16 correct, 12 no_answer"


def test_one_sample_has_no_passes_and_one_benchmark_no_mean() -> None:
    table = results({"aime24": summary("AIME24", [0, 1], k=1)})
    assert table.headings == ["", "AIME24"]
    assert [row[0] for row in table.rows] == ["Avg@1", "length", "cut", "repetitive", "problems"]


def with_settings(summaries: dict, **settings: object) -> dict:
    return {name: {**each, "settings": {"temperature": 1.0, **settings}} for name, each in summaries.items()}


def test_a_comparison_is_of_the_shared_problems() -> None:
    same = {"aime24": {"0", "1", "2"}, "gsm8k": set(), "mine": {"0"}}
    table = comparison(SUMMARIES, {"aime24": summary("AIME24", [2, 0])}, same)
    assert table.rows == [["AIME24", "+0.0 [-50.0, +50.0]", "1", "1", "2"]]
    with pytest.raises(RunError, match="nothing to compare"):
        comparison(SUMMARIES, {"math500": SUMMARIES["mine"]}, same)


def test_a_comparison_says_what_speaks_against_it() -> None:
    mine, theirs = with_settings(SUMMARIES, seed=1), with_settings(SUMMARIES, seed=2)
    told = cautions(mine, theirs, {"aime24": {"0", "1"}, "gsm8k": {"0", "1"}, "mine": {"0", "1"}})
    assert "aime24: made otherwise: seed 2 there, 1 here" in told
    assert "aime24: 1 ids stand for another problem there, and are left out" in told
    assert any("on so few problems" in line for line in told)
    assert cautions(mine, {}, {}) == []

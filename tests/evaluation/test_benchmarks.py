"""The table of benchmarks: names, counts, and the rows that lie beside the checkout."""

import json
from pathlib import Path

import pytest

from conftest import SHARED
from poweropd.errors import ConfigError
from poweropd.evaluation.benchmarks import BENCHMARKS, PRESETS, benchmark, benchmark_rows
from poweropd.evaluation.standalone import chosen_sets

DATA = SHARED / "data"


def test_the_paper_is_one_preset_in_its_column_order() -> None:
    paper = PRESETS["paper"]
    assert (paper.samples, paper.max_new_tokens, paper.temperature) == (8, 4096, 0.6)
    titles = [benchmark(name).title for name in paper.benchmarks]
    assert titles == ["GSM8K", "MATH-500", "AMC23", "AIME24", "AIME25", "Minerva", "Olympiad"]


@pytest.mark.parametrize("name", BENCHMARKS)
@pytest.mark.skipif(not DATA.is_dir(), reason=f"no benchmarks in {DATA}")
def test_every_benchmark_is_complete(name: str) -> None:
    rows = benchmark_rows(name, DATA)
    assert len(rows) == BENCHMARKS[name].count
    assert len({row["id"] for row in rows}) == len(rows)
    assert all(row["problem"].strip() and row["answer"].strip() for row in rows)


def test_a_benchmark_that_is_not_in_the_folder_comes_from_the_hub(tmp_path: Path) -> None:
    data = benchmark("olympiadbench").data(tmp_path, limit=5, chat=False)
    assert (data.source, data.path, data.subset) == ("hub", "Hothan/OlympiadBench", "OE_TO_maths_en_COMP")
    assert (data.answer, data.expected_rows, data.limit, data.chat) == ("final_answer", 674, 5, False)
    assert "\\boxed{}" in data.template


def test_a_wrong_count_is_refused(tmp_path: Path) -> None:
    rows = [json.dumps({"problem": f"{n}?", "answer": str(n)}) for n in range(29)]
    (tmp_path / "aime24.jsonl").write_text("\n".join(rows))
    with pytest.raises(ConfigError, match=r"aime24\.jsonl has 29 rows, and 30 are expected"):
        benchmark_rows("aime24", tmp_path)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("math-500", "math500"), ("AIME_25", "aime25"), ("olympiad", "olympiadbench"), ("amc", "amc23")],
)
def test_an_unknown_name_gets_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"did you mean {nearest}"):
        benchmark(name)


def test_what_is_asked_must_be_said(tmp_path: Path) -> None:
    (tmp_path / "math500.jsonl").write_text("{}")
    with pytest.raises(ConfigError, match="say what to evaluate on"):
        chosen_sets([], [], None, None, {}, {})
    with pytest.raises(ConfigError, match="two sets of problems are called math500"):
        chosen_sets(["math500"], [tmp_path / "math500.jsonl"], None, None, {}, {})
    with pytest.raises(ConfigError, match="there is no such file, it is a folder"):
        chosen_sets([], [tmp_path], None, None, {}, {})
    with pytest.raises(ConfigError, match="there is no folder nowhere"):
        chosen_sets(["math500"], [], Path("nowhere"), None, {}, {})
    assert set(chosen_sets(["math500"], [], None, "paper", {}, {})) == set(BENCHMARKS)

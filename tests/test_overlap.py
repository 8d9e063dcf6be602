"""Overlap of training problems and benchmarks: what counts, what does not, and the command that lists it."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from typer.testing import CliRunner

from conftest import RECIPE, SHARED
from poweropd.cli import app
from poweropd.overlap import Problem, normalised, overlaps, words

AYA = (
    "Every morning Aya goes for a $9$-kilometer-long walk and stops at a coffee shop afterwards. When she walks at a constant "
    "speed of $s$ kilometers per hour, the walk takes her 4 hours, including $t$ minutes spent in the coffee shop."
)
LATEX = r"Let $x\geq 0$ and $\frac{1}{2}x^{2} + 3 = \left( y - 1 \right)$. Find the largest value of $x \cdot y$."
BAG = (
    "A bag holds 5 red and 7 blue marbles, and Ada draws two of them without putting the first one back. "
    "What is the probability that both are red?"
)


def kinds(training: str, benchmark: str) -> list[str]:
    return [pair.kind for pair in overlaps([Problem("t", training)], [Problem("b", benchmark)])]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"Find $\dfrac{1}{2}x + 3$.", "find frac 1 2 x + 3"),
        (r"\[ \left\{ x \,\middle|\, x \leqslant 1.5 \right\} \]", "x middle | x le 1.5"),
        (r"\text{He} paid \$1{,}000 — “gladly”", "he paid 1 000 - gladly"),
        ("ﬁnd ｘ² ≥ π", "find x ^ 2 ge pi"),
        (r"\frac12 \frac{12}3", "frac 1 2 frac 12 3"),
        (" \n ", ""),
    ],
)
def test_words(text: str, expected: str) -> None:
    assert " ".join(words(text)) == expected


def test_numbers_stay_apart_where_braces_go() -> None:
    assert normalised(r"\frac{1}{23}") != normalised(r"\frac{12}{3}")
    assert normalised(r"$x y$") == normalised(r"$xy$")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (AYA, AYA),
        (AYA, AYA.upper().replace(" ", "\n  ")),
        (AYA, AYA.replace("$", "").replace("-", "−")),
        (LATEX, r"Let \( x \ge 0 \) and \(\dfrac12 x^2+3=(y-1)\). Find the largest value of \(x\cdot{}y\)"),
        (LATEX, LATEX.replace("x^{2}", "x²").replace(r"\cdot", "·").replace(r"\geq", "≥")),
        ("What is $2+3$?", "What is 2 + 3"),  # five words: equal or nothing
    ],
)
def test_equal(one: str, other: str) -> None:
    assert kinds(one, other) == ["exact"]
    assert kinds(other, one) == ["exact"]


@pytest.mark.parametrize(
    ("training", "benchmark"),
    [
        (AYA.replace("Every morning Aya", "Each morning Bea"), AYA),
        (AYA + " Find $t$.", AYA),
        (f"Answer carefully. {AYA}", AYA),
        (BAG.replace("5 red", "6 red"), BAG),  # a long text with another number in it: near, and to be looked at
    ],
)
def test_near(training: str, benchmark: str) -> None:
    assert kinds(training, benchmark) == ["near"]


@pytest.mark.parametrize(
    ("training", "benchmark"),
    [
        (LATEX, AYA),
        ("", ""),
        ("What is 2 + 3?", "What is 2 + 4?"),
        # numbers all over: hardly eight words in a row are the same
        (
            "A car drives 30 km in 2 hours, a train 90 km in 3 hours and a plane 700 km in 1 hour. Which is fastest?",
            "A car drives 35 km in 4 hours, a train 80 km in 5 hours and a plane 900 km in 2 hours. Which is fastest?",
        ),
        # the benchmark problem is a small part of a long training text
        (AYA + " " + " ".join(f"word{letter} thing{letter}" for letter in "abcdefghijklmnopqrstuvwxyz" * 4), AYA),
        # the training problem is a small part of the benchmark's
        (AYA, AYA + " " + " ".join(f"word{letter} thing{letter}" for letter in "abcdefghijklmnopqrstuvwxyz" * 4)),
        ("If the shop is closed, how long does her usual walk take, in minutes, on the morning of the race?", AYA),
    ],
)
def test_neither(training: str, benchmark: str) -> None:
    assert kinds(training, benchmark) == []


def test_a_pair_in_full() -> None:
    training = [Problem("a", LATEX, "7"), Problem("b", AYA, "24"), Problem("c", AYA.replace("Aya", "Bea"), "x")]
    exact, near = overlaps(training, [Problem("q", AYA, "024"), Problem("r", BAG)])
    assert (exact.training_place, exact.training.id, exact.benchmark.id, exact.kind) == (1, "b", "q", "exact")
    assert (exact.of_benchmark, exact.of_training, exact.same_answer) == (1.0, 1.0, True)
    assert (near.training_place, near.kind, near.same_answer) == (2, "near", False)
    assert near.of_benchmark == near.of_training == (38 - 3) / 38  # 45 words; three 8-grams hold the third
    assert overlaps([Problem("b", AYA)], [Problem("q", AYA, "24")])[0].same_answer is None


def brute_force(training: Sequence[str], benchmark: Sequence[str]) -> dict[tuple[int, int], tuple[str, float, float]]:
    """All pairs, compared one by one: no index, no candidates; n-grams as texts."""

    def parts(text: str) -> tuple[str, set[str]]:
        found = words(text)
        plain = re.sub(r"(?<=\D)\s|\s(?=\D)", "", " ".join(found))
        return plain, {" ".join(found[start : start + 8]) for start in range(len(found) - 7)}

    found = {}
    asked = [parts(text) for text in benchmark]
    for i, text in enumerate(training):
        plain, grams = parts(text)
        for j, (other_plain, other_grams) in enumerate(asked):
            common = len([gram for gram in grams if gram in other_grams])
            of_training, of_benchmark = (common / len(each) if each else 0.0 for each in (grams, other_grams))
            if plain == other_plain:
                found[i, j] = ("exact", 1.0, 1.0)
            elif of_benchmark >= 0.6 and of_training >= 0.4:
                found[i, j] = ("near", of_benchmark, of_training)
    return found


def problems_of(name: str) -> list[Problem]:
    path = SHARED / "data" / f"{name}.jsonl"
    if not path.is_file():
        pytest.skip(f"the data sets are not here: {path}")
    rows = map(json.loads, path.open("rb"))
    return [Problem(row["id"], row["problem"], row["answer"]) for row in rows]


def test_agrees_with_comparing_all_pairs_of_real_problems() -> None:
    asked = problems_of("olympiadbench_674")[:40] + problems_of("math500")[:60] + problems_of("amc23")
    half = [Problem(problem.id, problem.text[: 2 * len(problem.text) // 3]) for problem in asked[:60]]
    reworded = [
        Problem(problem.id, " ".join(word if place % 17 else "some" for place, word in enumerate(problem.text.split())))
        for problem in asked[30:]
    ]
    training = problems_of("train_small_deepscaler_512")[:60] + half + reworded + asked[::9]
    expected = brute_force([problem.text for problem in training], [problem.text for problem in asked])
    found = overlaps(training, asked)
    assert {
        (pair.training_place, pair.benchmark_place): (pair.kind, pair.of_benchmark, pair.of_training) for pair in found
    } == expected
    counts = [sum(kind == each for kind, _, _ in expected.values()) for each in ("exact", "near")]
    assert min(counts) >= 10, "the comparison is of nothing"


def test_agrees_with_comparing_all_pairs_of_one_template() -> None:
    """Where most n-grams are those of every problem, and only the rare ones tell."""
    texts = [
        f"Your task is to count how many legs there are in total when given a list: {n} ants, {n % 3} {'cows ' * (n % 5)} end"
        for n in range(40)
    ]
    expected = brute_force(texts[:20], texts[10:])
    problems = [Problem(str(n), text) for n, text in enumerate(texts)]
    found = overlaps(problems[:20], problems[10:])
    assert {
        (pair.training_place, pair.benchmark_place): (pair.kind, pair.of_benchmark, pair.of_training) for pair in found
    } == expected
    assert 0 < len(expected) < 20 * 30


CLEANED = {  # pairs that an earlier cleaning left; read: both are the same problem, in other notation
    "gsm8k_train.clean": [],
    "math_12k.clean": [("math_12k-03894", "olympiadbench_674-461")],
    "deepscaler_part.clean": [("deepscaler_part-01455", "olympiadbench_674-086")],
}
BENCHMARKS = ("gsm8k_test", "math500", "amc23", "aime24", "aime25", "minerva_math", "olympiadbench_674")


@pytest.mark.parametrize("name", CLEANED)
def test_sets_that_were_cleaned(name: str) -> None:
    found = overlaps(problems_of(name), [problem for each in BENCHMARKS for problem in problems_of(each)])
    assert [(pair.training.id, pair.benchmark.id) for pair in found] == CLEANED[name]


def test_two_copies_of_one_benchmark() -> None:
    """One of them lacks a problem, and rewords a few."""
    found = overlaps(problems_of("olympiadbench_675"), problems_of("olympiadbench_674"))
    assert 670 <= len({pair.benchmark_place for pair in found}) <= 674
    assert not overlaps(problems_of("aime24"), problems_of("aime25"))


def write(path: Path, rows: Sequence[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def train(tmp_path: Path) -> Path:
    """Odd spacing, a blank line and an unterminated last line: what is kept must be kept as it is."""
    path = tmp_path / "train.jsonl"
    lines = [
        json.dumps({"id": "a", "problem": AYA, "answer": "24"}),
        '{"problem":   "What is \\u0032+2?", "id": "b" }',
        "",
        json.dumps({"id": "c", "problem": BAG[::-1]}),
        json.dumps({"id": "d", "problem": BAG.replace("5 red", "6 red"), "answer": "1/9"}),
        json.dumps({"id": "e", "problem": LATEX}),
    ]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def benchmark(tmp_path: Path) -> Path:
    return write(
        tmp_path / "bench.jsonl", [{"problem": AYA, "answer": "24"}, {"id": "bag", "problem": BAG, "answer": "5/33"}]
    )


def invoke(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_the_command_lists_writes_and_cleans(train: Path, benchmark: Path, tmp_path: Path) -> None:
    out, clean = tmp_path / "overlaps.jsonl", tmp_path / "clean.jsonl"
    code, output = invoke("data", "check", train, "--against", benchmark, "--out", out, "--clean", clean)
    assert code == 3, output
    assert "exact  a  is  0 of bench: 1.00 of it, 1.00 of the training problem, same answer" in output
    assert "near   d  is like  bag of bench" in output
    pairs = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(pair["training_id"], pair["benchmark_id"], pair["kind"], pair["same_answer"]) for pair in pairs] == [
        ("a", "0", "exact", True),
        ("d", "bag", "near", False),
    ]
    assert pairs[1]["training_problem"] == BAG.replace("5 red", "6 red")
    original = train.read_bytes().split(b"\n")
    assert clean.read_bytes().split(b"\n") == [original[place] for place in (1, 3, 5)]

    code, output = invoke("data", "check", clean, "--against", benchmark)
    assert code == 0, output
    code, output = invoke("data", "check", train, "--against", benchmark, "--clean", clean)
    assert code == 1
    assert "never written over" in output
    assert clean.read_bytes().split(b"\n") == [original[place] for place in (1, 3, 5)]


def test_files_of_one_name_are_two_benchmarks(train: Path, benchmark: Path, tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    other = write(tmp_path / "more" / "bench.jsonl", [{"problem": LATEX, "answer": ["7", 8]}])
    code, output = invoke("data", "check", train, "--against", benchmark, "--against", other)
    assert code == 3, output
    assert f"e  is  0 of {other}: " in output
    assert "a  is  0 of bench: " in output


def test_parquet(benchmark: Path, tmp_path: Path) -> None:
    rows = [{"question": AYA, "kept": 1}, {"question": LATEX, "kept": 2}, {"question": BAG, "kept": 3}]
    train, clean = tmp_path / "train.parquet", tmp_path / "clean.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), train)
    code, output = invoke(
        "data", "check", train, "--prompt", "question", "--against", benchmark, "--clean", clean
    )  # fmt: skip
    assert code == 3, output
    assert pyarrow.parquet.read_table(clean).to_pylist() == rows[1:2]


def recipe(folder: Path, train: Path, benchmark: Path) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(
        f"extends: {RECIPE}\n"
        f"data: {{source: jsonl, path: {train}, prompt: problem, answer: null, golden: null, families: {{}}}}\n"
        f"evaluation: {{data: {{source: jsonl, path: {benchmark}, prompt: problem, families: {{}}}}}}\n"
    )
    return path


def test_a_recipe_s_own_data(train: Path, benchmark: Path, tmp_path: Path) -> None:
    path = recipe(tmp_path, train, benchmark)
    code, output = invoke("data", "check", path)
    assert code == 3, output
    assert re.search(r"evaluation\.data\D+2\D+2\D+1\D+1\D+2\D", output)
    code, output = invoke("data", "check", path, "--clean", tmp_path / "clean.jsonl")
    assert "is a recipe; give its data file in its place" in output

    code, output = invoke("doctor", path)
    assert code == 0, output
    line = next(line for line in output.splitlines() if "data overlap" in line)
    assert line.startswith("warn")
    assert "1 of 2 of bench are in the training data in the same words, 1 nearly so" in line


def test_doctor_finds_generated_problems_apart() -> None:
    sets = ("--set", "data.limit=300", "--set", "evaluation.data.limit=20")
    code, output = invoke("doctor", RECIPE, *sets)
    assert code == 0, output
    assert re.search(r"ok +data overlap +0 of 20 of held_out are in the training data", output)
    split = ("--set", "evaluation.data.split=train")  # the same problems on both sides
    _, output = invoke("doctor", RECIPE, *sets, *split)
    assert re.search(r"warn +data overlap +[1-9]\d* of 20 of train", output)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.jsonl"], "nothing to compare with: give --against FILE or --benchmark NAME"),
        (["absent.jsonl", "--against", "bench.jsonl"], "there is no file 'absent.jsonl'"),
        (["train.jsonl", "--against", "absent.parquet"], "there is no file 'absent.parquet'"),
        (["train.jsonl", "--prompt", "question", "--against", "bench.jsonl"], "has no column 'question'; it has 'id', 'problem', 'answer'"),
        (["bad.jsonl", "--against", "bench.jsonl"], "bad.jsonl line 2 is not JSON"),
        (["empty.jsonl", "--against", "bench.jsonl"], "no problems in empty.jsonl"),
        (["absent.yaml"], "cannot read recipe absent.yaml"),
        (["train.jsonl", "--against", "bench.jsonl", "--out", "no/such/folder/x.jsonl"], "cannot write no/such/folder/x.jsonl"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(
    arguments: list[str], message: str, train: Path, benchmark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(train.parent)
    Path("bad.jsonl").write_text('{"problem": "x"}\n{"problem"\n')
    Path("empty.jsonl").touch()
    code, output = invoke("data", "check", *arguments)
    assert code == 1
    lines = [line for line in output.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, output
    assert message in lines[0]


def test_unknown_benchmarks_are_refused(train: Path) -> None:
    pytest.importorskip("poweropd.evaluation.benchmarks", reason="the table of benchmarks is not there yet")
    code, output = invoke("data", "check", train, "--benchmark", "math5000")
    assert code == 1
    assert "math500" in output
    assert len([line for line in output.splitlines() if line.startswith("error:")]) == 1

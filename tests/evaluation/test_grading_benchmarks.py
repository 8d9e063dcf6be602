"""Every reference answer of the seven benchmarks, through the grader and past the second checker."""

import json
import random
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from second_checker import equal

from poweropd.evaluation.grading import Grader

DATA = Path(__file__).parents[3] / "shared" / "data"
BENCHMARKS = ["gsm8k_test", "math500", "amc23", "aime24", "aime25", "minerva_math", "olympiadbench_675"]
Golds = list[tuple[str, str]]

# References that say nothing to math-verify, so that only their text is correct.
TEXT_ALONE = {
    "minerva_math-027": "a Sun as the index of a mass",
    "olympiadbench_675-096": "`t(0,4]`, an interval behind a stray letter",
}
# Twice the half of a lone letter: math-verify compares a letter with anything else by its text.
NOT_SEEN_TO_BE_EQUAL = {"minerva_math-100", "minerva_math-259"}

pytestmark = [
    pytest.mark.skipif(not DATA.is_dir(), reason=f"THE BENCHMARKS ARE NOT HERE: no folder {DATA}"),
    pytest.mark.filterwarnings("ignore:the reference"),
]


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader() as grader:
        yield grader


def golds(name: str) -> Golds:
    lines = (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [(row["id"], str(row["answer"])) for row in map(json.loads, lines)]


def boxed(text: str) -> str:
    return f"The answer is $\\boxed{{{text}}}$."


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_reference_grades_itself_correct(grader: Grader, name: str) -> None:
    grades = grader.grade_many((boxed(gold), gold) for _, gold in golds(name))
    assert [(gold, grade) for gold, grade in zip(golds(name), grades, strict=True) if not grade.correct] == []


def respelt(gold: str) -> str | None:
    """Twice its half, of a reference that is one expression: equal, and nobody can tell without reading it."""
    gold = re.sub(r"(?<=\d)e(-?\d+)", r"\\cdot 10^{\1}", gold.strip().strip("$").rstrip("."))
    other_than_expressions = r"[,=<>$%]|\\(in|cup|text|mbox|pm|circ|begin|[gl]eq?\w*)(?![a-zA-Z])|\d\s*_|\d\s*\\frac"
    if re.search(other_than_expressions, gold) or re.fullmatch(r"-?\d+", gold) or gold.startswith("t("):
        return None
    return f"\\frac{{2({gold})}}{{2}}"


def check_respelt(grader: Grader, chosen: Golds) -> set[str]:
    pairs = [(at, spelling, gold) for at, gold in chosen if (spelling := respelt(gold)) is not None]
    grades = grader.grade_many((boxed(spelling), gold) for _, spelling, gold in pairs)
    return {at for (at, _, _), grade in zip(pairs, grades, strict=True) if not grade.correct}


def expressions() -> Golds:
    return [gold for name in BENCHMARKS for gold in golds(name) if respelt(gold[1]) is not None]


def test_references_are_read_and_not_only_recognised(grader: Grader) -> None:
    chosen = [gold for gold in random.Random(0).sample(expressions(), 120) if gold[0] not in NOT_SEEN_TO_BE_EQUAL]
    assert check_respelt(grader, chosen) == set()


@pytest.mark.slow
def test_all_references_are_read_and_not_only_recognised(grader: Grader) -> None:
    assert len(expressions()) > 400
    assert check_respelt(grader, expressions()) == NOT_SEEN_TO_BE_EQUAL


def text_alone(grader: Grader, chosen: Golds) -> set[str]:
    """Of single answers; members of lists are not looked at where their number decides."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        grades = grader.grade_many((boxed("x^{17}+\\sqrt{19}"), gold) for _, gold in chosen)
    assert {grade.status for grade in grades} == {"wrong"}
    return {at for at, gold in chosen if gold in grader.compared_as_text}


def test_references_that_are_no_mathematics_are_these(grader: Grader) -> None:
    sample = [
        gold for name in BENCHMARKS for at, gold in enumerate(golds(name)) if at % 9 == 0 or gold[0] in TEXT_ALONE
    ]
    assert text_alone(grader, sample) == set(TEXT_ALONE)


@pytest.mark.slow
def test_all_references_that_are_no_mathematics_are_these(grader: Grader) -> None:
    assert text_alone(grader, [gold for name in BENCHMARKS for gold in golds(name)]) == set(TEXT_ALONE)


def neighbours(step: int) -> list[tuple[str, str, str]]:
    pairs = [
        (at, gold, other)
        for name in BENCHMARKS
        for (at, gold), (_, other) in zip(golds(name), golds(name)[1:], strict=False)
    ]
    return pairs[::step]


def check_neighbours(grader: Grader, pairs: list[tuple[str, str, str]]) -> None:
    grades = grader.grade_many((boxed(other), gold) for _, gold, other in pairs)
    verdicts = [equal(other, gold) for _, gold, other in pairs]
    judged = [
        (pair, grade, verdict)
        for pair, grade, verdict in zip(pairs, grades, verdicts, strict=True)
        if verdict is not None
    ]
    assert [each for each in judged if each[1].correct != each[2]] == []
    assert len(judged) > 0.8 * len(pairs)
    assert sum(grade.status == "timeout" for grade in grades) <= 0.01 * len(pairs)


def test_both_checkers_agree_on_neighbours(grader: Grader) -> None:
    check_neighbours(grader, neighbours(step=9))


@pytest.mark.slow
def test_both_checkers_agree_on_all_neighbours(grader: Grader) -> None:
    check_neighbours(grader, neighbours(step=1))


def misprints(chosen: Golds) -> Golds:
    """Each reference with one of its digits another."""
    rng = random.Random(3)
    printed = []
    for _, gold in chosen:
        digits = [at for at, character in enumerate(gold) if character.isdigit()]
        if digits:
            at = rng.choice(digits)
            printed.append((gold[:at] + str((int(gold[at]) + rng.randint(1, 9)) % 10) + gold[at + 1 :], gold))
    return printed


@pytest.mark.parametrize("step", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_no_misprint_is_correct(grader: Grader, step: int) -> None:
    pairs = misprints([gold for name in BENCHMARKS for gold in golds(name)][::step])
    grades = grader.grade_many((boxed(misprint), gold) for misprint, gold in pairs)
    assert [pair for pair, grade in zip(pairs, grades, strict=True) if grade.correct] == []

"""Generated problems: a split that holds by construction, and worked solutions that end in the answer."""

import random
import re
import subprocess
import sys
from itertools import islice

import pytest

from conftest import RECIPE
from poweropd.config import load_recipe
from poweropd.evaluation.grading import extract_answer
from poweropd.tasks import STEPS, base_style_solution, problems, split_of, worked_solution

FAMILIES = load_recipe(RECIPE).data.families


def test_train_and_held_out_share_no_numbers() -> None:
    """Not the text, and not a rewording or reordering of the same numbers."""

    def keys(split: str, count: int) -> set[tuple]:
        return {
            (p["metadata"]["source_dataset"], *sorted(re.findall(r"\d+", p["question"])))
            for p in islice(problems(FAMILIES, split=split, seed=0), count)  # type: ignore[arg-type]
        }

    train, held_out = keys("train", 12_000), keys("held_out", 1_500)
    assert len(train) > 1_000
    assert len(held_out) > 200
    assert not train & held_out


def test_the_split_is_the_same_in_every_process() -> None:
    code = "from poweropd.tasks import split_of; print([split_of('gcd', f'{n} and {n + 7}') for n in range(40)])"
    runs = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    }
    assert runs == {f"{[split_of('gcd', f'{n} and {n + 7}') for n in range(40)]}\n"}


def test_held_out_problems_can_be_asked_once_each() -> None:
    questions = [p["question"] for p in islice(problems(FAMILIES, split="held_out", seed=0, distinct=True), 300)]
    assert len(set(questions)) == 300


def test_a_family_without_new_problems_ends_the_stream() -> None:
    few = {"products": {"min_digits": 1, "max_digits": 1}}
    found = list(problems(few, split="held_out", seed=0, distinct=True))
    assert 0 < len(found) < 100


@pytest.mark.parametrize("family", STEPS)
def test_worked_solutions_compute_the_answer(family: str) -> None:
    """Every line that states an equality of numbers is true, and the last one leads to the boxed answer."""
    for problem in islice(problems({family: FAMILIES[family]}, split="train", seed=1), 1_500):
        solution = worked_solution(problem)
        assert extract_answer(solution) == problem["answer"]
        for line in solution.splitlines()[:-1]:
            *_, left, right = line.partition(": ")[2].split(" = ") if ": " in line else line.split(" = ")
            if re.fullmatch(r"[-\d */+]+|\d+ mod \d+", left):
                assert eval(left.replace("mod", "%")) == int(right), line
        states_result = family not in ("fraction_simplification", "gcd")
        if states_result:
            assert solution.splitlines()[-2].endswith(f" {problem['answer']}")


def test_base_text_states_the_right_answer_in_every_style() -> None:
    rng = random.Random(0)
    stream = problems(FAMILIES, split="train", seed=2)
    texts = [(base_style_solution(problem, rng), problem["answer"]) for problem in islice(stream, 500)]
    assert all(extract_answer(text) == answer for text, answer in texts)
    for mark in ("\\boxed", "then", "It is", "Let me check"):
        assert sum(mark in text for text, _ in texts) > 20

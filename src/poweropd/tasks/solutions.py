"""Worked solutions of some problem families, and the styles in which they are written down.

`reasoning-gym` gives a problem, its answer and its parameters; the steps between are ours. They train the embedded pair
and are the golden answers of its problems.
"""

import random
import re
from collections.abc import Callable
from typing import Any

from poweropd.tasks.problems import Problem


def _running_total(terms: list[int], signs: list[str]) -> list[str]:
    """The lines of a left-to-right sum: `7 + 5 = 12`, `12 - 3 = 9`."""
    total, lines = terms[0], []
    for sign, term in zip(signs, terms[1:], strict=True):
        result = total + term if sign == "+" else total - term
        lines.append(f"{total} {sign} {term} = {result}")
        total = result
    return lines


def _chain_sum(metadata: dict[str, Any]) -> list[str]:
    tokens = metadata["expression"].split()
    return _running_total([int(t) for t in tokens[::2]], tokens[1::2])


def _products(metadata: dict[str, Any]) -> list[str]:
    left, right = (int(t) for t in metadata["expression"].split(" * "))
    tens, ones = right // 10 * 10, right % 10
    if not tens or not ones:
        return [f"{left} * {right} = {left * right}"]
    high, low = left * tens, left * ones
    return [f"{left} * {tens} = {high}", f"{left} * {ones} = {low}", f"{high} + {low} = {high + low}"]


def _simple_equations(metadata: dict[str, Any]) -> list[str]:
    x = metadata["variable"]
    left, right = metadata["equation"].split(" = ")
    at_zero, at_one = (eval(re.sub(rf"\b{x}\b", value, left), {"__builtins__": {}}) for value in "01")
    slope, target = at_one - at_zero, int(right)
    scaled = target - at_zero
    unknown = x if slope == 1 else f"-{x}" if slope == -1 else f"{slope}*{x}"
    lines = []
    if at_zero:
        lines.append(f"{unknown} = {target} {'-' if at_zero > 0 else '+'} {abs(at_zero)} = {scaled}")
    if slope != 1:
        lines.append(f"{x} = {scaled} / {slope} = {scaled // slope}")
    return lines or [f"{x} = {scaled}"]


def _gcd(metadata: dict[str, Any]) -> list[str]:
    small, large = sorted(metadata["numbers"])
    lines = []
    while small:
        lines.append(f"{large} mod {small} = {large % small}")
        small, large = large % small, small
    return lines


def _fraction_simplification(metadata: dict[str, Any]) -> list[str]:
    top, bottom, factor = metadata["numerator"], metadata["denominator"], metadata["reduction_factor"]
    return [
        f"gcd({top}, {bottom}) = {factor}",
        f"{top} / {factor} = {top // factor}",
        f"{bottom} / {factor} = {bottom // factor}",
    ]


def _leg_counting(metadata: dict[str, Any]) -> list[str]:
    from reasoning_gym.arithmetic.leg_counting import ANIMALS  # takes a second to import

    animals = metadata["animals"]
    legs = {name: count * ANIMALS[name] for name, count in animals.items()}
    lines = [f"{name}: {count} * {ANIMALS[name]} = {legs[name]}" for name, count in animals.items()]
    return lines + _running_total(list(legs.values()), ["+"] * (len(legs) - 1))


STEPS: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "chain_sum": _chain_sum,
    "products": _products,
    "simple_equations": _simple_equations,
    "gcd": _gcd,
    "fraction_simplification": _fraction_simplification,
    "leg_counting": _leg_counting,
}


def worked_solution(problem: Problem) -> str:
    """The teacher's style: one step a line, then the boxed answer."""
    lines = STEPS[problem["metadata"]["source_dataset"]](problem["metadata"])
    return "\n".join([*lines, f"The answer is \\boxed{{{problem['answer']}}}."])


def base_style_solution(problem: Problem, rng: random.Random) -> str:
    """One of the styles met in unedited text: worked and boxed, worked in one line, bare, or checked over and over."""
    lines = STEPS[problem["metadata"]["source_dataset"]](problem["metadata"])
    answer = problem["answer"]
    style = rng.random()
    if style < 0.40:
        return worked_solution(problem)
    if style < 0.65:
        return f"We have {', then '.join(lines)}. So it is {answer}."
    if style < 0.80:
        return f"It is {answer}."
    text = "\n".join(lines)
    while True:
        text += "\n".join(["\nLet me check.", *lines])
        if rng.random() < 0.5:
            return f"{text}\nSo it is {answer}."

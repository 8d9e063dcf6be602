"""Repetition: the paper's gate, and the one that scales with the budget, on good texts and on loops."""

import random

import pytest

from poweropd.repetition import compression_ratio, is_repetitive, repetition_rate, threshold_for, window_for

BUDGETS = [101, 161, 257, 513, 1025, 2049, 4097, 10_001, 32_768]
SENTENCE = "So 3 + 4 = 7, and 7 - 2 = 5, and 5 x 6 = 30, and 30 / 3 = 10, and 10 - 1 = 9, so the answer must be 9. "  # some 60 tokens


def twenty_words(count: int) -> str:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=3)) for _ in range(20)]
    return " ".join(draw.choices(words, k=count))


def matrix(draw: random.Random) -> str:
    a, b, c, d = draw.choices(range(-9, 10), k=4)
    return rf"\begin{{pmatrix}} {a} & {b} \\ {c} & {d} \end{{pmatrix}}"


def good_texts() -> dict[str, str]:
    """Reasoning that is as regular as it gets without going round in circles; over 10,000 characters each."""
    draw = random.Random(0)
    return {
        "trial division": "".join(
            f"7919 / {d} = {7919 / d:.3f}, so {d} does not divide 7919.\n" for d in range(2, 400)
        ),
        "cases": "".join(f"Case {i}: if a = {i}, then b = {draw.randrange(99)}, so a + b > {i}.\n" for i in range(500)),
        "table": "".join(f"{i} x {j} = {i * j}\n" for i in range(1, 60) for j in range(1, 30)),
        "list": ", ".join(str(i) for i in range(2, 3000)),
        "products": "".join(f"{matrix(draw)} {matrix(draw)} =\n" for _ in range(200)),
        "words": twenty_words(4000),
    }


@pytest.mark.parametrize(
    ("text", "low", "high", "repetitive"),
    [
        (twenty_words(4000), 3.5, 5, False),
        ("wait, " * 3000, 212, 214, True),
        (SENTENCE * 200, 60, 90, True),
        ("x" * 9_999, 250, 320, False),
        ("x" * 10_001, 250, 320, True),
    ],
)
def test_the_papers_gate(text: str, low: float, high: float, *, repetitive: bool) -> None:
    assert low < compression_ratio(text[-10_000:]) < high
    assert is_repetitive(text, window=10_000, threshold=10) is repetitive


def test_a_large_budget_has_the_papers_gate() -> None:
    assert window_for(10_001) == window_for(32_768) == 10_000
    assert threshold_for(10_000) == pytest.approx(10)


@pytest.mark.parametrize("budget", BUDGETS)
def test_good_texts_are_left_alone(budget: int) -> None:
    window = window_for(budget)
    for name, text in good_texts().items():
        assert len(text) > 10_000, name
        for end in range(window + 1, len(text), max(window // 3, 97)):
            ratio = compression_ratio(text[end - window : end])
            assert ratio < threshold_for(window), (name, ratio)


@pytest.mark.parametrize("budget", BUDGETS)
def test_loops_are_caught(budget: int) -> None:
    """A phrase of a sixth of the window, and shorter ones, after a good beginning."""
    worked = (
        "Natalia sold 48 / 2 = 24 clips in May. She sold 48 + 24 = 72 clips altogether in April and May, so it is 72. "
    )
    for length in (1, 6, 15, window_for(budget) // 6):
        phrase = (worked * 20)[:length]
        text = worked + phrase * (window_for(budget) // length + 2)
        assert repetition_rate([text], budget) == 1, length


@pytest.mark.parametrize("budget", [64, 161, 1025])
def test_one_character_a_token_is_long_enough(budget: int) -> None:
    """`!!!!`, `0000`: a collapsed student's truncated answer, whose every token is one character."""
    assert repetition_rate(["0" * budget], budget) == 1


def test_only_the_end_counts() -> None:
    """A loop that the answer found its way out of is none."""
    good = good_texts()["cases"][:2000]
    assert repetition_rate(["wait, " * 1000 + good], 1025) == 0
    assert repetition_rate([good + "wait, " * 1000], 1025) == 1


def test_rate() -> None:
    assert repetition_rate(["a" * 200, "short", "b" * 200, good_texts()["list"]], 161) == 0.5
    assert repetition_rate(["", "the"], 1) == 0
    assert repetition_rate([], 100) == 0

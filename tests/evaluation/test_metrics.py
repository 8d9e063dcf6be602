"""Avg@k and Pass@k against brute force, intervals against their promise."""

from itertools import combinations

import numpy as np
import pytest

from poweropd.evaluation.metrics import bootstrap, bootstrap_of_means, maj_at_k, paired, pass_at_k


@pytest.mark.parametrize(("n", "k"), [(1, 1), (4, 2), (8, 8), (8, 3), (6, 1)])
def test_pass_at_k_is_the_share_of_draws_with_a_correct_sample(n: int, k: int) -> None:
    for correct in range(n + 1):
        draws = list(combinations([True] * correct + [False] * (n - correct), k))
        assert pass_at_k(n, correct, k) == pytest.approx(np.mean([any(draw) for draw in draws]))


@pytest.mark.parametrize("k", [0, 9])
def test_pass_at_k_needs_k_samples(k: int) -> None:
    with pytest.raises(ValueError, match="needs 1 <= k <= samples"):
        pass_at_k(8, 3, k)


def test_the_interval_covers_the_true_mean_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    truth, covered = 0.4, 0
    for trial in range(200):
        rates = rng.beta(2, 3, size=60)  # problems differ in difficulty; their mean is 0.4
        estimate = bootstrap(rng.binomial(8, rates) / 8, seed=trial)
        covered += estimate.low <= truth <= estimate.high
    assert 0.90 <= covered / 200 <= 0.99


def test_a_difference_of_pairs_is_covered_and_narrower_than_of_strangers() -> None:
    rng = np.random.default_rng(1)
    covered, widths = 0, []
    for trial in range(200):
        rates = rng.beta(2, 3, size=60)
        first, second = (rng.binomial(8, np.clip(rates + shift, 0, 1)) / 8 for shift in (0, 0.1))
        truth = np.clip(rates + 0.1, 0, 1).mean() - rates.mean()
        found = paired(*({str(n): value for n, value in enumerate(scores)} for scores in (first, second)), seed=trial)
        covered += found.difference.low <= truth <= found.difference.high
        apart = [bootstrap(scores, seed=trial) for scores in (first, second)]
        widths.append((found.difference.high - found.difference.low) / sum(each.high - each.low for each in apart))
    assert 0.90 <= covered / 200 <= 0.99
    assert np.mean(widths) < 0.7


def test_pairs_are_the_problems_that_both_have() -> None:
    found = paired({"a": 0.0, "b": 1.0, "c": 0.25, "only": 1.0}, {"c": 0.5, "b": 0.25, "a": 0.0, "other": 1.0})
    assert found.difference.mean == pytest.approx((0 - 0.75 + 0.25) / 3)
    assert (found.gained, found.lost, found.problems) == (1, 1, 3)
    with pytest.raises(ValueError, match="share no problem"):
        paired({"a": 1.0}, {"b": 1.0})


def test_the_interval_of_a_mean_over_benchmarks_covers_it() -> None:
    rng = np.random.default_rng(2)
    covered = 0
    for trial in range(200):
        groups = [rng.binomial(8, rng.beta(a, b, size=size)) / 8 for a, b, size in ((2, 3, 40), (4, 1, 90))]
        found = bootstrap_of_means(groups, seed=trial)
        covered += found.low <= (0.4 + 0.8) / 2 <= found.high
    assert 0.90 <= covered / 200 <= 0.99


def test_where_all_problems_agree_the_interval_is_that_of_a_binomial() -> None:
    """Zero of 30: with a true share of `high`, none in 30 would be seen with probability 2.5 %."""
    nothing, everything = bootstrap([0.0] * 30), bootstrap([1.0] * 30)
    assert (1 - nothing.high) ** 30 == pytest.approx(0.025)
    assert nothing.low == 0
    assert everything == (1.0, pytest.approx(1 - nothing.high), 1.0)
    assert bootstrap([0.25] * 30) == (
        0.25,
        pytest.approx(0.25 * (1 - nothing.high)),
        pytest.approx(0.25 + 0.75 * nothing.high),
    )
    alike = {str(n): 1.0 for n in range(30)}
    assert paired(alike, alike).difference == (0.0, pytest.approx(-nothing.high), pytest.approx(nothing.high))
    mixed = bootstrap_of_means([[0.0] * 30, [0.0, 1.0] * 15])
    assert mixed.high == pytest.approx(bootstrap([0.0, 1.0] * 15, seed=1).high / 2 + nothing.high / 2, abs=0.01)


@pytest.mark.parametrize(
    ("votes", "value"),
    [
        ([], 0.0),
        ([("1/2", True), ("0.5", True), ("7", False), ("8", False)], 1.0),  # right answers are one, however written
        ([("7", False), ("7", False), ("1/2", True)], 0.0),
        ([("7", False), ("1/2", True)], 0.5),
        ([("7", False), ("8", False), ("1/2", True)], 1 / 3),
    ],
)
def test_majority(votes: list[tuple[str, bool]], value: float) -> None:
    assert maj_at_k(votes) == pytest.approx(value)


def test_bootstrap_is_reproducible_and_exact_for_constants() -> None:
    assert bootstrap([0.5, 0.25, 1.0]) == bootstrap([0.5, 0.25, 1.0])
    assert bootstrap([12.0] * 7, bounds=None) == (12.0, 12.0, 12.0)

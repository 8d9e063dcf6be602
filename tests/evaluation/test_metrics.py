"""Avg@k and Pass@k against brute force, intervals against their promise."""

from itertools import combinations

import numpy as np
import pytest

from poweropd.evaluation.metrics import bootstrap, pass_at_k


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


def test_bootstrap_is_reproducible_and_exact_for_constants() -> None:
    assert bootstrap([0.5, 0.25, 1.0]) == bootstrap([0.5, 0.25, 1.0])
    assert bootstrap([0.5] * 7) == (0.5, 0.5, 0.5)

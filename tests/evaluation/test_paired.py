"""Two models on the same problems: against the normal approximation, and what cannot be compared."""

from statistics import NormalDist

import numpy as np
import pytest

from poweropd.evaluation.metrics import paired, paired_of_means


def scores(values: np.ndarray) -> dict[str, float]:
    return {f"p{place}": float(value) for place, value in enumerate(values)}


def test_one_benchmark() -> None:
    rng = np.random.default_rng(0)
    before, after = rng.binomial(8, 0.4, 300) / 8, rng.binomial(8, 0.5, 300) / 8
    found = paired(scores(before), {**scores(after), "another": 1.0})
    error = NormalDist().inv_cdf(0.975) * (after - before).std() / 300**0.5
    middle = (after - before).mean()
    assert found.difference == pytest.approx((middle, middle - error, middle + error), abs=0.003)
    assert found.problems == 300
    assert found.gained == sum(b < 0.5 <= a for b, a in zip(before, after, strict=True))
    assert found.lost == sum(a < 0.5 <= b for b, a in zip(before, after, strict=True))
    assert found == paired_of_means([(scores(before), scores(after))])


def test_every_benchmark_weighs_the_same_whatever_its_size() -> None:
    rng = np.random.default_rng(1)
    pairs = [(rng.random(size), rng.random(size)) for size in (400, 30)]
    found = paired_of_means([(scores(first), scores(second)) for first, second in pairs])
    changes = [second - first for first, second in pairs]
    middle = np.mean([change.mean() for change in changes])
    error = NormalDist().inv_cdf(0.975) * np.sqrt(sum(change.var() / len(change) for change in changes)) / 2
    assert found.difference == pytest.approx((middle, middle - error, middle + error), abs=0.01)
    assert found.problems == 430


def test_what_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="share no problem"):
        paired_of_means([({"a": 1.0}, {"a": 0.0}), ({"a": 1.0}, {"b": 1.0})])
    with pytest.raises(ValueError, match="no benchmark"):
        paired_of_means([])

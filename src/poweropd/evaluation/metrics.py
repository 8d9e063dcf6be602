"""Accuracy over k samples of each problem, with intervals over problems."""

from collections.abc import Sequence
from math import comb
from typing import NamedTuple

import numpy as np

BOOTSTRAP_SAMPLES = 2000


class Estimate(NamedTuple):
    """A mean over problems and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Chance that k of n samples, drawn without replacement, hold a correct one: `1 - C(n - c, k) / C(n, k)`.

    Unbiased; arXiv 2107.03374, eq. 1.

    Raises:
        ValueError: k is not within 1..num_samples.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} needs 1 <= k <= samples, got {num_samples} samples")
    return 1 - comb(num_samples - num_correct, k) / comb(num_samples, k)


def bootstrap(per_problem: Sequence[float], *, seed: int = 0) -> Estimate:
    """Mean over problems with a percentile interval from resampled problems, whose samples are not independent."""
    values = np.asarray(per_problem, dtype=float)
    draws = np.random.default_rng(seed).integers(len(values), size=(BOOTSTRAP_SAMPLES, len(values)))
    low, high = np.percentile(values[draws].mean(axis=1), [2.5, 97.5])
    return Estimate(float(values.mean()), float(low), float(high))

"""Accuracy over k samples of each problem, with intervals over problems; two models on the same problems."""

from collections import Counter
from collections.abc import Mapping, Sequence
from math import comb
from typing import NamedTuple

import numpy as np

BOOTSTRAP_SAMPLES = 4000
DRAWS_AT_ONCE = 2**18  # what fits a cache
FEW_PROBLEMS = 20  # below it, an interval from resampled problems is known to be too narrow
TAIL = 0.025  # of each side of a 95 % interval


class Estimate(NamedTuple):
    """A mean over problems and its 95 % interval."""

    mean: float
    low: float
    high: float


class Paired(NamedTuple):
    """Two models on the same problems.

    Attributes:
        difference: second minus first, a mean over problems, with its 95 % interval from resampled problems.
        gained: problems that the first solves in less than half of its samples and the second in at least half.
        lost: the other way round.
        problems: how many there are in both.
    """

    difference: Estimate
    gained: int
    lost: int
    problems: int


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Chance that k of n samples, drawn without replacement, hold a correct one: `1 - C(n - c, k) / C(n, k)`.

    Unbiased; arXiv 2107.03374, eq. 1.

    Raises:
        ValueError: k is not within 1..num_samples.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} needs 1 <= k <= samples, got {num_samples} samples")
    return 1 - comb(num_samples - num_correct, k) / comb(num_samples, k)


def maj_at_k(votes: Sequence[tuple[str, bool]]) -> float:
    """Whether the most frequent answer is correct; of several equally frequent ones, the share that is.

    Args:
        votes: (answer, whether it is correct) of each sample that has an answer. All correct answers are one, however
            written; wrong ones are told apart by their text. Without any vote the result is 0. arXiv 2203.11171.
    """
    counts = Counter((answer if not correct else "", correct) for answer, correct in votes)
    if not counts:
        return 0.0
    most = max(counts.values())
    leaders = [correct for (_, correct), count in counts.items() if count == most]
    return sum(leaders) / len(leaders)


def bootstrap(
    per_problem: Sequence[float], *, seed: int = 0, bounds: tuple[float, float] | None = (0.0, 1.0)
) -> Estimate:
    """Mean over problems with a percentile interval from resampled problems, whose samples are not independent.

    Where all problems agree, resampling would promise certainty: there the interval allows for problems at either end of
    `bounds`, as many as n problems fail to show with probability 2.5 % (exact binomial).

    Args:
        bounds: least and largest value there can be; None where there are none, as of a length.
    """
    return _estimate([np.asarray(per_problem, dtype=float)], seed, bounds)


def bootstrap_of_means(groups: Sequence[Sequence[float]], *, seed: int = 0) -> Estimate:
    """The mean over benchmarks of their mean shares; problems are resampled within each benchmark.

    A benchmark whose problems all agree widens the interval by its exact binomial bound.
    """
    return _estimate([np.asarray(group, dtype=float) for group in groups], seed, bounds=(0.0, 1.0))


def paired(first: Mapping[str, float], second: Mapping[str, float], *, seed: int = 0) -> Paired:
    """Compare two models by their share of correct samples on each problem; problems that only one has are left out.

    Raises:
        ValueError: they share no problem.
    """
    return paired_of_means([(first, second)], seed=seed)


def paired_of_means(benchmarks: Sequence[tuple[Mapping[str, float], Mapping[str, float]]], *, seed: int = 0) -> Paired:
    """As `paired`, over several benchmarks: the difference is the mean over benchmarks of their mean differences.

    Problems are resampled within each benchmark, and one on which all differences are equal widens the interval by the
    exact binomial bound of problems that differ otherwise; gained and lost problems are counted over all of them.

    Raises:
        ValueError: there is no benchmark, or the models share no problem of one.
    """
    before, after = [], []
    for first, second in benchmarks:
        shared = [problem for problem in first if problem in second]
        if not shared:
            raise ValueError("the two evaluations share no problem")
        before.append(np.asarray([first[problem] for problem in shared], dtype=float))
        after.append(np.asarray([second[problem] for problem in shared], dtype=float))
    if not before:
        raise ValueError("there is no benchmark to compare on")
    differences = [late - early for early, late in zip(before, after, strict=True)]
    was, now = np.concatenate(before), np.concatenate(after)
    return Paired(
        _estimate(differences, seed, bounds=(-1.0, 1.0)),
        gained=int(((was < 0.5) & (now >= 0.5)).sum()),
        lost=int(((was >= 0.5) & (now < 0.5)).sum()),
        problems=len(was),
    )


def _estimate(groups: Sequence[np.ndarray], seed: int, bounds: tuple[float, float] | None) -> Estimate:
    """The mean of the groups' means; `bounds` are what a value could be of a problem that is not among those asked."""
    means = np.mean([_resampled_means(values, seed + place) for place, values in enumerate(groups)], axis=0)
    low, high = np.quantile(means, [TAIL, 1 - TAIL])
    for values in groups:
        if bounds is not None and values.min() == values.max():
            unseen = (1 - TAIL ** (1 / len(values))) / len(groups)
            low -= unseen * (values[0] - bounds[0])
            high += unseen * (bounds[1] - values[0])
    return Estimate(float(np.mean([values.mean() for values in groups])), float(low), float(high))


def _resampled_means(values: np.ndarray, seed: int) -> np.ndarray:
    """[BOOTSTRAP_SAMPLES] means of problems drawn with replacement, a block of draws at a time."""
    rng = np.random.default_rng(seed)
    rows = max(1, DRAWS_AT_ONCE // len(values))
    blocks = (min(rows, BOOTSTRAP_SAMPLES - done) for done in range(0, BOOTSTRAP_SAMPLES, rows))
    return np.concatenate(
        [values[rng.integers(len(values), size=(block, len(values)))].mean(axis=1) for block in blocks]
    )

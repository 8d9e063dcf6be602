"""Reward shaping that needs the statistics of the whole batch of an optimizer step, over every micro-batch and rank."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

DEVIATION_FLOOR = 1e-8  # as in the authors' code: a batch of equal rewards is left at zero, not divided by zero


@dataclass(frozen=True)
class RewardStatistics:
    """What the shapings need of a batch of rewards; two of them add up to that of both batches.

    Example: rewards [1, -3] -> count 2, total -2, square_total 10, largest 1, smallest -3.
    """

    count: int = 0
    total: float = 0.0
    square_total: float = 0.0
    largest: float = 0.0
    smallest: float = 0.0

    @classmethod
    def of(cls, rewards: Tensor) -> Self:
        """Statistics of `rewards`, of any shape; sums in float64."""
        if rewards.numel() == 0:
            return cls()
        exact = rewards.double()
        return cls(
            count=exact.numel(),
            total=exact.sum().item(),
            square_total=exact.square().sum().item(),
            largest=exact.max().item(),
            smallest=exact.min().item(),
        )

    def __add__(self, other: Self) -> Self:
        return type(self)(
            self.count + other.count,
            self.total + other.total,
            self.square_total + other.square_total,
            max(self.largest, other.largest),
            min(self.smallest, other.smallest),
        )

    @property
    def mean(self) -> float:
        return self.total / max(self.count, 1)

    @property
    def deviation(self) -> float:
        """Population standard deviation."""
        variance = self.square_total / max(self.count, 1) - self.mean**2
        return max(variance, 0.0) ** 0.5


def zscore(rewards: Tensor, statistics: RewardStatistics) -> Tensor:
    """`(r - mean) / standard deviation`. arXiv 2606.17199; there the statistics are those of one rank."""
    return (rewards - statistics.mean) / max(statistics.deviation, DEVIATION_FLOOR)


def sign_max_abs(rewards: Tensor, statistics: RewardStatistics) -> Tensor:
    """Positive rewards over the largest reward, negative ones over the largest magnitude among them: in [-1, 1].

    In the authors' code of arXiv 2606.17199, not in the paper. Keeps every sign.
    """
    scale = torch.where(
        rewards > 0,
        max(statistics.largest, DEVIATION_FLOOR),
        max(-statistics.smallest, DEVIATION_FLOOR),
    )
    return rewards / scale

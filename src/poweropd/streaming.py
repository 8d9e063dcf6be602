"""Statistics of a stream of numbers in constant memory, the same however the stream is cut.

Each keeps small fp64 tensors that combine by addition (`sums`), minimum (`lows`) or maximum (`highs`), so micro-batches
are added and ranks merged in any order: counts and extremes are then equal to the last bit, sums up to rounding. What is
not finite is counted and otherwise left out. Nothing waits for a device until a result is read.

Shapes: N numbers, R rows, each of which is a stream of its own.
"""

from collections.abc import Sequence
from functools import cache

import torch
import torch.distributed
from torch import Tensor
from torch.distributed import ReduceOp

QUANTILES = {"p1": 0.01, "p5": 0.05, "p50": 0.5, "p95": 0.95, "p99": 0.99}

MANTISSA_BITS = 6  # of a number that its bin depends on
RELATIVE_ERROR = 2.0 ** -(MANTISSA_BITS + 1)  # half a bin's width over the lowest magnitude in it
_DROPPED_BITS = 23 - MANTISSA_BITS  # of an fp32 number
_LARGEST = (255 << MANTISSA_BITS) - 1  # the bin of the largest finite magnitude
_BINS = 2 * _LARGEST + 1  # bins of negative magnitudes, that of 0, those of positive ones


class Streaming:
    """Small tensors that combine by addition, minimum and maximum."""

    def __init__(self, sums: Tensor, rows: int) -> None:
        self.sums = sums
        self.lows = sums.new_full((rows,), torch.inf)
        self.highs = sums.new_full((rows,), -torch.inf)

    def merge(self, other: "Streaming") -> None:
        """Take in what another one of the same shape has seen."""
        self.sums += other.sums
        torch.minimum(self.lows, other.lows, out=self.lows)
        torch.maximum(self.highs, other.highs, out=self.highs)


def merge_ranks(parts: Sequence[Streaming], group: torch.distributed.ProcessGroup | None = None) -> None:
    """Have every rank's statistics speak of what all ranks have seen: three small reductions, whatever was seen.

    A process that is alone has seen all.
    """
    if not torch.distributed.is_initialized():
        return
    for name, operation in (("sums", ReduceOp.SUM), ("lows", ReduceOp.MIN), ("highs", ReduceOp.MAX)):
        own = [getattr(part, name) for part in parts]
        flat = torch.cat([tensor.flatten() for tensor in own])
        torch.distributed.all_reduce(flat, operation, group)
        for tensor, combined in zip(own, flat.split([tensor.numel() for tensor in own]), strict=True):
            tensor.copy_(combined.view_as(tensor))


class Moments(Streaming):
    """Count, mean, mean square and extremes [R] of R streams; NaN where a stream had no finite number."""

    def __init__(self, rows: int = 1, *, device: torch.device | str = "cpu") -> None:
        super().__init__(torch.zeros((4, rows), dtype=torch.float64, device=device), rows)

    def add(self, values: Tensor, belongs: Tensor | None = None) -> None:
        """Args: values: [R, N], or [N] for every row; belongs: [R, N], which of them are of the row; all, if None."""
        values = values.double().expand(len(self.lows), -1)
        belongs = torch.ones_like(values, dtype=torch.bool) if belongs is None else belongs
        finite = values.isfinite() & belongs
        kept = torch.where(finite, values, 0.0)
        self.sums += torch.stack(
            [finite.sum(1), (belongs & ~finite).sum(1), kept.sum(1), kept.square().sum(1)]
        )  # fmt: skip
        if values.shape[1]:
            torch.minimum(self.lows, torch.where(finite, values, torch.inf).amin(1), out=self.lows)
            torch.maximum(self.highs, torch.where(finite, values, -torch.inf).amax(1), out=self.highs)

    @property
    def count(self) -> Tensor:
        """Of finite numbers."""
        return self.sums[0]

    @property
    def not_finite(self) -> Tensor:
        return self.sums[1]

    @property
    def mean(self) -> Tensor:
        return self.sums[2] / self.count

    @property
    def squares(self) -> Tensor:
        """The sum of squares."""
        return self.sums[3]


class QuantileSketch(Streaming):
    """Quantiles of R streams to within `RELATIVE_ERROR`, from counts in logarithmic bins; DDSketch, arXiv 1908.10693.

    A number's bin is its sign, exponent and first `MANTISSA_BITS` bits as fp32: the bins of every octave have equal
    width, and finding one is exact on every device. Numbers below 2^-126 have bins of equal width, too.
    """

    def __init__(self, rows: int = 1, *, device: torch.device | str = "cpu") -> None:
        super().__init__(torch.zeros((rows, _BINS + 1), dtype=torch.float64, device=device), rows)

    def add(self, values: Tensor, rows: Tensor | None = None) -> None:
        """Args: values: [N]; rows: [N], the row of each; the first, if None."""
        values = values.float()
        rows = torch.zeros_like(values, dtype=torch.long) if rows is None else rows
        magnitudes = values.abs().view(torch.int32) >> _DROPPED_BITS
        bins = _LARGEST + torch.where(values < 0, -magnitudes, magnitudes)
        finite = values.isfinite()
        places = torch.where(finite, bins, _BINS).long()  # the last counts what is not finite
        ones = torch.ones_like(places, dtype=self.sums.dtype)
        self.sums.index_put_((rows, places), ones, accumulate=True)
        self.lows.scatter_reduce_(0, rows, torch.where(finite, values, torch.inf).double(), "amin")
        self.highs.scatter_reduce_(0, rows, torch.where(finite, values, -torch.inf).double(), "amax")

    @property
    def counts(self) -> Tensor:
        """[R, bins]."""
        return self.sums[:, :-1]

    @property
    def count(self) -> Tensor:
        """[R], of finite numbers."""
        return self.counts.sum(1)

    @property
    def not_finite(self) -> Tensor:
        return self.sums[:, -1]

    def quantiles(self, shares: Sequence[float]) -> Tensor:
        """[R, shares]: for each share s the number at place floor(s (n - 1)) of the n sorted ones, from 0.

        Exact for shares 0 and 1; NaN where a row is empty.
        """
        wanted = self.sums.new_tensor(list(shares))
        ranks = (wanted * (self.count[:, None] - 1)).floor()
        places = torch.searchsorted(self.counts.cumsum(1), ranks, right=True).clamp(max=_BINS - 1)
        found = _edges(self.sums.device).unfold(0, 2, 1).mean(1)[places]
        found = torch.maximum(torch.minimum(found, self.highs[:, None]), self.lows[:, None])
        found = torch.where(wanted == 0, self.lows[:, None], torch.where(wanted == 1, self.highs[:, None], found))
        return torch.where(self.count[:, None] > 0, found, torch.nan)

    def histogram(self, *, per_octave: int = 4, smallest: float = 2.0**-10) -> list[tuple[list[float], list[int]]]:
        """Edges [n + 1] and exact counts [n] of every row, in the bins of the sketch put together.

        Between `smallest` and the extremes there are `per_octave` bins an octave, a power of two; one bin holds all
        that is smaller in magnitude. The outermost bins hold the extremes. An edge belongs to the bin farther from 0.
        """
        edges = _edges(self.sums.device)
        step = (1 << MANTISSA_BITS) // per_octave
        is_edge = torch.arange(-_LARGEST, _LARGEST + 1, device=edges.device) % step == 0  # of the bin's end nearer to 0
        upper = torch.where(is_edge & (edges[:-1] >= smallest))[0]
        kept = torch.cat([_BINS - upper.flip(0), upper])
        found = []
        for counts in self.counts.cpu():
            sums = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
            ends = torch.cat([torch.zeros(1, dtype=torch.long), kept.cpu(), torch.tensor([_BINS])])
            inside = sums[ends].diff().long()
            there = inside.nonzero()[:, 0].tolist() or [len(upper)]
            low, high = there[0], there[-1] + 1
            found.append((edges.cpu()[ends[low : high + 1]].tolist(), inside[low:high].tolist()))
        return found


@cache
def _edges(device: torch.device) -> Tensor:
    """[bins + 1], the numbers between which the bins lie; 0 is in the middle of its own."""
    of_magnitudes = torch.arange(_LARGEST + 2)
    exponents, steps = of_magnitudes >> MANTISSA_BITS, of_magnitudes & ((1 << MANTISSA_BITS) - 1)
    share = steps.double() / (1 << MANTISSA_BITS)
    positive = torch.ldexp(torch.where(exponents > 0, 1 + share, share), exponents.clamp(min=1) - 127)[1:]
    return torch.cat([-positive.flip(0), positive]).to(device)


class Plane(Streaming):
    """Pairs of probabilities in squares of equal size: how many fell into each, and the mean of a number beside them."""

    def __init__(self, cells: int = 20, *, device: torch.device | str = "cpu") -> None:
        super().__init__(torch.zeros((3, cells, cells), dtype=torch.float64, device=device), 0)
        self._cells = cells

    def add(self, first: Tensor, second: Tensor, values: Tensor) -> None:
        """Args: first, second: [N], between 0 and 1; values: [N]. A pair that is not finite counts nowhere."""
        counts = (first.isfinite() & second.isfinite()).double()
        finite = counts * values.isfinite()
        places = [
            torch.where(counts > 0, axis * self._cells, 0).long().clamp(0, self._cells - 1) for axis in (first, second)
        ]
        sums = torch.where(finite > 0, values.double(), 0.0)
        for plane, amounts in zip(self.sums, (counts, finite, sums), strict=True):
            plane.index_put_(tuple(places), amounts, accumulate=True)

    def cells(self) -> list[tuple[int, int, int, float | None]]:
        """First place, second place, count and mean number of every cell that is not empty."""
        counts, finite, sums = self.sums.cpu()
        means = (sums / finite).tolist()
        return [(a, b, int(counts[a, b]), means[a][b] if finite[a, b] else None) for a, b in counts.nonzero().tolist()]

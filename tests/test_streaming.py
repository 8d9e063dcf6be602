"""Streaming statistics against exact ones, and that nothing depends on how a stream is cut."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed
from torch import Tensor

from poweropd.streaming import RELATIVE_ERROR, Moments, Plane, QuantileSketch, Streaming, merge_ranks

SHARES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
SUBNORMAL = 2.0**-126  # below it the bins are of equal width

STREAMS: dict[str, Callable[[], Tensor]] = {
    "heavy tails": lambda: torch.randn(20_000) / torch.randn(20_000),
    "log-normal over thirty decades": lambda: (10 * torch.randn(20_000)).exp(),
    "like log-ratios": lambda: torch.where(torch.rand(5_000) < 0.6, 1e-6, 1.0) * torch.randn(5_000) - 0.1,
    "a constant": lambda: torch.full((777,), -3.3),
    "zero": lambda: torch.zeros(50),
    "both signs, many zeros": lambda: torch.randint(-2, 3, (999,)) * torch.rand(999),
    "tiny": lambda: torch.randn(1_000) * 1e-36,
    "below the smallest normal number": lambda: torch.randn(1_000) * 1e-39,
    "huge": lambda: torch.rand(1_000) * 3.4e38,
    "signed extremes": lambda: torch.tensor([-3.4e38, -1e-38, -0.0, 0.0, 1e-38, 3.4e38]),
    "one": lambda: torch.tensor([0.1]),
    "two": lambda: torch.tensor([-1e30, 1e-30]),
}


def sketch_of(values: Tensor) -> QuantileSketch:
    sketch = QuantileSketch()
    sketch.add(values)
    return sketch


@pytest.mark.parametrize("name", STREAMS)
def test_quantiles_are_within_the_stated_error(name: str) -> None:
    values = STREAMS[name]()
    ordered = values.double().sort().values
    got = sketch_of(values).quantiles(SHARES)[0]
    exact = ordered[torch.tensor([int(share * (len(values) - 1)) for share in SHARES])]
    assert ((got - exact).abs() <= RELATIVE_ERROR * exact.abs().clamp(min=SUBNORMAL)).all()
    assert (got[0], got[-1]) == (ordered[0], ordered[-1])  # extremes are exact


def test_the_stated_error_is_the_least_there_is() -> None:
    """Somewhere in a bin the error comes near to it."""
    values = 1 + torch.arange(1 << 12) / (1 << 12)
    got = torch.cat([sketch_of(torch.stack([values[0], v, values[-1]])).quantiles([0.5])[0] for v in values[:200]])
    assert 0.95 * RELATIVE_ERROR < ((got - values[:200]) / values[:200]).abs().max() <= RELATIVE_ERROR


@pytest.mark.parametrize("name", STREAMS)
def test_merging_any_split_is_the_whole(name: str) -> None:
    values = STREAMS[name]()
    rows = torch.randint(0, 3, values.shape)
    of_row = rows == torch.arange(3)[:, None]
    whole = QuantileSketch(3), Moments(3)
    whole[0].add(values, rows)
    whole[1].add(values, of_row)
    for parts in (2, 7, 50):
        owner = torch.randint(0, parts, values.shape)
        merged = QuantileSketch(3), Moments(3)
        for part in reversed(range(parts)):
            own = owner == part  # perhaps nothing
            other = QuantileSketch(3), Moments(3)
            other[0].add(values[own], rows[own])
            other[1].add(values[own], of_row[:, own])
            for mine, theirs in zip(merged, other, strict=True):
                mine.merge(theirs)
        assert torch.equal(merged[0].sums, whole[0].sums)
        assert torch.equal(merged[1].count, whole[1].count)
        torch.testing.assert_close(merged[1].sums, whole[1].sums, rtol=1e-12, atol=1e-12 * float(values.abs().sum()))
        for mine, theirs in zip(merged, whole, strict=True):
            assert torch.equal(mine.lows, theirs.lows)
            assert torch.equal(mine.highs, theirs.highs)


def test_moments_are_those_of_numpy() -> None:
    values, of_row = torch.randn(3, 1_000).exp(), torch.rand(3, 1_000) < 0.4
    moments = Moments(3)
    for part in torch.arange(1_000).split(64):
        moments.add(values[:, part], of_row[:, part])
    for row in range(3):
        own = values[row][of_row[row]].double().numpy()
        assert moments.count[row] == len(own)
        assert moments.mean[row].item() == pytest.approx(own.mean(), rel=1e-12)
        assert moments.squares[row].item() == pytest.approx(np.square(own).sum(), rel=1e-12)
        assert (moments.lows[row], moments.highs[row]) == (own.min(), own.max())


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_what_is_not_finite_is_counted_and_spoils_nothing(share: float) -> None:
    values = torch.randn(400)
    bad = torch.rand(400) < share
    poison = torch.tensor([torch.nan, torch.inf, -torch.inf])[torch.arange(400) % 3]
    poisoned = torch.where(bad, poison, values)
    clean, sketch, moments = sketch_of(values[~bad]), sketch_of(poisoned), Moments()
    moments.add(poisoned)
    assert sketch.not_finite.item() == moments.not_finite.item() == bad.sum()
    assert sketch.count.item() == moments.count.item() == (~bad).sum()
    torch.testing.assert_close(sketch.quantiles(SHARES), clean.quantiles(SHARES), rtol=0, atol=0, equal_nan=True)
    if share < 1:
        assert moments.mean.item() == pytest.approx(values[~bad].double().mean().item(), rel=1e-12)
    else:
        assert moments.mean.isnan().all()
        assert sketch.quantiles(SHARES).isnan().all()


@pytest.mark.parametrize("name", [name for name in STREAMS if name != "signed extremes"])
def test_histograms_are_exact(name: str) -> None:
    """Mirrored, since on either side an edge belongs to the bin farther from 0."""
    values = STREAMS[name]()
    ((edges, counts),) = sketch_of(values).histogram()
    edges = np.array(edges)
    own = values.double().numpy()
    assert sum(counts) == len(own)
    positive = edges[edges > 0]
    if len(positive) > 1:
        expected = [((own >= low) & (own < high)).sum() for low, high in pairwise(positive)]
        assert counts[len(counts) - len(expected) :] == expected
    negative = edges[edges < 0]
    if len(negative) > 1:
        expected = [((own > low) & (own <= high)).sum() for low, high in pairwise(negative)]
        assert counts[: len(expected)] == expected
    assert counts[0] > 0
    assert counts[-1] > 0
    assert len(edges) == len(counts) + 1
    assert (np.diff(edges) > 0).all()


def test_an_empty_histogram_has_one_empty_bin() -> None:
    ((edges, counts),) = QuantileSketch().histogram()
    assert (edges, counts) == ([-(2.0**-10), 2.0**-10], [0])


def test_a_plane_counts_pairs() -> None:
    first, second, values = torch.rand(500), torch.rand(500), torch.randn(500)
    first[0], second[1], values[2] = 1.0, 0.0, torch.nan
    first[3], second[4] = torch.nan, torch.inf
    plane, expected = Plane(cells=4), {}
    for part in torch.arange(500).split(90):
        plane.add(first[part], second[part], values[part])
    for a, b, value in zip(first.tolist(), second.tolist(), values.tolist(), strict=True):
        if np.isfinite(a) and np.isfinite(b):
            expected.setdefault((min(int(a * 4), 3), min(int(b * 4), 3)), []).append(value)
    assert sum(count for *_, count, _ in plane.cells()) == 498
    assert [(a, b) for a, b, *_ in plane.cells()] == sorted(expected)
    for a, b, count, mean in plane.cells():
        assert count == len(expected[a, b])
        assert mean == pytest.approx(np.nanmean(expected[a, b]))


def statistics_of(values: Tensor) -> list[Streaming]:
    moments, sketch, plane = Moments(2), QuantileSketch(2), Plane()
    moments.add(torch.stack([values, -values]))
    sketch.add(values, (values > 0).long())
    plane.add(values.sigmoid(), values.cos().abs(), values)
    return [moments, sketch, plane]


def every_rank(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    parts = statistics_of(torch.load(f"{folder}/values.pt")[rank::2])
    merge_ranks(parts)
    torch.save([vars(part) for part in parts], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_agree_on_what_both_saw(tmp_path: Path) -> None:
    values = torch.randn(1_001) / torch.rand(1_001)
    torch.save(values, tmp_path / "values.pt")
    torch.multiprocessing.spawn(every_rank, args=(str(tmp_path),), nprocs=2)
    whole = statistics_of(values)
    for rank in range(2):
        for part, got in zip(whole, torch.load(tmp_path / f"{rank}.pt"), strict=True):
            assert torch.equal(got["lows"], part.lows)
            assert torch.equal(got["highs"], part.highs)
            is_count = not isinstance(part, Moments | Plane)
            torch.testing.assert_close(got["sums"], part.sums, rtol=0 if is_count else 1e-12, atol=0)

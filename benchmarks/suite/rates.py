"""What this machine can do: the rates of matrix products and of memory that every floor is counted from."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from suite.turns import Turns

VOCABULARY = 151_936
SHAPES = {  # rows, inner, columns
    "square 2048": (2048, 2048, 2048),
    "student head, 128 rows": (128, 256, VOCABULARY),
    "teacher head, 128 rows": (128, 512, VOCABULARY),
    "student MLP, 2,112 rows": (2112, 256, 768),
    "teacher MLP, 2,112 rows": (2112, 512, 1536),
}
COPIED = 256 * 2**20  # bytes, beyond any cache
REPETITION, REPETITIONS = 0.05, 3  # seconds, about


def measure(turns: Turns) -> None:
    """FLOP and bytes a second, by the clock on the wall and by processor seconds of all threads."""
    for _ in range(turns.count):
        turns.begin()
        products = {
            f"{name}, {dtype}": product_rate(*size, dtype=getattr(torch, dtype))
            for name, size in SHAPES.items()
            for dtype in ("float32", "bfloat16")
        }
        turns.end(products=products, memory=memory_rate())


def product_rate(rows: int, inner: int, columns: int, *, dtype: torch.dtype) -> dict[str, float]:
    """FLOP a second of `[rows, inner] @ [columns, inner].T`, which is how a linear map is stored."""
    left, right = torch.randn(rows, inner, dtype=dtype), torch.randn(columns, inner, dtype=dtype)
    out = torch.empty(rows, columns, dtype=dtype)

    def product() -> Tensor:
        return torch.mm(left, right.T, out=out)

    return _rate(product, 2.0 * rows * inner * columns)


def memory_rate() -> dict[str, float]:
    """Bytes a second of a copy, read and written both counted."""
    source = torch.ones(COPIED // 4)
    target = torch.empty_like(source)
    return _rate(lambda: target.copy_(source), 2.0 * COPIED)


def _rate(work: Callable[[], object], amount: float) -> dict[str, float]:
    """Of the fastest of several repetitions, each long enough for the processor's clock."""
    work()
    start = time.perf_counter()
    work()
    times = 1 + int(REPETITION / (time.perf_counter() - start))
    best = {"wall": float("inf"), "cpu": float("inf")}
    for _ in range(REPETITIONS):
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(times):
            work()
        best["wall"] = min(best["wall"], (time.perf_counter() - wall) / times)
        best["cpu"] = min(best["cpu"], (time.process_time() - cpu) / times)
    return {clock: amount / seconds for clock, seconds in best.items()}

"""What `gpu.py` measures of a device by itself: its matmuls, the Triton kernels, and the products around them."""

import datetime
import importlib.metadata
import platform
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from poweropd.objectives import kernels
from poweropd.objectives.kernels import LogitMap, reverse_kl_rows, softmax_rows

PLAIN = LogitMap()
LAUNCHES = ((1024, 4), (2048, 4), (2048, 8), (4096, 8), (4096, 16), (8192, 16))  # BLOCK and WARPS to choose from


def machine_of(device: torch.device) -> dict[str, str]:
    """Date, card and versions."""
    found = {"date": datetime.date.today().isoformat(), "device": platform.processor() or platform.machine()}
    if device.type == "cuda":
        of_device = torch.cuda.get_device_properties(device)
        found |= {"device": of_device.name, "memory": f"{of_device.total_memory / 2**30:.0f} GiB"}
        found["cuda"] = str(torch.version.cuda)
    for package in ("torch", "triton", "transformers"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def matmul_rate(device: torch.device, dtype: torch.dtype, *, size: int) -> float:
    """FLOP/s of a square product, the best of 20 after some that warm up."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / min(seconds_of(lambda: torch.mm(a, b, out=out), device, repeats=20))


def seconds_of(work: Callable[[], object], device: torch.device, *, repeats: int) -> list[float]:
    """Of each repeat, after three that warm up; on a GPU by its own clock."""
    found = []
    for repeat in range(-3, repeats):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            end.synchronize()
            seconds = start.elapsed_time(end) / 1000
        else:
            begun = time.perf_counter()
            work()
            seconds = time.perf_counter() - begun
        found += [seconds] if repeat >= 0 else []
    return found


def check_kernels(device: torch.device, vocabulary: int, rate: float, *, is_small: bool) -> dict[str, Any]:
    """Print and return errors and times of the kernels and of the obvious code, and those of the products of a head.

    Raises:
        SystemExit: the kernels cannot run here, or are wrong.
    """
    if not kernels.available(device):
        raise SystemExit("the kernels need a GPU, or TRITON_INTERPRET=1 and triton, where they take seconds a row")
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows = 4 if is_small else 2048
    student, teacher = (5 * torch.randn(rows, vocabulary, device=device, dtype=dtype) for _ in range(2))
    errors = _errors(student[:256], teacher[:256])
    for what, error in errors.items():
        print(f"* {what}: {error:.1e}")
    seconds: dict[str, float] = {}
    ways: dict[str, Callable[[], object]] = {
        "softmax, obvious": lambda: _obvious_softmax(student),
        "softmax, kernel": lambda: softmax_rows(student, **PLAIN._asdict(), gradient=True),
        "softmax without gradient, kernel": lambda: softmax_rows(student, **PLAIN._asdict(), gradient=False),
        "reverse KL, obvious": lambda: _obvious_reverse_kl(student, teacher),
        "reverse KL, kernel": lambda: reverse_kl_rows(
            student, teacher, student_map=PLAIN, teacher_map=PLAIN, gradient=True
        ),
    }
    repeats = 2 if is_small else 20
    print(f"\n| {rows} rows of {vocabulary} {dtype} | ms | GB/s of reading and writing once |\n|---|---|---|")
    for name, way in ways.items():
        _time(seconds, name, way, device, repeats, student.nbytes * (2 if "reverse" not in name else 3))
    for block, warps in LAUNCHES if device.type == "cuda" else ():
        kernels.BLOCK, kernels.WARPS = block, warps
        for name in ("softmax, kernel", "reverse KL, kernel"):
            shape = f"{name}, {block} columns by {warps} warps"
            _time(seconds, shape, ways[name], device, repeats, student.nbytes * (2 if "reverse" not in name else 3))
    return {"errors": errors, "seconds": seconds, "heads": _heads(device, dtype, vocabulary, rate, is_small=is_small)}


def _time(
    seconds: dict[str, float], name: str, way: Callable[[], object], device: torch.device, repeats: int, size: int
) -> None:
    seconds[name] = min(seconds_of(way, device, repeats=repeats))
    print(f"| {name} | {1000 * seconds[name]:.3f} | {size / seconds[name] / 1e9:.0f} |")


def _obvious_softmax(products: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits = products.float()
    normalisers, probabilities = logits.logsumexp(1), logits.softmax(1)
    entropies, top1_ids = normalisers - (probabilities * logits).sum(1), logits.argmax(1)
    products.copy_(probabilities)
    return normalisers, entropies, top1_ids


def _obvious_reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    log_q, log_p = student.float().log_softmax(1), teacher.float().log_softmax(1)
    q, ratios = log_q.exp(), log_q - log_p
    values = (q * ratios).sum(1)
    student.copy_(q * (ratios - values[:, None]))
    return values


def _errors(student: Tensor, teacher: Tensor) -> dict[str, float]:
    """Largest errors against fp64; gradients relative to their largest entry.

    Raises:
        SystemExit: one is larger than rounding.
    """
    logits = student.double()
    q, p = logits.softmax(1), teacher.double().softmax(1)
    ratios = q.log() - p.log()
    values = (q * ratios).sum(1)
    gradient, found_softmax = student.clone(), None
    found_softmax = softmax_rows(gradient, **PLAIN._asdict(), gradient=True)
    of_kl = student.clone()
    found = reverse_kl_rows(of_kl, teacher, student_map=PLAIN, teacher_map=PLAIN, gradient=True)
    exact = q * (ratios - values[:, None])
    errors = {
        "log-normaliser": (found_softmax.normalisers - logits.logsumexp(1)).abs().max(),
        "entropy": (found_softmax.entropies + (q * q.log()).sum(1)).abs().max(),
        "likeliest token": (found_softmax.top1_ids != logits.argmax(1)).double().mean(),
        "gradient of the log-normaliser": (gradient - q).abs().max() / q.max(),
        "reverse KL": ((found.values - values).abs() / (1 + values)).max(),
        "gradient of the reverse KL": (of_kl - exact).abs().max() / exact.abs().max(),
    }
    eps = torch.finfo(student.dtype).eps
    for what, error in errors.items():
        if not error <= (max(eps, 1e-5) if "gradient" in what else 1e-5):
            raise SystemExit(f"THE KERNELS ARE WRONG: {what} is off by {error:.1e}")
    return {what: error.item() for what, error in errors.items()}


def _heads(
    device: torch.device, dtype: torch.dtype, vocabulary: int, rate: float, *, is_small: bool
) -> dict[str, float]:
    """Share of the matmul rate of a head's three products, by rows of a tile and by how its rows lie in memory.

    267 of the 151,936 rows of Qwen3's heads mean nothing and are cut off, which leaves rows of an odd number.
    """
    size, hidden_size = vocabulary - 267, 64 if is_small else 1024
    weight, gradient = (torch.randn(vocabulary, hidden_size, device=device, dtype=dtype) for _ in range(2))
    found = {}
    print("\n| tile | products of the head, share of the matmul rate |\n|---|---|")
    for rows in (16,) if is_small else (256, 512, 1024, 2048, 4096, 8192):
        hidden = torch.randn(rows, hidden_size, device=device, dtype=dtype)
        for lie, width, columns in (
            ("whole", vocabulary, vocabulary),
            ("cut", size, size),
            ("cut, in whole rows", vocabulary, size),
        ):
            tile = torch.empty(rows, width, device=device, dtype=dtype)[:, :columns]

            def products(hidden: Tensor = hidden, tile: Tensor = tile, columns: int = columns) -> None:
                torch.mm(hidden, weight[:columns].T, out=tile)
                torch.mm(tile, weight[:columns])
                gradient[:columns].addmm_(tile.T, hidden)

            seconds = min(seconds_of(products, device, repeats=5))
            name = f"{rows} rows of {columns}, {lie}"
            found[name] = 6 * rows * columns * hidden_size / seconds / rate
            print(f"| {name} | {found[name]:.0%} |")
    return found

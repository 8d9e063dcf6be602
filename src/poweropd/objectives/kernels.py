"""What a loss does to a tile of logits, as one kernel: statistics of every row, and the gradient over the products.

The same as the portable functions of `lm_head`, which pass over the tile about ten times in fp32; here each product is
read twice and written once, in its own precision. Triton runs it, which comes with torch on GPUs; nothing here imports
it before a kernel is called. With TRITON_INTERPRET=1 in the environment its interpreter runs the same code on a CPU.

Shapes: B rows, V outcomes.
"""

import importlib.util
import os
import warnings
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 2048  # columns that a program has in registers at a time
WARPS = 8  # threads of a program, in units of 32
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CAPABILITY = (8, 0)  # the least that Triton promises to run on, and the first with bf16


@cache
def available(device: torch.device) -> bool:
    """Whether the kernels run on a device; a warning says why not, where they should."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if importlib.util.find_spec("triton") is None or (device.type != "cuda" and not interpreted):
        return False
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < CAPABILITY:
        return False
    try:
        softmax_rows(torch.zeros((1, 2), device=device), bias=None, scale=1.0, softcap=None, gradient=False)
    except Exception as error:  # Triton compiles at the first launch, and lacks a C compiler or a driver only then
        warnings.warn(f"without Triton's kernels, and slower: {type(error).__name__}: {error}", stacklevel=2)
        return False
    return True


class LogitMap(NamedTuple):
    """How logits come from products: `softcap * tanh(scale * (products + bias) / softcap)`; see `LMHead`.

    `bias` is [V] or None; without a softcap logits are `scale * (products + bias)`.
    """

    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None


class RowStatistics(NamedTuple):
    """Of each row's softmax, [B] each: log-normaliser, entropy in nats and largest logit, fp32, and the first id that
    has it, int64. No end tokens are merged."""

    normalisers: Tensor
    entropies: Tensor
    largest: Tensor
    top1_ids: Tensor


class ReverseKLRows(NamedTuple):
    """KL(student || teacher) [B] in nats, the statistics of both, and the student's logit [B] at the teacher's
    `top1_ids`, which tells whether that is one of the student's likeliest."""

    values: Tensor
    student: RowStatistics
    teacher: RowStatistics
    student_at_teachers_top1: Tensor


def softmax_rows(
    products: Tensor, *, bias: Tensor | None, scale: float, softcap: float | None, gradient: bool
) -> RowStatistics:
    """Statistics of the softmax of the logits that `products` stand for, all arithmetic in fp32.

    A row that holds a NaN gets a NaN normaliser, entropy and gradient; logits of -inf are not for here.

    Args:
        products: [B, V] hidden states times the head, half precision or fp32; V contiguous, rows at any stride.
        bias, scale, softcap: see `LogitMap`.
        gradient: overwrite `products` by d normaliser / d products = softmax * d logit / d product.

    Raises:
        ValueError: `products` of another dtype or with a stride in V.
    """
    _check(products)
    found = _statistics(products)
    if len(products):
        _launch(
            "softmax_rows",
            products,
            bias,
            *found,
            products.shape[1],
            products.stride(0),
            scale=scale,
            softcap=softcap,
            GRADIENT=gradient,
        )
    return found


def reverse_kl_rows(
    student: Tensor,
    teacher: Tensor,
    *,
    student_map: LogitMap,
    teacher_map: LogitMap,
    end_ids: Tensor | None = None,
    gradient: bool,
) -> ReverseKLRows:
    """KL(q || p) of the softmaxes of two models' logits at each row, all arithmetic in fp32.

    Args:
        student, teacher: products [B, V] of each, as in `softmax_rows`; dtypes may differ.
        end_ids: [k], outcomes that are one in value and gradient: each side's probabilities of them are summed. The
            statistics know nothing of it.
        gradient: overwrite `student` by d value / d student = q (log q - log p - value) * d logit / d product.

    Raises:
        ValueError: products of another dtype, with a stride in V, or of different shapes.
    """
    _check(student, teacher)
    values, at_top1 = (_empty(student) for _ in range(2))
    found = ReverseKLRows(values, _statistics(student), _statistics(teacher), at_top1)
    num_ends = 0 if end_ids is None else len(end_ids)
    if len(student):
        _launch(
            "reverse_kl_rows",
            student,
            teacher,
            student_map.bias,
            teacher_map.bias,
            end_ids,
            values,
            at_top1,
            *found.student,
            *found.teacher,
            student.shape[1],
            student.stride(0),
            teacher.stride(0),
            student_scale=student_map.scale,
            student_softcap=student_map.softcap,
            teacher_scale=teacher_map.scale,
            teacher_softcap=teacher_map.softcap,
            num_ends=num_ends,
            GRADIENT=gradient,
            ENDS=_power_of_two(num_ends),
        )
    return found


def _launch(name: str, products: Tensor, *others: Tensor | int | None, **constants: float | None) -> None:
    """Run a kernel of `triton_rows`, a program for every row of `products`, on their device."""
    from poweropd.objectives import triton_rows

    rows, size = products.shape
    with torch.cuda.device_of(products):
        kernel = getattr(triton_rows, name)[(rows,)]
        kernel(products, *others, BLOCK=min(BLOCK, _power_of_two(size)), num_warps=WARPS, **constants)


def _check(*products: Tensor) -> None:
    for each in products:
        if each.dtype not in DTYPES or each.stride(1) != 1 or each.shape != products[0].shape:
            raise ValueError(
                f"kernels take products [B, V] in {', '.join(map(str, DTYPES))} with V contiguous, not "
                f"{', '.join(f'{tuple(each.shape)} in {each.dtype} with strides {each.stride()}' for each in products)}"
            )


def _statistics(products: Tensor) -> RowStatistics:
    """Room for them."""
    normalisers, entropies, largest = (_empty(products) for _ in range(3))
    return RowStatistics(normalisers, entropies, largest, _empty(products, torch.int64))


def _empty(products: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """[B], of its own: where numbers are views of one tensor, Triton compiles anew for every alignment."""
    return products.new_empty(len(products), dtype=dtype)


def _power_of_two(least: int) -> int:
    return 1 << max(least - 1, 0).bit_length()

"""How torch should work on a CPU, said once a process."""

import ctypes
import platform
from functools import cache

import torch

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # the names of glibc's settings, from malloc.h
KEPT_BLOCK, KEPT_HEAP = 32 << 20, 256 << 20  # bytes; glibc allows no larger block


def settle(threads: int | None = None) -> None:
    """Make arithmetic and memory fast, before any work is done: threads that torch starts inherit it.

    * Denormal numbers count as zero. Some CPUs take a hundred times as long over them, and the tails of a softmax times a
      small advantage are full of them.
    * glibc keeps what is freed for the next tensor of that size, rather than have the kernel hand out zeroed pages anew.

    Args:
        threads: of torch; None leaves the choice to it.
    """
    torch.set_flush_denormal(True)
    libc = _glibc()
    if libc is not None:
        libc.mallopt(MMAP_THRESHOLD, KEPT_BLOCK)
        libc.mallopt(TRIM_THRESHOLD, KEPT_HEAP)
    if threads is not None:
        torch.set_num_threads(threads)


def make_room(size: int) -> None:
    """Before a tensor of `size` bytes that is too large to be kept: the kernel gets back what lies free, in its stead."""
    libc = _glibc()
    if libc is not None and size > KEPT_BLOCK:
        libc.malloc_trim(0)


@cache
def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None

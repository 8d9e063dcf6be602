"""CUDA graphs of decode steps."""

import warnings
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

WARM_UP = 4  # calls of one shape that run as they are, before they are worth recording
CLOSE = 1e-2  # of the largest number: what a recording may be off by, since other kernels may be chosen for it


class Replay:
    """Repeats what a function has the GPU do, without its kernel launches: one recording for each shape.

    A recording is used if it gives what the function gives; a function that cannot be recorded runs as it is, which is
    said once. Not yet run on a GPU.
    """

    def __init__(self) -> None:
        self._calls: Counter[tuple[int, int]] = Counter()
        self._recordings: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._works = torch.cuda.is_available()
        self._stream = torch.cuda.Stream() if self._works else None

    def __call__(self, function: Callable[[int, int], Tensor], shape: tuple[int, int]) -> Tensor:
        """The result of `function(*shape)`, which the next call may overwrite.

        Args:
            function: the same in every call. It reads tensors that stay where they are until `forget`; called twice in a
                row, it leaves what it left the first time.
        """
        if shape in self._recordings:
            graph, result = self._recordings[shape]
            graph.replay()
            return result
        expected = function(*shape)
        self._calls[shape] += 1
        if self._works and self._calls[shape] > WARM_UP:
            try:
                self._record(function, shape, expected)
            except RuntimeError as error:
                self._works = False
                reason = str(error).partition("\n")[0]
                warnings.warn(f"rollouts go on without CUDA graphs, which failed: {reason}", stacklevel=2)
        return expected

    def forget(self) -> None:
        """What the function reads has moved."""
        self._recordings.clear()

    def _record(self, function: Callable[[int, int], Tensor], shape: tuple[int, int], expected: Tensor) -> None:
        graph, current, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(), self._stream
        assert stream is not None
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            graph.capture_begin()
            try:
                result = function(*shape)
            finally:
                graph.capture_end()
        current.wait_stream(stream)
        graph.replay()
        if not (result - expected).abs().max() <= CLOSE * expected.abs().max():
            raise RuntimeError("a recorded step differs from the step itself")
        self._recordings[shape] = graph, result

"""Several processes that work as one: what they tell each other, and how they end together.

`torchrun` and `accelerate launch` start them and say by the environment who is who. Numbers and objects travel by gloo,
tensors on a GPU by NCCL.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from poweropd.errors import PeerError, RunError, UserError

T = TypeVar("T")

PATIENCE = timedelta(hours=1)  # that ranks wait for one that evaluates, scores or writes
BUCKET = 2**24  # numbers that are added up in one go
ENDED, INTERRUPTED = "ended", "interrupted"  # a key of the store, and what stands there if nothing was wrong


class World:
    """A process that is alone, in which there is nothing to tell.

    Attributes:
        rank: which of the processes this is.
        size: how many there are.
    """

    rank = 0
    size = 1

    @property
    def is_main(self) -> bool:
        """Whether this one keeps the records and speaks to the user."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """The value of every rank, in order."""
        return [value]

    def agreed(self, function: Callable[[], T]) -> T:
        """What a function gives here, once it has succeeded on every rank; an error on one is raised on all.

        Args:
            function: talks to no other rank.
        """
        return function()

    def each(self, function: Callable[[], T]) -> list[T]:
        """What a function that talks to no other rank gives on every one; an error on one is raised on all."""
        return self.gather(self.agreed(function))

    def on_main(self, function: Callable[[], T]) -> T:
        """What a function gives that rank 0 alone runs; its error is raised on all."""
        own = self.agreed(function if self.is_main else lambda: None)
        return self.broadcast(own)  # type: ignore[return-value]

    def broadcast(self, value: T) -> T:
        """The value of rank 0."""
        return value

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace each by its sum over all ranks, which have tensors of the same shapes."""

    def copy_from_main(self, tensors: Sequence[Tensor]) -> None:
        """Replace each by that of rank 0."""

    def cat(self, tensor: Tensor) -> Tensor:
        """Rows `[n, ...]` of all ranks, one rank behind the other."""
        return tensor

    def apart(self) -> "World":
        """The same ranks for a thread of its own, whose calls do not mix with those of others."""
        return self

    @contextmanager
    def in_words(self) -> Iterator[None]:
        """Within this context, a rank that has gone is a `PeerError`."""
        yield


ALONE = World()


class Processes(World):
    """One of several processes. All of them must make the same calls in the same order.

    Args:
        store: what they share before and after they can talk.
    """

    def __init__(self, store: Store) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._store = store
        self._talk = dist.new_group(backend="gloo", timeout=PATIENCE)

    def gather(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._talk)
        return values

    def agreed(self, function: Callable[[], T]) -> T:
        value: Any = None
        error: Exception | None = None
        try:
            value = function()
        except Exception as caught:  # raised below, once all ranks know of it
            error = caught
            self.is_first_to_end(str(caught))
        for failure in (error, *self.gather(_told(error))):
            if failure is not None:
                raise failure
        return value

    def broadcast(self, value: T) -> T:
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self._talk)
        return values[0]

    @torch.no_grad()
    def add_up(self, tensors: Sequence[Tensor]) -> None:
        for bucket in _buckets(tensors):
            if len(bucket) == 1 and bucket[0].is_contiguous():
                dist.all_reduce(bucket[0])
                continue
            flat = torch.cat([tensor.flatten() for tensor in bucket])
            dist.all_reduce(flat)
            for tensor, total in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
                tensor.copy_(total.view_as(tensor))

    @torch.no_grad()
    def copy_from_main(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)

    def cat(self, tensor: Tensor) -> Tensor:
        lengths = self.gather(len(tensor))
        padded = tensor.new_zeros((max(lengths), *tensor.shape[1:]))
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(parts, padded)
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])

    def apart(self) -> "Processes":
        return Processes(self._store)

    @contextmanager
    def in_words(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if not _is_lost_connection(error):
                raise
            said = self._last_words()
            if said == INTERRUPTED:
                raise KeyboardInterrupt from None
            raise PeerError(
                said
                or f"one of the {self.size} processes of this run is gone, or cannot be reached; go on with --resume"
            ) from error

    def is_first_to_end(self, words: str) -> bool:
        """Whether no other rank has said why the run ends; these are its last words, unless this one has said some."""
        try:
            first = self._store.compare_set(ENDED, "", f"{self.rank} {words}")
            return first.decode().partition(" ")[0] == str(self.rank)
        except RuntimeError:  # the store went with its process
            return self.is_main

    def _last_words(self) -> str | None:
        """Why another rank ended the run, if it could say so."""
        try:
            if self._store.check([ENDED]):
                return self._store.get(ENDED).decode().partition(" ")[2]
        except RuntimeError:
            pass
        return None


def _told(error: Exception | None) -> Exception | None:
    """The error as another rank raises it."""
    return error if error is None or isinstance(error, UserError) else RunError(f"{type(error).__name__}: {error}")


def _is_lost_connection(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors in order, a few small ones together."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and sum(map(Tensor.numel, bucket)) + tensor.numel() > BUCKET:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


@contextmanager
def joined() -> Iterator[World]:
    """The processes that a launcher started together with this one; none did: this one alone.

    However many of them fail, one says why; the others leave silently, with the exit status of a failure.

    Raises:
        RunError: they cannot find each other, or are more than there are GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    world = _join()
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        with world.in_words():
            yield world
            world.gather(None)  # until all are done, for one of them may hold the store
    except KeyboardInterrupt:
        world.is_first_to_end(INTERRUPTED)
        if not world.is_main:
            raise SystemExit(130) from None
        raise
    except Exception as error:
        if not world.is_first_to_end(str(error)):
            raise SystemExit(1) from None
        raise
    signal.signal(signal.SIGTERM, previous)
    dist.destroy_process_group()


def _interrupt(*_: object) -> None:
    """Like Ctrl-C, but not on the way out with an error: a launcher ends all processes as soon as one has failed."""
    if sys.exc_info()[1] is None:
        raise KeyboardInterrupt


def _join() -> Processes:
    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    backend = "gloo"
    if torch.cuda.is_available():
        own, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if own >= there:
            raise RunError(f"process {own} of this machine has no GPU, there are {there}; start one process a GPU")
        torch.cuda.set_device(own)
        backend = "cpu:gloo,cuda:nccl"
    try:
        store, rank, size = next(iter(rendezvous("env://", timeout=PATIENCE)))
        dist.init_process_group(
            backend, store=PrefixStore("ranks", store), rank=rank, world_size=size, timeout=PATIENCE
        )
        return Processes(store)
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise RunError(f"the processes of this run cannot find each other at {place}: {reason}") from error

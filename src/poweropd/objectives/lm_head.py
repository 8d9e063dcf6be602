"""An LM head, and hidden states through it, a few rows at a time.

No tensor of [tokens, vocabulary] exists at any moment. Logits live for one tile of rows; a tile is as large as its
matrix products like it, and everything elementwise, in fp32, happens on blocks of its rows that fit a cache. This is
the only place where logits are upcast.

Shapes: N tokens, H hidden size, V rows of the head, C rows of a tile, B rows of a block.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from poweropd import cpu

# Elements of a tile and of a block; the GPU's are not yet measured.
TILE_ELEMENTS = {"cpu": 21_900_000, "cuda": 160_000_000}
PANEL = {"cpu": (1024, 4096)}  # rows and tokens of a panel; elsewhere whole tiles
BLOCK_ELEMENTS = {"cpu": 1_000_000, "cuda": 16_000_000}
ROUND = {"cpu": 16, "cuda": 128}  # rows of a tile are a multiple of it, where there are as many
ALIGNED = {"cpu": 1, "cuda": 64}  # and lie apart by one: half-precision products on a GPU are slow at odd addresses
SEGMENT = 128  # see `likeliest`
NEVER = -1e9  # the logit of a token that cannot be emitted; finite, so that 0 * (log q - log p) stays 0


@dataclass(frozen=True)
class LMHead:
    """The map from the last hidden state to logits.

    Attributes:
        weight: [V, H].
        vocab_size: tokens that exist. Rows of `weight` beyond are padding and never get probability.
        bias: [V], if the model has one.
        softcap: logits become `softcap * tanh(logits / softcap)`, if the model does so.
        scale: factor on the logits.
        end_ids: end tokens that count as one outcome, however spelt; see `poweropd.vocabulary`. Their probabilities are
            summed, under the first id; the others never occur. Empty or a single id: nothing is merged.
    """

    weight: Tensor
    vocab_size: int
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0
    end_ids: tuple[int, ...] = ()

    def canonical(self, target_ids: Tensor) -> Tensor:
        """`target_ids` with every merged end token under the first of them."""
        if len(self.end_ids) < 2:
            return target_ids
        is_end = torch.isin(target_ids, self.ends_on(target_ids.device))
        return torch.where(is_end, self.end_ids[0], target_ids)

    def ends_on(self, device: torch.device) -> Tensor:
        """`end_ids` as a tensor on a device."""
        return _on_device(self.end_ids, device)


@cache
def _on_device(ids: tuple[int, ...], device: torch.device) -> Tensor:
    """Made once: a copy to a GPU waits for all that is under way."""
    return torch.tensor(ids, dtype=torch.long, device=device)


class Block(NamedTuple):
    """Logits [B, vocab_size] of some rows, fp32, end tokens merged."""

    logits: Tensor
    ends: Tensor | None  # [B, end_ids]: the logits of the end tokens before they were merged


def shape_logits(products: Tensor, head: LMHead) -> Tensor:
    """Logits from `products` [B, vocab_size], in their place; end tokens as they stand."""
    if head.bias is not None:
        products += head.bias[: head.vocab_size]
    if head.scale != 1.0:
        products *= head.scale
    if head.softcap is not None:
        products.div_(head.softcap).tanh_().mul_(head.softcap)
    return products


def slope_of(logits: Tensor, head: LMHead) -> Tensor | float:
    """The derivative of each logit with respect to its product, from the logit."""
    if head.softcap is None:
        return head.scale
    return head.scale * (1 - (logits / head.softcap).square())


def logits_of(products: Tensor, head: LMHead) -> Block:
    """The logits that `products` [B, vocab_size] stand for, in fp32 (or wider), which take their place if these are wide."""
    logits = shape_logits(products.to(wide(products.dtype)), head)
    if len(head.end_ids) < 2:
        return Block(logits, None)
    places = head.ends_on(logits.device)
    ends = logits[:, places]
    logits[:, places] = NEVER
    logits[:, head.end_ids[0]] = torch.logsumexp(ends, dim=1)
    return Block(logits, ends)


def through_logits(gradient: Tensor, block: Block, head: LMHead) -> Tensor:
    """The gradient [B, V] with respect to `products + bias`, from that with respect to the logits; overwritten."""
    if block.ends is not None:
        of_ends = gradient[:, head.end_ids[0], None] * torch.softmax(block.ends, dim=1)
        of_ends *= slope_of(block.ends, head)
    if head.softcap is not None or head.scale != 1.0:
        gradient *= slope_of(block.logits, head)
    if block.ends is not None:
        gradient[:, head.ends_on(gradient.device)] = of_ends
    return gradient


class Tiles:
    """The tiles of N tokens, and for each `hidden @ weight.T` [C, vocab_size] in the precision of the hidden states.

    All tiles share one buffer: a fresh one each would live beside its predecessor and cost its page faults again.
    """

    def __init__(self, hidden: Tensor, head: LMHead) -> None:
        self._hidden = hidden
        self._weight = head.weight[: head.vocab_size].T
        self._rows = tile_rows(len(hidden), head.vocab_size, hidden.device)
        if hidden.device.type == "cpu":
            cpu.make_room(self._rows * head.vocab_size * hidden.element_size())
        self._buffer = _buffer(hidden, self._rows, head.vocab_size)[:, : head.vocab_size]

    def __iter__(self) -> Iterator[slice]:
        return slices(len(self._hidden), self._rows)

    def products(self, tile: slice) -> Tensor:
        """Valid until the next call."""
        return torch.mm(self._hidden[tile], self._weight, out=self._buffer[: tile.stop - tile.start])


class Panels:
    """Pieces of some rows and some tokens, for what needs no row as a whole: small enough for a cache, and large both ways,
    which is what matrix products like best.
    """

    def __init__(self, hidden: Tensor, head: LMHead) -> None:
        rows, self.columns = PANEL.get(hidden.device.type) or (
            tile_rows(len(hidden), head.vocab_size, hidden.device),
            head.vocab_size,
        )
        self._hidden, self._head = hidden, head
        self.fit_cache = hidden.device.type in PANEL
        self.rows = list(slices(len(hidden), rows)) or [slice(0, 0)]
        self._buffer = _buffer(hidden, min(rows, len(hidden)), min(self.columns, head.vocab_size))

    def of(self, rows: slice) -> Iterator[tuple[int, LMHead, Tensor]]:
        """The panels of some rows: first token, the head of its tokens, none merged, and products, valid until the next."""
        hidden, head = self._hidden[rows], self._head
        for tokens in slices(head.vocab_size, self.columns):
            size = tokens.stop - tokens.start
            bias = None if head.bias is None else head.bias[tokens]
            part = replace(head, weight=head.weight[tokens], vocab_size=size, bias=bias, end_ids=())
            out = self._buffer[: len(hidden), :size]
            yield tokens.start, part, torch.mm(hidden, part.weight.T, out=out)


def _buffer(hidden: Tensor, rows: int, columns: int) -> Tensor:
    """Room for products; it may have more columns than asked for."""
    return hidden.new_empty((rows, _up(columns, ALIGNED.get(hidden.device.type, ALIGNED["cuda"]))))


def tile_rows(tokens: int, vocab_size: int, device: torch.device) -> int:
    """Rows of a tile: as many as it may have, evenly spread over the tiles, in a number that matrix products like."""
    most = max(1, TILE_ELEMENTS.get(device.type, TILE_ELEMENTS["cuda"]) // vocab_size)
    tiles = max(1, -(-tokens // most))
    even = -(-tokens // tiles)
    return max(1, min(_up(even, ROUND.get(device.type, ROUND["cuda"])), most, tokens))


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def slices(rows: int, size: int) -> Iterator[slice]:
    return (slice(at, min(at + size, rows)) for at in range(0, rows, size))


def blocks(tile: slice, head: LMHead) -> Iterator[tuple[slice, slice]]:
    """The blocks of a tile: their rows within it, and among all tokens."""
    budget = BLOCK_ELEMENTS.get(head.weight.device.type, BLOCK_ELEMENTS["cuda"])
    for block in slices(tile.stop - tile.start, max(1, budget // head.vocab_size)):
        yield block, slice(tile.start + block.start, tile.start + block.stop)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of results: fp32 for half precision, else unchanged."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def likeliest(rows: Tensor) -> Tensor:
    """`argmax(dim=1)` [B] of [B, V]: the largest of every segment, then where in the best one it is.

    On a CPU it takes a fifth of torch's own, which carries an index through the whole row.
    """
    whole = rows.shape[1] // SEGMENT * SEGMENT
    if not whole:
        return rows.argmax(dim=1)
    segments = rows[:, :whole].unflatten(1, (-1, SEGMENT))
    best = segments.amax(dim=2).argmax(dim=1)
    ids = best * SEGMENT + segments[torch.arange(len(rows), device=rows.device), best].argmax(dim=1)
    if whole == rows.shape[1]:
        return ids
    rest = rows[:, whole:]
    return torch.where(rest.amax(dim=1) > rows.gather(1, ids[:, None])[:, 0], whole + rest.argmax(dim=1), ids)


def head_logits(hidden: Tensor, head: LMHead) -> Tensor:
    """Logits [C, vocab_size] of a few rows `hidden` [C, H], fp32: for checks and for sampling, not for training."""
    head = replace(head, weight=head.weight.to(hidden.dtype))
    return logits_of(torch.mm(hidden, head.weight[: head.vocab_size].T), head).logits


@dataclass(frozen=True)
class Distribution:
    """Next-token distributions of N positions as hidden states and LM heads; several models make a mixture.

    Attributes:
        hidden: for each model, its last hidden states [N, H].
        heads: for each model; all share `vocab_size` and `end_ids`.
        weights: shares of the mixture of probabilities, summing to 1.
    """

    hidden: tuple[Tensor, ...]
    heads: tuple[LMHead, ...]
    weights: tuple[float, ...] = (1.0,)

    def check_fits(self, head: LMHead) -> None:
        """Raises ValueError unless every head speaks of the same outcomes as `head`."""
        for own in self.heads:
            if (head.vocab_size, head.end_ids) != (own.vocab_size, own.end_ids):
                raise ValueError(
                    f"student and teacher heads must share vocab_size and end_ids, not {head.vocab_size}, "
                    f"{head.end_ids} and {own.vocab_size}, {own.end_ids}"
                )


class LogProbs:
    """Log-probabilities of a `Distribution`, a block of a tile at a time."""

    def __init__(self, distribution: Distribution) -> None:
        self._log_weights = [math.log(weight) for weight in distribution.weights]
        pairs = list(zip(distribution.hidden, distribution.heads, strict=True))
        self._heads = [replace(head, weight=head.weight.to(hidden.dtype)) for hidden, head in pairs]
        self._tiles = [Tiles(hidden, head) for (hidden, _), head in zip(pairs, self._heads, strict=True)]
        self._products: list[Tensor] = []

    def __iter__(self) -> Iterator[slice]:
        """The tiles."""
        return iter(self._tiles[0])

    def enter(self, tile: slice) -> list[Tensor]:
        """Go to the rows of a tile; returns its products, one of each model."""
        self._products = [tiles.products(tile) for tiles in self._tiles]
        return self._products

    def of(self, block: slice) -> Tensor:
        """Log-probabilities [B, vocab_size] of a block of the tile entered, fp32."""
        members = [
            torch.log_softmax(logits_of(products[block], head).logits, dim=1)
            for products, head in zip(self._products, self._heads, strict=True)
        ]
        if len(members) == 1:
            return members[0]
        shifted = [log_weight + member for log_weight, member in zip(self._log_weights, members, strict=True)]
        return torch.stack(shifted).logsumexp(dim=0)

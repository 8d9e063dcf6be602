"""Hidden states and an LM head to log-probabilities, losses and gradients, a few rows at a time.

No tensor of [tokens, vocabulary] exists at any moment. Logits live for one tile of rows, and the gradient with respect
to the hidden states and the head is taken from the same tile, so the backward pass recomputes nothing. A tile is as
large as its matrix products like it; everything elementwise, in fp32, happens on blocks of its rows that fit a cache,
and the gradient overwrites the logits. This is the only place where logits are upcast.

Shapes: N tokens, H hidden size, V rows of the head, C rows of a tile, B rows of a block.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

# Elements of a tile and of a block. Chosen by benchmarks/memory.py on a CPU; the GPU's are not yet measured.
TILE_ELEMENTS = {"cpu": 20_000_000, "cuda": 128_000_000}
BLOCK_ELEMENTS = {"cpu": 1_000_000, "cuda": 64_000_000}
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
        is_end = torch.isin(target_ids, torch.tensor(self.end_ids, device=target_ids.device))
        return torch.where(is_end, self.end_ids[0], target_ids)


class TokenScores(NamedTuple):
    """Per scored token: its log-probability [N] and the entropy [N] of the distribution it came from, in nats, fp32."""

    logprobs: Tensor
    entropies: Tensor


class _Block(NamedTuple):
    """Logits [B, vocab_size] of some rows, fp32, end tokens merged."""

    logits: Tensor
    ends: Tensor | None  # [B, end_ids]: the logits of the end tokens before they were merged


def _logits(products: Tensor, head: LMHead) -> _Block:
    """The logits that `products` [B, vocab_size] stand for, in fp32 (or wider); `products` is left as it is."""
    logits = products.to(_wide(products.dtype), copy=True)
    if head.bias is not None:
        logits += head.bias[: head.vocab_size]
    if head.scale != 1.0:
        logits *= head.scale
    if head.softcap is not None:
        logits.div_(head.softcap).tanh_().mul_(head.softcap)
    if len(head.end_ids) < 2:
        return _Block(logits, None)
    ends = logits[:, list(head.end_ids)]
    logits[:, list(head.end_ids)] = NEVER
    logits[:, head.end_ids[0]] = torch.logsumexp(ends, dim=1)
    return _Block(logits, ends)


def _through_logits(gradient: Tensor, block: _Block, head: LMHead) -> Tensor:
    """The gradient [B, V] with respect to `products + bias`, from that with respect to the logits; overwritten."""
    of_ends = None
    if block.ends is not None:
        of_ends = gradient[:, head.end_ids[0], None] * torch.softmax(block.ends, dim=1)
    if head.softcap is not None:
        gradient *= 1 - (block.logits / head.softcap).square()  # the slope of the softcap, from the capped value
        if of_ends is not None and block.ends is not None:
            of_ends = of_ends * (1 - (block.ends / head.softcap).square())
    if of_ends is not None:
        gradient[:, list(head.end_ids)] = of_ends
    if head.scale != 1.0:
        gradient *= head.scale
    return gradient


class _Tiles:
    """The tiles of N tokens, and for each `hidden @ weight.T` [C, vocab_size] in the precision of the hidden states.

    All tiles share one buffer: a fresh one each would live beside its predecessor and cost its page faults again.
    """

    def __init__(self, hidden: Tensor, head: LMHead) -> None:
        self._hidden = hidden
        self._weight = head.weight[: head.vocab_size].T
        budget = TILE_ELEMENTS.get(hidden.device.type, TILE_ELEMENTS["cuda"])
        self._rows = max(1, min(budget // head.vocab_size, len(hidden)))
        self._buffer = hidden.new_empty((self._rows, head.vocab_size))

    def __iter__(self) -> Iterator[slice]:
        return _slices(len(self._hidden), self._rows)

    def products(self, tile: slice) -> Tensor:
        """Valid until the next call."""
        return torch.mm(self._hidden[tile], self._weight, out=self._buffer[: tile.stop - tile.start])


def _slices(rows: int, size: int) -> Iterator[slice]:
    return (slice(at, min(at + size, rows)) for at in range(0, rows, size))


def _blocks(tile: slice, head: LMHead) -> Iterator[tuple[slice, slice]]:
    """The blocks of a tile: their rows within it, and among all tokens."""
    budget = BLOCK_ELEMENTS.get(head.weight.device.type, BLOCK_ELEMENTS["cuda"])
    for block in _slices(tile.stop - tile.start, max(1, budget // head.vocab_size)):
        yield block, slice(tile.start + block.start, tile.start + block.stop)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of results: fp32 for half precision, else unchanged."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Log-normaliser [B] and probabilities [B, V].

    With m the largest logit, its probability is exp(m - normaliser) >= 1/V: the normaliser comes from one number a row
    and no second pass over the block.
    """
    largest, where = logits.max(dim=1)
    probabilities = torch.softmax(logits, dim=1)
    return largest - probabilities.gather(1, where[:, None])[:, 0].log(), probabilities


def head_logits(hidden: Tensor, head: LMHead) -> Tensor:
    """Logits [C, vocab_size] of a few rows `hidden` [C, H], fp32: for checks and for sampling, not for training."""
    head = replace(head, weight=head.weight.to(hidden.dtype))
    return _logits(torch.mm(hidden, head.weight[: head.vocab_size].T), head).logits


@torch.no_grad()
def token_scores(hidden: Tensor, head: LMHead, target_ids: Tensor) -> TokenScores:
    """Log-probability of each target and entropy of its distribution, full softmax at temperature 1, fp32.

    Args:
        hidden: [N, H], the last hidden state that predicts each target.
        target_ids: [N].
    """
    head = replace(head, weight=head.weight.to(hidden.dtype))
    targets = head.canonical(target_ids)
    scores = TokenScores(*hidden.new_empty((2, len(hidden)), dtype=_wide(hidden.dtype)))
    tiles = _Tiles(hidden, head)
    for tile in tiles:
        products = tiles.products(tile)
        for block, rows in _blocks(tile, head):
            logits = _logits(products[block], head).logits
            normaliser, probabilities = _softmax(logits)
            scores.logprobs[rows] = logits.gather(1, targets[rows, None])[:, 0] - normaliser
            scores.entropies[rows] = normaliser - torch.einsum("bv,bv->b", probabilities, logits)
    return scores


class LossTerms(NamedTuple):
    """Result of a fused loss: `loss`, a scalar with a gradient, and detached per-token tensors [N].

    `logprobs` and `entropies` are the student's; `teacher_logprobs` the teacher's of the same target; `weights` the
    advantage of a sampled loss or the divergence of a full one.
    """

    loss: Tensor
    logprobs: Tensor
    entropies: Tensor
    teacher_logprobs: Tensor
    weights: Tensor


Advantage = Callable[[Tensor, Tensor], Tensor]  # (student_logprobs [B], teacher_logprobs [B]) -> advantage [B]
Divergence = Callable[[Tensor, Tensor], Tensor]  # (student_logprobs [B, V], teacher_logprobs [B, V]) -> value [B]


def sampled_loss(
    hidden: Tensor,
    head: LMHead,
    target_ids: Tensor,
    teacher_logprobs: Tensor,
    advantage: Advantage,
    denominator: float,
) -> LossTerms:
    """`-(1/denominator) * sum_t advantage_t * log q(target_t)`, the advantage detached.

    Args:
        hidden: [N, H] student hidden states that predict the targets.
        head: the student's head.
        target_ids: [N] sampled tokens.
        teacher_logprobs: [N] log p of the targets.
        advantage: of the two log-probabilities of each token.
        denominator: loss tokens of the whole optimizer step, over micro-batches and ranks.
    """

    def sweep(backward: _HeadBackward) -> LossTerms:
        head, targets = backward.head, backward.head.canonical(target_ids)
        logprobs, entropies, weights = hidden.new_empty((3, len(hidden)), dtype=_wide(hidden.dtype))
        tiles = _Tiles(hidden, head)
        for tile in tiles:
            products = tiles.products(tile)
            for block, rows in _blocks(tile, head):
                shaped = _logits(products[block], head)
                normaliser, gradient = _softmax(shaped.logits)
                chosen = shaped.logits.gather(1, targets[rows, None])[:, 0]
                logprobs[rows] = chosen - normaliser
                entropies[rows] = normaliser - torch.einsum("bv,bv->b", gradient, shaped.logits)
                weights[rows] = advantage(logprobs[rows], teacher_logprobs[rows])
                gradient.scatter_add_(1, targets[rows, None], -torch.ones_like(chosen)[:, None])
                products[block] = _through_logits(gradient, shaped, head)
            backward.add(tile, products, weights[tile] / denominator)
        loss = -(weights.double() * logprobs.double()).sum() / denominator
        return LossTerms(loss.to(weights.dtype), logprobs, entropies, teacher_logprobs, weights)

    return LossTerms(*_FusedLoss.apply(hidden, head.weight, head.bias, head, sweep))


def full_loss(
    hidden: Tensor,
    head: LMHead,
    target_ids: Tensor,
    teacher_hidden: Tensor,
    teacher_head: LMHead,
    divergence: Divergence,
    denominator: float,
) -> LossTerms:
    """`(1/denominator) * sum_t divergence(q_t, p_t)`, exact over the vocabulary.

    Args:
        hidden, head, target_ids, denominator: as in `sampled_loss`; the targets are only scored.
        teacher_hidden: [N, H of the teacher].
        teacher_head: with the same `vocab_size` and `end_ids` as `head`.
        divergence: of two log-softmaxes; differentiated with respect to the student, a block at a time.

    Raises:
        ValueError: the heads do not share `vocab_size` and `end_ids`.
    """
    if (head.vocab_size, head.end_ids) != (teacher_head.vocab_size, teacher_head.end_ids):
        raise ValueError(
            f"student and teacher heads must share vocab_size and end_ids, not {head.vocab_size}, {head.end_ids} "
            f"and {teacher_head.vocab_size}, {teacher_head.end_ids}"
        )
    teacher_head = replace(teacher_head, weight=teacher_head.weight.to(teacher_hidden.dtype))

    def sweep(backward: _HeadBackward) -> LossTerms:
        head, targets = backward.head, backward.head.canonical(target_ids)
        outputs = hidden.new_empty((4, len(hidden)), dtype=_wide(hidden.dtype))
        logprobs, entropies, teacher_logprobs, values = outputs
        tiles, teacher_tiles = _Tiles(hidden, head), _Tiles(teacher_hidden, teacher_head)
        for tile in tiles:
            products, teacher_products = tiles.products(tile), teacher_tiles.products(tile)
            for block, rows in _blocks(tile, head):
                teacher = torch.log_softmax(_logits(teacher_products[block], teacher_head).logits, dim=1)
                shaped = _logits(products[block], head)
                with torch.enable_grad():
                    student = torch.log_softmax(shaped.logits.requires_grad_(), dim=1)
                    value = divergence(student, teacher)
                    (gradient,) = torch.autograd.grad(value.sum(), shaped.logits)
                student = student.detach()
                logprobs[rows] = student.gather(1, targets[rows, None])[:, 0]
                entropies[rows] = -torch.einsum("bv,bv->b", student.exp(), student)
                teacher_logprobs[rows] = teacher.gather(1, targets[rows, None])[:, 0]
                values[rows] = value.detach()
                shaped.logits.requires_grad_(False)
                products[block] = _through_logits(gradient, shaped, head)
            backward.add(tile, products, torch.full_like(values[tile], 1 / denominator))
        loss = values.double().sum() / denominator
        return LossTerms(loss.to(outputs.dtype), logprobs, entropies, teacher_logprobs, values)

    return LossTerms(*_FusedLoss.apply(hidden, head.weight, head.bias, head, sweep))


class _HeadBackward:
    """Sums the gradients with respect to hidden states, head weight and bias while the tiles go by."""

    def __init__(self, hidden: Tensor, head: LMHead, *, for_weight: bool, for_bias: bool) -> None:
        self._hidden = hidden
        self.head = replace(head, weight=head.weight.detach().to(hidden.dtype))
        self._for_hidden = torch.zeros_like(hidden)
        self._for_weight = torch.zeros_like(head.weight) if for_weight else None
        self._for_bias = torch.zeros_like(head.bias) if for_bias and head.bias is not None else None

    @property
    def gradients(self) -> tuple[Tensor | None, ...]:
        return self._for_hidden, self._for_weight, self._for_bias

    def add(self, rows: slice, gradient: Tensor, scale: Tensor) -> None:
        """Add `scale` [C] times `gradient` [C, vocab_size], that with respect to `products + bias` of the tile."""
        size, scale = self.head.vocab_size, scale[:, None]
        self._for_hidden[rows] = torch.mm(gradient, self.head.weight[:size]) * scale.to(gradient.dtype)
        if self._for_weight is not None:
            scaled_hidden = (self._hidden[rows] * scale).to(gradient.dtype)
            if self._for_weight.dtype == gradient.dtype:
                self._for_weight[:size].addmm_(gradient.T, scaled_hidden)
            else:
                self._for_weight[:size] += torch.mm(gradient.T, scaled_hidden)
        if self._for_bias is not None:
            self._for_bias[:size] += torch.mv(gradient.T, scale[:, 0].to(gradient.dtype))


class _FusedLoss(torch.autograd.Function):
    """Runs a sweep over the tiles in forward, where it also takes the gradients; backward only scales them."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, head, sweep):  # type: ignore[no-untyped-def]
        _, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        backward = _HeadBackward(hidden.detach(), head, for_weight=needs_weight, for_bias=needs_bias)
        terms = sweep(backward)
        ctx.gradients = backward.gradients
        ctx.mark_non_differentiable(*terms[1:])
        return tuple(terms)

    @staticmethod
    def backward(ctx, grad_loss, *_):  # type: ignore[no-untyped-def]
        if ctx.gradients is None:
            raise RuntimeError("a fused loss can be differentiated once: its gradients were handed over")
        gradients, ctx.gradients = ctx.gradients, None
        scaled = (None if gradient is None else gradient.mul_(grad_loss) for gradient in gradients)
        return *scaled, None, None

"""The one place where a loss meets the vocabulary: a sweep over tiles of logits that takes the gradient as it goes.

The gradient with respect to the hidden states and the head is taken from the tile of logits that gave the loss, so the
backward pass recomputes nothing and no tensor of [tokens, vocabulary] exists at any moment. What is elementwise happens
on blocks of a tile, and the gradient overwrites the logits; see `lm_head`.

Shapes: N tokens, H hidden size, V rows of the head, C rows of a tile, B rows of a block.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from poweropd.objectives.lm_head import (
    Block,
    Distribution,
    LMHead,
    LogProbs,
    Tiles,
    blocks,
    likeliest,
    logits_of,
    softmax_of,
    through_logits,
    wide,
)
from poweropd.objectives.positions import Positions, TokenInputs


class TokenScores(NamedTuple):
    """Per scored token, fp32: its log-probability [N], the entropy [N] of the distribution it came from, in nats, and
    the k likeliest tokens there [N, k], descending, with their log-probabilities, and the likeliest of all [N]."""

    logprobs: Tensor
    entropies: Tensor
    top_ids: Tensor
    top_logprobs: Tensor
    top1_ids: Tensor


@torch.no_grad()
def token_scores(hidden: Tensor, head: LMHead, target_ids: Tensor, *, k: int = 0) -> TokenScores:
    """Log-probability of each target, entropy and likeliest tokens of its distribution: full softmax at temperature 1.

    Args:
        hidden: [N, H], the last hidden state that predicts each target.
        target_ids: [N].
        k: how many of the likeliest tokens to give.
    """
    head = replace(head, weight=head.weight.to(hidden.dtype))
    targets = head.canonical(target_ids)
    k = min(k, head.vocab_size)
    logprobs, entropies = hidden.new_empty((2, len(hidden)), dtype=wide(hidden.dtype))
    top_logprobs = logprobs.new_empty((len(hidden), k))
    top_ids, top1_ids = target_ids.new_empty((len(hidden), k)), target_ids.new_empty(len(hidden))
    tiles = Tiles(hidden, head)
    for tile in tiles:
        products = tiles.products(tile)
        for block, rows in blocks(tile, head):
            logits = logits_of(products[block], head).logits
            normaliser, probabilities = softmax_of(logits)
            logprobs[rows] = logits.gather(1, targets[rows, None])[:, 0] - normaliser
            entropies[rows] = normaliser - torch.einsum("bv,bv->b", probabilities, logits)
            if k:
                top = logits.topk(k, dim=1)
                top_ids[rows] = top.indices
                top_logprobs[rows] = top.values - normaliser[:, None]
            top1_ids[rows] = likeliest(logits)
    return TokenScores(logprobs, entropies, top_ids, top_logprobs, top1_ids)


@torch.no_grad()
def distribution_scores(distribution: Distribution, target_ids: Tensor, *, k: int = 0) -> TokenScores:
    """The same of a `Distribution`: the entropies and likeliest tokens of a mixture are not those of its models."""
    hidden, head = distribution.hidden[0], distribution.heads[0]
    targets = head.canonical(target_ids)
    k = min(k, head.vocab_size)
    logprobs, entropies = hidden.new_empty((2, len(hidden)), dtype=wide(hidden.dtype))
    top_logprobs, top_ids = logprobs.new_empty((len(targets), k)), targets.new_empty((len(targets), k))
    top1_ids = torch.empty_like(targets)
    reader = LogProbs(distribution)
    for tile in reader:
        reader.enter(tile)
        for block, rows in blocks(tile, head):
            every = reader.of(block).clamp_(max=0)  # a mixture of certainties rounds to just above
            logprobs[rows] = every.gather(1, targets[rows, None])[:, 0]
            entropies[rows] = -torch.einsum("bv,bv->b", every.exp(), every)
            top_logprobs[rows], top_ids[rows] = every.topk(k, dim=1)
            top1_ids[rows] = likeliest(every)
    return TokenScores(logprobs, entropies, top_ids, top_logprobs, top1_ids)


class Loss(Protocol):
    """What a sweep asks of a loss. Per position it is `-advantage * log q(target) + exact`, the advantage detached."""

    @property
    def has_score(self) -> bool:
        """Whether there is an advantage."""
        ...

    @property
    def has_exact(self) -> bool:
        """Whether there is an exact part, which makes `Positions.student` carry its graph."""
        ...

    @property
    def looks_at_student(self) -> bool:
        """Whether the advantage looks at `Positions.student`."""
        ...

    def advantage(self, at: Positions, rows: slice) -> Tensor:
        """[B], of the positions `rows` among all tokens."""
        ...

    def exact(self, at: Positions, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """[B] each: what is differentiated; and for the record the objective's part and the reference KL in it."""
        ...


class LossTerms(NamedTuple):
    """Result of a fused loss: `loss`, a scalar with a gradient, and detached per-token tensors [N].

    `logprobs` and `entropies` are the student's, `teacher_logprobs` the teacher's of the same target (NaN if unknown);
    `advantages` and `divergences` the two parts of the loss; `reference_kl` exact, or log q - log reference of the target.
    `teacher_entropies` and `top1_agreement`, 1 where the teacher's likeliest token is one of the student's likeliest and
    else 0, are NaN where the teacher does not tell.
    """

    loss: Tensor
    logprobs: Tensor
    entropies: Tensor
    teacher_logprobs: Tensor
    advantages: Tensor
    divergences: Tensor
    reference_kl: Tensor
    teacher_entropies: Tensor
    top1_agreement: Tensor


def fused_loss(hidden: Tensor, head: LMHead, inputs: TokenInputs, loss: Loss, denominator: float) -> LossTerms:
    """The sum of a loss over N tokens, divided by `denominator`.

    Args:
        hidden: [N, H] student hidden states that predict the targets, with their graph.
        head: the student's head.
        inputs: what else is known of the tokens.
        denominator: loss tokens of the whole optimizer step, over micro-batches and ranks.

    Raises:
        ValueError: another model's head does not speak of the same tokens.
    """

    def sweep(backward: "_HeadBackward") -> LossTerms:
        return _sweep(hidden.detach(), backward.head, inputs, loss, denominator, backward.add)

    return LossTerms(*_FusedLoss.apply(hidden, head.weight, head.bias, head, sweep))


@torch.no_grad()
def loss_terms(hidden: Tensor, head: LMHead, inputs: TokenInputs, loss: Loss) -> LossTerms:
    """The same without a gradient; the loss is the sum."""
    head = replace(head, weight=head.weight.detach().to(hidden.dtype))
    return _sweep(hidden, head, inputs, loss, 1.0, None)


Add = Callable[[slice, Tensor, Tensor], None]  # (rows of a tile, gradient [C, V] of the products, scale [C])


def _sweep(
    hidden: Tensor, head: LMHead, inputs: TokenInputs, loss: Loss, denominator: float, add: Add | None
) -> LossTerms:
    inputs = inputs.canonical(head)
    columns = hidden.new_full((8, len(hidden)), torch.nan, dtype=wide(hidden.dtype))
    logprobs, entropies, teacher_logprobs, advantages, divergences, reference_kl, teacher_entropies, agreement = columns
    if inputs.teacher_entropies is not None:
        teacher_entropies.copy_(inputs.teacher_entropies)
    values = torch.zeros_like(logprobs)
    others = {name: getattr(inputs, name) for name in ("teacher", "reference")}
    for distribution in others.values():
        if distribution is not None:
            distribution.check_fits(head)
    readers = {name: LogProbs(distribution) for name, distribution in others.items() if distribution is not None}
    part = _exact_part if loss.has_exact else _score_part
    tiles = Tiles(hidden, head)
    for tile in tiles:
        products = tiles.products(tile)
        for reader in readers.values():
            reader.enter(tile)
        for block, rows in blocks(tile, head):
            whole = {name: reader.of(block) for name, reader in readers.items()}
            shaped = logits_of(products[block], head)
            known = inputs.rows(rows)
            if "teacher" in whole:
                known["teacher_logprobs"] = whole["teacher"].gather(1, known["target_ids"][:, None])[:, 0]
                known["top1_ids"] = likeliest(whole["teacher"])
                teacher_entropies[rows] = -whole["teacher"].exp().mul_(whole["teacher"]).sum(1)
            if "top1_ids" in known:
                of_theirs = shaped.logits.gather(1, known["top1_ids"][:, None])[:, 0]
                agreement[rows] = (of_theirs == shaped.logits.amax(dim=1)).to(agreement.dtype)
            found = part(shaped, loss, known | whole, rows)
            at, logprobs[rows], entropies[rows] = found.at, found.at.logprobs, found.entropies
            advantages[rows], values[rows], divergences[rows] = found.advantages, found.values, found.divergences
            if at.teacher_logprobs is not None:
                teacher_logprobs[rows] = at.teacher_logprobs
            reference_kl[rows] = (
                found.reference_kl if at.reference_logprobs is None else at.logprobs - at.reference_logprobs
            )
            if add is not None:
                products[block] = through_logits(found.gradient, shaped, head)
        if add is not None:
            scale = torch.ones_like(advantages[tile]) if loss.has_exact else advantages[tile]
            add(tile, products, scale / denominator)
    total = (values.double() - advantages.double() * logprobs.double()).sum() / denominator
    return LossTerms(total.to(columns.dtype), *columns)


class _Part(NamedTuple):
    """What a block gives: [B] each, and the gradient [B, V] with respect to its logits.

    Where nothing is exact, the gradient is that of -log q(target), which the advantage is still to scale.
    """

    at: Positions
    entropies: Tensor
    advantages: Tensor
    values: Tensor
    divergences: Tensor
    reference_kl: Tensor
    gradient: Tensor


def _score_part(shaped: Block, loss: Loss, known: dict[str, Tensor], rows: slice) -> _Part:
    targets = known["target_ids"][:, None]
    normaliser, gradient = softmax_of(shaped.logits)
    chosen = shaped.logits.gather(1, targets)[:, 0]
    entropies = normaliser - torch.einsum("bv,bv->b", gradient, shaped.logits)
    student = shaped.logits - normaliser[:, None] if loss.looks_at_student else None
    at = Positions(logprobs=chosen - normaliser, student=student, **known)
    advantages = loss.advantage(at, rows)
    gradient.scatter_add_(1, targets, -torch.ones_like(chosen)[:, None])
    nothing = torch.zeros_like(chosen)
    return _Part(at, entropies, advantages, nothing, nothing, nothing, gradient)


def _exact_part(shaped: Block, loss: Loss, known: dict[str, Tensor], rows: slice) -> _Part:
    targets = known["target_ids"][:, None]
    with torch.enable_grad():
        student = torch.log_softmax(shaped.logits.requires_grad_(), dim=1)
        at = Positions(logprobs=student.detach().gather(1, targets)[:, 0], student=student, **known)
        value, divergences, reference_kl = loss.exact(at, rows)
        (gradient,) = torch.autograd.grad(value.sum(), shaped.logits)
    shaped.logits.requires_grad_(False)
    student = student.detach()
    probabilities = student.exp()
    advantages = torch.zeros_like(at.logprobs)
    if loss.has_score:
        advantages = loss.advantage(replace(at, student=student), rows)
        gradient += advantages[:, None] * probabilities
        gradient.scatter_add_(1, targets, -advantages[:, None])
    entropies = -torch.einsum("bv,bv->b", probabilities, student)
    return _Part(at, entropies, advantages, value.detach(), divergences.detach(), reference_kl.detach(), gradient)


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

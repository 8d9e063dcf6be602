"""The one place where a loss meets the vocabulary: a sweep over tiles of logits that takes the gradient as it goes.

The gradient with respect to the hidden states and the head is taken from the tile of logits that gave the loss, so the
backward pass recomputes nothing and no tensor of [tokens, vocabulary] exists at any moment. What is elementwise happens
on blocks of a tile, and the gradient overwrites the logits; see `lm_head`.

Shapes: N tokens, H hidden size, V rows of the head, C rows of a tile, B rows of a block.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from poweropd.objectives.lm_head import Distribution, LMHead, LogProbs, blocks, likeliest, wide
from poweropd.objectives.positions import TokenInputs
from poweropd.objectives.softmax import score_rows
from poweropd.objectives.sweeps import Loss, LossTerms, sweep


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
    if k:
        return distribution_scores(Distribution((hidden,), (head,)), target_ids, k=k)
    read = score_rows(hidden, head, head.canonical(target_ids)[:, None])
    none = (len(hidden), 0)
    nothing = target_ids.new_empty(none), read.entropies.new_empty(none)
    return TokenScores(read.logprobs[:, 0], read.entropies, *nothing, read.top1_ids)


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
            top1_ids[rows] = likeliest(every)
            top_logprobs[rows], top_ids[rows] = every.topk(k, dim=1)
            entropies[rows] = -every.exp().mul_(every).sum(1)
    return TokenScores(logprobs, entropies, top_ids, top_logprobs, top1_ids)


def fused_loss(
    hidden: Tensor, head: LMHead, inputs: TokenInputs, loss: Loss, denominator: float, *, in_place: bool = False
) -> LossTerms:
    """The sum of a loss over N tokens, divided by `denominator`.

    Args:
        hidden: [N, H] student hidden states that predict the targets, with their graph.
        head: the student's head.
        inputs: what else is known of the tokens.
        denominator: loss tokens of the whole optimizer step, over micro-batches and ranks.
        in_place: add the head's gradient to `head.weight.grad` and `head.bias.grad` at once, before any backward pass and
            as if the loss were differentiated by itself; a gradient of its own would be another tensor of that size.

    Raises:
        ValueError: another model's head does not speak of the same tokens.
    """
    return LossTerms(*_FusedLoss.apply(hidden, head.weight, head.bias, head, inputs, loss, denominator, in_place))


@torch.no_grad()
def loss_terms(hidden: Tensor, head: LMHead, inputs: TokenInputs, loss: Loss) -> LossTerms:
    """The same without a gradient; the loss is the sum."""
    head = replace(head, weight=head.weight.detach().to(hidden.dtype))
    return sweep(hidden, head, inputs, loss, 1.0, None)


class _HeadBackward:
    """Sums the gradients with respect to hidden states, head weight and bias while the tiles go by.

    Args:
        for_weight, for_bias: what theirs are added to; None where they have none.
    """

    def __init__(self, hidden: Tensor, head: LMHead, for_weight: Tensor | None, for_bias: Tensor | None) -> None:
        self.hidden, self.head = hidden, head
        self.for_hidden = torch.empty_like(hidden)
        self.for_weight, self.for_bias = for_weight, for_bias

    def add(self, rows: slice, gradient: Tensor, scale: Tensor) -> None:
        """Take `scale` [C] times `gradient` [C, vocab_size], that with respect to `products + bias` of the tile."""
        size, scale = self.head.vocab_size, scale[:, None]
        torch.mm(gradient, self.head.weight[:size], out=self.for_hidden[rows])
        self.for_hidden[rows] *= scale
        if self.for_weight is not None:
            scaled_hidden = (self.hidden[rows] * scale).to(gradient.dtype)
            if self.for_weight.dtype == gradient.dtype:
                self.for_weight[:size].addmm_(gradient.T, scaled_hidden)
            else:
                self.for_weight[:size] += torch.mm(gradient.T, scaled_hidden)
        if self.for_bias is not None:
            self.for_bias[:size] += torch.mv(gradient.T, scale[:, 0].to(gradient.dtype))


class _FusedLoss(torch.autograd.Function):
    """Runs a sweep over the tiles in forward, where it also takes the gradients; backward only scales them."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, head, inputs, loss, denominator, in_place):  # type: ignore[no-untyped-def]
        _, needs_weight, needs_bias, *_ = ctx.needs_input_grad

        def target(parameter: Tensor) -> Tensor:
            if not in_place:
                return torch.zeros_like(parameter)
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            return parameter.grad

        backward = _HeadBackward(
            hidden.detach(),
            replace(head, weight=weight.detach().to(hidden.dtype)),
            target(head.weight) if needs_weight else None,
            target(head.bias) if needs_bias else None,
        )
        terms = sweep(backward.hidden, backward.head, inputs, loss, denominator, backward.add)
        ctx.gradients = backward.for_hidden, *((None, None) if in_place else (backward.for_weight, backward.for_bias))
        ctx.mark_non_differentiable(*terms[1:])
        return tuple(terms)

    @staticmethod
    def backward(ctx, grad_loss, *_):  # type: ignore[no-untyped-def]
        if ctx.gradients is None:
            raise RuntimeError("a fused loss can be differentiated once: its gradients were handed over")
        gradients, ctx.gradients = ctx.gradients, None
        scaled = (None if gradient is None else gradient.mul_(grad_loss) for gradient in gradients)
        return *scaled, None, None, None, None, None

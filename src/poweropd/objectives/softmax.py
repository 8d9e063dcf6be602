"""What is asked of a row of logits as a whole: log-probabilities of some tokens, entropy, likeliest token, and a gradient.

The rows are products of hidden states and head, [B, V]; the gradient takes their place, so nothing of their size is made.
On a GPU the elementwise work is two kernels (`kernels`), elsewhere torch on blocks of rows that fit a cache.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from poweropd.objectives.lm_head import LMHead, blocks, likeliest, shape_logits, slope_of, wide


class RowStatistics(NamedTuple):
    """Of the softmax of each row, end tokens not merged, [B] each: log-normaliser, entropy in nats, the largest logit and
    the first place where it is."""

    normalisers: Tensor
    entropies: Tensor
    largest: Tensor
    top1_ids: Tensor


class RowScores(NamedTuple):
    """Of each row, end tokens merged: log-probabilities [B, m] of the tokens asked for, the entropy [B], the largest
    log-probability [B] and the first token [B] that has it."""

    logprobs: Tensor
    entropies: Tensor
    largest: Tensor
    top1_ids: Tensor


@torch.no_grad()
def read_rows(products: Tensor, head: LMHead, ids: Tensor, *, gradient: bool = False) -> RowScores:
    """Scores of rows [B, V]; `products` is used up.

    Args:
        ids: [B, m], merged end tokens under the first of them.
        gradient: leave in `products` the gradient of `-log q(ids[:, 0])` with respect to `products + bias`.
    """
    chosen, ends = _logits_at(products, head, ids), None
    if len(head.end_ids) > 1:
        ends = _logits_at(products, head, _end_ids(products, head).expand(len(products), -1))
        merged = ends.logsumexp(dim=1)
        is_end = ids == head.end_ids[0]
        chosen = torch.where(is_end, merged[:, None], chosen)
    normalisers, entropies, largest, top1_ids = softmax_rows(products, head, gradient=gradient)
    logprobs = chosen - normalisers[:, None]
    if gradient:
        at_target = torch.expm1(logprobs[:, 0]) * slope_of(chosen[:, 0], head)
        if ends is not None:
            # Each end token has its own softmax probability, less its share of a target that is any of them.
            shares = torch.softmax(ends, dim=1) * is_end[:, :1]
            at_ends = ((ends - normalisers[:, None]).exp() - shares) * slope_of(ends, head)
            products[:, list(head.end_ids)] = at_ends.to(products.dtype)
            at_target = torch.where(is_end[:, 0], at_ends[:, 0], at_target)
        products.scatter_(1, ids[:, :1], at_target[:, None].to(products.dtype))
    if ends is not None:
        apart, together = ends - normalisers[:, None], merged - normalisers
        entropies = entropies + (apart.exp() * apart).sum(1) - together.exp() * together
        wins = torch.isin(top1_ids, _end_ids(products, head)) | (merged > largest)
        largest, top1_ids = torch.where(wins, merged, largest), torch.where(wins, head.end_ids[0], top1_ids)
    return RowScores(logprobs, entropies, largest - normalisers, top1_ids)


def softmax_rows(products: Tensor, head: LMHead, *, gradient: bool) -> RowStatistics:
    """Statistics of rows [B, V] as they stand, end tokens not merged; `products` is used up.

    Args:
        gradient: leave in `products` the gradient of the log-normaliser with respect to `products + bias`: the softmax
            times the slope of the logits.
    """
    dtype = wide(products.dtype)
    normalisers, expected, largest = products.new_empty((3, len(products)), dtype=dtype)
    top1_ids = products.new_empty(len(products), dtype=torch.long)
    scratch = products.new_empty(0, dtype=dtype)
    for block, rows in blocks(slice(0, len(products)), head):
        logits = shape_logits(products[block].to(dtype), head)
        probabilities = torch.softmax(logits, dim=1, out=scratch.resize_(logits.shape))
        top1_ids[rows] = likeliest(logits)
        place = top1_ids[rows, None]
        largest[rows] = logits.gather(1, place)[:, 0]
        # The largest probability is exp(largest - normaliser) >= 1/V: no further exponential is needed.
        normalisers[rows] = largest[rows] - probabilities.gather(1, place)[:, 0].log()
        slope = slope_of(logits, head) if gradient else 1.0
        expected[rows] = logits.mul_(probabilities).sum(1)
        if gradient:
            products[block] = probabilities.mul_(slope) if isinstance(slope, Tensor) or slope != 1.0 else probabilities
    return RowStatistics(normalisers, normalisers - expected, largest, top1_ids)


def _logits_at(products: Tensor, head: LMHead, ids: Tensor) -> Tensor:
    """Logits [B, m] of some tokens, as they stand."""
    picked = products.gather(1, ids).to(wide(products.dtype))
    if head.bias is not None:
        picked = picked + head.bias[ids]
    return shape_logits(picked, replace(head, bias=None))


def _end_ids(products: Tensor, head: LMHead) -> Tensor:
    return torch.tensor(head.end_ids, device=products.device)

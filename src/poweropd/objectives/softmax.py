"""What is asked of a row of logits as a whole: log-probabilities of some tokens, entropy, likeliest token, and a gradient.

The rows are products of hidden states and head, [B, V]; the gradient takes their place, so nothing of their size is made.
On a GPU the elementwise work is two kernels (`kernels`), elsewhere torch on blocks of rows that fit a cache.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from poweropd.objectives import kernels
from poweropd.objectives.lm_head import LMHead, Panels, blocks, likeliest, shape_logits, slope_of, wide


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
    asked = _ask(products, head, ids)
    statistics = softmax_rows(products, head, gradient=gradient)
    if gradient:
        _subtract_target(products, head, asked, statistics.normalisers)
    return _answer(head, asked, statistics)


@torch.no_grad()
def score_rows(hidden: Tensor, head: LMHead, ids: Tensor) -> RowScores:
    """The same from hidden states [N, H], with no row of logits at once."""
    panels, ends = Panels(hidden, head), head.ends_on(hidden.device).expand(len(hidden), -1)
    wanted = torch.cat((ids, ends), dim=1)
    picked = hidden.new_full(wanted.shape, torch.nan)  # what is no token stays so
    # One scratch for all panels: one each would leave holes in the heap.
    scratch = hidden.new_empty(0, dtype=wide(hidden.dtype)) if panels.fit_cache else None
    found = []
    for rows in panels.rows:
        parts = []
        for first, part, products in panels.of(rows):
            places = wanted[rows] - first
            inside = (places >= 0) & (places < part.vocab_size)
            here = products.gather(1, places.clamp(0, part.vocab_size - 1))
            picked[rows] = torch.where(inside, here, picked[rows])
            statistics = softmax_rows(products, part, gradient=False, scratch=scratch)
            parts.append(statistics._replace(top1_ids=statistics.top1_ids + first))
        found.append(_merge(parts))
    statistics = kernels.RowStatistics(*(torch.cat(columns) for columns in zip(*found, strict=True)))
    asked = _asked(picked[:, : ids.shape[1]], picked[:, ids.shape[1] :], head, ids)
    return _answer(head, asked, statistics)


def _merge(parts: list[kernels.RowStatistics]) -> kernels.RowStatistics:
    """Statistics of rows from those of their panels."""
    if len(parts) == 1:
        return parts[0]
    every = kernels.RowStatistics(*(torch.stack(columns) for columns in zip(*parts, strict=True)))
    normalisers = every.normalisers.logsumexp(0)
    surprises = normalisers - every.normalisers
    entropies = ((-surprises).exp() * (every.entropies + surprises)).sum(0)
    largest, best = every.largest.max(0)
    return kernels.RowStatistics(normalisers, entropies, largest, every.top1_ids.gather(0, best[None])[0])


class ReverseKLScores(NamedTuple):
    """Of each row, end tokens merged: KL(q || p) [B], the scores of both, and whether the teacher's likeliest token is one
    of the student's likeliest, [B] of bool."""

    values: Tensor
    student: RowScores
    teacher: RowScores
    agree: Tensor


@torch.no_grad()
def read_reverse_kl(
    products: Tensor, head: LMHead, teacher_products: Tensor, teacher_head: LMHead, ids: Tensor, *, gradient: bool
) -> ReverseKLScores:
    """Reverse KL of rows [B, V] of both models, by its kernel (`has_kernels`); both products are used up.

    Args:
        ids: as in `read_rows`.
        gradient: leave in `products` the gradient of the values with respect to `products + bias`.
    """
    asked, asked_of_teacher = _ask(products, head, ids), _ask(teacher_products, teacher_head, ids)
    found = kernels.reverse_kl_rows(
        products,
        teacher_products,
        student_map=_map(head),
        teacher_map=_map(teacher_head),
        end_ids=head.ends_on(products.device) if len(head.end_ids) > 1 else None,
        gradient=gradient,
    )
    student, teacher = _answer(head, asked, found.student), _answer(teacher_head, asked_of_teacher, found.teacher)
    theirs = found.student_at_teachers_top1
    if asked.merged is not None:
        theirs = torch.where(teacher.top1_ids == head.end_ids[0], asked.merged, theirs)
    agree = theirs - found.student.normalisers == student.largest
    return ReverseKLScores(found.values, student, teacher, agree)


def has_kernels(rows: Tensor) -> bool:
    """Whether there are kernels for products of this kind."""
    return rows.dtype in kernels.DTYPES and kernels.available(rows.device)


class _Asked(NamedTuple):
    """Logits at the ids asked for [B, m], end tokens merged; and of the end tokens apart [B, E] and merged [B]."""

    ids: Tensor
    chosen: Tensor
    ends: Tensor | None
    merged: Tensor | None


def _ask(products: Tensor, head: LMHead, ids: Tensor) -> _Asked:
    ends = head.ends_on(products.device).expand(len(products), -1)
    return _asked(products.gather(1, ids), products.gather(1, ends), head, ids)


def _asked(at_ids: Tensor, at_ends: Tensor, head: LMHead, ids: Tensor) -> _Asked:
    """From the products [B, m] of the ids asked for and [B, E] of the end tokens."""
    chosen = _logits_at(at_ids, head, ids)
    if len(head.end_ids) < 2:
        return _Asked(ids, chosen, None, None)
    ends = _logits_at(at_ends, head, head.ends_on(ids.device))
    merged = ends.logsumexp(dim=1)
    return _Asked(ids, torch.where(ids == head.end_ids[0], merged[:, None], chosen), ends, merged)


def _answer(head: LMHead, asked: _Asked, statistics: kernels.RowStatistics) -> RowScores:
    normalisers, entropies, largest, top1_ids = statistics
    if asked.ends is not None and asked.merged is not None:
        apart, together = asked.ends - normalisers[:, None], asked.merged - normalisers
        entropies = entropies + (apart.exp() * apart).sum(1) - together.exp() * together
        wins = torch.isin(top1_ids, head.ends_on(top1_ids.device)) | (asked.merged > largest)
        largest, top1_ids = torch.where(wins, asked.merged, largest), torch.where(wins, head.end_ids[0], top1_ids)
    return RowScores(asked.chosen - normalisers[:, None], entropies, largest - normalisers, top1_ids)


def _subtract_target(gradient: Tensor, head: LMHead, asked: _Asked, normalisers: Tensor) -> None:
    """From the gradient of the log-normaliser that of the target's logit; in its place, and without cancellation."""
    target, chosen = asked.ids[:, 0], asked.chosen[:, 0]
    at_target = torch.expm1(chosen - normalisers) * slope_of(chosen, head)
    if asked.ends is not None:
        # Each end token has its own softmax probability, less its share of a target that is any of them.
        is_end = target == head.end_ids[0]
        shares = torch.softmax(asked.ends, dim=1) * is_end[:, None]
        at_ends = ((asked.ends - normalisers[:, None]).exp() - shares) * slope_of(asked.ends, head)
        gradient[:, head.ends_on(gradient.device)] = at_ends.to(gradient.dtype)
        at_target = torch.where(is_end, at_ends[:, 0], at_target)
    gradient.scatter_(1, target[:, None], at_target[:, None].to(gradient.dtype))


def softmax_rows(
    products: Tensor, head: LMHead, *, gradient: bool, scratch: Tensor | None = None
) -> kernels.RowStatistics:
    """Statistics of rows [B, V] as they stand, end tokens not merged; `products` is used up.

    Args:
        scratch: of the dtype of the statistics, resized as needed; with it, all rows are one block.
        gradient: leave in `products` the gradient of the log-normaliser with respect to `products + bias`: the softmax
            times the slope of the logits.
    """
    if has_kernels(products):
        return kernels.softmax_rows(products, **_map(head)._asdict(), gradient=gradient)
    dtype = wide(products.dtype)
    normalisers, expected, largest = products.new_empty((3, len(products)), dtype=dtype)
    top1_ids = products.new_empty(len(products), dtype=torch.long)
    every = slice(0, len(products))
    pieces = blocks(every, head) if scratch is None else [(every, every)]
    scratch = products.new_empty(0, dtype=dtype) if scratch is None else scratch
    for block, rows in pieces:
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
    return kernels.RowStatistics(normalisers, normalisers - expected, largest, top1_ids)


def _map(head: LMHead) -> kernels.LogitMap:
    bias = None if head.bias is None else head.bias[: head.vocab_size]
    return kernels.LogitMap(bias, head.scale, head.softcap)


def _logits_at(products: Tensor, head: LMHead, ids: Tensor) -> Tensor:
    """Logits [B, m] of some tokens, as they stand, from their products [B, m]."""
    picked = products.to(wide(products.dtype), copy=True)
    if head.bias is not None:
        picked = picked + head.bias[ids]
    return shape_logits(picked, replace(head, bias=None))

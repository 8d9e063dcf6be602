"""The sweep of a loss over the tiles of logits, which takes the gradient of each tile as it goes.

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
    through_logits,
    wide,
)
from poweropd.objectives.positions import Positions, TokenInputs
from poweropd.objectives.softmax import has_kernels, read_reverse_kl, read_rows


class Exact(NamedTuple):
    """What a loss differentiates at some positions, [B]; and for the record the objective's part and the reference KL in it.

    `slope` [B, V] is the derivative with respect to log q, up to a multiple of q, where the loss knows it; where it is None,
    `values` have a graph.
    """

    values: Tensor
    divergences: Tensor
    reference_kl: Tensor
    slope: Tensor | None = None


class Loss(Protocol):
    """What a sweep asks of a loss. Per position it is `-advantage * log q(target) + exact`, the advantage detached."""

    @property
    def has_score(self) -> bool:
        """Whether there is an advantage."""
        ...

    @property
    def has_exact(self) -> bool:
        """Whether there is an exact part."""
        ...

    @property
    def knows_slope(self) -> bool:
        """Whether the exact part comes with its slope; else `Positions.student` carries its graph."""
        ...

    @property
    def is_reverse_kl(self) -> bool:
        """Whether it is the exact KL(q || p) and nothing else."""
        ...

    @property
    def looks_at_student(self) -> bool:
        """Whether the advantage looks at `Positions.student`."""
        ...

    def advantage(self, at: Positions, rows: slice) -> Tensor:
        """[B], of the positions `rows` among all tokens."""
        ...

    def exact(self, at: Positions, rows: slice) -> Exact: ...


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


Add = Callable[[slice, Tensor, Tensor], None]
"""Takes the rows of a tile, the gradient [C, V] of its products, and by what each row of it is still to be scaled [C]."""


class _Found(NamedTuple):
    """What a sweep writes down of each token, [N] each, and `values`, what an exact part adds to the loss."""

    logprobs: Tensor
    entropies: Tensor
    teacher_logprobs: Tensor
    advantages: Tensor
    divergences: Tensor
    reference_kl: Tensor
    teacher_entropies: Tensor
    top1_agreement: Tensor
    values: Tensor


def sweep(
    hidden: Tensor, head: LMHead, inputs: TokenInputs, loss: Loss, denominator: float, add: Add | None
) -> LossTerms:
    """The sum of a loss over N tokens, divided by `denominator`; `add` takes its gradient, tile by tile."""
    inputs = inputs.canonical(head)
    columns = hidden.new_full((9, len(hidden)), torch.nan, dtype=wide(hidden.dtype))
    found = _Found(*columns)
    for column in (found.advantages, found.divergences, found.reference_kl, found.values):
        column.zero_()
    if inputs.teacher_entropies is not None:
        found.teacher_entropies.copy_(inputs.teacher_entropies)
    if loss.is_reverse_kl and inputs.teacher is not None and len(inputs.teacher.heads) == 1 and has_kernels(hidden):
        _sweep_reverse_kl(hidden, head, inputs, inputs.teacher, denominator, add, found)
    elif loss.has_exact or loss.looks_at_student or inputs.teacher is not None or inputs.reference is not None:
        _sweep_distributions(hidden, head, inputs, loss, denominator, add, found)
    else:
        _sweep_targets(hidden, head, inputs, loss, denominator, add, found)
    total = (found.values.double() - found.advantages.double() * found.logprobs.double()).sum() / denominator
    return LossTerms(total.to(columns.dtype), *found[:-1])


def _sweep_targets(
    hidden: Tensor, head: LMHead, inputs: TokenInputs, loss: Loss, denominator: float, add: Add | None, found: _Found
) -> None:
    """Where nothing but the targets' log-probabilities is looked at: the advantage scales the gradient of `-log q`."""
    tiles = Tiles(hidden, head)
    ids = [inputs.target_ids] if inputs.top1_ids is None else [inputs.target_ids, head.canonical(inputs.top1_ids)]
    asked = torch.stack(ids, dim=1)
    for tile in tiles:
        products = tiles.products(tile)
        read = read_rows(products, head, asked[tile], gradient=add is not None)
        at = Positions(logprobs=read.logprobs[:, 0], **inputs.rows(tile))
        advantages = loss.advantage(at, tile)
        found.logprobs[tile], found.entropies[tile], found.advantages[tile] = at.logprobs, read.entropies, advantages
        if inputs.top1_ids is not None:
            found.top1_agreement[tile] = (read.logprobs[:, 1] == read.largest).to(found.top1_agreement.dtype)
        _note(found, at, tile)
        if add is not None:
            add(tile, products, advantages / denominator)


def _sweep_reverse_kl(
    hidden: Tensor,
    head: LMHead,
    inputs: TokenInputs,
    teacher: Distribution,
    denominator: float,
    add: Add | None,
    found: _Found,
) -> None:
    """The commonest exact objective, where a kernel gives a whole tile's values and gradients."""
    teacher.check_fits(head)
    tiles, reader = Tiles(hidden, head), LogProbs(teacher)
    for tile in tiles:
        products, (teacher_products,) = tiles.products(tile), reader.enter(tile)
        targets = inputs.target_ids[tile, None]
        read = read_reverse_kl(products, head, teacher_products, teacher.heads[0], targets, gradient=add is not None)
        found.values[tile] = found.divergences[tile] = read.values
        found.logprobs[tile], found.teacher_logprobs[tile] = read.student.logprobs[:, 0], read.teacher.logprobs[:, 0]
        found.entropies[tile], found.teacher_entropies[tile] = read.student.entropies, read.teacher.entropies
        found.top1_agreement[tile] = read.agree.to(found.top1_agreement.dtype)
        if add is not None:
            add(tile, products, torch.full_like(read.values, 1 / denominator))


def _sweep_distributions(
    hidden: Tensor, head: LMHead, inputs: TokenInputs, loss: Loss, denominator: float, add: Add | None, found: _Found
) -> None:
    """Where whole distributions are looked at."""
    readers: dict[str, LogProbs] = {}
    for name, distribution in (("teacher", inputs.teacher), ("reference", inputs.reference)):
        if distribution is not None:
            distribution.check_fits(head)
            readers[name] = LogProbs(distribution)
    tiles = Tiles(hidden, head)
    for tile in tiles:
        products = tiles.products(tile)
        for reader in readers.values():
            reader.enter(tile)
        for block, rows in blocks(tile, head):
            whole = {name: reader.of(block) for name, reader in readers.items()}
            known = inputs.rows(rows)
            if "teacher" in whole:
                known["teacher_logprobs"] = whole["teacher"].gather(1, known["target_ids"][:, None])[:, 0]
                known["top1_ids"] = likeliest(whole["teacher"])
                found.teacher_entropies[rows] = -whole["teacher"].exp().mul_(whole["teacher"]).sum(1)
            shaped = logits_of(products[block], head)
            if "top1_ids" in known:
                of_theirs = shaped.logits.gather(1, known["top1_ids"][:, None])[:, 0]
                agrees = of_theirs == shaped.logits.amax(dim=1)
                found.top1_agreement[rows] = agrees.to(found.top1_agreement.dtype)
            gradient = _block(shaped, loss, known | whole, rows, found)
            if add is not None:
                products[block] = through_logits(gradient, shaped, head)
        if add is not None:
            add(tile, products, hidden.new_full((tile.stop - tile.start,), 1 / denominator, dtype=wide(hidden.dtype)))


def _block(shaped: Block, loss: Loss, known: dict[str, Tensor], rows: slice, found: _Found) -> Tensor:
    """The gradient [B, V] with respect to the logits of a block; the rest goes into `found`."""
    targets = known["target_ids"][:, None]
    student = torch.log_softmax(shaped.logits, dim=1)
    at = Positions(logprobs=student.gather(1, targets)[:, 0], student=student, **known)
    probabilities = student.exp()
    if loss.has_exact:
        exact, gradient = _exact(at, student, probabilities, loss, rows)
        found.values[rows], found.divergences[rows], found.reference_kl[rows] = exact[:3]
    else:
        gradient = torch.zeros_like(student)
    if loss.has_score:
        found.advantages[rows] = advantages = loss.advantage(at, rows)
        gradient.addcmul_(advantages[:, None], probabilities)
        gradient.scatter_add_(1, targets, -advantages[:, None])
    found.logprobs[rows] = at.logprobs
    found.entropies[rows] = -probabilities.mul_(student).sum(1)
    _note(found, at, rows)
    return gradient


def _exact(at: Positions, student: Tensor, probabilities: Tensor, loss: Loss, rows: slice) -> tuple[Exact, Tensor]:
    """The exact part, and its gradient [B, V] with respect to the logits: `g - q sum(g)`, g that with respect to log q."""
    if loss.knows_slope:
        exact = loss.exact(at, rows)
        slope = exact.slope
        assert slope is not None
    else:
        with torch.enable_grad():
            leaf = student.detach().requires_grad_()
            exact = loss.exact(replace(at, student=leaf), rows)
            (slope,) = torch.autograd.grad(exact.values.sum(), leaf)
        exact = Exact(*(part.detach() for part in exact[:3]))
    return exact, torch.addcmul(slope, probabilities, slope.sum(1, keepdim=True), value=-1)


def _note(found: _Found, at: Positions, rows: slice) -> None:
    if at.teacher_logprobs is not None:
        found.teacher_logprobs[rows] = at.teacher_logprobs
    if at.reference_logprobs is not None:
        found.reference_kl[rows] = at.logprobs - at.reference_logprobs

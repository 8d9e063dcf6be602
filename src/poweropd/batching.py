"""Scored rollouts to tensors. The alignment rule of `types` is enforced here and nowhere else."""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain, repeat
from typing import Literal

import torch
from torch import Tensor

from poweropd.objectives.lm_head import Distribution
from poweropd.objectives.positions import TokenInputs
from poweropd.types import Rollout, ScoredRollout, TokenBatch

PADDING = 1.03  # padded rows of one forward pass may take this many times their tokens,
ENOUGH = 1024  # unless they would be fewer than so many: matrix products like many rows


def group_by_tokens(rollouts: Sequence[Rollout], tokens: int, *, packed: bool) -> list[list[int]]:
    """Indices of rollouts in groups of similar length and of nearly equal size, each within `tokens`.

    A rollout longer than `tokens` gets a group of its own.

    Args:
        packed: whether size is counted in tokens; else in tokens and padding, of which there is to be little.
    """
    lengths = [_fed(rollout) for rollout in rollouts]
    order = sorted(range(len(rollouts)), key=lambda index: -lengths[index])

    def fits(size: int, padded: int, limit: int) -> bool:
        return size <= limit if packed else padded <= min(limit, max(PADDING * size, ENOUGH))

    def fill(limit: int) -> list[list[int]]:
        groups: list[list[int]] = []
        size = longest = 0
        for index in order:
            size += lengths[index]
            if groups and fits(size, longest * (len(groups[-1]) + 1), limit):
                groups[-1].append(index)
            else:
                groups.append([index])
                size = longest = lengths[index]
        return groups

    fewest = len(fill(tokens))
    least = bisect_left(range(tokens), -fewest, lo=1, key=lambda limit: -len(fill(limit)))
    return fill(least)  # the lowest limit under which they are as few


def collate(
    scored: Sequence[ScoredRollout],
    *,
    masked_end_ids: Sequence[int] = (),
    masked_ids: Sequence[int] = (),
    version: int | None = None,
) -> TokenBatch:
    """Tensors of some scored rollouts; see `TokenBatch` for the layout.

    Args:
        scored: with scores of one kind, and whole distributions of the same models.
        masked_end_ids: a response's last token is not trained on if it is one of these.
        masked_ids: tokens that are never trained on.
        version: optimizer steps that the student has taken; rollouts of its older versions are off-policy. None: none are.
    """
    rollouts = [item.rollout for item in scored]
    lengths = tuple(map(_fed, rollouts))
    response_lengths = _ids(map(len, rollouts))

    # Of all response tokens, rollout by rollout. The last one is predicted by the last token that is fed.
    target_ids = _ids(chain.from_iterable(rollout.response_ids for rollout in rollouts))
    rows = torch.arange(len(rollouts)).repeat_interleave(response_lengths)
    left = response_lengths.cumsum(0)[rows] - torch.arange(1, 1 + len(rows))  # that come after it in its response
    positions = _ids(lengths).cumsum(0)[rows] - 1 - left
    stopped = torch.tensor([rollout.finish_reason == "stop" for rollout in rollouts], dtype=torch.bool)
    masked = _among(target_ids, masked_ids) | (_among(target_ids, masked_end_ids) & (left == 0))
    kept = (~masked).nonzero()[:, 0] if masked.any() else slice(None)

    def trained(values: Tensor) -> Tensor:
        """Those of loss tokens, `[N, ...]`, among those of all response tokens."""
        return values[kept if isinstance(kept, slice) else kept.to(values.device)]

    def together(parts: Iterable[Tensor | None]) -> Tensor | None:
        """[N, ...] from one `[response, ...]` tensor a rollout; None where one is missing."""
        there = [part for part in parts if part is not None]
        return trained(torch.cat(there)) if there and len(there) == len(rollouts) else None

    def distribution(parts: Iterable[Distribution | None]) -> Distribution | None:
        there = [part for part in parts if part is not None]
        if not there or len(there) < len(rollouts):
            return None
        members = [together(hidden) for hidden in zip(*(part.hidden for part in there), strict=True)]
        return replace(there[0], hidden=tuple(member for member in members if member is not None))

    def sampler(rollout: Rollout) -> Literal["student", "other", "nobody"]:
        """Who drew it: the student as it is now, anyone else, or nobody."""
        if rollout.source == "golden":
            return "nobody"
        is_current = version is None or rollout.policy_version >= version
        return "student" if rollout.source == "student" and is_current else "other"

    def logprobs(drawn_by: str) -> Tensor:
        """[N] under the distribution sampled from, where that was `drawn_by`; else NaN."""
        told = (r.rollout_logprobs if own == drawn_by else repeat(torch.nan, len(r)) for r, own in drawn)
        return trained(torch.tensor([*chain.from_iterable(told)], dtype=torch.float32))

    drawn = [(rollout, sampler(rollout)) for rollout in rollouts]
    on_policy = all(own != "other" for _, own in drawn)
    scores, references = [item.scores for item in scored], [item.reference for item in scored]
    return TokenBatch(
        input_ids=_ids(chain.from_iterable((*r.prompt.prompt_ids, *r.response_ids[:-1]) for r in rollouts)),
        lengths=lengths,
        loss_positions=trained(positions),
        inputs=TokenInputs(
            target_ids=trained(target_ids),
            teacher_logprobs=together(score.logprobs for score in scores),
            teacher_entropies=together(score.entropies for score in scores),
            top_ids=together(score.top_ids for score in scores),
            top_logprobs=together(score.top_logprobs for score in scores),
            top1_ids=together(score.top1_ids for score in scores),
            rollout_logprobs=None if on_policy else logprobs("other"),
            reference_logprobs=together(reference.logprobs for reference in references),
            teacher=distribution(score.distribution for score in scores),
            reference=distribution(reference.distribution for reference in references),
        ),
        rows=trained(rows),
        places=trained(response_lengths[rows] - 1 - left),
        ends=trained((left == 0) & stopped[rows]),
        own_logprobs=logprobs("student"),
    )


def _fed(rollout: Rollout) -> int:
    """Tokens of it that are fed to a model: its last one predicts nothing."""
    return len(rollout.prompt.prompt_ids) + len(rollout) - 1


def _ids(values: Iterable[int]) -> Tensor:
    return torch.tensor([*values], dtype=torch.long)


def _among(target_ids: Tensor, ids: Sequence[int]) -> Tensor:
    return torch.isin(target_ids, _ids(ids))

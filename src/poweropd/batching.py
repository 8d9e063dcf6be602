"""Scored rollouts to tensors. The alignment rule of `types` is enforced here and nowhere else."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from poweropd.objectives.lm_head import Distribution
from poweropd.objectives.positions import TokenInputs
from poweropd.types import Rollout, ScoredRollout, TokenBatch


def group_by_tokens(rollouts: Sequence[Rollout], tokens: int) -> list[list[int]]:
    """Indices of rollouts in groups of similar length, whose padded size stays within `tokens`.

    A rollout longer than `tokens` gets a group of its own.
    """
    lengths = [len(rollout.prompt.prompt_ids) + len(rollout) for rollout in rollouts]
    groups: list[list[int]] = []
    for index in sorted(range(len(rollouts)), key=lambda index: -lengths[index]):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def collate(
    scored: Sequence[ScoredRollout],
    *,
    pad_id: int,
    masked_end_ids: Sequence[int] = (),
    masked_ids: Sequence[int] = (),
) -> TokenBatch:
    """Tensors of some scored rollouts; see `TokenBatch` for the layout.

    Args:
        scored: with scores of one kind, and whole distributions of the same models.
        pad_id: fills the right of shorter rows; masked out everywhere.
        masked_end_ids: a response's last token is not trained on if it is one of these.
        masked_ids: tokens that are never trained on.
    """
    rollouts = [item.rollout for item in scored]
    ids = [torch.tensor(rollout.prompt.prompt_ids + rollout.response_ids) for rollout in rollouts]
    trained = [_trained(rollout, masked_end_ids, masked_ids) for rollout in rollouts]
    input_ids = _pad([row[:-1] for row in ids], pad_id)
    target_ids = _pad([row[1:] for row in ids], pad_id)
    attention_mask, response_mask, loss_mask = torch.zeros((3, *input_ids.shape), dtype=torch.long)
    for index, (rollout, kept) in enumerate(zip(rollouts, trained, strict=True)):
        start, stop = _response_span(rollout)
        attention_mask[index, :stop] = 1
        response_mask[index, start:stop] = 1
        loss_mask[index, start:stop] = kept.long()
    rows = torch.arange(len(scored)).repeat_interleave(loss_mask.sum(1))
    places = torch.cat([kept.nonzero()[:, 0] for kept in trained])
    final = torch.tensor([len(r) - 1 if r.finish_reason == "stop" else -1 for r in rollouts])
    ends = places == final[rows]

    def of_loss_tokens(values: Sequence[Tensor | None]) -> Tensor | None:
        """[N, ...] from one `[response, ...]` tensor a rollout; None where one is missing."""
        there = [value for value in values if value is not None]
        if len(there) < len(scored):
            return None
        return torch.cat([value[kept.to(value.device)] for value, kept in zip(there, trained, strict=True)])

    def whole(distributions: Sequence[Distribution | None]) -> Distribution | None:
        there = [distribution for distribution in distributions if distribution is not None]
        if len(there) < len(scored):
            return None
        members = [of_loss_tokens(hidden) for hidden in zip(*(item.hidden for item in there), strict=True)]
        return replace(there[0], hidden=tuple(member for member in members if member is not None))

    own = of_loss_tokens([_logprobs(rollout, where=rollout.source == "student") for rollout in rollouts])
    assert own is not None
    scores, references = [item.scores for item in scored], [item.reference for item in scored]
    inputs = TokenInputs(
        target_ids=target_ids[loss_mask.bool()],
        teacher_logprobs=of_loss_tokens([score.logprobs for score in scores]),
        teacher_entropies=of_loss_tokens([score.entropies for score in scores]),
        top_ids=of_loss_tokens([score.top_ids for score in scores]),
        top_logprobs=of_loss_tokens([score.top_logprobs for score in scores]),
        top1_ids=of_loss_tokens([score.top1_ids for score in scores]),
        rollout_logprobs=of_loss_tokens(
            [_logprobs(rollout, where=rollout.source not in ("student", "golden")) for rollout in rollouts]
        ),
        reference_logprobs=of_loss_tokens([reference.logprobs for reference in references]),
        teacher=whole([score.distribution for score in scores]),
        reference=whole([reference.distribution for reference in references]),
    )
    return TokenBatch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        target_ids=target_ids,
        response_mask=response_mask,
        loss_mask=loss_mask,
        inputs=inputs,
        rows=rows,
        places=places,
        ends=ends,
        own_logprobs=own.masked_fill(ends, torch.nan),
    )


def _trained(rollout: Rollout, masked_end_ids: Sequence[int], masked_ids: Sequence[int]) -> Tensor:
    """[response] of bool."""
    kept = torch.tensor([token not in masked_ids for token in rollout.response_ids])
    kept[-1] &= rollout.response_ids[-1] not in masked_end_ids
    return kept


def _logprobs(rollout: Rollout, *, where: bool) -> Tensor:
    """[response] under the distribution sampled from, or NaN."""
    return torch.tensor(rollout.rollout_logprobs if where else (torch.nan,) * len(rollout))


def _response_span(rollout: Rollout) -> tuple[int, int]:
    """Where the targets of a row are its response: the last prompt token predicts the first response token."""
    start = len(rollout.prompt.prompt_ids) - 1
    return start, start + len(rollout)


def _pad(rows: Sequence[Tensor], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)

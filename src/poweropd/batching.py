"""Scored rollouts to tensors. The alignment rule of `types` is enforced here and nowhere else."""

from collections.abc import Sequence

import torch
from torch import Tensor

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


def collate(scored: Sequence[ScoredRollout], *, pad_id: int, masked_end_ids: Sequence[int] = ()) -> TokenBatch:
    """Tensors of some scored rollouts; see `TokenBatch` for the layout.

    Args:
        pad_id: fills the right of shorter rows; masked out everywhere.
        masked_end_ids: a response's last token is not trained on if it is one of these.
    """
    rows = [item.rollout for item in scored]
    ids = [torch.tensor(row.prompt.prompt_ids + row.response_ids) for row in rows]
    input_ids = _pad([row[:-1] for row in ids], pad_id)
    batch, width = input_ids.shape
    attention_mask, response_mask = torch.zeros((2, batch, width), dtype=torch.long)
    loss_mask = torch.zeros((batch, width), dtype=torch.long)
    for index, row in enumerate(rows):
        start, stop = _response_span(row)
        attention_mask[index, :stop] = 1
        response_mask[index, start:stop] = 1
        trained_stop = stop - 1 if row.response_ids[-1] in masked_end_ids else stop
        loss_mask[index, start:trained_stop] = 1

    def per_token(values: Sequence[Tensor | None]) -> Tensor | None:
        """`[B, T]` from one `[response]` tensor a row, placed on the response."""
        if any(value is None for value in values):
            return None
        placed = torch.zeros((batch, width), dtype=torch.float32)
        for index, (row, value) in enumerate(zip(rows, values, strict=True)):
            assert value is not None
            placed[index, slice(*_response_span(row))] = value
        return placed

    rollout_logprobs = per_token([torch.tensor(row.rollout_logprobs) for row in rows])
    assert rollout_logprobs is not None
    hidden = [
        item.scores.hidden[: int(loss_mask[index].sum())]
        for index, item in enumerate(scored)
        if item.scores.hidden is not None
    ]
    return TokenBatch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        target_ids=_pad([row[1:] for row in ids], pad_id),
        response_mask=response_mask,
        loss_mask=loss_mask,
        rollout_logprobs=rollout_logprobs,
        teacher_logprobs=per_token([item.scores.logprobs for item in scored]),
        teacher_entropies=per_token([item.scores.entropies for item in scored]),
        teacher_hidden=torch.cat(hidden) if len(hidden) == len(rows) else None,
    )


def _response_span(rollout: Rollout) -> tuple[int, int]:
    """Where the targets of a row are its response: the last prompt token predicts the first response token."""
    start = len(rollout.prompt.prompt_ids) - 1
    return start, start + len(rollout)


def _pad(rows: Sequence[Tensor], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)

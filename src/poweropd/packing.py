"""Rows of different lengths laid end to end, so that a model computes nothing for padding.

Linear layers and norms see one row of all tokens, whose positions start again with each row. Attention alone needs to know
the rows: it pads those of similar length to the longest of them. Right-padded causal rows need no mask, which leaves
torch's fastest kernels free to run.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

ATTENTION = "poweropd"  # our name among the attention implementations of transformers
PADDED_ATTENTION = AttentionInterface()["sdpa"]
SPARE = 1.25  # a group of rows is padded to this many times its tokens at most
TOLERANCE, HALF_TOLERANCE = 1e-3, 5e-2  # relative; a row that sees another is off by far more, rounding by less
WITHOUT_EFFECT = {"position_ids", "use_cache", "output_attentions"}  # told to every attention, used by none
UNFIT = (TypeError, ValueError, RuntimeError, LookupError, AttributeError)  # what a model may answer to packed rows


@dataclass(frozen=True)
class RowGroup:
    """Neighbouring rows of a pack that are padded together.

    Attributes:
        tokens: where they lie in the pack.
        rows, longest: their number, and the length of the longest.
        slots: [tokens], where each token goes among the `rows * longest` places of the padded rows.
    """

    tokens: slice
    rows: int
    longest: int
    slots: Tensor

    def pad(self, packed: Tensor) -> Tensor:
        """`[pack, ...] -> [rows, longest, ...]`, right-padded with zeros."""
        padded = packed.new_zeros((self.rows * self.longest, *packed.shape[1:]))
        return padded.index_copy_(0, self.slots, packed[self.tokens]).unflatten(0, (self.rows, self.longest))

    def unpad(self, padded: Tensor) -> Tensor:
        """`[rows, longest, ...] -> [tokens, ...]`."""
        return padded.flatten(0, 1).index_select(0, self.slots)


@dataclass(frozen=True)
class Packing:
    """How rows lie in a pack.

    Attributes:
        positions: [pack], the place of each token in its row.
        groups: of rows to be padded together, in order; any order of rows is right, and sorted ones waste least.
    """

    positions: Tensor
    groups: tuple[RowGroup, ...]

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device, *, spare: float = SPARE) -> "Packing":
        """
        Args:
            lengths: of the rows, in order.
            spare: see `SPARE`; infinite: all rows are padded together.
        """
        positions = torch.cat([torch.arange(0), *map(torch.arange, lengths)])
        groups, start = [], 0
        for rows in _similar(lengths, spare):
            longest, tokens = max(rows), slice(start, start := start + sum(rows))
            row = torch.arange(len(rows)).repeat_interleave(torch.tensor(rows))
            groups.append(RowGroup(tokens, len(rows), longest, (row * longest + positions[tokens]).to(device)))
        return cls(positions.to(device), tuple(groups))


def _similar(lengths: Sequence[int], spare: float) -> Iterator[list[int]]:
    """`lengths` cut where padding would grow too much."""
    group: list[int] = []
    tokens = longest = 0
    for length in lengths:
        tokens, longest = tokens + length, max(longest, length)
        if group and (len(group) + 1) * longest > spare * tokens:
            yield group
            group, tokens, longest = [], length, length
        group.append(length)
    if group:
        yield group


def packed_hidden_states(model: PreTrainedModel, input_ids: Tensor, lengths: Sequence[int]) -> Tensor:
    """Last hidden states [S, H] of the rows [S] of a pack, from a model that `takes_packs`."""
    return run_packed(model, input_ids, Packing.of(lengths, input_ids.device))


def run_packed(model: PreTrainedModel, input_ids: Tensor, packing: Packing) -> Tensor:
    """The same, of rows whose packing is known."""
    found = model.base_model(
        input_ids=input_ids[None],
        position_ids=packing.positions[None],
        attention_mask=input_ids.new_empty((1, 1, 0, 0)),  # of four dimensions: passed on as it is, none is built
        packing=packing,
        use_cache=False,
    )
    return found.last_hidden_state[0]


def padded_hidden_states(model: PreTrainedModel, input_ids: Tensor, lengths: Sequence[int]) -> Tensor:
    """The same from any model, by rows that are padded to the longest."""
    (rows,) = Packing.of(lengths, input_ids.device, spare=torch.inf).groups
    attention_mask = rows.pad(torch.ones_like(input_ids))
    found = model.base_model(input_ids=rows.pad(input_ids), attention_mask=attention_mask, use_cache=False)
    return rows.unpad(found.last_hidden_state)


def takes_packs(model: PreTrainedModel) -> bool:
    """Whether `enable_packing` found that it can."""
    return model.config._attn_implementation == ATTENTION


def may_take_packs(model: PreTrainedModel) -> bool:
    """Whether its config says so, of attention that is causal and no more; `enable_packing` tries it."""
    layer_types = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    return model.config._attn_implementation == "sdpa" and not layer_types - {"full_attention"}


@torch.no_grad()
def enable_packing(model: PreTrainedModel) -> bool:
    """Let a model take packed rows, if it then gives what each row alone gives; else leave it as it was.

    Models whose attention is more than causal, such as one with sliding windows, soft-capping or sinks, or that pass on
    from token to token by other ways than attention, are left alone. Everything else the model does, such as decoding
    with a cache, stays as it was.
    """
    if takes_packs(model):
        return True
    if not may_take_packs(model):
        return False
    lengths = (7, 4, 1)
    ids = torch.arange(1, 1 + sum(lengths), device=model.device) % model.config.get_text_config().vocab_size
    alone = [model.base_model(input_ids=row[None], use_cache=False).last_hidden_state[0] for row in ids.split(lengths)]
    model.set_attn_implementation(ATTENTION)
    try:
        together = packed_hidden_states(model, ids, lengths).split(lengths)
    except UNFIT:
        fits = False
    else:
        tolerance = TOLERANCE if model.dtype.itemsize >= 4 else HALF_TOLERANCE
        pairs = zip(together, alone, strict=True)
        fits = takes_packs(model) and all((one - own).norm() <= tolerance * own.norm() for one, own in pairs)
    if not fits:
        model.set_attn_implementation("sdpa")
    return fits


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packing: Packing | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """torch's attention, of padded rows as everywhere, or of the rows of a pack: [1, heads, S, d] -> [1, S, heads, d].

    Raises:
        ValueError: of a pack, more is asked for than causal attention.
    """
    if packing is None:
        return PADDED_ATTENTION(module, query, key, value, attention_mask, **settings)
    asked = {name: value for name, value in settings.items() if value is not None and name not in WITHOUT_EFFECT}
    scale, dropout = asked.pop("scaling", None), asked.pop("dropout", 0.0)
    is_causal = asked.pop("is_causal", getattr(module, "is_causal", True))
    if not is_causal or any(value is not False for value in asked.values()):
        raise ValueError(f"packed attention is causal and no more; asked for: {', '.join(asked) or 'not causal'}")
    if torch.is_autocast_enabled(query.device.type):  # or the padded rows would be cast once more
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    heads_a_key = query.shape[1] // key.shape[1]
    if query.is_cuda and query.dtype == torch.float32:  # for which the lean kernel knows no shared keys
        key, value = key.repeat_interleave(heads_a_key, dim=1), value.repeat_interleave(heads_a_key, dim=1)
        heads_a_key = 1

    def attend(rows: RowGroup) -> Tensor:
        q, k, v = (rows.pad(states[0].transpose(0, 1)).transpose(1, 2) for states in (query, key, value))
        shares_keys = heads_a_key > 1
        attended = scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, dropout_p=dropout, enable_gqa=shares_keys
        )
        return rows.unpad(attended.transpose(1, 2))

    return torch.cat([attend(rows) for rows in packing.groups])[None], None


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, AttentionMaskInterface()["sdpa"])

"""Running a causal language model token by token, over rows that come and go."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel

from poweropd.models import compute_precision
from poweropd.rollout.batch import Move
from poweropd.rollout.cache import KeyValueCache
from poweropd.rollout.llama import Llama, is_llama
from poweropd.rollout.replay import Replay

PREFILL_TOKENS = 2048  # padded tokens of prompts run at once
CHECKED = (7, 3, 1, 5)  # tokens of the prompts on which a lean decoding is compared with transformers
TOLERANCE = {torch.bfloat16: 5e-2, torch.float16: 1e-2}  # of the largest hidden state
TOLERANCE_OF_FULL = 1e-3
CACHED_WEIGHTS = 2**20  # of a matrix that a CPU need not read from memory each time
GPU_WIDTH = 256  # see `LeanDecoding._shape`


class Decoding(Protocol):
    """One model at work on some rows: each holds a prompt and what came after it.

    It lives as long as one call of an engine, and its weights are those at its beginning.
    """

    refills: bool
    """Whether rows can be added while others are at work; else only where there are none."""

    def admit(self, prompts: Sequence[Sequence[int]], which: Sequence[int]) -> Tensor:
        """Add rows behind those there are; hidden states [len(which), H] of their last tokens.

        Args:
            prompts: run once each, however many rows begin with it; best in the order of their lengths.
            which: the prompt of each row.
        """
        ...

    def step(self, ids: Tensor) -> Tensor:
        """Hidden states [rows, H] of one more token in every row, `ids` [rows]."""
        ...

    def keep(self, move: Move) -> None:
        """Let some rows go."""
        ...


def rows_of_product(rows: int, weights: int) -> int:
    """With how many rows a CPU multiplies `rows` rows fastest with a matrix [out, in] of so many weights.

    Of less than 16 rows it takes a few at a time, and reads the matrix from memory for each few again.
    """
    return 16 if 6 < rows < 16 and weights > CACHED_WEIGHTS else rows


class LeanDecoding:
    """Runs a `Llama` with a `KeyValueCache`, in inference mode: a step is many small operations, which then cost less.

    Args:
        model: see `is_llama`.
        precision: dtype of matmuls and of the cache.
        rows: most rows at work.
        tokens: most tokens of a row.
    """

    refills = True

    def __init__(self, model: PreTrainedModel, *, precision: torch.dtype, rows: int, tokens: int) -> None:
        self._llama = Llama(model, precision=precision, tokens=tokens)
        llama = self._llama
        rows = self._rows_of_step(rows)
        self._cache = KeyValueCache(
            layers=len(llama.layers),
            rows=rows,
            tokens=tokens,
            shape=(llama.key_heads, llama.head_size),
            dtype=llama.dtype,
            device=llama.device,
        )
        self._rows = 0
        self._replay = Replay()
        self._ids = torch.zeros(rows, dtype=torch.long, device=llama.device)
        self._lengths = torch.zeros(rows, dtype=torch.long, device=llama.device)  # tokens in each slot
        self._longest = 0  # of the rows at work

    @torch.inference_mode()
    def admit(self, prompts: Sequence[Sequence[int]], which: Sequence[int]) -> Tensor:
        device = self._llama.device
        self._reserve(max(map(len, prompts)))
        of_rows = torch.tensor(which, device=device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        hidden = []
        for group in _groups(prompts):
            rows = ((of_rows >= group.start) & (of_rows < group.stop)).nonzero()[:, 0]
            hidden.append(self._prefill(prompts[group], lengths[group], self._rows + rows, of_rows[rows] - group.start))
        self._lengths[self._rows : self._rows + len(which)] = lengths[of_rows]
        self._rows += len(which)
        self._longest = max(self._longest, *map(len, prompts))
        return torch.cat(hidden)[of_rows]

    def _prefill(self, prompts: Sequence[Sequence[int]], lengths: Tensor, rows: Tensor, which: Tensor) -> Tensor:
        """Hidden states [prompts, H] of the last tokens; keys and values of prompts `which` go to `rows`.

        Tokens stand one behind the other; only attention has them padded, behind the end of each prompt.
        """
        device = lengths.device
        count, width = len(prompts), max(map(len, prompts))
        ids = torch.tensor([token for prompt in prompts for token in prompt], device=device)
        places = (torch.arange(width, device=device) < lengths[:, None]).flatten().nonzero()[:, 0]

        def pad(heads: Tensor) -> Tensor:
            padded = heads.new_zeros(count * width, *heads.shape[1:])
            return padded.index_copy_(0, places, heads).unflatten(0, (count, width))

        def attend(layer: int, *heads: Tensor) -> Tensor:
            queries, keys, values = map(pad, heads)
            self._cache.keys[layer][rows, :width] = keys[which]
            self._cache.values[layer][rows, :width] = values[which]
            queries, keys, values = (each.transpose(1, 2) for each in (queries, keys, values))
            found = F.scaled_dot_product_attention(
                queries, keys, values, is_causal=True, scale=self._llama.scale, enable_gqa=True
            )
            return found.transpose(1, 2).flatten(0, 1)[places]

        hidden = self._llama(ids, places % width, attend)
        return self._llama.final(hidden[lengths.cumsum(0) - 1])

    @torch.inference_mode()
    def step(self, ids: Tensor) -> Tensor:
        self._longest += 1
        self._reserve(self._longest)
        self._ids[: self._rows] = ids
        shape = self._shape()
        hidden = (self._replay(self._decode, shape) if ids.is_cuda else self._decode(*shape))[: self._rows]
        self._lengths[: self._rows] += 1
        return hidden

    def _reserve(self, tokens: int) -> None:
        if self._cache.reserve(tokens):
            self._replay.forget()

    def _rows_of_step(self, rows: int) -> int:
        return rows if self._llama.copied else rows_of_product(rows, self._llama.matrix_size)

    def _shape(self) -> tuple[int, int]:
        """Rows and tokens that a step runs over. On a GPU they are rounded up, so that few shapes occur."""
        if self._ids.is_cuda:
            rows = min(1 << (self._rows - 1).bit_length(), len(self._ids))
            return rows, min(-(-self._longest // GPU_WIDTH) * GPU_WIDTH, self._cache.capacity)
        return self._rows_of_step(self._rows), self._longest

    def _decode(self, rows: int, width: int) -> Tensor:
        """Hidden states [rows, H] of `self._ids`, each put at the end of its slot; none is longer than `width` with it."""
        positions = self._lengths[:rows]
        places = torch.arange(rows, device=positions.device) * self._cache.capacity + positions
        unseen = torch.arange(width, device=positions.device) > positions[:, None]
        mask = torch.zeros(rows, 1, 1, width, dtype=self._llama.dtype, device=positions.device)
        mask.masked_fill_(unseen[:, None, None], -torch.inf)

        def attend(layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            self._cache.write(layer, places, keys, values)
            # The queries of one key head stand where those of several tokens would: nothing is repeated.
            found = F.scaled_dot_product_attention(
                queries.unflatten(1, (self._llama.key_heads, -1)),
                self._cache.keys[layer][:rows, :width].transpose(1, 2),
                self._cache.values[layer][:rows, :width].transpose(1, 2),
                attn_mask=mask,
                scale=self._llama.scale,
            )
            return found.flatten(1, 2)

        return self._llama.final(self._llama(self._ids[:rows], positions, attend))

    @torch.inference_mode()
    def keep(self, move: Move) -> None:
        self._cache.move(move.gaps, move.sources, self._longest)
        self._lengths[move.gaps] = self._lengths[move.sources]
        self._lengths[move.rows :] = 0
        self._rows = move.rows
        self._longest = int(self._lengths[: self._rows].max()) if self._rows else 0


def _groups(prompts: Sequence[Sequence[int]]) -> Iterator[slice]:
    """Prompts that are run together: neighbours, as many as fit padded."""
    start = 0
    for stop in range(1, len(prompts) + 1):
        group = prompts[start : stop + 1]
        if stop == len(prompts) or len(group) * max(map(len, group)) > PREFILL_TOKENS:
            yield slice(start, stop)
            start = stop


class ModuleDecoding:
    """Runs transformers' own modules, so any architecture. Rows are padded on their left to one length.

    Args:
        precision: dtype of matmuls.
        pad_id: fills the padding.
    """

    refills = False

    def __init__(self, model: PreTrainedModel, *, precision: torch.dtype, pad_id: int) -> None:
        self._model = model
        self._precision = precision
        self._pad_id = pad_id

    def admit(self, prompts: Sequence[Sequence[int]], which: Sequence[int]) -> Tensor:
        device = self._model.device
        rows = [torch.tensor(prompt) for prompt in prompts]
        ids = pad_sequence(rows, batch_first=True, padding_value=self._pad_id, padding_side="left").to(device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        width = ids.shape[1]
        self._cache = DynamicCache(config=self._model.config)
        self._mask = (torch.arange(width, device=device) >= width - lengths[:, None]).long()
        self._positions = (self._mask.cumsum(1) - 1).clamp(min=0)
        hidden = self._forward(ids)
        self._select(torch.tensor(which, device=device))
        return hidden[which]

    def step(self, ids: Tensor) -> Tensor:
        self._positions = self._positions[:, -1:] + 1
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(ids), 1)], dim=1)
        return self._forward(ids[:, None])

    def keep(self, move: Move) -> None:
        order = torch.arange(move.rows, device=move.gaps.device)
        order[move.gaps] = move.sources
        self._select(order)

    def _select(self, rows: Tensor) -> None:
        self._mask, self._positions = self._mask[rows], self._positions[rows]
        self._cache.batch_select_indices(rows)

    def _forward(self, ids: Tensor) -> Tensor:
        """[rows, H] of the last of each row's tokens."""
        with compute_precision(self._model.device, self._precision):
            return self._model.base_model(
                input_ids=ids,
                attention_mask=self._mask,
                position_ids=self._positions,
                past_key_values=self._cache,
                use_cache=True,
            ).last_hidden_state[:, -1]


class Decoder:
    """Starts decodings of a model, by the fastest code that is right for it.

    Args:
        precision: dtype of matmuls.
        pad_id: see `ModuleDecoding`.
    """

    def __init__(self, model: PreTrainedModel, *, precision: torch.dtype, pad_id: int) -> None:
        self._model = model
        self._precision = precision
        self._pad_id = pad_id

    @cached_property
    def is_lean(self) -> bool:
        """Whether `LeanDecoding` can stand for the model's own modules: it is tried once, when it is first needed."""
        return is_llama(self._model) and self._agrees()

    def start(self, *, rows: int, tokens: int) -> Decoding:
        """A decoding of at most `rows` rows of at most `tokens` tokens."""
        if self.is_lean:
            return LeanDecoding(self._model, precision=self._precision, rows=rows, tokens=tokens)
        return ModuleDecoding(self._model, precision=self._precision, pad_id=self._pad_id)

    @torch.no_grad()
    def _agrees(self) -> bool:
        """Whether `LeanDecoding` gives what transformers gives: prompts, two steps, a row that moves, another step."""
        dtypes = {parameter.dtype for parameter in self._model.parameters()}
        dtype, device = min(dtypes, key=lambda each: each.itemsize), self._model.device  # of matmuls, where they differ
        vocabulary = self._model.config.get_text_config().vocab_size
        prompts = [[(31 * place + 7 * row + 1) % vocabulary for place in range(n)] for row, n in enumerate(CHECKED)]
        which = [0, 1, 1, 2, 3]
        ids = (torch.arange(len(which), device=device) * 101 + 5) % vocabulary

        def run(decoding: Decoding) -> Tensor:
            hidden = [decoding.admit(prompts, which), decoding.step(ids), decoding.step(ids.flip(0))]
            decoding.keep(Move.without(torch.arange(len(which), device=device) == 1))
            return torch.cat([*hidden, decoding.step(ids[:4])]).float()

        lean = run(LeanDecoding(self._model, precision=dtype, rows=len(which), tokens=max(CHECKED) + 3))
        expected = run(ModuleDecoding(self._model, precision=dtype, pad_id=self._pad_id))
        tolerance = TOLERANCE.get(dtype, TOLERANCE_OF_FULL)
        return bool((lean - expected).abs().max() <= tolerance * expected.abs().max())

"""Rollouts by a transformers model in this process, batched, with a KV cache."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from poweropd.models import compute_precision, lm_head, weights_fingerprint
from poweropd.objectives.lm_head import head_logits
from poweropd.rollout.engine import Sampling
from poweropd.rollout.sampling import draw, mix, uniforms
from poweropd.types import FinishReason, Prompt, Rollout, Source

COMPACT_AT = 0.125  # finished rows leave the batch once they are this share of it


class _Request(NamedTuple):
    place: int  # in the order of the results
    prompt: Prompt
    sample: int


class HFEngine:
    """Samples from a transformers model, or token by token from a mixture of several.

    Model objects are shared with the trainer, so weights are never copied.

    Args:
        model: a causal language model.
        vocab_size: ids at or above it are padding and are never drawn, whatever number of rows a head has.
        pad_id: fills the left of shorter prompts.
        precision: dtype of matmuls.
        sequences_per_batch: sequences decoded together.
        source: whose rollouts these are.
        mixed_in: further models on the same device, decoded in lock step, and their shares m_i, positive and below 1 in
            sum. Each token is drawn from `(1 - sum m_i) * model + sum m_i * other_i`, formed at temperature 1 over the
            whole vocabulary; temperature and truncations then reshape the mixture, not its parts. End tokens are those
            of the models: none are merged here. MiniLLM, arXiv 2306.08543.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        vocab_size: int,
        pad_id: int,
        precision: torch.dtype = torch.float32,
        sequences_per_batch: int = 64,
        source: Source = "student",
        mixed_in: Sequence[tuple[PreTrainedModel, float]] = (),
    ) -> None:
        self._models = [model, *(other for other, _ in mixed_in)]
        self._shares = [share for _, share in mixed_in]
        self._vocab_size = vocab_size
        self._pad_id = pad_id
        self._precision = precision
        self._sequences_per_batch = sequences_per_batch
        self._source: Source = source
        self._version = 0

    def update_weights(self, *, version: int) -> None:
        self._version = version

    def fingerprint(self) -> str:
        parts = [*map(weights_fingerprint, self._models), self._shares, self._vocab_size, str(self._precision)]
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    @torch.no_grad()
    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, *, seed: int) -> list[Rollout]:
        pairs = [(prompt, sample) for prompt in prompts for sample in range(sampling.samples_per_prompt)]
        requests = [_Request(place, *pair) for place, pair in enumerate(pairs)]
        requests.sort(key=lambda request: len(request.prompt.prompt_ids))
        rollouts: dict[int, Rollout] = {}
        for start in range(0, len(requests), self._sequences_per_batch):
            rollouts |= self._decode(requests[start : start + self._sequences_per_batch], sampling, seed)
        return [rollouts[place] for place in range(len(requests))]

    def _decode(self, requests: list[_Request], sampling: Sampling, seed: int) -> dict[int, Rollout]:
        device = self._models[0].device
        noise = torch.stack(
            [uniforms(r.prompt, r.sample, seed=seed, count=sampling.max_new_tokens) for r in requests]
        ).to(device)
        stop_ids = torch.tensor(sampling.stop_ids, device=device)
        ids, attention_mask = self._left_pad([request.prompt.prompt_ids for request in requests], device)
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
        caches = [DynamicCache(config=model.config) for model in self._models]
        responses = torch.full((len(requests), sampling.max_new_tokens), self._pad_id, device=device)
        logprobs = torch.zeros(responses.shape, dtype=torch.float32, device=device)
        lengths = torch.full((len(requests),), sampling.max_new_tokens, device=device)
        stopped = torch.zeros(len(requests), dtype=torch.bool, device=device)
        rows = torch.arange(len(requests), device=device)  # request of each row still in the batch
        for step in range(sampling.max_new_tokens):
            logits = [
                self._next_logits(model, cache, ids, attention_mask, positions)
                for model, cache in zip(self._models, caches, strict=True)
            ]
            drawn, drawn_logprobs = draw(mix(logits, self._shares), noise[rows, step], sampling)
            alive = ~stopped[rows]
            responses[rows[alive], step] = drawn[alive]
            logprobs[rows[alive], step] = drawn_logprobs[alive]
            ended = alive & torch.isin(drawn, stop_ids)
            stopped[rows[ended]] = True
            lengths[rows[ended]] = step + 1
            alive &= ~ended
            num_alive = int(alive.sum())
            if num_alive == 0:
                break
            if num_alive <= (1 - COMPACT_AT) * len(rows):
                rows, drawn, positions, attention_mask = (t[alive] for t in (rows, drawn, positions, attention_mask))
                for cache in caches:
                    cache.batch_select_indices(alive.nonzero()[:, 0])
            ids = drawn[:, None]
            positions = positions[:, -1:] + 1
            attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(rows), 1)], dim=1)
        return self._collect(requests, responses, logprobs, lengths, stopped)

    def _next_logits(
        self, model: PreTrainedModel, cache: DynamicCache, ids: Tensor, attention_mask: Tensor, positions: Tensor
    ) -> Tensor:
        with compute_precision(model.device, self._precision):
            hidden = model.base_model(
                input_ids=ids,
                attention_mask=attention_mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state[:, -1]
        return head_logits(hidden, lm_head(model, vocab_size=self._vocab_size))

    def _left_pad(self, rows: list[tuple[int, ...]], device: torch.device) -> tuple[Tensor, Tensor]:
        width = max(map(len, rows))
        ids = [[self._pad_id] * (width - len(row)) + list(row) for row in rows]
        mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
        return torch.tensor(ids, device=device), torch.tensor(mask, device=device)

    def _collect(
        self, requests: list[_Request], responses: Tensor, logprobs: Tensor, lengths: Tensor, stopped: Tensor
    ) -> dict[int, Rollout]:
        rollouts = {}
        columns = zip(requests, responses.tolist(), logprobs.tolist(), lengths.tolist(), stopped.tolist(), strict=True)
        for request, ids, values, length, has_stopped in columns:
            reason: FinishReason = "stop" if has_stopped else "length"
            rollouts[request.place] = Rollout(
                request.prompt,
                tuple(ids[:length]),
                tuple(values[:length]),
                reason,
                request.sample,
                self._version,
                self._source,
            )
        return rollouts

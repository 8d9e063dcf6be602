"""Rollouts by transformers models in this process: rows that end leave, and others take their places."""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from poweropd.models import lm_head, weights_fingerprint
from poweropd.objectives.lm_head import LMHead, head_logits
from poweropd.rollout.batch import Answer, Batch, Request
from poweropd.rollout.decoding import Decoder, Decoding, rows_of_product
from poweropd.rollout.engine import Sampling
from poweropd.rollout.sampling import mix
from poweropd.types import FinishReason, Prompt, Rollout, Source

REFILL_AT = 0.25  # others take the places of finished rows once these are such a share of all


class HFEngine:
    """Samples from a transformers model, or token by token from a mixture of several.

    Model objects may be shared with the trainer; their weights are read anew in every call of `generate`.

    Args:
        model: a causal language model.
        vocab_size: ids at or above it are padding and are never drawn, whatever number of rows a head has.
        pad_id: fills the left of shorter prompts, where an architecture needs them at one length.
        precision: dtype of matmuls.
        sequences_per_batch: sequences decoded together.
        source: whose rollouts these are.
        mixed_in: further models on the same device, decoded in lock step, and their shares m_i, positive and below 1 in
            sum. Each token is drawn from `(1 - sum m_i) * model + sum m_i * other_i`, formed at temperature 1 over the
            whole vocabulary; temperature and truncations then reshape the mixture, not its parts. MiniLLM, arXiv
            2306.08543.
        end_ids: end tokens that count as one outcome, see `LMHead`: drawn as the first of them, with the probability of
            all.
        on_update: brings the models up to date, where they are not the trainer's; called with the version.
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
        end_ids: tuple[int, ...] = (),
        on_update: Callable[[int], None] | None = None,
    ) -> None:
        self._models = [model, *(other for other, _ in mixed_in)]
        self._shares = [share for _, share in mixed_in]
        self._decoders = [Decoder(each, precision=precision, pad_id=pad_id) for each in self._models]
        self._vocab_size = vocab_size
        self._precision = precision
        self._sequences_per_batch = sequences_per_batch
        self._source: Source = source
        self._end_ids = end_ids
        self._on_update = on_update
        self._version = 0

    def update_weights(self, *, version: int) -> None:
        if self._on_update is not None:
            self._on_update(version)
        self._version = version

    def fingerprint(self) -> str:
        settings = [self._shares, self._vocab_size, str(self._precision), self._end_ids]
        return hashlib.sha256(repr([*map(weights_fingerprint, self._models), *settings]).encode()).hexdigest()

    @torch.no_grad()
    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, *, seed: int) -> list[Rollout]:
        pairs = [(prompt, sample) for prompt in prompts for sample in range(sampling.samples_per_prompt)]
        waiting = [Request(place, *pair) for place, pair in enumerate(pairs)]
        if not waiting:
            return []
        waiting.sort(key=lambda request: -len(request.prompt.prompt_ids))
        rows = min(self._sequences_per_batch, len(waiting))
        tokens = len(waiting[0].prompt.prompt_ids) + sampling.max_new_tokens
        decodings = [decoder.start(rows=rows, tokens=tokens) for decoder in self._decoders]
        heads = [self._head(model) for model in self._models]
        batch = Batch(rows, sampling, seed, self._models[0].device)
        rollouts: dict[int, Rollout] = {}
        while waiting or len(batch):
            room = rows - len(batch)
            if room >= self._room_needed(rows, len(waiting), decodings):
                requests, waiting = waiting[:room], waiting[room:]
                batch.add(requests)
                hidden = _admit(decodings, requests)
            else:
                hidden = [decoding.step(batch.last_ids) for decoding in decodings]
            logits = [_logits(*each) for each in zip(hidden, heads, strict=True)]
            batch.draw(mix(logits, self._shares))
            answers, move = batch.take_ended()
            rollouts |= {answer.request.place: self._rollout(answer, sampling) for answer in answers}
            if move is not None:
                for decoding in decodings:
                    decoding.keep(move)
        return [rollouts[place] for place in range(len(pairs))]

    def _head(self, model: PreTrainedModel) -> LMHead:
        head = lm_head(model, vocab_size=self._vocab_size, end_ids=self._end_ids)
        return replace(head, weight=head.weight.to(self._precision))

    def _room_needed(self, rows: int, waiting: int, decodings: Sequence[Decoding]) -> float:
        """Free rows at which those that wait are let in."""
        if not waiting:
            return math.inf
        if not all(decoding.refills for decoding in decodings):
            return rows
        return min(REFILL_AT * rows, waiting)

    def _rollout(self, answer: Answer, sampling: Sampling) -> Rollout:
        reason: FinishReason = "stop" if answer.ids[-1] in sampling.stop_ids else "length"
        return Rollout(
            answer.request.prompt,
            tuple(answer.ids),
            tuple(answer.logprobs),
            reason,
            answer.request.sample,
            self._version,
            self._source,
        )


def _admit(decodings: Sequence[Decoding], requests: Sequence[Request]) -> list[Tensor]:
    """Hidden states of new rows by every model; samples of one prompt share its run."""
    prompts = list(dict.fromkeys(request.prompt.prompt_ids for request in requests))
    places = {prompt: place for place, prompt in enumerate(prompts)}
    which = [places[request.prompt.prompt_ids] for request in requests]
    return [decoding.admit(prompts, which) for decoding in decodings]


def _logits(hidden: Tensor, head: LMHead) -> Tensor:
    """[rows, V]. In the precision of the head, so that its weights are never copied."""
    rows = len(hidden)
    if not hidden.is_cuda:
        hidden = F.pad(hidden, (0, 0, 0, rows_of_product(rows, head.weight.numel()) - rows))
    return head_logits(hidden.to(head.weight.dtype), head)[:rows]

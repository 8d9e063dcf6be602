"""A teacher that is a transformers model in this process."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from poweropd.batching import collate, group_by_tokens
from poweropd.distributed import ALONE, World
from poweropd.models import default_device, lm_head
from poweropd.objectives import Needs
from poweropd.objectives.fused import TokenScores, token_scores
from poweropd.objectives.lm_head import Distribution
from poweropd.objectives.softmax import score_rows
from poweropd.packing import enable_packing
from poweropd.sharding import Trunk
from poweropd.teacher.scorer import teacher_scores
from poweropd.types import Prompt, Rollout, ScoredRollout, TeacherScores, TokenBatch


class HFTeacher:
    """Scores response positions only: the prompt and the padding never reach the LM head.

    Args:
        model: a causal language model; its weights' dtype is the precision of scoring.
        vocab_size, end_ids: as in the student's `LMHead`.
        tokens_per_batch: tokens of one forward pass, with padding where the model cannot do without (`enable_packing`).
        world: ranks that its layers are spread over, which then score together, each its own rollouts.
    """

    provides: frozenset[Needs] = frozenset({"nothing", "sampled", "top_k", "full"})

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        vocab_size: int,
        end_ids: tuple[int, ...] = (),
        tokens_per_batch: int = 16384,
        world: World = ALONE,
    ) -> None:
        self._model = model.requires_grad_(False)
        self._packed = enable_packing(model)
        self._world = world
        self._trunk = Trunk(model)
        if world.size > 1:
            self._trunk.shard(layers_only=True)
            torch.nn.Module.to(model, default_device())
        self._tokens_per_batch = tokens_per_batch
        self._head = lm_head(model, vocab_size=vocab_size, end_ids=end_ids)

    @torch.no_grad()
    def score(self, rollouts: Sequence[Rollout], *, needs: Needs, k: int = 0) -> list[TeacherScores]:
        if needs == "nothing":
            return [TeacherScores()] * len(rollouts)
        scores: dict[int, TeacherScores] = {}
        groups = group_by_tokens(rollouts, self._tokens_per_batch, packed=self._packed)
        idle = max(self._world.gather(len(groups))) - len(groups)
        for group in groups:
            scores |= zip(group, self._score_group([rollouts[index] for index in group], needs, k), strict=True)
        for _ in range(idle):  # for others that still compute, and gather weights from this rank too
            self._forward([Rollout(Prompt("", (0,)), (0,), (0.0,), "length")])
        return [scores[index] for index in range(len(rollouts))]

    @torch.no_grad()
    def logprobs_of(self, rollouts: Sequence[Rollout], ids: Sequence[Tensor]) -> list[Tensor]:
        """log p [T, m], fp32, of any tokens `ids` [T, m] in the places of each rollout's T response tokens."""
        found: dict[int, Tensor] = {}
        for group in group_by_tokens(rollouts, self._tokens_per_batch, packed=self._packed):
            _, hidden = self._forward([rollouts[index] for index in group])
            wanted = self._head.canonical(torch.cat([ids[index] for index in group]).to(hidden.device))
            head = replace(self._head, weight=self._head.weight.to(hidden.dtype))
            logprobs = score_rows(hidden, head, wanted).logprobs.cpu()
            found |= zip(group, logprobs.split([len(rollouts[index]) for index in group]), strict=True)
        return [found[index] for index in range(len(rollouts))]

    def _score_group(self, rollouts: list[Rollout], needs: Needs, k: int) -> list[TeacherScores]:
        batch, hidden = self._forward(rollouts)
        lengths = [len(rollout) for rollout in rollouts]
        if needs == "full":
            return [TeacherScores(distribution=Distribution((rows,), (self._head,))) for rows in hidden.split(lengths)]
        scores = token_scores(hidden, self._head, batch.inputs.target_ids, k=k if needs == "top_k" else 0)
        columns = zip(*(column.cpu().split(lengths) for column in scores), strict=True)
        return [teacher_scores(TokenScores(*column), needs) for column in columns]

    def _forward(self, rollouts: Sequence[Rollout]) -> tuple[TokenBatch, Tensor]:
        """Rollouts as a batch, and the hidden states [N, H] that predict their response tokens."""
        batch = collate([ScoredRollout(rollout) for rollout in rollouts]).to(self._model.device)
        return batch, self._trunk(batch.input_ids, batch.lengths, batch.loss_positions)

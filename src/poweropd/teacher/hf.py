"""A teacher that is a transformers model in this process."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from poweropd.batching import collate, group_by_tokens
from poweropd.models import hidden_states, lm_head
from poweropd.objectives import Needs
from poweropd.objectives.fused import TokenScores, token_scores
from poweropd.objectives.lm_head import Distribution
from poweropd.packing import enable_packing
from poweropd.teacher.scorer import teacher_scores
from poweropd.types import Rollout, ScoredRollout, TeacherScores


class HFTeacher:
    """Scores response positions only: the prompt and the padding never reach the LM head.

    Args:
        model: a causal language model; its weights' dtype is the precision of scoring.
        vocab_size, end_ids: as in the student's `LMHead`.
        tokens_per_batch: tokens of one forward pass, with padding where the model cannot do without (`enable_packing`).
    """

    provides: frozenset[Needs] = frozenset({"nothing", "sampled", "top_k", "full"})

    def __init__(
        self, model: PreTrainedModel, *, vocab_size: int, end_ids: tuple[int, ...] = (), tokens_per_batch: int = 16384
    ) -> None:
        self._model = model.requires_grad_(False)
        self._packed = enable_packing(model)
        self._tokens_per_batch = tokens_per_batch
        self._head = lm_head(model, vocab_size=vocab_size, end_ids=end_ids)

    @torch.no_grad()
    def score(self, rollouts: Sequence[Rollout], *, needs: Needs, k: int = 0) -> list[TeacherScores]:
        if needs == "nothing":
            return [TeacherScores()] * len(rollouts)
        scores: dict[int, TeacherScores] = {}
        for group in group_by_tokens(rollouts, self._tokens_per_batch, packed=self._packed):
            scores |= zip(group, self._score_group([rollouts[index] for index in group], needs, k), strict=True)
        return [scores[index] for index in range(len(rollouts))]

    def _score_group(self, rollouts: list[Rollout], needs: Needs, k: int) -> list[TeacherScores]:
        batch = collate([ScoredRollout(rollout) for rollout in rollouts]).to(self._model.device)
        hidden = hidden_states(self._model, batch.input_ids, batch.lengths)[batch.loss_positions]
        lengths = [len(rollout) for rollout in rollouts]
        if needs == "full":
            return [TeacherScores(distribution=Distribution((rows,), (self._head,))) for rows in hidden.split(lengths)]
        scores = token_scores(hidden, self._head, batch.inputs.target_ids, k=k if needs == "top_k" else 0)
        columns = zip(*(column.cpu().split(lengths) for column in scores), strict=True)
        return [teacher_scores(TokenScores(*column), needs) for column in columns]

"""A model that answers the questions of trainers on other machines; `server.py` puts it behind HTTP."""

import threading
import time
from functools import lru_cache

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from poweropd.models import lm_head, weights_fingerprint
from poweropd.objectives import Needs
from poweropd.teacher.hf import HFTeacher
from poweropd.teacher.wire import COLUMNS, PROTOCOL, Info, Question, pack, pack_head
from poweropd.vocabulary import end_token_ids, real_vocab_size, vocabulary_hash


class TeacherService:
    """One model, one question at a time: no answer depends on who else is asking.

    Args:
        name: what it is called in `info`.
        tokens_per_batch: of one forward pass.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, name: str, tokens_per_batch: int = 16384
    ) -> None:
        self._model = model
        self._one_at_a_time = threading.Lock()
        self.tokens, self.seconds = 0, 0.0  # of all answers
        rows = int(model.get_output_embeddings().weight.shape[0])
        size = real_vocab_size(tokenizer, rows)
        self.info = Info(
            protocol=PROTOCOL,
            model=name,
            weights=weights_fingerprint(model),
            vocab_size=size,
            vocabulary=vocabulary_hash(tokenizer, size),
            head_rows=rows,
            end_ids=end_token_ids(model, tokenizer),
            context=model.config.get_text_config().max_position_embeddings,
            dtype=str(model.dtype).removeprefix("torch."),
            parameters=model.num_parameters(),
            provides=tuple(sorted(HFTeacher.provides)),
        )

        @lru_cache(maxsize=8)
        def scorer(vocab_size: int, end_ids: tuple[int, ...]) -> HFTeacher:
            return HFTeacher(model, vocab_size=vocab_size, end_ids=end_ids, tokens_per_batch=tokens_per_batch)

        self._scorer = scorer

    def answer(self, body: bytes) -> bytes:
        """The answer to a `Question`.

        Raises:
            ValueError: it is none.
            RuntimeError: the model cannot answer it, for example for want of memory.
        """
        question = Question.read(body, head_rows=self.info.head_rows, context=self.info.context)
        with self._one_at_a_time:
            started = time.perf_counter()
            columns = self._columns(question)
            self.seconds += time.perf_counter() - started
            self.tokens += sum(map(len, question.rollouts))
        return pack(columns, weights=self.info.weights)

    def head(self, vocab_size: int) -> bytes:
        """The LM head, cut to `vocab_size` rows.

        Raises:
            ValueError: it has not so many.
        """
        if not 1 <= vocab_size <= self.info.head_rows:
            raise ValueError(f"vocab_size is {vocab_size}; the head has {self.info.head_rows} rows")
        return pack_head(lm_head(self._model, vocab_size=vocab_size), self.info.weights)

    def _columns(self, question: Question) -> dict[str, torch.Tensor]:
        """One row for each response token of all rollouts, on the CPU."""
        scorer = self._scorer(question.vocab_size, question.end_ids)
        rollouts = question.rollouts
        if not rollouts or question.needs == "nothing":
            return {}
        if question.ids is not None:
            found = scorer.logprobs_of(rollouts, question.ids.split([len(rollout) for rollout in rollouts]))
            return {"logprobs": torch.cat(found)}
        needs: Needs = question.needs  # type: ignore[assignment]  # it was read as one
        scores = scorer.score(rollouts, needs=needs, k=question.k)
        if needs == "full":
            return {"hidden": torch.cat([own.distribution.hidden[0].cpu() for own in scores if own.distribution])}
        columns = {name: torch.cat([getattr(own, name) for own in scores]) for name in COLUMNS[needs]}
        return {name: column.int() if column.dtype == torch.long else column for name, column in columns.items()}

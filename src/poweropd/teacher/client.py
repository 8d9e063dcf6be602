"""A teacher behind `poweropd serve-teacher` on another machine. No answer is believed before it is checked."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from poweropd.batching import group_by_tokens
from poweropd.errors import ModelError, TeacherError
from poweropd.objectives import Needs
from poweropd.objectives.lm_head import Distribution, LMHead
from poweropd.teacher.http import Connection, UnusableAnswerError
from poweropd.teacher.wire import COLUMNS, Info, Question, unpack, unpack_head
from poweropd.types import Rollout, TeacherScores
from poweropd.vocabulary import vocabulary_hash

IDS = {"top_ids", "top1_ids"}


class ServedTeacher:
    """Asks for scores of some rollouts at a time, on one connection; for one thread at a time.

    Args:
        connection: to the server.
        vocab_size, end_ids: as in the student's `LMHead`.
        tokens_per_batch: of one question.
        device: where hidden states and head are to be.

    Attributes:
        info: what the server said of itself; other weights are refused from then on.

    Raises:
        TeacherError: there is no such server, or it refuses, or later: it no longer answers as it should.
    """

    provides: frozenset[Needs] = frozenset({"nothing", "sampled", "top_k", "full"})

    def __init__(
        self,
        connection: Connection,
        *,
        vocab_size: int,
        end_ids: tuple[int, ...] = (),
        tokens_per_batch: int = 16384,
        device: torch.device | str = "cpu",
    ) -> None:
        self._connection = connection
        self._vocab_size, self._end_ids = vocab_size, end_ids
        self._tokens_per_batch = tokens_per_batch
        self._device = torch.device(device)
        self._fetched_head: LMHead | None = None
        self.info = connection.ask("GET", "/info", Info.read)

    def score(self, rollouts: Sequence[Rollout], *, needs: Needs, k: int = 0) -> list[TeacherScores]:
        if needs == "nothing":
            return [TeacherScores()] * len(rollouts)
        scores: dict[int, TeacherScores] = {}
        for group in group_by_tokens(rollouts, self._tokens_per_batch, packed=True):
            own = [rollouts[index] for index in group]
            columns = self._ask(own, needs, k=min(k, self._vocab_size) if needs == "top_k" else 0)
            parts = {name: column.split([len(rollout) for rollout in own]) for name, column in columns.items()}
            for place, index in enumerate(group):
                scores[index] = self._scores({name: part[place] for name, part in parts.items()})
        return [scores[index] for index in range(len(rollouts))]

    def logprobs_of(self, rollouts: Sequence[Rollout], ids: Sequence[Tensor]) -> list[Tensor]:
        """log p [T, m], fp32, of any tokens `ids` [T, m] in the places of each rollout's T response tokens."""
        found: dict[int, Tensor] = {}
        for group in group_by_tokens(rollouts, self._tokens_per_batch, packed=True):
            own = [rollouts[index] for index in group]
            columns = self._ask(own, "ids", ids=torch.cat([ids[index] for index in group]))
            found |= zip(group, columns["logprobs"].split([len(rollout) for rollout in own]), strict=True)
        return [found[index] for index in range(len(rollouts))]

    def refuse_other_model(
        self,
        name: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        head_rows: int,
        end_ids: tuple[int, ...],
        context: int,
        parameters: int,
    ) -> None:
        """Raises ModelError unless the server has the model `name`, of which this is known here."""
        info = self.info
        told: list[tuple[str, Any, Any]] = [
            ("tokens of other meaning", info.vocabulary, vocabulary_hash(tokenizer, info.vocab_size)),
            ("rows of the LM head", info.head_rows, head_rows),
            ("end tokens", sorted(info.end_ids), sorted(end_ids)),
            ("positions", info.context, context),
            ("parameters", info.parameters, parameters),
        ]
        for what, there, here in told:
            if there != here:
                raise ModelError(
                    f"the teacher at {self._connection.url} is {info.model!r}, and not the {name!r} of teacher.model: {what}, "
                    f"{there} there and {here} here. Serve {name!r}, or change teacher.model"
                )

    def _scores(self, columns: dict[str, Any]) -> TeacherScores:
        if "hidden" not in columns:
            return TeacherScores(**columns)
        return TeacherScores(distribution=Distribution((columns["hidden"].to(self._device),), (self._head,)))

    @property
    def _head(self) -> LMHead:
        """Fetched once: one object, by which an update knows that rollouts have one teacher."""
        if self._fetched_head is None:

            def read(body: bytes) -> LMHead:
                self._check_weights(_unpack(body)[1])
                return unpack_head(body, vocab_size=self._vocab_size, end_ids=self._end_ids, device=self._device)

            self._fetched_head = self._connection.ask("GET", f"/head?vocab_size={self._vocab_size}", read)
        return self._fetched_head

    def _ask(self, rollouts: Sequence[Rollout], needs: str, k: int = 0, ids: Tensor | None = None) -> dict[str, Tensor]:
        """The columns of an answer, with one row for each response token."""
        question = Question(rollouts, needs, self._vocab_size, self._end_ids, k, ids)
        rows = sum(map(len, rollouts))
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(COLUMNS[needs], (rows,))
        if ids is not None:
            shapes["logprobs"] = tuple(ids.shape)
        elif needs == "top_k":
            shapes |= {"top_ids": (rows, k), "top_logprobs": (rows, k)}
        elif needs == "full":
            shapes["hidden"] = (rows, self._head.weight.shape[1])

        def read(body: bytes) -> dict[str, Tensor]:
            columns, facts = _unpack(body)
            self._check_weights(facts)
            for name, shape in shapes.items():
                self._check_column(name, columns.get(name), shape)
            return {name: column.long() if name in IDS else column for name, column in columns.items()}

        return self._connection.ask("POST", "/score", read, question.to_bytes())

    def _check_weights(self, facts: dict[str, Any]) -> None:
        if facts.get("weights") != self.info.weights:
            raise TeacherError(
                f"the teacher at {self._connection.url} now has other weights than when this run asked it first "
                f"({self.info.model}, {self.info.weights}); serve the same model again"
            )

    def _check_column(self, name: str, column: Tensor | None, shape: tuple[int, ...]) -> None:
        if column is None or column.shape != shape:
            found = "none" if column is None else f"shape {tuple(column.shape)}"
            raise UnusableAnswerError(f"{name} of shape {shape} were asked for, it gave {found}")
        if name in IDS:
            if column.is_floating_point() or (
                column.numel() and not 0 <= column.min() <= column.max() < self._vocab_size
            ):
                raise UnusableAnswerError(f"{name} are not all ids of the {self._vocab_size} tokens")
        elif not column.is_floating_point() or not column.isfinite().all():
            raise TeacherError(
                f"the teacher at {self._connection.url} gives {name} that are not finite; no rollout is trained on with such "
                "scores. Look after its weights and precision"
            )


def _unpack(body: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        return unpack(body)
    except ValueError as error:
        raise UnusableAnswerError(str(error)) from None

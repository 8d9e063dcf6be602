"""A teacher behind a vLLM server as it comes: log-probabilities of sampled tokens, or its likeliest tokens."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from poweropd.batching import group_by_tokens
from poweropd.objectives import Needs
from poweropd.teacher.http import UnusableAnswerError
from poweropd.teacher.vllm_http import MOST_NAMED_IDS, VLLMConnection
from poweropd.types import Rollout, TeacherScores

PROBE = "The answer is 12,345.67 = x^2 + 3; Straße, naïve, 漢字.\n\tdef f(x): return x"
MOST_PADDING = 1e-3  # probability of padding that is put up with: its nats are missing from every score
LEAST = -9999.0  # what vLLM writes for the logarithm of zero
PLAIN = {
    "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
    "frequency_penalty": 0.0, "max_tokens": 1, "add_special_tokens": False, "return_tokens_as_token_ids": True,
}  # fmt: skip
"""Said in every request, for a model's generation_config.json has other defaults."""


class TeacherConnection(VLLMConnection):
    """To the vLLM server of a teacher."""

    def _refusal(self, status: int, told: str) -> str:
        advice = "; start it with a larger --max-logprobs, or set a lower objective.k" if "logprobs" in told else ""
        return super()._refusal(status, told) + advice


class VLLMTeacher:
    """Asks for log-probabilities of prompts, which are responses here; for one thread at a time.

    vLLM gives them of the full softmax at temperature 1, whatever temperature a request has. It counts the padding rows of
    the LM head: their probability is measured at the start. It does not tell entropies. Where end tokens are merged, the
    likeliest tokens cannot be told, and the last token is asked for by itself.

    Args:
        url: `http://host:port`.
        model: the Hub id or folder that it must serve.
        vocab_size, end_ids: as in the student's `LMHead`.
        tokenizer: the teacher's.
        head_rows: of the teacher's LM head, padding included.
        token: its `--api-key`.
        timeout_s, deadline_s: see `Connection`.
        tokens_per_batch: of one request.

    Raises:
        TeacherError: there is no such server, or it refuses, serves another model or tokenizer, or is too old; or later:
            it no longer answers as it should.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str,
        vocab_size: int,
        tokenizer: PreTrainedTokenizerBase,
        head_rows: int,
        end_ids: tuple[int, ...] = (),
        token: str | None = None,
        timeout_s: float = 120.0,
        deadline_s: float = 600.0,
        tokens_per_batch: int = 16384,
    ) -> None:
        self._connection = TeacherConnection(url, token=token, timeout_s=timeout_s, deadline_s=deadline_s)
        self._vocab_size, self._end_ids = vocab_size, end_ids
        self._tokens_per_batch = tokens_per_batch
        self.provides: frozenset[Needs] = frozenset(
            {"nothing", "sampled"} if end_ids else {"nothing", "sampled", "top_k"}
        )
        self._connection.check_version()
        self._name, self._longest = self._connection.served(model, "teacher.model")
        probe = self._refuse_other_tokenizer(tokenizer)
        self._refuse_padding(probe, range(vocab_size, head_rows))

    def score(self, rollouts: Sequence[Rollout], *, needs: Needs, k: int = 0) -> list[TeacherScores]:
        if needs == "nothing":
            return [TeacherScores()] * len(rollouts)
        scores: dict[int, TeacherScores] = {}
        for group in group_by_tokens(rollouts, self._tokens_per_batch, packed=True):
            own = [rollouts[index] for index in group]
            scores |= zip(group, self._score_group(own, k if needs == "top_k" else 0), strict=True)
        return [scores[index] for index in range(len(rollouts))]

    def _score_group(self, rollouts: list[Rollout], k: int) -> list[TeacherScores]:
        texts = [[*rollout.prompt.prompt_ids, *rollout.response_ids] for rollout in rollouts]
        longest = max(map(len, texts)) + 1  # for the token that vLLM must draw
        if longest > self._longest:
            raise self._connection.refused(
                f"it was started with --max-model-len {self._longest}, and a prompt with its answer needs {longest}; start it "
                "with more"
            )

        def read(choice: dict[str, Any], rollout: Rollout) -> TeacherScores:
            rows = choice["prompt_logprobs"][len(rollout.prompt.prompt_ids) :]
            if len(rows) != len(rollout):
                raise UnusableAnswerError(f"{len(rows)} scores for {len(rollout)} tokens")
            return self._scores(rollout, rows, k)

        scores = self._ask(texts, rollouts, read, {"prompt_logprobs": max(k, 1)})
        ended = [place for place, rollout in enumerate(rollouts) if rollout.response_ids[-1] in self._end_ids]
        if ended:
            before = [texts[place][:-1] for place in ended]
            for place, mass in zip(ended, self._probability_of(self._end_ids, before), strict=True):
                logprobs = scores[place].logprobs
                assert logprobs is not None  # sampled scores have them
                logprobs[-1] = min(math.log(mass), 0.0) if mass else -math.inf
        self._refuse_infinite(scores)
        return scores

    def _scores(self, rollout: Rollout, rows: Sequence[dict[str, dict[str, float]]], k: int) -> TeacherScores:
        """Of the log-probabilities by token id that were told of each response token: its own and the likeliest."""
        found = [{int(id): one["logprob"] for id, one in row.items()} for row in rows]
        logprobs = [row[id] for row, id in zip(found, rollout.response_ids, strict=True)]
        real = [{id: logprob for id, logprob in row.items() if id < self._vocab_size} for row in found]
        likeliest = [sorted(row, key=row.__getitem__, reverse=True)[: max(k, 1)] for row in real]
        if k and min(map(len, likeliest)) < k:
            raise self._connection.refused(f"padding is among its {k} likeliest tokens; set a lower objective.k")
        top = torch.tensor(likeliest)
        scores = TeacherScores(torch.tensor(logprobs), top1_ids=None if self._end_ids else top[:, 0])
        if not k:
            return scores
        values = [[row[id] for id in ids] for row, ids in zip(found, likeliest, strict=True)]
        return TeacherScores(scores.logprobs, top_ids=top, top_logprobs=torch.tensor(values), top1_ids=scores.top1_ids)

    def _probability_of(self, ids: Sequence[int], texts: Sequence[Sequence[int]]) -> list[float]:
        """Of any of these tokens to come after each text."""

        def read(choice: dict[str, Any], _: object) -> float:
            (told,) = choice["logprobs"]["top_logprobs"]
            return sum(math.exp(told[f"token_id:{id}"]) for id in ids)

        return self._ask(texts, texts, read, {"logprobs": 1, "logprob_token_ids": list(ids)})

    def _ask(self, texts: Sequence[Sequence[int]], about: Sequence[Any], read: Any, asked: dict[str, Any]) -> list[Any]:
        """What `read` makes of the answer to each text and of what that is about."""

        def pick(answer: dict[str, Any]) -> list[Any]:
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            if len(choices) != len(texts):
                raise UnusableAnswerError(f"{len(choices)} answers to {len(texts)} questions")
            return [read(choice, each) for choice, each in zip(choices, about, strict=True)]

        question = {"model": self._name, "prompt": list(map(list, texts)), **PLAIN, **asked}
        return self._connection.ask_json("POST", "/v1/completions", pick, question)

    def _refuse_other_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """The ids of a text, of which server and tokenizer must agree."""
        question = {"model": self._name, "prompt": PROBE, "add_special_tokens": False}
        theirs = self._connection.ask_json("POST", "/tokenize", lambda told: list(told["tokens"]), question)
        ours = list(tokenizer.encode(PROBE, add_special_tokens=False))
        if theirs != ours:
            raise self._connection.refused(
                f"it has another tokenizer: a text of {len(ours)} tokens here has {len(theirs)} others there. Serve the model "
                "with its own tokenizer"
            )
        return ours

    def _refuse_padding(self, text: list[int], padding: range) -> None:
        """Refuse a teacher whose padding rows take probability from real tokens."""
        chunks = [padding[start : start + MOST_NAMED_IDS] for start in range(0, len(padding), MOST_NAMED_IDS)]
        texts = [text[: len(text) // 2], text]
        parts = [self._probability_of(chunk, texts) for chunk in chunks]
        mass = max(map(sum, zip(*parts, strict=True)), default=0.0)
        if not mass <= MOST_PADDING:
            raise self._connection.refused(
                f"the padding rows of its LM head have probability {mass:.2g}, which vLLM counts and every score lacks; serve "
                "it by `poweropd serve-teacher` (teacher.engine: served)"
            )

    def _refuse_infinite(self, scores: Sequence[TeacherScores]) -> None:
        for columns in scores:
            for column in (columns.logprobs, columns.top_logprobs):
                if column is not None and not (column > LEAST).all():
                    raise self._connection.refused(
                        "it gives log-probabilities that are not finite; no rollout is trained on with such scores. Look after "
                        "its weights and precision"
                    )

"""The contract of teachers, which every implementation runs; then what only the HF teacher promises."""

from collections.abc import Callable

import pytest
import torch

from conftest import CHAT_END, END, make_model, make_rollouts
from fakes import FakeTeacher
from poweropd.objectives.lm_head import head_logits
from poweropd.teacher.hf import HFTeacher
from poweropd.teacher.scorer import TeacherScorer
from poweropd.types import TeacherScores

LENGTHS = [(3, 5), (9, 2), (1, 20), (6, 12), (2, 1)]
TEACHERS: dict[str, Callable[[], TeacherScorer]] = {
    "hf": lambda: HFTeacher(make_model(), vocab_size=512),
    "fake": FakeTeacher,
}


@pytest.mark.parametrize("name", TEACHERS)
def test_contract(name: str) -> None:
    teacher, rollouts = TEACHERS[name](), make_rollouts(LENGTHS)
    sampled = teacher.score(rollouts, needs="sampled")
    for rollout, scores in zip(rollouts, sampled, strict=True):
        assert scores.logprobs is not None
        assert scores.entropies is not None
        assert scores.logprobs.shape == scores.entropies.shape == (len(rollout),)
        assert scores.logprobs.dtype == torch.float32
        assert (scores.logprobs <= 0).all()
        assert (scores.entropies >= 0).all()
    again = teacher.score(rollouts[::-1], needs="sampled")[::-1]
    for one, other in zip(sampled, again, strict=True):
        torch.testing.assert_close(one.logprobs, other.logprobs)
    assert teacher.score(rollouts, needs="nothing") == [TeacherScores()] * len(rollouts)
    assert teacher.score([], needs="sampled") == []
    if "top_k" in teacher.provides:
        for rollout, scores in zip(rollouts, teacher.score(rollouts, needs="top_k", k=4), strict=True):
            assert scores.top_ids is not None
            assert scores.top_logprobs is not None
            assert scores.top_ids.shape == scores.top_logprobs.shape == (len(rollout), 4)
            assert (scores.top_logprobs.diff(dim=1) <= 0).all()
    if "full" in teacher.provides:
        for rollout, scores in zip(rollouts, teacher.score(rollouts, needs="full"), strict=True):
            assert scores.distribution is not None
            for hidden, head in zip(scores.distribution.hidden, scores.distribution.heads, strict=True):
                assert hidden.shape == (len(rollout), head.weight.shape[1])


@pytest.mark.parametrize("tokens_per_batch", [1, 30, 10_000])
def test_logprobs_are_those_of_the_model_at_temperature_one(tokens_per_batch: int) -> None:
    model = make_model(rows=528)
    teacher = HFTeacher(model, vocab_size=512, tokens_per_batch=tokens_per_batch)
    rollouts = make_rollouts(LENGTHS)
    full = teacher.score(rollouts, needs="full")
    for rollout, scores, states in zip(rollouts, teacher.score(rollouts, needs="sampled"), full, strict=True):
        ids = torch.tensor([rollout.prompt.prompt_ids + rollout.response_ids])
        start = len(rollout.prompt.prompt_ids) - 1
        with torch.no_grad():
            logprobs = model(input_ids=ids).logits[0, start:-1, :512].log_softmax(-1)
        expected = logprobs[range(len(rollout)), list(rollout.response_ids)]
        torch.testing.assert_close(scores.logprobs, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(scores.entropies, -(logprobs.exp() * logprobs).sum(-1), rtol=1e-4, atol=1e-5)
        assert states.distribution is not None
        (hidden,), (head,) = states.distribution.hidden, states.distribution.heads
        torch.testing.assert_close(head_logits(hidden, head).log_softmax(-1), logprobs, rtol=1e-4, atol=1e-4)


def test_merged_end_tokens_raise_the_score_of_the_last_token_alone() -> None:
    model, rollouts = make_model(), make_rollouts(LENGTHS)
    plain, merged = (
        HFTeacher(model, vocab_size=512, end_ids=ends).score(rollouts, needs="sampled")
        for ends in ((), (END, CHAT_END))
    )
    for one, other in zip(plain, merged, strict=True):
        assert one.logprobs is not None
        assert other.logprobs is not None
        torch.testing.assert_close(one.logprobs[:-1], other.logprobs[:-1])
        assert other.logprobs[-1] > one.logprobs[-1]

"""The guards: what stops a step, and what it says."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
from transformers import PreTrainedTokenizerBase

from conftest import make_model, make_rollouts
from poweropd import guards
from poweropd.errors import NonFiniteError
from poweropd.objectives import build
from poweropd.policy import Student
from poweropd.teacher.hf import HFTeacher
from poweropd.types import ScoredRollout
from poweropd.update import accumulate_gradient


def test_the_token_that_broke_a_step_is_named(
    make_student: Callable[..., Student], tokenizer: PreTrainedTokenizerBase
) -> None:
    """One NaN in a teacher's answer, at a known place."""
    student, objective, rollouts = make_student(), build("log_ratio"), make_rollouts([(3, 4), (2, 5)])
    scores = HFTeacher(make_model(seed=1), vocab_size=512).score(rollouts, needs=objective.needs)
    broken = scores[1].logprobs.clone()
    broken[2] = math.nan
    scored = [ScoredRollout(rollouts[0], scores[0]), ScoredRollout(rollouts[1], replace(scores[1], logprobs=broken))]
    result = accumulate_gradient(student, scored, objective, teacher_head=None, tokens_per_micro_batch=100, pad_id=0)
    token = tokenizer.decode([rollouts[1].response_ids[2]])
    with pytest.raises(NonFiniteError) as error:
        guards.refuse_non_finite(result, student.gradient_norm(), rollouts, tokenizer, step=7)
    message = str(error.value)
    assert f"step 7: not finite at token 2 ({token!r}) of the response to prompt p1: reward nan" in message
    assert "No update was made" in message


def test_an_overflow_of_the_backward_pass_is_told_apart(
    make_student: Callable[..., Student], tokenizer: PreTrainedTokenizerBase
) -> None:
    student, objective, rollouts = make_student(), build("log_ratio"), make_rollouts([(3, 4)])
    scores = HFTeacher(make_model(seed=1), vocab_size=512).score(rollouts, needs=objective.needs)
    scored = [ScoredRollout(rollouts[0], scores[0])]
    result = accumulate_gradient(student, scored, objective, teacher_head=None, tokens_per_micro_batch=100, pad_id=0)
    guards.refuse_non_finite(result, student.gradient_norm(), rollouts, tokenizer, step=7)
    with pytest.raises(NonFiniteError, match=r"step 7: loss .* though every reward is finite"):
        guards.refuse_non_finite(result, math.inf, rollouts, tokenizer, step=7)


def test_a_sampler_that_is_not_the_student_is_noticed() -> None:
    assert guards.mismatch_warning({"rollout/mismatch": 1e-5}) is None
    assert "disagree" in str(guards.mismatch_warning({"rollout/mismatch": 0.4}))

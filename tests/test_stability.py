"""What holds a student: the KL to its initial state, golden answers, importance weights; against plain autograd."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from conftest import make_model, make_rollouts
from poweropd.objectives import build
from poweropd.policy import Student
from poweropd.rollout.engine import Sampling
from poweropd.rollout.golden import GoldenEngine
from poweropd.teacher.hf import HFTeacher
from poweropd.teacher.scorer import judge
from poweropd.types import Rollout, ScoredRollout
from poweropd.update import MicroBatches, accumulate_gradient

LENGTHS = [(3, 9), (7, 2), (1, 1), (5, 14)]


def logprobs_of(model: torch.nn.Module, rollout: Rollout) -> Tensor:
    ids = torch.tensor([rollout.prompt.prompt_ids + rollout.response_ids])
    return model(input_ids=ids).logits[0, len(rollout.prompt.prompt_ids) - 1 : -1, :512].log_softmax(-1)


def gradient(student: Student) -> Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in student.model.parameters()])


class Written:
    """Every log-probability of some rollouts, by plain forward passes: student, teacher, reference, sampled tokens."""

    def __init__(self, student: Student, teacher: torch.nn.Module, reference: torch.nn.Module, rollouts: list[Rollout]):
        self.q = torch.cat([logprobs_of(student.model, rollout) for rollout in rollouts])
        with torch.no_grad():
            self.p, self.r = (
                torch.cat([logprobs_of(model, rollout) for rollout in rollouts]) for model in (teacher, reference)
            )
        self.tokens = torch.cat([torch.tensor(rollout.response_ids) for rollout in rollouts])[:, None]
        self.parameters = list(student.model.parameters())

    def chosen(self, logprobs: Tensor) -> Tensor:
        return logprobs.gather(1, self.tokens)[:, 0]

    def gradient_of(self, loss: Tensor) -> Tensor:
        return torch.cat([part.flatten() for part in torch.autograd.grad(loss, self.parameters)])


@pytest.fixture
def models() -> tuple[torch.nn.Module, torch.nn.Module]:
    return make_model(hidden_size=24, seed=1), make_model(hidden_size=20, seed=7)


@pytest.mark.parametrize("form", ["full", "k2_loss", "k1_reward"])
@pytest.mark.parametrize("tokens", [20, 10_000])
def test_reference_kl_equals_plain_autograd(
    form: str, tokens: int, make_student: Callable[..., Student], models: tuple[torch.nn.Module, torch.nn.Module]
) -> None:
    student, rollouts = make_student(), make_rollouts(LENGTHS)
    written = Written(student, *models, rollouts)
    objective = build("power", alpha=0.5, reference_kl=0.3, reference_kl_form=form)
    teacher, reference = (HFTeacher(model, vocab_size=512) for model in models)
    scored = judge(rollouts, objective, teacher, reference)
    result = accumulate_gradient(student, scored, objective, MicroBatches(tokens=tokens))

    chosen, from_teacher, from_reference = map(written.chosen, (written.q, written.p, written.r))
    pull = -((from_teacher / 2).exp() - (chosen / 2).exp()).detach() * chosen
    if form == "full":
        held = (written.q.exp() * (written.q - written.r)).sum(-1)
        measured = held
    else:
        held = (chosen - from_reference).square() / 2
        measured = chosen - from_reference
    expected = written.gradient_of((pull + 0.3 * held).mean())
    assert (gradient(student) - expected).norm() <= 1e-4 * expected.norm()
    got = torch.cat([terms.reference_kl for terms in result.terms])
    torch.testing.assert_close(got, measured.detach(), rtol=1e-4, atol=1e-4)


def test_k1_in_the_reward_is_shaped_with_it_and_k2_as_a_loss_is_not(
    make_student: Callable[..., Student], models: tuple[torch.nn.Module, torch.nn.Module]
) -> None:
    rollouts = make_rollouts(LENGTHS)
    teacher, reference = (HFTeacher(model, vocab_size=512) for model in models)
    for form in ("k1_reward", "k2_loss"):
        student = make_student()
        written = Written(student, *models, rollouts)
        objective = build("log_ratio", normalize="zscore", reference_kl=0.3, reference_kl_form=form)
        scored = judge(rollouts, objective, teacher, reference)
        accumulate_gradient(student, scored, objective, MicroBatches(tokens=40))
        chosen, from_teacher, from_reference = map(written.chosen, (written.q, written.p, written.r))
        ratio, pull = (from_teacher - chosen).detach(), 0.3 * (chosen - from_reference).detach()
        reward = ratio - pull if form == "k1_reward" else ratio
        advantage = (reward - reward.mean()) / reward.std(unbiased=False)
        advantage = advantage if form == "k1_reward" else advantage - pull
        expected = written.gradient_of(-(advantage * chosen).mean())
        assert (gradient(student) - expected).norm() <= 1e-4 * expected.norm()


def test_golden_answers_add_their_weighted_mean_cross_entropy(
    make_student: Callable[..., Student], models: tuple[torch.nn.Module, torch.nn.Module]
) -> None:
    student, rollouts = make_student(), make_rollouts(LENGTHS)
    prompts = [replace(r.prompt, golden_ids=g.response_ids) for r, g in zip(rollouts, rollouts[::-1], strict=True)]
    answers = GoldenEngine().generate(prompts, Sampling(stop_ids=(0,), max_new_tokens=30), seed=0)
    how = MicroBatches(tokens=30)
    found = accumulate_gradient(student, [ScoredRollout(answer) for answer in answers], build("sft"), how, weight=0.2)
    written = Written(student, *models, answers)
    loss = -0.2 * written.chosen(written.q).mean()
    assert found.loss == pytest.approx(loss.item(), rel=1e-5)
    expected = written.gradient_of(loss)
    assert (gradient(student) - expected).norm() <= 1e-4 * expected.norm()


def test_off_policy_rewards_are_weighted_up_to_the_cap_and_the_students_own_are_not(
    make_student: Callable[..., Student], models: tuple[torch.nn.Module, torch.nn.Module]
) -> None:
    own, other, third = make_rollouts([(3, 6), (4, 8), (2, 5)])
    untold = (*third.rollout_logprobs[:-1], float("nan"))
    rollouts = [own, replace(other, source="mixture"), replace(third, source="teacher", rollout_logprobs=untold)]
    teacher = HFTeacher(models[0], vocab_size=512, end_ids=(0, 2))
    objective = build("power", alpha=0.5)
    scored = judge(rollouts, objective, teacher)
    plain, weighted = make_student(end_ids=(0, 2)), make_student(end_ids=(0, 2))
    bare = accumulate_gradient(plain, scored, objective, MicroBatches(tokens=20))
    got = accumulate_gradient(weighted, scored, objective, MicroBatches(tokens=20, importance_cap=0.01))
    for rollout, one, two in zip(rollouts, bare.terms, got.terms, strict=True):
        ratio = (one.logprobs - torch.tensor(rollout.rollout_logprobs)).exp().clamp(max=0.01)
        factor = torch.ones_like(ratio) if rollout.source == "student" else ratio.nan_to_num(1.0)
        torch.testing.assert_close(two.advantages, factor * one.advantages)
    assert (got.terms[1].advantages[:-1] != bare.terms[1].advantages[:-1]).all()


def test_rollouts_of_an_older_student_are_off_policy(
    make_student: Callable[..., Student], models: tuple[torch.nn.Module, torch.nn.Module]
) -> None:
    old, current = ([replace(r, policy_version=v) for r in make_rollouts([(3, 6)])] for v in (3, 4))
    objective, how = build("power"), MicroBatches(tokens=20, importance_cap=0.01)
    scored = judge([*old, *current], objective, HFTeacher(models[0], vocab_size=512))
    bare = accumulate_gradient(make_student(), scored, objective, how)
    got = accumulate_gradient(make_student(), scored, objective, how, version=4)
    (one, two), (older, newer) = bare.terms, got.terms
    ratio = (one.logprobs - torch.tensor(old[0].rollout_logprobs)).exp().clamp(max=0.01)
    torch.testing.assert_close(older.advantages, ratio * one.advantages)
    torch.testing.assert_close(newer.advantages, two.advantages)


def test_importance_weights_come_after_whole_step_shaping(
    make_student: Callable[..., Student], models: tuple[torch.nn.Module, torch.nn.Module]
) -> None:
    rollouts = [replace(rollout, source="mixture") for rollout in make_rollouts([(3, 6), (4, 8)])]
    objective = build("log_ratio", normalize="zscore")
    scored = judge(rollouts, objective, HFTeacher(models[0], vocab_size=512))
    shaped = accumulate_gradient(make_student(), scored, objective, MicroBatches(tokens=20))
    how = MicroBatches(tokens=20, importance_cap=0.01)
    weighted = accumulate_gradient(make_student(), scored, objective, how)
    for rollout, one, two in zip(rollouts, shaped.terms, weighted.terms, strict=True):
        ratio = (one.logprobs - torch.tensor(rollout.rollout_logprobs)).exp().clamp(max=0.01)
        torch.testing.assert_close(two.advantages, ratio * one.advantages)


def test_masked_tokens_give_no_gradient(make_student: Callable[..., Student], models: tuple) -> None:
    student, rollouts = make_student(), make_rollouts(LENGTHS)
    unwanted = {rollouts[0].response_ids[2], rollouts[3].response_ids[0]}
    written = Written(student, *models, rollouts)
    objective = build("reverse_kl")
    scored = judge(rollouts, objective, HFTeacher(models[0], vocab_size=512))
    how = MicroBatches(tokens=30, masked_ids=tuple(unwanted))
    result = accumulate_gradient(student, scored, objective, how)
    kept = torch.tensor([token not in unwanted for token in written.tokens[:, 0].tolist()])
    expected = written.gradient_of((written.q.exp() * (written.q - written.p)).sum(-1)[kept].mean())
    assert (gradient(student) - expected).norm() <= 1e-4 * expected.norm()
    assert result.num_loss_tokens == int(kept.sum())
    assert 2 not in result.terms[0].places.tolist()
    assert 0 not in result.terms[3].places.tolist()

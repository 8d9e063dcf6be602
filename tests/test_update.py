"""The gradient of a step: what it must not depend on, and how many forwards it takes."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from conftest import CHAT_END, END, make_model, make_rollouts
from poweropd.batching import collate
from poweropd.objectives import OBJECTIVES, Objective, build
from poweropd.policy import Student
from poweropd.rollout.engine import Sampling
from poweropd.rollout.hf import HFEngine
from poweropd.teacher.ensemble import MixtureTeacher, RoutedTeacher
from poweropd.teacher.hf import HFTeacher
from poweropd.teacher.scorer import TeacherScorer, judge
from poweropd.types import Rollout, ScoredRollout
from poweropd.update import GradientResult, MicroBatches, accumulate_gradient

LENGTHS = [(3, 9), (7, 2), (1, 1), (5, 14), (2, 6)]


def built(text: str) -> Objective:
    """From `name setting=value ...`."""
    name, *settings = text.split()
    pairs = (setting.split("=") for setting in settings)
    return build(name, **{key: float(value) if value[0].isdigit() else value for key, value in pairs})


def gradient_of(
    student: Student,
    teacher: TeacherScorer,
    rollouts: list[Rollout],
    objective: Objective | str,
    tokens: int = 10_000,
    version: int | None = None,
    **settings: Any,
) -> tuple[GradientResult, Tensor]:
    """The frozen initial student is another random model here, so that its KL is not zero."""
    objective = built(objective) if isinstance(objective, str) else objective
    student.optimizer.zero_grad()
    reference = None
    if objective.needs_of_reference != "nothing":
        reference = HFTeacher(make_model(hidden_size=20, seed=7), vocab_size=512, end_ids=student.head.end_ids)
    scored = judge(rollouts, objective, teacher, reference)
    how = MicroBatches(tokens=tokens, **settings)
    result = accumulate_gradient(student, scored, objective, how, version=version)
    gradients = [p.grad.flatten() for p in student.model.parameters() if p.grad is not None]
    return result, torch.cat([torch.zeros(0), *gradients])


def logprobs_of(model: torch.nn.Module, rollouts: list[Rollout]) -> Tensor:
    """[N, 512] of all response tokens, every logit built."""

    def rows(rollout: Rollout) -> Tensor:
        ids = torch.tensor([rollout.prompt.prompt_ids + rollout.response_ids])
        return model(input_ids=ids).logits[0, len(rollout.prompt.prompt_ids) - 1 : -1, :512].log_softmax(-1)

    return torch.cat([rows(rollout) for rollout in rollouts])


@pytest.fixture
def teacher() -> HFTeacher:
    return HFTeacher(make_model(hidden_size=24, rows=528, seed=1), vocab_size=512)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_gradient_does_not_depend_on_micro_batches(
    name: str, make_student: Callable[..., Student], teacher: HFTeacher
) -> None:
    """Ragged lengths, so that the splits differ in what stands together."""
    student, rollouts = make_student(), make_rollouts(LENGTHS)
    whole, gradient = gradient_of(student, teacher, rollouts, name)
    for tokens in (1, 20, 40):
        parts, other = gradient_of(student, teacher, rollouts, name, tokens)
        assert parts.loss == pytest.approx(whole.loss, rel=1e-5, abs=1e-8)
        assert (other - gradient).norm() <= 1e-5 * gradient.norm()
        for mine, theirs in zip(parts.terms, whole.terms, strict=True):
            torch.testing.assert_close(mine.advantages, theirs.advantages, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(mine.divergences, theirs.divergences, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["power", "zscore", "reverse_kl"])
def test_the_order_of_rollouts_does_not_matter(
    name: str, make_student: Callable[..., Student], teacher: HFTeacher
) -> None:
    student, rollouts = make_student(), make_rollouts(LENGTHS)
    _, gradient = gradient_of(student, teacher, rollouts, name)
    _, other = gradient_of(student, teacher, rollouts[::-1], name)
    assert (other - gradient).norm() <= 1e-5 * gradient.norm()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["power", "log_ratio", "zscore", "reverse_kl", "forward_kl"])
def test_gradient_equals_plain_autograd_over_all_logits(
    name: str, make_student: Callable[..., Student], teacher: HFTeacher, *, tied: bool
) -> None:
    """The whole path, models included, against a loop over rollouts that builds every logit."""
    student, rollouts = make_student(make_model(tie_word_embeddings=tied)), make_rollouts(LENGTHS)
    _, gradient = gradient_of(student, teacher, rollouts, name, tokens=30)
    q, p = logprobs_of(student.model, rollouts), logprobs_of(teacher._model, rollouts).detach()
    tokens = torch.cat([torch.tensor(rollout.response_ids) for rollout in rollouts])[:, None]
    chosen, reference = q.gather(1, tokens)[:, 0], p.gather(1, tokens)[:, 0]
    ratio = (reference - chosen).detach()
    loss = {
        "power": lambda: -((reference.exp() ** 5 - chosen.exp() ** 5).detach() * chosen).mean(),
        "log_ratio": lambda: -(ratio * chosen).mean(),
        "zscore": lambda: -((ratio - ratio.mean()) / ratio.std(unbiased=False) * chosen).mean(),
        "reverse_kl": lambda: (q.exp() * (q - p)).sum(-1).mean(),
        "forward_kl": lambda: (p.exp() * (p - q)).sum(-1).mean(),
    }[name]()
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(student.model.parameters()))])
    assert (gradient - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("name", ["power", "zscore", "reverse_kl"])
def test_rollouts_with_nothing_to_train_on_change_nothing(
    name: str, make_student: Callable[..., Student], teacher: HFTeacher
) -> None:
    """Each in a micro-batch of its own, which then has no loss token."""
    student, rollouts = make_student(), make_rollouts(LENGTHS)
    one = next(rollout for rollout in rollouts if len(rollout) == 1)
    rest = [rollout for rollout in rollouts if rollout is not one]
    masked = {"masked_ids": [9]}
    untrained = replace(one, response_ids=(9,))
    rest = [replace(r, response_ids=tuple(id + (id == 9) for id in r.response_ids)) for r in rest]
    whole, gradient = gradient_of(student, teacher, [untrained, *rest], name, tokens=1, **masked)
    assert whole.num_loss_tokens == sum(map(len, rest))
    _, other = gradient_of(student, teacher, rest, name, **masked)
    assert (other - gradient).norm() <= 1e-5 * gradient.norm()
    for nothing in ([untrained], []):
        found, gradient = gradient_of(student, teacher, nothing, name, **masked)
        assert (found.loss, found.num_loss_tokens, gradient.count_nonzero()) == (0, 0, 0)


@pytest.mark.parametrize("tokens", [1, 30, 10_000])
@pytest.mark.parametrize("name", ["power", "reverse_kl", "forward_kl estimator=top_k"])
def test_two_teachers_give_the_sum_of_their_gradients(
    name: str, tokens: int, make_student: Callable[..., Student], teacher: HFTeacher
) -> None:
    """Each weighted by its share of the step's tokens, whatever the micro-batches."""
    by_name = {"a": teacher, "b": HFTeacher(make_model(hidden_size=20, seed=2), vocab_size=512)}
    student, owners = make_student(), "abbab"
    rollouts = [
        replace(rollout, prompt=replace(rollout.prompt, teacher=owner))
        for rollout, owner in zip(make_rollouts(LENGTHS), owners, strict=True)
    ]
    objective = built(name)
    _, gradient = gradient_of(student, RoutedTeacher(by_name), rollouts, objective, tokens)
    total = sum(map(len, rollouts))
    expected = torch.zeros_like(gradient)
    for owner, own_teacher in by_name.items():
        own = [rollout for rollout in rollouts if rollout.prompt.teacher == owner]
        expected += gradient_of(student, own_teacher, own, objective)[1] * sum(map(len, own)) / total
    assert (gradient - expected).norm() <= 1e-5 * expected.norm()


def test_a_mixtures_gradient_equals_plain_autograd(make_student: Callable[..., Student], teacher: HFTeacher) -> None:
    student, rollouts = make_student(), make_rollouts(LENGTHS)
    members = [teacher, HFTeacher(make_model(hidden_size=20, seed=2), vocab_size=512)]
    _, gradient = gradient_of(student, MixtureTeacher(members, [0.6, 0.4]), rollouts, "reverse_kl", tokens=30)
    q = logprobs_of(student.model, rollouts)
    first, second = (logprobs_of(member._model, rollouts).exp().detach() for member in members)
    loss = (q.exp() * (q - (0.6 * first + 0.4 * second).log())).sum(-1).mean()
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(student.model.parameters()))])
    assert (gradient - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])  # packed, and padded
def test_hidden_states_at_loss_are_those_of_each_rollout_alone(
    attention: str, make_student: Callable[..., Student]
) -> None:
    model = make_model()
    model.set_attn_implementation(attention)
    rollouts = make_rollouts(LENGTHS)
    alone = []
    for rollout in rollouts:
        ids = torch.tensor([rollout.prompt.prompt_ids + rollout.response_ids])
        start = len(rollout.prompt.prompt_ids) - 1
        alone.append(model.base_model(input_ids=ids).last_hidden_state[0, start:-1])
    student = make_student(model)
    assert student.packed == (attention == "sdpa")
    got = student.hidden_at_loss(collate([ScoredRollout(rollout) for rollout in rollouts]))
    torch.testing.assert_close(got, torch.cat(alone), rtol=1e-4, atol=1e-5)


def positions_seen(model: PreTrainedModel) -> list[int]:
    """Grows by the positions, padding included, of every forward from now on."""
    seen: list[int] = []
    model.base_model.norm.register_forward_hook(lambda _module, _args, out: seen.append(out.shape[:-1].numel()))
    return seen


def fed(rollouts: list[Rollout]) -> int:
    """Tokens that a model must see to judge every response token."""
    return sum(len(rollout.prompt.prompt_ids) + len(rollout) - 1 for rollout in rollouts)


@pytest.mark.parametrize(
    ("name", "student_forwards", "teacher_forwards"),
    [("power", 1, 1), ("reverse_kl", 1, 1), ("zscore", 2, 1), ("sft", 1, 0)],
)
def test_forwards_per_trained_token(
    name: str, student_forwards: int, teacher_forwards: int, make_student: Callable[..., Student], teacher: HFTeacher
) -> None:
    student, rollouts = make_student(), make_rollouts(LENGTHS)
    by_student, by_teacher = positions_seen(student.model), positions_seen(teacher._model)
    gradient_of(student, teacher, rollouts, name)
    assert sum(by_student) == student_forwards * fed(rollouts)
    assert sum(by_teacher) == teacher_forwards * fed(rollouts)


MERGED = tuple(range(60))  # so many that some answers end with one


def sampled_rollouts(model: PreTrainedModel) -> list[Rollout]:
    """The student's own: two answers to each of three prompts, whose ends count as one outcome."""
    prompts = [rollout.prompt for rollout in make_rollouts([(3, 1), (6, 1), (1, 1)])]
    sampling = Sampling(stop_ids=MERGED, max_new_tokens=12, samples_per_prompt=2)
    rollouts = HFEngine(model, vocab_size=512, pad_id=END, end_ids=MERGED).generate(prompts, sampling, seed=5)
    assert {rollout.finish_reason for rollout in rollouts} == {"stop", "length"}
    return rollouts


@pytest.mark.parametrize(
    "name",
    [
        "zscore",
        "power normalize=zscore",
        "power normalize=sign_max_abs baseline=leave_one_out",
        "log_ratio discount=0.9",
        "log_ratio normalize=zscore discount=0.5 reference_kl=0.1 reference_kl_form=k1_reward",
        "power normalize=zscore reference_kl=0.1 reference_kl_form=full",
    ],
)
def test_rollouts_tell_what_a_forward_would(name: str, make_student: Callable[..., Student]) -> None:
    student, objective = make_student(end_ids=MERGED), built(name)
    teacher = HFTeacher(make_model(hidden_size=24, seed=1), vocab_size=512, end_ids=MERGED)
    rollouts = sampled_rollouts(student.model)
    seen = positions_seen(student.model)
    slow, gradient = gradient_of(student, teacher, rollouts, objective, tokens=30)
    assert sum(seen) == 2 * fed(rollouts)
    seen.clear()
    fast, other = gradient_of(student, teacher, rollouts, objective, tokens=30, version=0, rollouts_tell=True)
    assert sum(seen) == fed(rollouts)
    assert (other - gradient).norm() <= 1e-5 * gradient.norm()
    for mine, theirs in zip(fast.terms, slow.terms, strict=True):
        torch.testing.assert_close(mine.advantages, theirs.advantages, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("why", ["entropies", "exact baseline", "another version", "untold", "teacher", "reshaped"])
def test_rollouts_that_do_not_tell_cost_a_forward(why: str, make_student: Callable[..., Student]) -> None:
    student = make_student(end_ids=MERGED)
    teacher = HFTeacher(make_model(hidden_size=24, seed=1), vocab_size=512, end_ids=MERGED)
    rollouts = sampled_rollouts(student.model)
    name = {"entropies": "reopold", "exact baseline": "power baseline=exact normalize=zscore"}.get(why, "zscore")
    if why == "untold":
        rollouts[2] = replace(rollouts[2], rollout_logprobs=(*rollouts[2].rollout_logprobs[:-1], float("nan")))
    if why == "teacher":
        rollouts[1] = replace(rollouts[1], source="teacher")
    seen = positions_seen(student.model)
    version, tell = 1 if why == "another version" else 0, why != "reshaped"
    gradient_of(student, teacher, rollouts, built(name), version=version, rollouts_tell=tell)
    assert sum(seen) == 2 * fed(rollouts)


def test_only_response_positions_reach_the_heads(
    make_student: Callable[..., Student], teacher: HFTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    from poweropd.objectives import lm_head

    of_student, of_teacher = [], []
    products, panels = lm_head.Tiles.products, lm_head.Panels.of

    def seen(counts: list[int], rows: slice, found: Any) -> Any:
        counts.append(rows.stop - rows.start)
        return found

    monkeypatch.setattr(lm_head.Tiles, "products", lambda own, rows: seen(of_student, rows, products(own, rows)))
    monkeypatch.setattr(lm_head.Panels, "of", lambda own, rows: seen(of_teacher, rows, panels(own, rows)))
    rollouts = make_rollouts([(40, 3), (60, 2)])
    gradient_of(make_student(), teacher, rollouts, "power")
    assert sum(of_student) == sum(of_teacher) == 5  # response tokens


def test_end_token_policies(make_student: Callable[..., Student]) -> None:
    """A student that ends with one token and a teacher that ends with another."""
    base = make_rollouts([(3, 4), (2, 5)])
    teacher_model = make_model(hidden_size=24, seed=1)
    ends = (END, CHAT_END)
    plain_teacher = HFTeacher(teacher_model, vocab_size=512)
    merging_teacher = HFTeacher(teacher_model, vocab_size=512, end_ids=ends)

    kept, _ = gradient_of(make_student(), plain_teacher, base, "log_ratio")
    mapped, _ = gradient_of(make_student(end_ids=ends), merging_teacher, base, "log_ratio")
    masked, _ = gradient_of(make_student(), plain_teacher, base, "log_ratio", masked_end_ids=ends)
    assert masked.num_loss_tokens == kept.num_loss_tokens - 2
    for before, after in zip(kept.terms, mapped.terms, strict=True):
        torch.testing.assert_close(before.advantages[:-1], after.advantages[:-1], rtol=1e-4, atol=1e-5)
        assert after.teacher_logprobs[-1] > before.teacher_logprobs[-1]  # the teacher's own end token is counted in
        assert after.logprobs[-1] > before.logprobs[-1]


def test_bf16_gradient_stays_near_fp32(make_student: Callable[..., Student], teacher: HFTeacher) -> None:
    rollouts = make_rollouts(LENGTHS)
    _, exact = gradient_of(make_student(), teacher, rollouts, "reverse_kl")
    _, rough = gradient_of(make_student(precision=torch.bfloat16), teacher, rollouts, "reverse_kl")
    assert torch.nn.functional.cosine_similarity(exact, rough, dim=0) > 0.99


def test_gradient_checkpointing_changes_nothing(make_student: Callable[..., Student], teacher: HFTeacher) -> None:
    rollouts = make_rollouts(LENGTHS)
    _, plain = gradient_of(make_student(), teacher, rollouts, "power")
    _, recomputed = gradient_of(make_student(gradient_checkpointing=True), teacher, rollouts, "power")
    torch.testing.assert_close(plain, recomputed)

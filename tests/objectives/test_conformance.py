"""Every row of the objective table passes every generic test. A new row inherits them.

The enumeration: on a small vocabulary the expected gradient of a sampled objective is a finite sum, so it can be
compared with a closed form to rounding. References here are written in probability space, from the definitions.
"""

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from poweropd.objectives import OBJECTIVES, Objective, RewardStatistics, build
from poweropd.objectives.fused import LMHead
from poweropd.objectives.loss import TeacherOutputs, loss_of

# methods.md section 6: the fixture of the golden numbers
TEACHER = torch.tensor([0.5, 0.25, 0.15, 0.07, 0.03], dtype=torch.float64)
STUDENT = torch.tensor([0.2, 0.3, 0.05, 0.35, 0.1], dtype=torch.float64)

SAMPLED = [name for name, row in OBJECTIVES.items() if row.reward and not row.on_golden_answers]
FULL = [name for name, row in OBJECTIVES.items() if row.divergence]


def expected_update(advantage: Tensor, q: Tensor) -> Tensor:
    """E_{v~q}[A(v) grad_logits log q(v)] = q (A - E_q A)."""
    return q * (advantage - (q * advantage).sum())


def random_pair(seed: int, size: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    p, q = torch.randn(2, size, dtype=torch.float64, generator=generator).mul(1.5).softmax(-1)
    return p, q


def alphas_and_defaults(name: str) -> list[dict[str, float]]:
    settings = OBJECTIVES[name].settings
    if "alpha" in settings:
        return [{"alpha": a} for a in (0.1, 0.5, 1.0, 5.0, 10.0)]
    return [{"weight": w} for w in (0.1, 0.5, 0.9)] if "weight" in settings else [{}]


NO_FIXED_TARGET = {"sign_max_abs"}  # its scale depends on the batch; pinned by value below


def cases(names: list[str]) -> list:
    return [pytest.param(build(n, **s), id=f"{n}-{s}") for n in names for s in alphas_and_defaults(n)]


# What each objective says its gradient is of, written again from its definition, in probability space.
def _clip_generator(u: Tensor, c: float) -> Tensor:
    """f of the f-divergence whose exact gradient the clipped log-ratio follows (bounds -c and c)."""
    e = torch.tensor(c).double().exp()
    inside = u - 1 - u.log()
    above, below = u * (1 - 1 / e) - c, u * (1 - e) + c
    return torch.where(u > e, above, torch.where(u < 1 / e, below, inside))


def target(name: str, p: Tensor, q: Tensor, **s: float) -> Tensor:
    if name in ("log_ratio", "zscore"):
        return (q * (q / p).log()).sum()
    if name in ("power", "exact_power", "box_cox"):
        a = s["alpha"]
        bregman = (q ** (1 + a) / (1 + a) - q * p**a + a * p ** (1 + a) / (1 + a)).sum()
        return bregman / a if name == "box_cox" else bregman
    if name == "clip":
        return (q * _clip_generator(p / q, 1.0)).sum()
    if name == "reverse_kl":
        return (q * (q / p).log()).sum()
    if name == "forward_kl":
        return (p * (p / q).log()).sum()
    if name == "generalized_jsd":
        w = s["weight"]
        m = w * p + (1 - w) * q
        return w * (p * (p / m).log()).sum() + (1 - w) * (q * (q / m).log()).sum()
    if name == "tanh":
        return (q * _generator_of(lambda ratio: torch.tanh(ratio.log() / s["tau"]), p / q)).sum()
    raise AssertionError(f"write down what the gradient of {name} is of")


def _generator_of(advantage: Callable[[Tensor], Tensor], u: Tensor) -> Tensor:
    """f(u) = u * integral_1^u a(s)/s^2 ds: the f-divergence whose gradient a non-decreasing advantage follows.

    By the trapezium rule in v = 1/s, where ds/s^2 = -dv.
    """
    share = torch.linspace(0, 1, 20_001, dtype=u.dtype)
    v = 1 + share[:, None] * (1 / u - 1)
    return -u * torch.trapezoid(advantage(1 / v), v, dim=0)


def target_gradient(name: str, p: Tensor, q: Tensor, **s: float) -> Tensor:
    logits = q.log().requires_grad_()
    return torch.autograd.grad(target(name, p, logits.softmax(-1), **s), logits)[0]


@pytest.mark.parametrize("objective", cases([name for name in SAMPLED if name not in NO_FIXED_TARGET]))
@pytest.mark.parametrize("seed", range(4))
def test_expected_sampled_gradient_is_the_declared_one(objective: Objective, seed: int) -> None:
    p, q = random_pair(seed)
    expected = -target_gradient(objective.name, p, q, **objective.settings)
    advantage = objective.sampled(q.log(), p.log(), RewardStatistics(count=1, total=0.7, square_total=4.49))
    if objective.name == "zscore":  # mean 0.7, standard deviation 2: the shift vanishes, the scale stays
        expected = expected / 2
    torch.testing.assert_close(expected_update(advantage, q), expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("objective", cases(FULL))
@pytest.mark.parametrize("seed", range(4))
def test_full_gradient_is_the_declared_one(objective: Objective, seed: int) -> None:
    p, q = random_pair(seed)
    logits = q.log().requires_grad_()
    value = objective.full(logits.log_softmax(-1), p.log())
    torch.testing.assert_close(value, target(objective.name, p, q, **objective.settings), rtol=1e-9, atol=1e-12)
    (gradient,) = torch.autograd.grad(value, logits)
    torch.testing.assert_close(gradient, target_gradient(objective.name, p, q, **objective.settings))


@pytest.mark.parametrize("objective", cases(FULL))
def test_divergences_are_positive_and_zero_only_at_the_teacher(objective: Objective) -> None:
    for seed in range(20):
        p, q = random_pair(seed)
        assert objective.full(q.log(), p.log()) > 0
        assert objective.full(p.log(), p.log()).abs() < 1e-12


@pytest.mark.parametrize("objective", cases(SAMPLED + FULL))
def test_nothing_moves_when_the_student_is_the_teacher(objective: Objective) -> None:
    p, _ = random_pair(0)
    if objective.needs == "full":
        logits = p.log().requires_grad_()
        (gradient,) = torch.autograd.grad(objective.full(logits.log_softmax(-1), p.log()), logits)
        assert gradient.abs().max() < 1e-12
    else:
        assert objective.sampled(p.log(), p.log()).abs().max() < 1e-12


@pytest.mark.parametrize("objective", cases(SAMPLED))
def test_rewards_are_detached_and_have_the_sign_of_p_minus_q(objective: Objective) -> None:
    p, q = random_pair(1)
    logq = q.log().requires_grad_()
    reward = objective.reward(logq, p.log())
    assert not reward.requires_grad
    assert torch.equal(reward.sign(), (p - q).sign())


GOLDEN = {  # methods.md 6.A: reward, expected update G
    ("log_ratio", None): (
        [0.916291, -0.182322, 1.098612, -1.609438, -1.203973],
        [0.283300, 0.095366, 0.079941, -0.388230, -0.070376],
    ),
    ("power", 0.1): (
        [0.081693, -0.016018, 0.086063, -0.133845, -0.090102],
        [0.024342, 0.007201, 0.006304, -0.032839, -0.005008],
    ),
    ("power", 0.5): (
        [0.259893, -0.047723, 0.163692, -0.327033, -0.143023],
        [0.068562, 0.010558, 0.012330, -0.085440, -0.006011],
    ),
    ("power", 1.0): ([0.3, -0.05, 0.1, -0.28, -0.07], [0.071, 0.0015, 0.00775, -0.07875, -0.0015]),
    ("power", 5.0): (
        [0.030930, -0.001453, 0.000076, -0.005251, -0.000010],
        [0.005403, -0.001611, -0.000192, -0.003208, -0.000393],
    ),
}


@pytest.mark.parametrize(("name", "alpha"), GOLDEN)
def test_golden_rewards_and_updates(name: str, alpha: float | None) -> None:
    objective = build(name, **({} if alpha is None else {"alpha": alpha}))
    reward, update = (torch.tensor(values, dtype=torch.float64) for values in GOLDEN[name, alpha])
    got = objective.sampled(STUDENT.log(), TEACHER.log())
    torch.testing.assert_close(got, reward, rtol=0, atol=1e-6)
    torch.testing.assert_close(expected_update(got, STUDENT), update, rtol=0, atol=1e-6)


def test_golden_divergences() -> None:
    student, teacher = STUDENT.log(), TEACHER.log()
    assert build("reverse_kl").full(student, teacher).item() == pytest.approx(0.500208256, abs=1e-9)
    assert build("forward_kl").full(student, teacher).item() == pytest.approx(0.428576982, abs=1e-9)
    assert build("generalized_jsd").full(student, teacher).item() == pytest.approx(0.108311, abs=1e-6)


def test_bounded_rewards_stay_in_their_bounds() -> None:
    student, teacher = -torch.rand(2, 10_000).mul(60)
    assert build("clip").sampled(student, teacher).abs().max() == 1
    assert build("tanh").sampled(student, teacher).abs().max() <= 1
    for alpha in (0.1, 1, 500):
        assert build("power", alpha=alpha).sampled(student, teacher).abs().max() <= 1
    shaped = build("sign_max_abs").sampled(student, teacher)
    assert shaped.max() == 1
    assert shaped.min() == -1


def test_tanh_by_value() -> None:
    got = build("tanh", tau=2.0).sampled(torch.tensor([-3.0]), torch.tensor([-1.0]))
    assert got.item() == pytest.approx(0.76159416)  # tanh(1)


def test_sign_max_abs_by_value() -> None:
    got = build("sign_max_abs").sampled(torch.zeros(4), torch.tensor([2.0, 1.0, -5.0, -10.0]))
    assert got.tolist() == [1.0, 0.5, -0.5, -1.0]


def test_box_cox_tends_to_the_log_ratio_in_fp32() -> None:
    student, teacher = torch.tensor([-3.0, -0.01]), torch.tensor([-1.0, -20.0])
    got = build("box_cox", alpha=1e-6).sampled(student, teacher)
    torch.testing.assert_close(got, teacher - student, rtol=1e-4, atol=0)


def test_statistics_of_parts_add_up() -> None:
    rewards = torch.randn(1000).mul(5)
    parts = sum((RewardStatistics.of(part) for part in rewards.split(37)), RewardStatistics())
    whole = RewardStatistics.of(rewards)
    assert parts.mean == pytest.approx(whole.mean)
    assert parts.deviation == pytest.approx(rewards.double().std(unbiased=False).item())
    assert (parts.largest, parts.smallest) == (rewards.max().item(), rewards.min().item())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_any_split_into_micro_batches_gives_the_same_gradient(name: str) -> None:
    """Loss and gradient of the whole equal the sums over parts, with the whole's denominator and statistics."""
    objective = build(name)
    hidden, teacher_hidden = torch.randn(11, 8), torch.randn(11, 12)
    weight, teacher_weight = torch.randn(16, 8), torch.randn(17, 12)
    targets = torch.randint(0, 15, (11,))
    teacher_head = LMHead(teacher_weight, vocab_size=15)
    teacher_logprobs = torch.log_softmax(teacher_hidden @ teacher_weight[:15].T, -1).gather(1, targets[:, None])[:, 0]
    student_logprobs = torch.log_softmax(hidden @ weight[:15].T, -1).gather(1, targets[:, None])[:, 0]
    statistics = (
        RewardStatistics.of(objective.reward(student_logprobs, teacher_logprobs))
        if objective.needs_batch_statistics
        else None
    )

    def run(splits: list[int]) -> tuple[float, Tensor, Tensor]:
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        total, start = 0.0, 0
        for size in splits:
            part = slice(start, start + size)
            start += size
            teacher = TeacherOutputs(teacher_logprobs[part], teacher_hidden[part], teacher_head)
            terms = loss_of(
                objective, h[part], LMHead(w, vocab_size=15), targets[part], teacher,
                denominator=11, statistics=statistics,
            )  # fmt: skip
            terms.loss.backward()
            total += terms.loss.item()
        assert h.grad is not None
        assert w.grad is not None
        return total, h.grad, w.grad

    loss, dh, dw = run([11])
    for splits in ([1] * 11, [4, 7], [10, 1]):
        other_loss, other_dh, other_dw = run(splits)
        assert other_loss == pytest.approx(loss, rel=1e-5, abs=1e-7)
        assert (other_dh - dh).norm() <= 1e-5 * dh.norm()
        assert (other_dw - dw).norm() <= 1e-5 * dw.norm()


def test_the_teacher_gets_no_gradient() -> None:
    for name in FULL:
        teacher = TEACHER.log().requires_grad_()
        student = STUDENT.log().requires_grad_()
        build(name).full(student, teacher).backward()
        assert teacher.grad is None
        assert student.grad is not None


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("powr", {}, "did you mean 'power'"),
        ("power", {"alpha": 0}, "objective.alpha: 0 is outside (0, inf)"),
        ("power", {"alpha": -1}, "outside"),
        ("power", {"alpha": "five"}, "outside"),
        ("power", {"alfa": 5}, "did you mean 'alpha'"),
        ("log_ratio", {"alpha": 5}, "log_ratio has no such setting; known: none"),
        ("generalized_jsd", {"weight": 1.0}, "outside (0, 1)"),
        ("clip", {"low": 1.0}, "outside (-inf, 0)"),
    ],
)
def test_bad_settings_are_refused(name: str, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        build(name, **settings)


def test_a_missing_form_is_refused_with_the_alternatives() -> None:
    with pytest.raises(ValueError, match=r"no sampled form.*power"):
        build("reverse_kl").sampled(torch.zeros(1), torch.zeros(1))
    with pytest.raises(ValueError, match=r"no full-vocabulary form.*reverse_kl"):
        build("power").full(torch.zeros(1, 2), torch.zeros(1, 2))

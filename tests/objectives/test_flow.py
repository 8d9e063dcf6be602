"""Where updates lead: the expected update at one position, followed step by step in the student's logits."""

import pytest
import torch
from torch import Tensor

from poweropd.objectives import Objective, build, row_of, settings_of

P = torch.tensor([0.5, 0.25, 0.15, 0.07, 0.03], dtype=torch.float64)  # teacher
Q = torch.tensor([0.2, 0.3, 0.05, 0.35, 0.1], dtype=torch.float64)  # student

RATIO_FORMS = [
    "reverse_kl", "forward_kl", "jensen_shannon", "pearson_chi2", "neyman_chi2", "squared_hellinger", "jeffreys"
]  # fmt: skip


def make(name: str, **settings) -> Objective:
    chosen = {"estimator": "sampled"} if "estimator" in settings_of(row_of(name)) else {}
    return build(name, **chosen, **settings)


def moved(objective: Objective, logits: Tensor, p: Tensor, lr: float) -> Tensor:
    """One step along `q (A - E_q A)`."""
    logq = logits.log_softmax(-1)
    q, a = logq.exp(), objective.sampled(logq, p.log().expand_as(logq))
    return logq + lr * q * (a - (q * a).sum(-1, keepdim=True))


def follow(objective: Objective, q: Tensor, p: Tensor = P, *, lr: float, steps: int) -> Tensor:
    logits = q.log()
    for _ in range(steps):
        logits = moved(objective, logits, p, lr)
    return logits.softmax(-1)


def steps_to_collapse(objective: Objective, q: Tensor, limit: int) -> int | None:
    """The first step of 0.1 after which some token is below 1e-6."""
    logits = q.log()
    for at in range(1, limit + 1):
        logits = moved(objective, logits, P, 0.1)
        if logits.softmax(-1).min() < 1e-6:
            return at
    return None


def starts(count: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, size, generator=generator, dtype=torch.float64).softmax(-1)


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("forward_kl", 38),
        ("jensen_shannon", 568),
        ("pearson_chi2", 17),
        ("neyman_chi2", 199),
        ("squared_hellinger", 244),
        ("total_variation", 298),
        ("jeffreys", 50),
    ],
)
def test_stop_gradient_collapses(name, steps):
    assert steps_to_collapse(make(name, gauge="stop_gradient"), Q, 600) == steps


def test_stop_gradient_of_the_reverse_kl_does_not_collapse():
    assert steps_to_collapse(make("reverse_kl", gauge="stop_gradient"), Q, 1500) is None


@pytest.mark.parametrize(
    ("name", "steps"), [("forward_kl", 176), ("jensen_shannon", None), ("pearson_chi2", None), ("neyman_chi2", None)]
)
def test_near_the_teacher_only_the_forward_kl_collapses_soon(name, steps):
    """The rest move in second order there."""
    assert steps_to_collapse(make(name, gauge="stop_gradient"), P + 0.01 * (Q - P), 1000) == steps


@pytest.mark.parametrize("gauge", ["zero", "opd_plus"])
@pytest.mark.parametrize("name", RATIO_FORMS)
def test_corrected_forms_reach_the_teacher(name, gauge):
    assert steps_to_collapse(make(name, gauge=gauge), Q, 600) is None
    reached = follow(make(name, gauge=gauge), Q, lr=1.0, steps=1200)
    torch.testing.assert_close(reached, P, rtol=0, atol=1e-5)


def test_total_variation_gets_as_near_as_its_step():
    """Its advantage does not shrink, so a fixed step circles the teacher."""
    far, near = ((follow(make("total_variation"), Q, lr=lr, steps=6000) - P).abs().max() for lr in (0.1, 0.01))
    assert 1e-5 < near < far / 5 < 0.01


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("clip", {"low": -1, "high": 1}),
        ("tanh", {"tau": 1}),
        ("tanh", {"tau": 5}),
        ("vopd", {}),
        ("power", {"alpha": 0.1}),
    ],
)
def test_bounded_rewards_reach_the_teacher(name, settings):
    lr = 5.0 if name in ("tanh", "power") else 1.0
    torch.testing.assert_close(follow(make(name, **settings), Q, lr=lr, steps=1500), P, rtol=0, atol=1e-5)


@pytest.mark.parametrize("alpha", [0.5, 1, 2])
def test_power_falls_at_every_step_and_reaches_the_teacher(alpha):
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    objective, value = make("power", alpha=alpha), build("power", alpha=alpha)
    logits = starts(8, 3).log()
    values = [value.full(logits.log_softmax(-1), p.log().expand_as(logits))]
    for _ in range(800):
        logits = moved(objective, logits, p, 3.0)
        values.append(value.full(logits.log_softmax(-1), p.log().expand_as(logits)))
    assert (torch.stack(values).diff(dim=0) <= 1e-16).all()
    torch.testing.assert_close(logits.softmax(-1), p.expand_as(logits), rtol=0, atol=1e-5)


@pytest.mark.parametrize("alpha", [50, 500])
def test_a_large_alpha_is_frozen_where_nobody_is_certain(alpha):
    """No step is longer than the largest probability to the power of alpha: .5^50 is 9e-16."""
    assert (follow(make("power", alpha=alpha), Q, lr=20_000.0, steps=100) - Q).abs().max() < 1e-8


def test_a_large_alpha_moves_where_the_teacher_or_the_student_is_certain():
    sure, unsure = torch.tensor([0.998, 0.001, 0.001]).double(), torch.tensor([0.4, 0.35, 0.25]).double()
    objective = make("power", alpha=500)
    assert follow(objective, unsure, sure, lr=1.0, steps=200)[0] > 0.9
    assert follow(objective, sure, unsure, lr=1.0, steps=2000)[0] < 0.995
    assert (follow(objective, unsure, unsure.flip(0), lr=1.0, steps=200) - unsure).abs().max() < 1e-12


def test_alpha_500_leaves_a_confident_mistake_as_soon_as_it_is_less_than_certain():
    """It ends near .98, where .98^500 is 4e-5: far from the teacher's .4."""
    sure, unsure = torch.tensor([0.998, 0.001, 0.001]).double(), torch.tensor([0.4, 0.35, 0.25]).double()
    assert follow(make("power", alpha=500), sure, unsure, lr=1.0, steps=2000)[0] > 0.95
    assert follow(make("power", alpha=1), sure, unsure, lr=1.0, steps=2000)[0] < 0.45


@pytest.mark.parametrize(("name", "settings"), [("log_ratio", {}), ("power", {"alpha": 1}), ("clip", {})])
def test_a_token_that_the_student_all_but_never_emits_stays_there(name, settings):
    """Its logit moves at rate q; the forward KL, whose advantage holds 1/q, is the one that fetches it back."""
    q, p = torch.tensor([0.6, 0.4 - 1e-8, 1e-8]).double(), torch.tensor([0.5, 0.2, 0.3]).double()
    assert follow(make(name, **settings), q, p, lr=1.0, steps=1000)[2] < 1e-5
    assert follow(make("forward_kl"), q, p, lr=1.0, steps=1000)[2] > 0.29


def adam(objective: Objective, steps: int = 50) -> Tensor:
    logits = Q.log().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.01)
    for _ in range(steps):
        logits.grad = logits.detach() - moved(objective, logits.detach(), P, 1.0)
        logits.grad -= logits.grad.mean()
        optimizer.step()
    return logits.detach().softmax(-1)


def test_adam_hides_the_scale_of_a_reward_until_its_epsilon():
    torch.testing.assert_close(adam(make("power", alpha=5)), adam(make("box_cox", alpha=5)), rtol=0, atol=1e-4)
    plain = [follow(make(name, alpha=5), Q, lr=1.0, steps=20) - Q for name in ("power", "box_cox")]
    assert plain[0].norm() > 4 * plain[1].norm()
    assert (adam(make("power", alpha=10)) - Q).abs().max() > 0.01
    assert (adam(make("power", alpha=50)) - Q).abs().max() < 1e-6  # gradients of 1e-16 beside an epsilon of 1e-8


def test_clipping_takes_the_scale_from_large_gradients_alone():
    def clipped(name: str) -> Tensor:
        logits = Q.log().requires_grad_()
        logits.grad = logits.detach() - moved(
            make(name, **({} if name == "log_ratio" else {"alpha": 5})), Q.log(), P, 1.0
        )
        torch.nn.utils.clip_grad_norm_([logits], 0.1)
        return logits.grad

    assert clipped("log_ratio").norm().item() == pytest.approx(0.1, rel=1e-4)
    assert clipped("power").norm().item() == pytest.approx(0.0065, abs=1e-4)

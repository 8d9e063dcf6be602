"""What each objective is, against references written again from the definitions, in probability space.

Expected updates are finite sums over a small vocabulary, so they are compared to rounding. Numbers are those of
methods.md, section 6.
"""

import itertools
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from poweropd.objectives import Objective, build, divergence_of, from_derivative, from_generator, row_of, settings_of
from poweropd.objectives.bregman import power
from poweropd.objectives.conformance import fused_gradients, inputs_of, of_logits
from poweropd.objectives.csiszar import clip, limited, reverse_kl, tanh
from poweropd.objectives.divergences import coarsen
from poweropd.objectives.loss import loss_of
from poweropd.objectives.positions import TokenInputs
from poweropd.objectives.shaping import StepTokens, zscore

P = np.array([0.5, 0.25, 0.15, 0.07, 0.03])  # teacher
Q = np.array([0.2, 0.3, 0.05, 0.35, 0.1])  # student
NEVER = -1e9


def ratio_form(name, f, w, **settings):
    label = "-".join([name, *(f"{value:g}" for value in settings.values())])
    return pytest.param(name, settings, f, w, id=label)


def _jsd(b):
    def f(u):
        mixed = b * u + 1 - b
        return b * u * np.log(u / mixed) - (1 - b) * np.log(mixed)

    return f, lambda u: (1 - b) * np.log(b * u + 1 - b)


def _cressie_read(a):
    return lambda u: (u**a - 1) / (a * (a - 1)) - (u - 1) / (a - 1), lambda u: (u**a - 1) / a


# f of D_f(p || q) = sum q f(p/q), and the advantage u f' - f of OPD+ worked out by hand
RATIO_FORMS = [
    ratio_form("reverse_kl", lambda u: -np.log(u), lambda u: np.log(u) - 1),
    ratio_form("forward_kl", lambda u: u * np.log(u), lambda u: u),
    ratio_form(
        "jensen_shannon",
        lambda u: (u * np.log(u) - (1 + u) * np.log((1 + u) / 2)) / 2,
        lambda u: np.log((1 + u) / 2) / 2,
    ),
    *(ratio_form("generalized_jsd", *_jsd(b), weight=b) for b in (0.1, 0.5, 0.9)),
    ratio_form("pearson_chi2", lambda u: (u - 1) ** 2, lambda u: u**2 - 1),
    ratio_form("neyman_chi2", lambda u: (u - 1) ** 2 / u, lambda u: 2 - 2 / u),
    ratio_form("squared_hellinger", lambda u: (np.sqrt(u) - 1) ** 2, lambda u: np.sqrt(u) - 1),
    ratio_form("total_variation", lambda u: np.abs(u - 1) / 2, lambda u: np.sign(u - 1) / 2),
    ratio_form("jeffreys", lambda u: (u - 1) * np.log(u), lambda u: np.log(u) + u - 1),
    *(ratio_form("cressie_read", *_cressie_read(a), alpha=a) for a in (-1.0, 0.5, 2.0, 3.0)),
]
over_ratio_forms = pytest.mark.parametrize(("name", "settings", "f", "w"), RATIO_FORMS)


def make(name: str, **settings) -> Objective:
    """With estimator sampled where there is a choice."""
    chosen = {"estimator": "sampled"} if "estimator" in settings_of(row_of(name)) else {}
    return build(name, **chosen, **settings)


def log(x: np.ndarray) -> Tensor:
    return torch.tensor(np.log(x))


def advantage(objective: Objective, q: np.ndarray = Q, p: np.ndarray = P) -> np.ndarray:
    return objective.sampled(log(q), log(p)).numpy()


def update(a: np.ndarray, q: np.ndarray = Q) -> np.ndarray:
    """`E_{v ~ q}[a(v) grad log q(v)]` in logits."""
    return q * (a - q @ a)


def descent(divergence, q: np.ndarray = Q, p: np.ndarray = P, step: float = 1e-6) -> np.ndarray:
    """-grad in logits of a function of the two distributions, by central differences."""

    def at(shift: np.ndarray) -> float:
        moved = q * np.exp(shift)
        return divergence(moved / moved.sum(), p)

    return np.array([(at(-step * e) - at(step * e)) / (2 * step) for e in np.eye(len(q))])


def through_loss(objective: Objective, weights: np.ndarray = Q, q: np.ndarray = Q, p: np.ndarray = P) -> np.ndarray:
    """The update expected by the loss that training uses, tokens drawn with `weights`."""
    size = len(q)
    gradients = fused_gradients(objective, log(q).expand(size, -1), log(p).expand(size, -1), torch.arange(size))
    return -weights @ gradients.numpy()


def kl(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * (np.log(a) - np.log(b))).sum())


def bregman(alpha: float):
    return lambda q, p: float(
        (q ** (1 + alpha) / (1 + alpha) - q * p**alpha + alpha * p ** (1 + alpha) / (1 + alpha)).sum()
    )


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def random_pairs(count: int, size: int, concentration: float = 1.0) -> np.ndarray:
    """[count, 2, size]"""
    drawn = np.random.default_rng(0).dirichlet([concentration] * size, (count, 2))
    return np.maximum(drawn, 1e-12) / np.maximum(drawn, 1e-12).sum(-1, keepdims=True)


close = np.testing.assert_allclose


# Golden numbers: advantages, expected updates, values


@pytest.mark.parametrize(
    ("name", "settings", "r", "g"),
    [
        ("log_ratio", {}, [0.916291, -0.182322, 1.098612, -1.609438, -1.203973],
         [0.283300, 0.095366, 0.079941, -0.388230, -0.070376]),
        ("power", {"alpha": 0.1}, [0.081693, -0.016018, 0.086063, -0.133845, -0.090102],
         [0.024342, 0.007201, 0.006304, -0.032839, -0.005008]),
        ("power", {"alpha": 0.5}, [0.259893, -0.047723, 0.163692, -0.327033, -0.143023],
         [0.068562, 0.010558, 0.012330, -0.085440, -0.006011]),
        ("power", {"alpha": 1}, [0.3, -0.05, 0.1, -0.28, -0.07], [0.071, 0.0015, 0.00775, -0.07875, -0.0015]),
        ("power", {"alpha": 5}, [0.030930, -0.001453, 0.000076, -0.005251, -0.000010],
         [0.005403, -0.001611, -0.000192, -0.003208, -0.000393]),
        ("power", {"alpha": 10}, [0.000976, -0.000005, 0.000000, -0.000028, -0.000000],
         [0.000158, -0.000057, -0.000009, -0.000074, -0.000018]),
    ],
)  # fmt: skip
def test_golden_advantages_and_updates(name, settings, r, g):
    objective = make(name, **settings)
    close(advantage(objective), r, atol=6e-7)
    close(through_loss(objective), g, atol=6e-7)


@pytest.mark.parametrize(
    ("name", "value", "within"),
    [
        ("reverse_kl", 0.500208256, 1e-9),
        ("forward_kl", 0.428576982, 1e-9),
        ("jensen_shannon", 0.108311, 5e-7),
        ("pearson_chi2", 0.931333, 5e-7),
        ("neyman_chi2", 1.54, 1e-12),
        ("squared_hellinger", 0.224023, 5e-7),
        ("total_variation", 0.4, 1e-12),
        ("jeffreys", 0.500208256 + 0.428576982, 2e-9),
    ],
)
def test_golden_values(name, value, within):
    assert build(name).full(log(Q), log(P)).item() == pytest.approx(value, abs=within)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1, 5, 10])
def test_value_of_power_is_its_bregman_divergence(alpha):
    for q, p in random_pairs(20, 6):
        assert build("power", alpha=alpha).full(log(q), log(p)).item() == pytest.approx(bregman(alpha)(q, p), abs=1e-14)


def test_power_1_is_half_the_squared_distance():
    assert build("power", alpha=1).full(log(Q), log(P)).item() == pytest.approx(((P - Q) ** 2).sum() / 2)


# f-divergences


@over_ratio_forms
def test_value_is_that_of_its_generator(name, settings, f, w):
    for q, p in [(Q, P), *random_pairs(20, 6)]:
        assert build(name, **settings).full(log(q), log(p)).item() == pytest.approx((q * f(p / q)).sum(), rel=1e-9)


@over_ratio_forms
def test_advantage_is_opd_plus_less_its_value_at_agreement(name, settings, f, w):
    close(advantage(make(name, **settings)), w(P / Q) - w(np.ones(5)), atol=1e-12)


@over_ratio_forms
def test_gauge_opd_plus_is_the_papers_advantage(name, settings, f, w):
    u = P / Q
    slope = (f(u + 1e-6) - f(u - 1e-6)) / 2e-6
    close(w(u), u * slope - f(u), atol=1e-7)
    close(advantage(make(name, **settings, gauge="opd_plus")), w(u), atol=1e-12)


@over_ratio_forms
@pytest.mark.parametrize("gauge", ["zero", "opd_plus"])
def test_corrected_update_descends_the_divergence(name, settings, f, w, gauge):
    for q, p in [(Q, P), *random_pairs(5, 6, 3.0)]:
        want = descent(lambda q, p: (q * f(p / q)).sum(), q, p)
        close(through_loss(make(name, **settings, gauge=gauge), q, q, p), want, atol=1e-8 + 1e-7 * np.abs(want).max())


@over_ratio_forms
def test_the_exact_estimator_descends_the_same(name, settings, f, w):
    for q, p in [(Q, P), *random_pairs(3, 6, 3.0)]:
        want = descent(lambda q, p: (q * f(p / q)).sum(), q, p)
        exact = through_loss(build(name, **settings, estimator="full"), q, q, p)
        close(exact, want, atol=1e-8 + 1e-7 * np.abs(want).max())


@pytest.mark.parametrize(
    ("name", "settings", "cos"),
    [
        ("reverse_kl", {}, 1.0),
        ("forward_kl", {}, -0.964),
        ("jensen_shannon", {}, 0.019),
        ("pearson_chi2", {}, -0.890),
        ("neyman_chi2", {}, 0.940),
        ("squared_hellinger", {}, 0.062),
        ("total_variation", {}, -0.797),
        ("jeffreys", {}, 0.108),
        ("generalized_jsd", {"weight": 0.1}, -0.347),
        ("generalized_jsd", {"weight": 0.5}, 0.019),
        ("generalized_jsd", {"weight": 0.9}, 0.431),
    ],
)
def test_stop_gradient_points_elsewhere(name, settings, cos):
    stopped = through_loss(make(name, **settings, gauge="stop_gradient"))
    assert cosine(stopped, through_loss(make(name, **settings))) == pytest.approx(cos, abs=6e-4)


# Gauges: f and f + c (u - 1) are one divergence


@pytest.mark.parametrize("c", [-2.0, 0.7])
def test_a_gauge_shifts_only_the_stop_gradient_update(c):
    plain = from_generator(lambda u: u * u.log())
    shifted = from_generator(lambda u: u * u.log() + c * (u - 1))
    assert shifted.value(log(Q), log(P)).item() == pytest.approx(plain.value(log(Q), log(P)).item())
    assert shifted.constant - plain.constant == pytest.approx(c)
    close(shifted.advantage(log(Q), log(P)).numpy(), plain.advantage(log(Q), log(P)).numpy(), atol=1e-12)
    u = log(P / Q)
    stopped = [update(-divergence.generator(u).numpy()) for divergence in (shifted, plain)]
    close(stopped[0] - stopped[1], -c * (P - Q), atol=1e-12)


@pytest.mark.parametrize("a", [0.3, 0.7, 1.5, 3.0])
def test_in_the_power_gauge_stop_gradient_is_the_right_update_over_1_minus_alpha(a):
    gauge = from_generator(lambda u: (u**a - 1) / (a * (a - 1)))
    right = update(advantage(make("cressie_read", alpha=a)))
    close(update(-gauge.generator(log(P / Q)).numpy()), right / (1 - a), atol=1e-12)


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jensen_shannon", "pearson_chi2", "neyman_chi2"])
def test_near_the_teacher_stop_gradient_follows_minus_the_slope_of_f_at_1(name):
    """-f'(1) (p - q) to first order: towards the teacher for -log u, away from it for u log u, nowhere for the rest."""
    slope = {"reverse_kl": -1, "forward_kl": 1}.get(name, 0)
    q = P + 1e-6 * (Q - P)
    close(update(advantage(make(name, gauge="stop_gradient"), q), q), -slope * (P - q), atol=1e-10)


# PowerOPD


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1, 5, 10])
def test_power_update_descends_its_bregman_divergence(alpha):
    for q, p in [(Q, P), *random_pairs(5, 6)]:
        close(through_loss(make("power", alpha=alpha), q, q, p), descent(bregman(alpha), q, p), atol=1e-9)


def test_exact_power_descends_the_same():
    for q, p in random_pairs(5, 6):
        close(through_loss(build("exact_power", alpha=2), q, q, p), descent(bregman(2), q, p), atol=1e-9)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1, 5, 10])
def test_power_is_the_ratios_box_cox_weighted_by_q_to_the_alpha(alpha):
    of_ratio = ((P / Q) ** alpha - 1) / alpha
    close(advantage(make("power", alpha=alpha)) / alpha, Q**alpha * of_ratio, rtol=1e-12)
    close(advantage(make("box_cox", alpha=alpha)), (P**alpha - Q**alpha) / alpha, atol=1e-15)
    if alpha != 1:
        close(advantage(make("cressie_read", alpha=alpha)), of_ratio, rtol=1e-12)


@pytest.mark.parametrize(("alpha", "gap"), [(0.1, 0.303), (0.01, 0.0345), (0.001, 0.00349), (0.0001, 0.00035)])
def test_box_cox_tends_to_the_log_ratio(alpha, gap):
    difference = np.abs(advantage(make("box_cox", alpha=alpha)) - np.log(P / Q))
    assert difference.max() == pytest.approx(gap, rel=5e-3)
    assert (difference <= alpha / 2 * np.maximum(np.log(P) ** 2, np.log(Q) ** 2)).all()
    assert abs(build("box_cox", alpha=alpha).full(log(Q), log(P)).item() - kl(Q, P)) < gap


@pytest.mark.parametrize("alpha", [0.1, 1, 5, 50])
def test_power_reward_is_bounded_and_keeps_the_sign(alpha):
    for q, p in random_pairs(50, 6):
        r = advantage(make("power", alpha=alpha), q, p)
        assert (np.abs(r) <= np.maximum(p, q) ** alpha * (1 + 1e-12)).all()
        assert (np.sign(r) == np.sign(p**alpha - q**alpha)).all()
        assert (r * (p - q) >= 0).all()


def test_mean_power_reward_can_be_positive_where_the_mean_log_ratio_cannot():
    q, p = np.array([0.6, 0.4]), np.array([1 - 1e-12, 1e-12])
    assert q @ advantage(make("power", alpha=1), q, p) == pytest.approx(0.08)
    assert Q @ advantage(make("log_ratio")) == pytest.approx(-kl(Q, P))
    assert Q @ advantage(make("power", alpha=5)) > 0


@pytest.mark.parametrize(("p", "r"), [(0.99, 0.00657), (0.995, 0.0816), (0.999, 0.606), (0.9999, 0.951), (0.8, 0.0)])
def test_alpha_500_sees_only_near_certain_tokens(p, r):
    unsure = torch.tensor(math.log(0.5), dtype=torch.float32)
    reward = build("power", alpha=500).sampled(unsure, torch.tensor(math.log(p), dtype=torch.float32))
    assert reward.item() == pytest.approx(r, rel=2e-3)
    assert r > 0 or reward.item() == 0  # 3.5e-49 is no fp32 number


def test_the_reward_shrinks_with_alpha():
    """So does the step, unless the optimiser scales it back: arms differ in step size as well as in shape."""

    def rms(objective: Objective) -> float:
        return float(np.sqrt(Q @ advantage(objective) ** 2))

    got = [rms(make("log_ratio")), *(rms(make("power", alpha=a)) for a in (0.5, 1, 5, 10, 50))]
    close(got, [1.1357, 0.2345, 0.2172, 0.0142, 4.370e-4, 3.97e-16], rtol=2e-3)


@pytest.mark.parametrize(("name", "alpha"), [("log_ratio", 0), ("power", 0.5), ("power", 1), ("power", 5)])
def test_near_the_teacher_a_token_is_corrected_at_rate_alpha_p_to_1_plus_alpha(name, alpha):
    d = np.array([0.4, -0.3, 0.2, -0.2, -0.1])
    q = P + 1e-7 * d
    slope = -d * (alpha * P ** (alpha - 1) if alpha else 1 / P)
    settings = {"alpha": alpha} if alpha else {}
    close(update(advantage(make(name, **settings), q), q) / 1e-7, update(slope, P), atol=1e-6)


# Stationary points of the power reward


def face_level(p: np.ndarray, alpha: float) -> float:
    """The c with sum (p^alpha - c)^(1/alpha) = 1, by bisection: the left side falls in c."""
    low, high = -1.0, float((p**alpha).min())
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if ((p**alpha - middle) ** (1 / alpha)).sum() > 1 else (low, middle)
    return low


@pytest.mark.parametrize("size", [3, 4])
@pytest.mark.parametrize("alpha", [0.5, 1, 2, 5])
def test_each_face_has_one_stationary_point_and_it_repels(size, alpha):
    p = np.array([0.4, 0.3, 0.2, 0.1])[:size] / np.array([0.4, 0.3, 0.2, 0.1])[:size].sum()
    objective = make("power", alpha=alpha)
    faces = [s for n in range(1, size + 1) for s in itertools.combinations(range(size), n)]
    assert len(faces) == 2**size - 1
    for face in map(list, faces):
        levels = np.linspace(-1, (p[face] ** alpha).min(), 50)
        sums = np.array([((p[face] ** alpha - c) ** (1 / alpha)).sum() for c in levels])
        assert (np.diff(sums) < 0).all()  # hence at most one level sums to one
        c = face_level(p[face], alpha)
        logq = np.full(size, NEVER)
        logq[face] = np.log(p[face] ** alpha - c) / alpha
        a = objective.sampled(torch.tensor(logq), log(p)).numpy()
        close(update(a, np.exp(logq)), 0, atol=1e-12)
        if len(face) == size:
            assert c == pytest.approx(0, abs=1e-12)
            close(np.exp(logq), p, atol=1e-12)
        else:
            missing = np.setdiff1d(np.arange(size), face)
            assert c < 0 < a[missing].min()


@pytest.mark.parametrize("alpha", [0.1, 1, 5])
def test_with_full_support_only_the_teacher_is_stationary(alpha):
    objective = make("power", alpha=alpha)
    for q, p in random_pairs(200, 4):
        assert np.abs(update(advantage(objective, q, p), q)).max() > 0
        assert np.abs(update(advantage(objective, p, p), p)).max() == 0


def test_sign_consistency_does_not_survive_centring():
    """Raising every token that the teacher prefers is true of the reward, not of the update, which sums to zero."""
    assert P[2] > Q[2]
    assert through_loss(make("power", alpha=5))[2] < 0
    assert P[1] < Q[1]
    assert through_loss(make("power", alpha=1))[1] > 0
    assert through_loss(make("log_ratio"))[1] > 0
    moved_away = np.mean([(update(p - q, q) * (p - q) < 0).any() for q, p in random_pairs(2000, 6)])
    assert moved_away > 0.5


# Any non-decreasing advantage of the ratio, and any increasing function of the probability, is an exact descent


def by_quadrature(a, q: np.ndarray, p: np.ndarray, nodes: int = 200_001) -> float:
    """sum q f(p/q), f(u) = u int_1^u a(log s)/s^2 ds, by Simpson's rule in log s."""
    total = 0.0
    for one_q, one_p in zip(q, p, strict=True):
        x, step = np.linspace(0, np.log(one_p / one_q), nodes, retstep=True)
        weights = np.ones(nodes)
        weights[1:-1:2], weights[2:-1:2] = 4, 2
        total += one_p * (weights * a(x) * np.exp(-x)).sum() * step / 3
    return total


CLIPPED = [(-1.0, 1.0), (-0.3, 2.0), (-5.0, 0.1)]


@pytest.mark.parametrize(("low", "high"), CLIPPED)
def test_clip_descends_an_f_divergence_in_closed_form(low, high):
    def f(u: np.ndarray) -> np.ndarray:
        above, below = u * (1 - np.exp(-high)) - high, u * (1 - np.exp(-low)) - low
        return np.where(np.log(u) > high, above, np.where(np.log(u) < low, below, u - 1 - np.log(u)))

    objective = build("clip", low=low, high=high)
    for q, p in [(Q, P), *random_pairs(3, 5)]:
        value = objective.divergence.value(log(q), log(p)).item()
        assert value == pytest.approx((q * f(p / q)).sum(), rel=1e-12)
        assert value == pytest.approx(by_quadrature(lambda x: np.clip(x, low, high), q, p), rel=1e-6)
        close(through_loss(objective, q, q, p), descent(lambda q, p: (q * f(p / q)).sum(), q, p), atol=1e-8)


@pytest.mark.parametrize("tau", [0.5, 1.0, 5.0])
def test_tanh_descends_an_f_divergence(tau):
    objective = build("tanh", tau=tau)
    for q, p in [(Q, P), *random_pairs(2, 5)]:
        want = by_quadrature(lambda x: np.tanh(x / tau), q, p)
        assert tanh(tau=tau).value(log(q), log(p)).item() == pytest.approx(want, rel=1e-6)
    close(
        through_loss(objective), descent(lambda q, p: by_quadrature(lambda x: np.tanh(x / tau), q, p, 2001)), atol=1e-7
    )


@pytest.mark.parametrize(
    "divergence", [clip(low=-1, high=1), tanh(tau=1.0), tanh(tau=5.0)], ids=["clip", "tanh1", "tanh5"]
)
def test_squashed_log_ratios_have_their_minimum_at_the_teacher(divergence):
    assert divergence.value(log(P), log(P)).item() == pytest.approx(0, abs=1e-12)
    assert all(divergence.value(log(q), log(p)).item() > 0 for q, p in random_pairs(50, 5))


@pytest.mark.parametrize(
    ("a", "f"),
    [
        (lambda r: r, lambda u: u - 1 - np.log(u)),
        (torch.expm1, lambda u: u * np.log(u) - u + 1),
        (lambda r: torch.tanh(r / 2), None),
    ],
    ids=["log", "expm1", "tanh"],
)
def test_divergence_of_an_advantage_is_its_quadrature(a, f):
    got = divergence_of(a).value(log(Q), log(P)).item()
    assert got == pytest.approx(by_quadrature(lambda x: a(torch.tensor(x)).numpy(), Q, P), rel=1e-9)
    assert f is None or got == pytest.approx((Q * f(P / Q)).sum(), rel=1e-9)


def test_a_limited_ratio_is_the_divergence_of_the_clamped_advantage():
    objective = make("forward_kl", ratio_limit=0.8)
    value = objective.divergence.value(log(Q), log(P)).item()
    assert value == pytest.approx(by_quadrature(lambda x: np.expm1(np.clip(x, -0.8, 0.8)), Q, P), rel=1e-6)
    close(advantage(objective), np.expm1(np.clip(np.log(P / Q), -0.8, 0.8)), atol=1e-12)
    loose = limited(reverse_kl(), low=-50, high=50)
    assert loose.value(log(Q), log(P)).item() == pytest.approx(kl(Q, P))


@pytest.mark.parametrize(
    ("name", "f"),
    [
        ("reverse_kl", lambda u: -u.log()),
        ("forward_kl", lambda u: u * u.log()),
        ("jensen_shannon", lambda u: (u * u.log() - (1 + u) * ((1 + u) / 2).log()) / 2),
        ("pearson_chi2", lambda u: (u - 1) ** 2),
        ("neyman_chi2", lambda u: (u - 1) ** 2 / u),
        ("squared_hellinger", lambda u: (u.sqrt() - 1) ** 2),
        ("jeffreys", lambda u: (u - 1) * u.log()),
    ],
)
def test_from_generator_gives_the_known_rows(name, f):
    mine, row = from_generator(f), make(name).divergence
    close(mine.advantage(log(Q), log(P)).numpy(), advantage(make(name)), atol=1e-12)
    assert mine.constant == pytest.approx(row.constant, abs=1e-12)
    assert mine.value(log(Q), log(P)).item() == pytest.approx(row.value(log(Q), log(P)).item())


@pytest.mark.parametrize("alpha", [0.5, 1, 3])
def test_from_derivative_gives_power(alpha):
    mine = from_derivative(lambda x: x**alpha, nodes=64)
    close(mine.advantage(log(Q), log(P)).numpy(), P**alpha - Q**alpha, atol=1e-14)
    assert mine.value(log(Q), log(P)).item() == pytest.approx(bregman(alpha)(Q, P), rel=1e-9)


def test_the_log_is_in_both_families_and_power_is_not():
    mine = from_derivative(torch.log)
    close(mine.advantage(log(Q), log(P)).numpy(), np.log(P / Q), atol=1e-14)
    assert mine.value(log(Q), log(P)).item() == pytest.approx(kl(Q, P), rel=1e-9)
    same_ratio = power(alpha=1).advantage(log(np.array([0.1, 0.4])), log(np.array([0.2, 0.8])))
    close(same_ratio.numpy(), [0.1, 0.4])
    assert not power(alpha=1).of_ratio
    assert reverse_kl().of_ratio


# z-score, and a sampler that leaves the tail out


def step_tokens(rewards: Tensor, **known: Tensor) -> StepTokens:
    """A step of one rollout, with what is known of its tokens."""
    return replace(StepTokens.of_one_rollout(torch.zeros_like(rewards), torch.zeros_like(rewards), rewards), **known)


def test_zscore_is_the_log_ratio_over_its_deviation():
    tokens = np.repeat(np.arange(5), [4, 6, 1, 7, 2])  # 20 tokens in the student's proportions: the expectation itself
    r = np.log(P / Q)[tokens]
    shaped = build("zscore").shape(step_tokens(torch.tensor(r))).advantages.numpy()
    got = (shaped[:, None] * (np.eye(5)[tokens] - Q)).mean(0)
    close(got, update(np.log(P / Q)) / np.sqrt(Q @ np.log(P / Q) ** 2 - (Q @ np.log(P / Q)) ** 2), atol=1e-12)


def test_zscore_forgets_how_far_apart_the_models_are():
    r = torch.tensor(np.log(P / Q))
    close(zscore(r / 1000).numpy(), zscore(r).numpy(), atol=1e-9)


@pytest.mark.parametrize("count", [2, 3])
def test_a_batch_mean_shrinks_the_update_by_its_own_share(count):
    """The mean holds the token's own reward: with n tokens the centred update is 1 - 1/n of the uncentred one."""
    q, p = Q[:3] / Q[:3].sum(), P[:3] / P[:3].sum()
    r, total = np.log(p / q), np.zeros(3)
    for batch in map(list, itertools.product(range(3), repeat=count)):
        standard = zscore(torch.tensor(r[batch])).numpy() * r[batch].std()
        total += q[batch].prod() * (standard[:, None] * (np.eye(3)[batch] - q)).mean(0)
    close(total, (1 - 1 / count) * update(r, q), atol=1e-12)


def test_sign_max_abs_weighs_two_tokens_by_what_else_is_in_the_batch():
    """So it descends no fixed function."""
    objective = build("sign_max_abs")
    alone, beside = (objective.shape(step_tokens(torch.tensor(r))).advantages for r in ([2.0, -1.0], [2.0, -1.0, -4.0]))
    close(alone.numpy(), [1, -1])
    close(beside.numpy(), [1, -0.25, -1])


def truncated(q: np.ndarray, kept: list[int]) -> np.ndarray:
    b = np.zeros_like(q)
    b[kept] = q[kept]
    return b / b.sum()


def test_under_a_truncated_sampler_the_zscores_mean_is_such_a_constant():
    tokens = np.repeat([0, 1, 3], [4, 6, 7])  # 17 tokens in the proportions of the nucleus
    b, r = truncated(Q, [0, 1, 3]), np.log(P / Q)
    shaped = build("zscore").shape(step_tokens(torch.tensor(r[tokens]))).advantages.numpy()
    got = (shaped[:, None] * (np.eye(5)[tokens] - Q)).mean(0)
    close(got, (through_loss(make("log_ratio"), b) - (b @ r) * (b - Q)) / r[tokens].std(), atol=1e-12)


@pytest.mark.parametrize("name", ["log_ratio", "forward_kl", "jensen_shannon"])
def test_under_a_truncated_sampler_a_constant_adds_c_times_b_minus_q(name):
    b = truncated(Q, [0, 1, 3])
    zero, plus = make(name), make(name, gauge="opd_plus")
    close(through_loss(plus, b) - through_loss(zero, b), zero.divergence.constant * (b - Q), atol=1e-12)


def test_the_papers_gauge_pushes_the_nucleus_down_where_both_agree():
    b = truncated(P, [0, 1, 2])
    pushed = through_loss(make("reverse_kl", gauge="opd_plus"), b, P, P)
    close(pushed, -(b - P), atol=1e-12)
    assert (pushed[:3] < 0).all()
    close(through_loss(make("reverse_kl"), b, P, P), 0, atol=1e-12)


@pytest.mark.parametrize(("name", "settings"), [("log_ratio", {}), ("power", {"alpha": 0.5}), ("power", {"alpha": 5})])
def test_under_a_truncated_sampler_the_tail_is_never_trained(name, settings):
    wrong_tail = np.array([0.5, 0.25, 0.15, 0.02, 0.08])
    b = truncated(wrong_tail, [0, 1, 2])
    close(through_loss(make(name, **settings), b, wrong_tail, P), 0, atol=1e-12)
    assert np.abs(through_loss(make(name, **settings), wrong_tail, wrong_tail, P)).max() > 1e-9


# Variance of one sample


def variance(a: np.ndarray, q: np.ndarray = Q) -> float:
    """Trace of the covariance of a(v) grad log q(v), in logits."""
    updates = a[:, None] * (np.eye(len(q)) - q)
    mean = q @ updates
    return float(q @ (updates**2).sum(1) - mean @ mean)


@pytest.mark.parametrize(
    ("name", "settings", "trace", "relative"),
    [
        ("log_ratio", {}, 0.6374, 2.54),
        ("reverse_kl", {"gauge": "opd_plus"}, 1.8931, 7.53),
        ("vopd", {}, 0.5608, 2.23),
        ("clip", {}, 0.3829, 2.91),
        ("power", {"alpha": 1}, 0.02137, 1.89),
        ("power", {"alpha": 1, "baseline": "exact"}, 0.02194, 1.94),
    ],
)
def test_golden_variances(name, settings, trace, relative):
    a = advantage(make(name, **settings))
    assert variance(a) == pytest.approx(trace, rel=3e-4)
    assert variance(a) / (update(a) @ update(a)) == pytest.approx(relative, abs=6e-3)


def test_minus_one_is_far_from_the_best_constant():
    r, squared_score = np.log(P / Q), ((np.eye(5) - Q) ** 2).sum(1)
    best = Q @ (r * squared_score) / (Q @ squared_score)
    assert best == pytest.approx(-0.3542, abs=1e-4)
    assert variance(r - best) == pytest.approx(0.5452, abs=1e-4)
    scan = [variance(r - b) for b in np.linspace(-3, 3, 601)]
    assert min(scan) >= variance(r - best)


def test_where_both_agree_the_log_ratio_is_silent_and_the_papers_gauge_is_not():
    assert variance(advantage(make("log_ratio"), P), P) == 0
    at_student = advantage(make("reverse_kl", gauge="opd_plus"), Q, Q)
    assert variance(at_student, Q) == pytest.approx(variance(-np.ones(5), Q))
    assert variance(advantage(make("reverse_kl", gauge="opd_plus"), P, P), P) == pytest.approx(0.6592, abs=1e-4)


def test_over_random_models_minus_one_nearly_always_raises_the_variance():
    raised, lowered = [], []
    for q, p in random_pairs(3000, 6, 0.5):
        plain = variance(np.log(p / q), q)
        raised.append(variance(advantage(make("reverse_kl", gauge="opd_plus"), q, p), q) > plain)
        lowered.append(variance(advantage(make("vopd"), q, p), q) < plain)
    assert np.mean(raised) == pytest.approx(0.982, abs=0.01)
    assert np.mean(lowered) == pytest.approx(0.772, abs=0.025)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *(("log_ratio", {}), ("power", {"alpha": 1}), ("clip", {}), ("tanh", {}), ("forward_kl", {}), ("box_cox", {})),
        ("aopd", {"k": 3}),  # the gate is part of the reward that is centred
    ],
)
def test_the_exact_baseline_keeps_the_mean(name, settings):
    plain, centred = make(name, **settings), make(name, **settings, baseline="exact")
    assert Q @ advantage(centred) == pytest.approx(0, abs=1e-12)
    close(through_loss(centred), through_loss(plain), atol=1e-12)


# Reference KL

REFERENCE = np.array([0.1, 0.2, 0.3, 0.15, 0.25])


def update_with_reference(objective: Objective) -> np.ndarray:
    size = len(Q)
    hidden = log(Q).expand(size, -1).clone().requires_grad_()
    teacher, reference = (of_logits(log(x).expand(size, -1)) for x in (P, REFERENCE))
    inputs = inputs_of(objective, torch.arange(size), teacher, reference)
    loss_of(objective, hidden, reference.heads[0], inputs, denominator=1).loss.backward()
    return -Q @ hidden.grad.numpy()


@pytest.mark.parametrize("form", ["full", "k2_loss", "k1_reward"])
@pytest.mark.parametrize(("name", "settings"), [("power", {"alpha": 1}), ("log_ratio", {"baseline": "exact"})])
def test_every_accepted_reference_kl_descends_student_to_reference(form, name, settings):
    weight = 0.7
    plain = update_with_reference(build(name, **settings))
    held = update_with_reference(build(name, **settings, reference_kl=weight, reference_kl_form=form))
    close(held - plain, weight * descent(lambda q, p: kl(q, REFERENCE)), atol=1e-9)


@pytest.mark.parametrize("form", ["full", "k2_loss"])
def test_a_reference_kl_beside_an_exact_objective(form):
    plain = update_with_reference(build("reverse_kl"))
    held = update_with_reference(build("reverse_kl", reference_kl=0.7, reference_kl_form=form))
    close(held - plain, 0.7 * descent(lambda q, p: kl(q, REFERENCE)), atol=1e-9)


def estimator(kind: str, logq: Tensor) -> Tensor:
    ratio = log(REFERENCE) - logq
    return {"k1": -ratio, "k2": ratio.square() / 2, "k3": ratio.exp() - 1 - ratio}[kind]


@pytest.mark.parametrize(("kind", "mean"), [("k1", True), ("k3", True), ("k2", False)])
def test_k1_and_k3_estimate_the_value_of_the_kl_and_k2_does_not(kind, mean):
    got = Q @ estimator(kind, log(Q)).numpy()
    assert (abs(got - kl(Q, REFERENCE)) < 1e-12) == mean


@pytest.mark.parametrize(
    ("kind", "follows"),
    [("k1", lambda q, p: 0.0), ("k2", lambda q, p: kl(q, REFERENCE)), ("k3", lambda q, p: kl(REFERENCE, q))],
    ids=["k1", "k2", "k3"],
)
def test_estimators_as_a_loss(kind, follows):
    logits = log(Q).requires_grad_()
    (torch.tensor(Q) * estimator(kind, logits.log_softmax(-1))).sum().backward()
    close(-logits.grad.numpy(), descent(follows), atol=1e-9)


def test_estimators_in_the_reward():
    right = descent(lambda q, p: kl(q, REFERENCE))
    close(update(-estimator("k1", log(Q)).numpy()), right, atol=1e-9)
    close(update(-estimator("k3", log(Q)).numpy()), right - (REFERENCE - Q), atol=1e-9)


@pytest.mark.parametrize(
    ("form", "reason"),
    [("k3", r"KL\(reference"), ("k3_loss", r"KL\(reference"), ("k1_loss", "expected gradient of zero")],
)
def test_reference_estimators_with_another_gradient_are_refused_with_the_reason(form, reason):
    with pytest.raises(ValueError, match=reason):
        build("power", reference_kl=0.1, reference_kl_form=form)


# Top k


def coarse_update(divergence, q: np.ndarray, p: np.ndarray, k: int, tail: str) -> np.ndarray:
    logits = log(q).requires_grad_()
    top = log(p).topk(k)
    divergence.value(*coarsen(logits.log_softmax(-1), top.indices, top.values, tail=tail)).backward()
    return -logits.grad.numpy()


@pytest.mark.parametrize("k", [1, 2, 4])
def test_left_as_it_is_the_top_k_pushes_its_own_mass_out_where_both_agree(k):
    """The gradient of sum_S q (log q - log p) at q = p is q_j (1[j in S] - q(S))."""
    inside = np.arange(5) < k
    close(coarse_update(reverse_kl(), P, P, k, "keep"), -P * (inside - P[:k].sum()), atol=1e-12)
    for tail in ("bucket", "renormalize"):
        close(coarse_update(reverse_kl(), P, P, k, tail), 0, atol=1e-12)


def test_a_tail_left_as_it_is_is_refused():
    with pytest.raises(ValueError, match="does not vanish"):
        build("reverse_kl", estimator="top_k", tail="keep")


def test_a_truncated_forward_kl_drops_the_tail():
    teacher_on_top = np.array([0.5, 0.25, 1e-300, 1e-300, 1e-300])
    q = teacher_on_top / teacher_on_top.sum()
    close(coarse_update(make("forward_kl").divergence, q, P, 2, "keep"), 0, atol=1e-12)


@over_ratio_forms
def test_top_k_with_a_tail_vanishes_at_the_teacher(name, settings, f, w):
    for tail in ("bucket", "renormalize"):
        objective = build(name, **settings, estimator="top_k", k=2, tail=tail)
        assert objective.top_k(log(P), log(P)).item() == pytest.approx(0, abs=1e-12)
        close(through_loss(objective, P, P, P), 0, atol=1e-12)


@over_ratio_forms
def test_a_bucket_is_a_lower_bound(name, settings, f, w):
    """Data processing: merging outcomes cannot part two distributions."""
    for q, p in random_pairs(20, 6):
        full = (q * f(p / q)).sum()
        values = [build(name, **settings, estimator="top_k", k=k).top_k(log(q), log(p)).item() for k in (1, 3, 5)]
        assert all(value <= full + 1e-9 * (1 + full) for value in values)
        assert (np.diff(values) >= -1e-9).all()
        assert values[-1] == pytest.approx(full, rel=1e-6)


def test_renormalised_the_mass_on_the_top_k_is_free():
    q = np.array([0.2, 0.1, 0.06, 0.24, 0.4])  # proportional to the teacher on its first three
    objective = build("reverse_kl", estimator="top_k", k=3, tail="renormalize")
    close(through_loss(objective, q, q, P), 0, atol=1e-12)
    assert np.abs(through_loss(build("reverse_kl", estimator="top_k", k=3), q, q, P)).max() > 0.01
    close(through_loss(build("local_support", k=3), q, q, P), 0, atol=1e-12)


@over_ratio_forms
def test_a_sampled_tail_agrees_with_the_whole_vocabulary(name, settings, f, w):
    objective = build(name, **settings, estimator="top_k", k=2, tail="sample")
    want = descent(lambda q, p: (q * f(p / q)).sum())
    close(through_loss(objective), want, atol=1e-8 + 1e-7 * np.abs(want).max())


# Published methods


@pytest.mark.parametrize(
    ("mixing", "floor"), [(0.1, -2.558), (0.2, -2.012), (0.3, -1.720), (0.5, -1.386), (0.9, -1.054)]
)
def test_reopold_floors(mixing, floor):
    objective = build("reopold", mixing=mixing)
    impossible, student = torch.tensor([-1e3, -0.5]), torch.tensor([-1.0, -0.5])
    close(objective.sampled(student, impossible).numpy(), [floor, 0.0], atol=5e-4)
    mixed = math.log((mixing * 0.3 + (1 - mixing) * 1e-12) / 0.3) / (1 - mixing)
    assert mixed == pytest.approx(floor, abs=5e-4)


REOPOLD = step_tokens(
    torch.tensor([1.0, -1.72, 0.5, -1.0]),
    logprobs=torch.tensor([-2.0, -1.0, -1.0, -1.0]),
    teacher_logprobs=torch.tensor([-1.0, -4.0, -0.5, -2.0]),
    entropies=torch.tensor([0.1, 3.0, 0.2, 0.4]),
)


def test_reopold_drops_what_is_below_the_floor_first():
    shaped = build("reopold").at(0.2).shape(REOPOLD)
    close(shaped.advantages.numpy(), np.array([1.0, 0.0, 0.5, -1.0]) * 4 / 3, rtol=1e-6)


def test_reopold_keeps_the_uncertain_later():
    shaped = build("reopold", share=0.5).at(0.5).shape(REOPOLD)
    close(shaped.advantages.numpy(), np.array([0.0, -1.72, 0.0, -1.0]) * 2, rtol=1e-6)


@pytest.mark.parametrize(("progress", "b"), [(0.0, 0.8), (0.5, 0.4), (1.0, 0.0)])
def test_veto_stands_still_at_a_sharpened_teacher(progress, b):
    objective = build("veto", beta=0.8).at(progress)
    sharpened = P ** (1 / (1 - b)) / (P ** (1 / (1 - b))).sum()
    close(through_loss(objective, sharpened, sharpened, P), 0, atol=1e-12)
    target = P * Q**b / (P * Q**b).sum()
    close(through_loss(objective), target - Q, atol=1e-12)  # that of KL(target || q), the target held fixed


def test_aopd_with_its_whole_teacher_leans_to_the_reverse_kl():
    """The paper's 1/k tilts the two branches; without it the cosine is the .883 of methods.md."""
    gated = P <= Q
    own, pull = update(np.where(gated, 0, np.log(P / Q))), Q[gated].sum() * (P - Q)
    right = descent(lambda q, p: kl(q, p))
    close(through_loss(build("aopd", k=5)), own + pull / 5, atol=1e-12)
    assert cosine(own + pull, right) == pytest.approx(0.883, abs=5e-4)
    assert cosine(through_loss(build("aopd", k=5)), right) == pytest.approx(0.815, abs=5e-4)
    close(through_loss(build("aopd", k=5), P, P, P), 0, atol=1e-12)


@pytest.mark.parametrize(("name", "symmetric"), [("aopd", False), ("log_ratio", True)])
def test_aopd_descends_no_function(name, symmetric):
    """The Jacobian of a gradient is symmetric."""
    objective = build("aopd", k=5) if name == "aopd" else make(name)

    def at(shift: np.ndarray) -> np.ndarray:
        q = Q * np.exp(shift) / (Q * np.exp(shift)).sum()
        return through_loss(objective, q, q, P)

    jacobian = np.array([(at(1e-6 * e) - at(-1e-6 * e)) / 2e-6 for e in np.eye(5)])
    assert (np.abs(jacobian - jacobian.T).max() < 1e-8) == symmetric


def test_aopd_with_a_part_of_its_teacher_pulls_towards_the_top_even_at_the_teacher():
    pulled = through_loss(build("aopd", k=2), P, P, P)
    close(pulled, (np.array([0.5, 0.25, 0, 0, 0]) - 0.75 * P) / 2, atol=1e-12)
    assert pulled[2:].sum() == pytest.approx(-0.75 / 2 * 0.25)


def test_aopd_at_threshold_minus_1_is_the_log_ratio():
    close(through_loss(build("aopd", threshold=-1, k=5)), update(np.log(P / Q)), atol=1e-12)


@pytest.mark.parametrize(("threshold", "on"), [(1.2, 1), (1.3, 0)])
def test_eopd_adds_a_forward_kl_where_the_teacher_is_uncertain(threshold, on):
    assert -(P * np.log(P)).sum() == pytest.approx(1.269, abs=1e-3)
    top = np.array([0.5, 0.25, 0, 0, 0]) / 0.75
    objective = build("eopd", threshold=threshold, coefficient=0.5, k=2)
    close(through_loss(objective), update(np.log(P / Q)) + on * 0.5 * (top - Q), atol=1e-12)
    exact = build("eopd", threshold=threshold, coefficient=0.5, k=2, estimator="full").full(log(Q), log(P))
    assert exact.item() == pytest.approx(kl(Q, P) + on * 0.5 * (top[:2] * np.log(top[:2] / Q[:2])).sum())


def test_eopd_with_a_bucket_stands_still_at_the_teacher_and_renormalised_it_does_not():
    close(through_loss(build("eopd", k=2, tail="bucket"), P, P, P), 0, atol=1e-12)
    assert np.abs(through_loss(build("eopd", k=2), P, P, P)).max() > 0.1


def test_tip_keeps_the_highest_soft_or_of_each_rollout():
    """h = (0, 1, .75, .8), d = (1, 0, .75, .1) scaled: h + d - h d = (1, 1, .94, .82); the second rollout is all equal."""
    tokens = step_tokens(
        torch.zeros(6),
        entropies=torch.tensor([1.0, 3.0, 2.5, 2.6, 7.0, 7.0]),
        divergences=torch.tensor([0.6, 0.2, 0.5, 0.24, 9.0, 9.0]),
        rollouts=torch.tensor([0, 0, 0, 0, 1, 1]),
    )
    close(build("tip", share=0.5).shape(tokens).weights.numpy(), np.array([1, 1, 0, 0, 1, 0]) * 2.0)
    close(build("tip", share=0.75).shape(tokens).weights.numpy(), np.array([1, 1, 1, 0, 1, 1]) * 6 / 5, rtol=1e-6)


def test_leave_one_out_takes_the_mean_of_the_other_rollouts():
    tokens = step_tokens(
        torch.tensor([1.0, 3.0, 4.0, 0.0, 2.0, 5.0]),
        rollouts=torch.tensor([0, 0, 1, 2, 2, 3]),
        prompts=torch.tensor([0, 0, 0, 0, 0, 1]),
    )
    shaped = build("log_ratio", baseline="leave_one_out").shape(tokens).advantages
    close(shaped.numpy(), [1 - 2.5, 3 - 2.5, 4 - 1.5, 0 - 3, 2 - 3, 5], rtol=1e-6)


@pytest.mark.parametrize(("name", "settings"), [("log_ratio", {}), ("power", {"alpha": 1})])
def test_leave_one_out_keeps_the_mean(name, settings):
    """Every pair of tokens drawn for one prompt, each its own rollout."""
    pairs = np.array(list(itertools.product(range(5), repeat=2)))
    r = advantage(make(name, **settings))
    tokens = step_tokens(
        torch.tensor(r[pairs].ravel()), rollouts=torch.arange(50), prompts=torch.arange(25).repeat_interleave(2)
    )
    shaped = make(name, **settings, baseline="leave_one_out").shape(tokens).advantages.numpy().reshape(25, 2)
    close(shaped[:, 0], r[pairs[:, 0]] - r[pairs[:, 1]], atol=1e-12)
    updates = (shaped[:, :, None] * (np.eye(5)[pairs] - Q)).mean(1)
    close(Q[pairs].prod(1) @ updates, update(r), atol=1e-12)


def off_policy(objective: Objective, share: float, cap: float = math.inf) -> np.ndarray:
    """Tokens drawn from `share` of the teacher and the rest of the student."""
    mixture = share * P + (1 - share) * Q
    hidden = log(Q).expand(5, -1).clone().requires_grad_()
    inputs = TokenInputs(torch.arange(5), teacher_logprobs=log(P), rollout_logprobs=log(mixture))
    head = of_logits(hidden).heads[0]
    loss_of(objective, hidden, head, inputs, denominator=1, importance_cap=cap).loss.backward()
    return -mixture @ hidden.grad.numpy()


@pytest.mark.parametrize("share", [0.2, 0.9, 1.0])
def test_importance_weights_give_the_on_policy_expectation(share):
    for objective in (make("log_ratio"), make("power", alpha=1), make("forward_kl", gauge="opd_plus")):
        close(off_policy(objective, share), through_loss(objective), atol=1e-12)


def test_a_cap_on_importance_weights_bounds_them_at_the_price_of_a_bias():
    weights = np.minimum(Q / P, 1.5)
    got = off_policy(make("log_ratio"), 1.0, cap=1.5)
    a = np.log(P / Q) * P * weights
    close(got, a - Q * a.sum(), atol=1e-12)
    assert np.abs(got - through_loss(make("log_ratio"))).max() > 0.01


def test_tokens_without_a_sampling_probability_count_as_the_students():
    inputs = TokenInputs(
        torch.arange(5), teacher_logprobs=log(P), rollout_logprobs=torch.full((5,), torch.nan).double()
    )
    hidden = log(Q).expand(5, -1).clone().requires_grad_()
    loss_of(make("log_ratio"), hidden, of_logits(hidden).heads[0], inputs, denominator=1).loss.backward()
    close(-Q @ hidden.grad.numpy(), through_loss(make("log_ratio")), atol=1e-12)


def test_sft_follows_the_likelihood_of_its_tokens():
    rows = log(Q).expand(5, -1)
    close(-fused_gradients(build("sft"), rows, rows, torch.arange(5)).numpy(), np.eye(5) - Q, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *(("generalized_jsd", {"weight": w}) for w in (1e-6, 1e-3, 0.999)),
        *(("cressie_read", {"alpha": a}) for a in (1e-6, -1e-3, 0.999, 1.001, 2.0)),
        *((name, {"alpha": a}) for name in ("power", "box_cox") for a in (1e-8, 1e-3)),
    ],
)
def test_near_the_ends_of_a_setting_fp32_keeps_its_digits(name, settings):
    objective, pairs = build(name, **settings), [(log(q), log(p)) for q, p in random_pairs(20, 6)]
    for q, p in pairs:
        student, exact_student = q.float().requires_grad_(), q.clone().requires_grad_()
        value, exact = objective.full(student, p.float()), objective.full(exact_student, p)
        assert value.item() == pytest.approx(exact.item(), rel=1e-3)
        value.backward()
        exact.backward()
        close(student.grad.double(), exact_student.grad, atol=1e-3 * exact_student.grad.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["jensen_shannon", "reverse_kl", "power", "eopd"])
def test_half_precision_is_computed_in_fp32(name, dtype):
    q, p = log(Q).to(dtype), log(P).to(dtype)
    objective = build(name)
    assert objective.full(q, p).dtype == torch.float32
    assert torch.equal(objective.full(q, p), objective.full(q.float(), p.float()))
    assert torch.equal(objective.sampled(q, p), objective.sampled(q.float(), p.float()))


@pytest.mark.parametrize(("name", "settings", "f", "w"), RATIO_FORMS)
def test_what_neither_model_can_emit_changes_nothing(name, settings, f, w):
    objective = build(name, **settings)
    q, p = (torch.cat([log(x), torch.tensor([-torch.inf])]) for x in (Q, P))
    student = q.clone().requires_grad_()
    value = objective.full(student, p)
    assert value.item() == pytest.approx(objective.full(log(Q), log(P)).item(), rel=1e-12)
    value.backward()
    assert student.grad.isfinite().all()
    assert objective.sampled(q, p).isfinite().all()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("forward_kl", 0.6 * np.log(3) + 0.4 * np.log(4 / 3)),
        (
            "jensen_shannon",
            (0.6 * np.log(1.5) + 0.4 * np.log(8 / 7) + 0.2 * np.log(0.5) + 0.3 * np.log(6 / 7) + 0.5 * np.log(2)) / 2,
        ),
        ("squared_hellinger", 2 - 2 * (np.sqrt(0.12) + np.sqrt(0.12))),
        ("total_variation", 0.5),
        ("power", (0.2**6 + 0.3**6 + 0.5**6) / 6 - 0.2 * 0.6**5 - 0.3 * 0.4**5 + 5 / 6 * (0.6**6 + 0.4**6)),
    ],
)
def test_a_token_that_the_teacher_never_emits_has_its_finite_value(name, value):
    student = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64).log().requires_grad_()
    teacher = torch.tensor([0.6, 0.4, 0.0], dtype=torch.float64).log()
    got = build(name).full(student, teacher)
    assert got.item() == pytest.approx(value, rel=1e-5)
    got.backward()
    assert student.grad.isfinite().all()


def test_no_setting_is_taken_silently():
    with pytest.raises(ValueError, match=re.escape("objective.alhpa")):
        build("power", alhpa=1)

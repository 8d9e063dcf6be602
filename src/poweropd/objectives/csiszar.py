"""f-divergences, D_f(p || q) = sum_v q f(p/q): what depends on the ratio of teacher p to student q alone.

Their advantage is that of OPD+, `w(u) = u f'(u) - f(u)` with u = p/q, here less its value at u = 1: in that gauge equal
models push nothing, whatever the sampler leaves out (arXiv 2606.01039; the rows beyond its three are derived from the
same formula). Each function returns a `Divergence`; r is log u.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from poweropd.objectives.divergences import REACH, Divergence, divergence_with, quadrature, scaled_expm1


def reverse_kl() -> Divergence:
    """KL(q || p): f(u) = -log u. Its advantage log u is vanilla on-policy distillation."""

    def term_and_slope(logq: Tensor, logp: Tensor) -> tuple[Tensor, Tensor]:
        term = (logq - logp).mul_(logq.exp())
        return term, term  # the derivative is term + q

    return Divergence(
        term=lambda logq, logp: logq.exp() * (logq - logp),
        advantage=lambda logq, logp: logp - logq,
        constant=-1.0,
        of_ratio=True,
        term_and_slope=term_and_slope,
    )


def forward_kl() -> Divergence:
    """KL(p || q): f(u) = u log u."""

    def term_and_slope(logq: Tensor, logp: Tensor) -> tuple[Tensor, Tensor]:
        p = logp.exp()
        return (logp - logq).mul_(p), p.neg_()

    return Divergence(
        term=lambda logq, logp: logp.exp() * (logp - logq),
        advantage=lambda logq, logp: torch.expm1(logp - logq),
        constant=1.0,
        of_ratio=True,
        term_and_slope=term_and_slope,
    )


def generalized_jsd(*, weight: float) -> Divergence:
    """weight KL(p || m) + (1 - weight) KL(q || m), with the mixture m = weight p + (1 - weight) q, 0 < weight < 1.

    GKD, arXiv 2306.13649, eq. 1. The mixture is of probabilities, not of log-probabilities. At the ends the value
    tends to zero; TRL calls the two KL divergences weight 0 and 1 instead: use `forward_kl` and `reverse_kl` here.
    """

    def mixed(log_ratio: Tensor, share: float) -> Tensor:
        """log(1 - share + share exp(log_ratio)), with its digits where the share is small."""
        below = log_ratio.clamp(max=REACH)
        return torch.log1p(share * torch.expm1(below)) + (log_ratio - below)

    def log_mixture(logq: Tensor, logp: Tensor) -> tuple[Tensor, Tensor]:
        """log(m / q) and log(m / p), from the model that has the larger weight."""
        r = logp - logq
        if weight <= 0.5:
            over_student = mixed(r, weight)
            return over_student, over_student - r
        over_teacher = mixed(-r, 1 - weight)
        return over_teacher + r, over_teacher

    def advantage(logq: Tensor, logp: Tensor) -> Tensor:
        return (1 - weight) * log_mixture(logq, logp)[0]

    def both(logq: Tensor, logp: Tensor) -> tuple[Tensor, Tensor]:
        over_student, over_teacher = log_mixture(logq, logp)
        slope = (1 - weight) * over_student
        return -weight * logp.exp() * over_teacher - logq.exp() * slope, slope

    return divergence_with(both, advantage, of_ratio=True)


def jensen_shannon() -> Divergence:
    """Half of KL(p || m) plus half of KL(q || m), m = (p + q) / 2."""
    return generalized_jsd(weight=0.5)


def pearson_chi2() -> Divergence:
    """sum (p - q)^2 / q: f(u) = (u - 1)^2."""
    return Divergence(
        term=lambda logq, logp: (2 * logp - logq).exp() - 2 * logp.exp() + logq.exp(),
        advantage=lambda logq, logp: torch.expm1(2 * (logp - logq)),
        of_ratio=True,
    )


def neyman_chi2() -> Divergence:
    """sum (p - q)^2 / p: f(u) = (u - 1)^2 / u."""
    return Divergence(
        term=lambda logq, logp: (2 * logq - logp).exp() - 2 * logq.exp() + logp.exp(),
        advantage=lambda logq, logp: -2 * torch.expm1(logq - logp),
        of_ratio=True,
    )


def squared_hellinger() -> Divergence:
    """sum (sqrt p - sqrt q)^2: f(u) = (sqrt u - 1)^2."""
    return Divergence(
        term=lambda logq, logp: ((logp / 2).exp() - (logq / 2).exp()).square(),
        advantage=lambda logq, logp: torch.expm1((logp - logq) / 2),
        of_ratio=True,
    )


def total_variation() -> Divergence:
    """Half of sum |p - q|: f(u) = |u - 1| / 2."""
    return Divergence(
        term=lambda logq, logp: (logp.exp() - logq.exp()).abs() / 2,
        advantage=lambda logq, logp: (logp - logq).sign() / 2,
        of_ratio=True,
    )


def jeffreys() -> Divergence:
    """KL(q || p) + KL(p || q): f(u) = (u - 1) log u."""
    return Divergence(
        term=lambda logq, logp: (logp.exp() - logq.exp()) * (logp - logq),
        advantage=lambda logq, logp: (logp - logq) + torch.expm1(logp - logq),
        of_ratio=True,
    )


def cressie_read(*, alpha: float) -> Divergence:
    """f(u) = (u^a - 1) / (a (a - 1)) - (u - 1) / (a - 1): the advantage is the Box-Cox transform of the ratio.

    alpha -> 0 gives the reverse, alpha -> 1 the forward KL; 1/2 four squared Hellinger distances halved, -1 half of
    Neyman's and 2 half of Pearson's chi-squared.
    """

    def advantage(logq: Tensor, logp: Tensor) -> Tensor:
        return torch.expm1(alpha * (logp - logq)) / alpha

    def both(logq: Tensor, logp: Tensor) -> tuple[Tensor, Tensor]:
        r, difference = logp - logq, scaled_expm1(logq, logp - logq)
        if abs(alpha) < 0.5:  # one f, written so that neither limit divides rounding by nearly nothing
            value = (scaled_expm1(logq, alpha * r) / alpha - difference) / (alpha - 1)
        else:
            value = (scaled_expm1(logp, (alpha - 1) * r) / (alpha - 1) - difference) / alpha
        return value, advantage(logq, logp)

    return divergence_with(both, advantage, of_ratio=True)


def limited(divergence: Divergence, *, low: float, high: float) -> Divergence:
    """What the advantage of another f-divergence minimises once its log-ratio is clamped to [low, high], low < 0 < high.

    Inside the bounds nothing changes (up to p - q, which sums to nothing); beyond, with c the bound, a(c) the advantage
    there and f the generator with f'(1) = 0, it is sum_v p e^-c f(e^c) + a(c) (p e^-c - q).
    """

    def clamped(logq: Tensor, logp: Tensor) -> Tensor:
        return divergence.advantage(*_at_ratio((logp - logq).clamp(low, high)))

    def both(logq: Tensor, logp: Tensor) -> tuple[Tensor, Tensor]:
        c = (logp - logq).clamp(low, high)
        scaled, slope = (logp - c).exp(), divergence.advantage(*_at_ratio(c))
        generator = divergence.generator(c) - divergence.constant * torch.expm1(c)
        value = scaled * generator + slope * (scaled - logq.exp())
        value += divergence.constant * (logp.exp() - logq.exp())
        return value, slope + divergence.constant

    return divergence_with(both, clamped, constant=divergence.constant, of_ratio=divergence.of_ratio)


def _at_ratio(log_ratio: Tensor) -> tuple[Tensor, Tensor]:
    """log q and log p with that log-ratio."""
    return torch.zeros_like(log_ratio), log_ratio


def clip(*, low: float, high: float) -> Divergence:
    """What the clipped log-ratio `clip(r, low, high)` minimises: sum_v q (1 - c) - p e^-c, c = clip(r, low, high).

    arXiv 2606.17199, footnote 3, has the reward: low = -1, high = 1 by grid search.
    """
    return limited(reverse_kl(), low=low, high=high)


def tanh(*, tau: float) -> Divergence:
    """What `tanh(r / tau)` minimises. arXiv 2606.17199; tau is not in the paper, the authors' code has 5."""
    return divergence_of(lambda r: torch.tanh(r / tau))


def divergence_of(advantage: Callable[[Tensor], Tensor], *, nodes: int = 48) -> Divergence:
    """The f-divergence that a detached advantage a(r) of the log-ratio r minimises, for any non-decreasing a, a(0) = 0.

    f(u) = u int_1^u a(log s) / s^2 ds is convex with f(1) = 0, and u f' - f = a. Its value is taken by quadrature, as
    q f(p/q) = p int_0^r a(x) exp(-x) dx with r = log u; its gradient is exact.

    Args:
        advantage: elementwise, of r in nats.
        nodes: of the quadrature; smooth advantages need few, kinks many.
    """

    def both(logq: Tensor, logp: Tensor) -> tuple[Tensor, Tensor]:
        r = logp - logq
        reach = r.clamp(-REACH, REACH)  # beyond it the integrand is nothing: at r where r < 0, at 0 elsewhere
        start = (r - reach).clamp(max=0)
        value = torch.zeros_like(r)
        for place, weight in quadrature(nodes):
            x = start + place * reach
            value += weight * advantage(x) * (logp - x).exp()
        return value * reach, advantage(r)

    return divergence_with(both, lambda logq, logp: advantage(logp - logq), of_ratio=True)


def from_generator(f: Callable[[Tensor], Tensor]) -> Divergence:
    """The f-divergence of a convex f(u), f(1) = 0, given as a differentiable function of u = p/q, elementwise.

    Beyond exp(40) and exp(-40) u counts as these.
    """

    def slope(u: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            value = f(u)
            (derivative,) = torch.autograd.grad(value.sum(), u)
        return value.detach(), derivative

    def advantage(logq: Tensor, logp: Tensor) -> Tensor:
        u = (logp - logq).clamp(-40, 40).exp()
        value, derivative = slope(u)
        return u * derivative - value - constant

    constant = float(slope(torch.ones((), dtype=torch.float64))[1])  # f(1) = 0, so w(1) = f'(1)

    def both(logq: Tensor, logp: Tensor) -> tuple[Tensor, Tensor]:
        value = logq.exp() * f((logp - logq).clamp(-40, 40).exp())
        return value, advantage(logq, logp) + constant

    return divergence_with(both, advantage, constant=constant, of_ratio=True)

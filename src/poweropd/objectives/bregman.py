"""Bregman divergences, B_phi(q || p) = sum_v phi(q) - phi(p) - phi'(p) (q - p), of a student q and a teacher p.

Their advantage is `h(p) - h(q)` with the increasing h = phi': PowerOPD's reward with h(x) = x^alpha, the log-ratio with
h = log, which is the one member of both this family and that of f-divergences.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from poweropd.objectives.divergences import REACH, Divergence, divergence_with, quadrature, scaled_expm1


def power(*, alpha: float) -> Divergence:
    """PowerOPD, arXiv 2606.17199: advantage `p^alpha - q^alpha`, in [-1, 1].

    It minimises sum_v [q^(1+a)/(1+a) - q p^a + a p^(1+a)/(1+a)], a times the density power divergence of index a; a = 1
    is half the squared distance. The 1/alpha of the Box-Cox transform is dropped as in the paper, so alpha also scales
    the step; `box_cox` keeps it.
    """

    return _power(alpha, scale=1.0)


def box_cox(*, alpha: float) -> Divergence:
    """`(p^alpha - q^alpha) / alpha`: PowerOPD before its 1/alpha is dropped; tends to the reverse KL as alpha -> 0."""
    return _power(alpha, scale=1 / alpha)


def _power(alpha: float, scale: float) -> Divergence:
    """At small alpha both powers are near 1, at close models near each other: their difference is taken with its digits."""

    def advantage(logq: Tensor, logp: Tensor) -> Tensor:
        return scale * scaled_expm1(alpha * logq, alpha * (logp - logq))

    def both(logq: Tensor, logp: Tensor) -> tuple[Tensor, Tensor]:
        towards = scale * alpha * (alpha * logp).exp() * scaled_expm1(logq, logp - logq)
        slope = advantage(logq, logp)
        return (towards - logq.exp() * slope) / (1 + alpha), slope

    return divergence_with(both, advantage)


def from_derivative(h: Callable[[Tensor], Tensor], *, nodes: int = 32) -> Divergence:
    """The Bregman divergence of any increasing h = phi', a function of the probability in (0, 1], elementwise.

    Its value phi(q) - phi(p) - h(p) (q - p) = int_p^q [h(x) - h(p)] dx is taken by quadrature over log x, so that h may
    grow without bound at 0; its gradient is exact.
    """

    def advantage(logq: Tensor, logp: Tensor) -> Tensor:
        return h(logp.exp()) - h(logq.exp())

    def both(logq: Tensor, logp: Tensor) -> tuple[Tensor, Tensor]:
        at_teacher, high = h(logp.exp()), torch.maximum(logq, logp)
        low = torch.maximum(torch.minimum(logq, logp), high - REACH)
        value = torch.zeros_like(high)
        for place, weight in quadrature(nodes):
            x = (low + place * (high - low)).exp()
            value += weight * x * (h(x) - at_teacher)
        return value * (high - low) * (logq - logp).sign(), advantage(logq, logp)

    return divergence_with(both, advantage)

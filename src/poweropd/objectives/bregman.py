"""Bregman divergences, B_phi(q || p) = sum_v phi(q) - phi(p) - phi'(p) (q - p), of a student q and a teacher p.

Their advantage is `h(p) - h(q)` with the increasing h = phi': PowerOPD's reward with h(x) = x^alpha, the log-ratio with
h = log, which is the one member of both this family and that of f-divergences.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from poweropd.objectives.divergences import Divergence, attach_gradient, quadrature


def power(*, alpha: float) -> Divergence:
    """PowerOPD, arXiv 2606.17199: advantage `p^alpha - q^alpha`, in [-1, 1].

    It minimises sum_v [q^(1+a)/(1+a) - q p^a + a p^(1+a)/(1+a)], a times the density power divergence of index a; a = 1
    is half the squared distance. The 1/alpha of the Box-Cox transform is dropped as in the paper, so alpha also scales
    the step; `box_cox` keeps it.
    """

    def advantage(logq: Tensor, logp: Tensor) -> Tensor:
        return (alpha * logp).exp() - (alpha * logq).exp()

    def term(logq: Tensor, logp: Tensor) -> Tensor:
        q, p = logq.exp(), logp.exp()
        return (alpha * (alpha * logp).exp() * (p - q) - q * advantage(logq, logp)) / (1 + alpha)

    return Divergence(term, advantage)


def box_cox(*, alpha: float) -> Divergence:
    """`(p^alpha - q^alpha) / alpha`: PowerOPD before its 1/alpha is dropped; tends to the reverse KL as alpha -> 0.

    Computed with expm1: at small alpha both powers are near 1 and their difference would lose its digits.
    """

    def advantage(logq: Tensor, logp: Tensor) -> Tensor:
        return (torch.expm1(alpha * logp) - torch.expm1(alpha * logq)) / alpha

    def term(logq: Tensor, logp: Tensor) -> Tensor:
        q, p = logq.exp(), logp.exp()
        return ((alpha * logp).exp() * (p - q) - q * advantage(logq, logp)) / (1 + alpha)

    return Divergence(term, advantage)


def from_derivative(h: Callable[[Tensor], Tensor], *, nodes: int = 32) -> Divergence:
    """The Bregman divergence of any increasing h = phi', a function of the probability in (0, 1], elementwise.

    Its value is taken by quadrature, phi(q) - phi(p) - h(p) (q - p) = (q - p) int_0^1 [h(p + t (q - p)) - h(p)] dt; its
    gradient is exact.
    """

    def advantage(logq: Tensor, logp: Tensor) -> Tensor:
        return h(logp.exp()) - h(logq.exp())

    def term(logq: Tensor, logp: Tensor) -> Tensor:
        with torch.no_grad():
            q, p = logq.exp(), logp.exp()
            value = -h(p)
            for place, weight in quadrature(nodes):
                value = value + weight * h(p + place * (q - p))
            value = value * (q - p)
        return attach_gradient(value, logq, advantage(logq, logp))

    return Divergence(term, advantage)

"""Exact divergences of two next-token distributions, over the whole vocabulary.

Notation: q is the student, p the teacher. Every function takes `student_logprobs` (log q) and `teacher_logprobs`
(log p), `[..., vocabulary]`, normalised, in nats, and returns one value per position, `[...]`, which is zero exactly
where q = p. The gradient goes to the student only; the distribution over prefixes is held fixed. A token that neither
model can emit may carry any large negative finite log-probability.
"""

import math

import torch
from torch import Tensor


def reverse_kl(student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """KL(q || p) = sum_v q (log q - log p)."""
    return (student_logprobs.exp() * (student_logprobs - teacher_logprobs)).sum(-1)


def forward_kl(student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """KL(p || q) = sum_v p (log p - log q)."""
    return (teacher_logprobs.exp() * (teacher_logprobs - student_logprobs)).sum(-1)


def generalized_jsd(student_logprobs: Tensor, teacher_logprobs: Tensor, *, weight: float) -> Tensor:
    """weight KL(p || m) + (1 - weight) KL(q || m), with the mixture m = weight p + (1 - weight) q, 0 < weight < 1.

    GKD, arXiv 2306.13649, eq. 1. The mixture is of probabilities, not of log-probabilities. At the ends the value
    tends to zero; TRL calls the two KL divergences weight 0 and 1 instead: use `forward_kl` and `reverse_kl` here.
    """
    mixture = torch.logaddexp(teacher_logprobs + math.log(weight), student_logprobs + math.log1p(-weight))
    return weight * forward_kl(mixture, teacher_logprobs) + (1 - weight) * reverse_kl(student_logprobs, mixture)


def power_bregman(student_logprobs: Tensor, teacher_logprobs: Tensor, *, alpha: float) -> Tensor:
    """Exact PowerOPD: sum_v [q^(1+a)/(1+a) - q p^a + a p^(1+a)/(1+a)], with a = alpha.

    The Bregman divergence B_phi(q || p) of phi(x) = x^(1+a)/(1+a), a times the density power divergence of index a.
    Its gradient is minus the expectation of PowerOPD's sampled update, `-E_q[(p^a - q^a) grad log q]`; a = 1 is half
    the squared distance. Derived from the reward of arXiv 2606.17199.
    """
    q, p = student_logprobs.exp(), teacher_logprobs.exp()
    p_power = torch.exp(alpha * teacher_logprobs)
    return (q * (torch.exp(alpha * student_logprobs) / (1 + alpha) - p_power) + alpha / (1 + alpha) * p * p_power).sum(
        -1
    )

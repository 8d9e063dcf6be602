"""Per-token rewards of a sampled token, from its two log-probabilities.

Notation: q is the student's and p the teacher's probability of the sampled token, both under the full softmax in fp32.
Every function takes `student_logprobs` (log q) and `teacher_logprobs` (log p), tensors of one shape, in nats, and
returns the reward in that shape. Every reward is zero where both models agree, so truncated sampling (top-p, top-k)
adds no constant push. Rewards are used detached.
"""

import torch
from torch import Tensor


def log_ratio(student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """`log p - log q`: unbounded. Its expected gradient is that of -KL(q || p). Also called vanilla OPD."""
    return teacher_logprobs - student_logprobs


def clip(student_logprobs: Tensor, teacher_logprobs: Tensor, *, low: float, high: float) -> Tensor:
    """`clip(log p - log q, low, high)`.

    arXiv 2606.17199, footnote 3: low = -1, high = 1 by grid search. The authors' code has -5 and 5.
    """
    return log_ratio(student_logprobs, teacher_logprobs).clamp(low, high)


def tanh(student_logprobs: Tensor, teacher_logprobs: Tensor, *, tau: float) -> Tensor:
    """`tanh((log p - log q) / tau)`. arXiv 2606.17199; tau is not in the paper, the authors' code has 5."""
    return torch.tanh(log_ratio(student_logprobs, teacher_logprobs) / tau)


def power(student_logprobs: Tensor, teacher_logprobs: Tensor, *, alpha: float) -> Tensor:
    """PowerOPD, `p^alpha - q^alpha`, in [-1, 1]. arXiv 2606.17199.

    The 1/alpha of the Box-Cox transform is dropped as in the paper, so alpha also scales the step; `box_cox` keeps it.
    """
    return torch.exp(alpha * teacher_logprobs) - torch.exp(alpha * student_logprobs)


def box_cox(student_logprobs: Tensor, teacher_logprobs: Tensor, *, alpha: float) -> Tensor:
    """`(p^alpha - q^alpha) / alpha`: tends to `log_ratio` as alpha -> 0. arXiv 2606.17199, before its 1/alpha is dropped.

    Computed with expm1: at small alpha both powers are near 1 and their difference would lose its digits.
    """
    return (torch.expm1(alpha * teacher_logprobs) - torch.expm1(alpha * student_logprobs)) / alpha


def one(student_logprobs: Tensor, teacher_logprobs: Tensor | None) -> Tensor:
    """`1` for every token: the cross-entropy of given answers."""
    return torch.ones_like(student_logprobs)

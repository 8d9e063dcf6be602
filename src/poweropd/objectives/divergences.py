"""What a divergence is here: a sum of terms, whose derivative is the advantage of a sampled token.

At one prefix, with student q and teacher p over the outcomes v, every divergence of this package is

    D(q, p) = sum_v term(log q_v, log p_v),

and therefore, for any constant c,

    -grad D = E_{v ~ q}[(A(v) + c) grad log q(v)],    A(v) = -(1 / q_v) d term / d log q_v.

So one term gives the exact value over the vocabulary and the detached advantage of one sampled token, and the two agree
in expectation. Shapes are free: `term` and `advantage` are elementwise, `value` sums over the last axis. The gradient
goes to the student only; the distribution over prefixes is held fixed. A token that neither model can emit may carry any
large negative finite log-probability.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

REACH = 60.0  # nats from the larger end after which an integral over probabilities has all its digits
Elementwise = Callable[[Tensor, Tensor], Tensor]  # (log q, log p), one shape -> that shape


@dataclass(frozen=True)
class Divergence:
    """One divergence of a student q from a teacher p.

    Attributes:
        term: of log q and log p; differentiable in log q; sums to a value that is 0 where q = p and positive elsewhere.
        advantage: of log q and log p of a sampled token, in the gauge where it is 0 if both agree.
        term_and_slope: the term and d term / d log q up to a multiple of q, where they come cheaper together than by
            autograd; they may be one tensor.
        constant: what that gauge leaves out: -(1/q) d term / d log q = advantage + constant.
        of_ratio: whether it is an f-divergence: the advantage depends on log p - log q alone.
    """

    term: Elementwise
    advantage: Elementwise
    constant: float = 0.0
    of_ratio: bool = False
    term_and_slope: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None

    def value(self, student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
        """D at each position: `[..., outcomes] -> [...]`."""
        return self.term(student_logprobs, teacher_logprobs).sum(-1)

    def with_slope(self, student_logprobs: Tensor, teacher_logprobs: Tensor) -> tuple[Tensor, Tensor]:
        """The same and, [..., outcomes], its derivative with respect to log q up to a multiple of q; without a graph."""
        assert self.term_and_slope is not None
        with torch.no_grad():
            term, slope = self.term_and_slope(student_logprobs, teacher_logprobs)
            return term.sum(-1), slope

    def generator(self, log_ratio: Tensor) -> Tensor:
        """f(u) of an f-divergence D = sum_v q f(p/q), from log u."""
        return self.term(torch.zeros_like(log_ratio), log_ratio)

    @property
    def stop_gradient_is_exact(self) -> bool:
        """Whether the reward -f(u) of an f-divergence differs from its advantage by a constant: log u alone does."""
        log_ratio = torch.linspace(-2, 2, 9, dtype=torch.float64)
        difference = self.generator(log_ratio) + self.advantage(torch.zeros_like(log_ratio), log_ratio)
        return bool((difference - difference[0]).abs().max() < 1e-9)


def attach_gradient(term: Tensor, student_logprobs: Tensor, advantage: Tensor) -> Tensor:
    """`term` with the gradient that belongs to `advantage`, -q A d log q, whatever made the term."""
    pull = _pull(student_logprobs.detach(), advantage.detach())
    return term.detach() - pull * (student_logprobs - student_logprobs.detach())


def _pull(logq: Tensor, advantage: Tensor) -> Tensor:
    """`q A`. A token of probability 0 is never sampled and pulls nothing, though its advantage be infinite."""
    q = logq.exp()
    return torch.where(q > 0, q * advantage, 0.0)


def divergence_with(
    both: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    advantage: Elementwise,
    *,
    constant: float = 0.0,
    of_ratio: bool = False,
) -> Divergence:
    """A divergence whose term is not differentiated: its gradient is that of its advantage.

    Args:
        both: the value of the term, and `advantage + constant`, of log q and log p.
    """

    def term(logq: Tensor, logp: Tensor) -> Tensor:
        with torch.no_grad():
            value, slope = both(logq, logp)
        return attach_gradient(value, logq, slope)

    def term_and_slope(logq: Tensor, logp: Tensor) -> tuple[Tensor, Tensor]:
        value, slope = both(logq, logp)
        return value, _pull(logq, slope).neg_()

    return Divergence(term, advantage, constant, of_ratio, term_and_slope)


def scaled_expm1(log_scale: Tensor, x: Tensor) -> Tensor:
    """`exp(log_scale) (exp(x) - 1)`: with its digits where x is small, finite where it is; not for autograd."""
    return x.sign() * (log_scale + x.clamp(min=0)).exp() * -torch.expm1(-x.abs())


@lru_cache(maxsize=4)
def quadrature(nodes: int) -> tuple[tuple[float, float], ...]:
    """Gauss-Legendre nodes and weights on [0, 1], by the eigenvalues of the Jacobi matrix (Golub and Welsch, 1969)."""
    orders = torch.arange(1, nodes, dtype=torch.float64)
    off_diagonal = orders / torch.sqrt(4 * orders**2 - 1)
    places, vectors = torch.linalg.eigh(torch.diag(off_diagonal, 1) + torch.diag(off_diagonal, -1))
    return tuple(zip(((places + 1) / 2).tolist(), vectors[0].square().tolist(), strict=True))


def coarsen(student_logprobs: Tensor, top_ids: Tensor, top_logprobs: Tensor, *, tail: str) -> tuple[Tensor, Tensor]:
    """Both distributions on the k outcomes that the teacher gave, and what is done about the rest.

    Args:
        student_logprobs: [..., V].
        top_ids, top_logprobs: [..., k], the teacher's outcomes and log p of them.
        tail: `bucket` adds one outcome that holds the rest; `renormalize` makes the k outcomes sum to one under each
            model, which leaves the student's mass on them unconstrained; `keep` leaves them as they are.

    Returns:
        log q and log p, [..., k + 1] for `bucket`, else [..., k].
    """
    student = student_logprobs.gather(-1, top_ids)
    if tail == "bucket":
        return _with_rest(student), _with_rest(top_logprobs)
    if tail == "renormalize":
        return torch.log_softmax(student, dim=-1), torch.log_softmax(top_logprobs, dim=-1)
    return student, top_logprobs


def _with_rest(logprobs: Tensor) -> Tensor:
    """`logprobs` and, as a last outcome, what they leave of one; never below rounding, so that ratios stay finite."""
    held = logprobs.exp().sum(-1, keepdim=True)
    rest = torch.log1p(-held.clamp(max=1 - 4 * torch.finfo(logprobs.dtype).eps))
    return torch.cat([logprobs, rest], dim=-1)

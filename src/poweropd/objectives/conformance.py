"""What every objective must hold to, shown on small vocabularies in float64: rows of the table and a user's own alike.

On a vocabulary of a few tokens the expected update of a sampled token is a finite sum, so it is compared with the
gradient of the exact divergence to rounding. The gradients come from the fused sweep that training uses.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from poweropd.objectives.build import RATIO, REWARD, build, settings_of
from poweropd.objectives.fused import token_scores
from poweropd.objectives.lm_head import Distribution, LMHead
from poweropd.objectives.loss import loss_of, unshaped_terms
from poweropd.objectives.objective import Objective
from poweropd.objectives.positions import Positions, TokenInputs
from poweropd.objectives.settings import Number
from poweropd.objectives.shaping import StepTokens
from poweropd.objectives.sweeps import LossTerms

SIZE = 7  # tokens of the vocabulary
PAIRS = 6  # random students and teachers


@dataclass(frozen=True)
class Finding:
    """One property: whether it holds, what was found otherwise, and the reason if it does not apply."""

    title: str
    problem: str | None = None
    reason: str | None = None

    @property
    def holds(self) -> bool:
        return self.problem is None


class _DoesNotApplyError(Exception):
    """A property says nothing of this objective; the message says why."""


def check(name: str, **settings: Any) -> list[Finding]:
    """Every property of one objective.

    Args:
        name, settings: as for `build`.

    Raises:
        ValueError: there is no such objective.
    """
    objective = build(name, **settings)
    findings = []
    for title, examine in PROPERTIES.items():
        problem, reason = None, None
        try:
            problem = next(examine(objective), None)
        except _DoesNotApplyError as error:
            reason = str(error)
        except Exception as error:  # a user's own function may raise anything
            problem = f"{type(error).__name__}: {' '.join(str(error).split())}"
        findings.append(Finding(title, problem, reason))
    return findings


def inputs_of(objective: Objective, target_ids: Tensor, teacher: Distribution, student: Distribution) -> TokenInputs:
    """What the objective needs to know of targets [N]; the student itself stands in for its reference."""
    inputs = TokenInputs(target_ids)
    if objective.needs == "full":
        inputs = replace(inputs, teacher=teacher)
    elif objective.needs != "nothing":
        k = objective.k if objective.needs == "top_k" else 0
        inputs = TokenInputs(target_ids, *token_scores(teacher.hidden[0], teacher.heads[0], target_ids, k=k))
    if objective.needs_of_reference == "full":
        return replace(inputs, reference=student)
    logprobs = token_scores(student.hidden[0], student.heads[0], target_ids).logprobs
    return replace(inputs, reference_logprobs=logprobs if objective.needs_of_reference == "sampled" else None)


def of_logits(logits: Tensor) -> Distribution:
    """Distributions [N, V] as hidden states before an identity for a head."""
    return Distribution((logits,), (LMHead(torch.eye(logits.shape[1], dtype=logits.dtype), logits.shape[1]),))


def fused_gradients(
    objective: Objective, student_logits: Tensor, teacher_logprobs: Tensor, target_ids: Tensor
) -> Tensor:
    """The gradient of the loss of each position with respect to its logits [N, V], by the sweep that training uses."""
    hidden = student_logits.clone().requires_grad_()
    student = of_logits(student_logits)
    head = student.heads[0]
    inputs = inputs_of(objective, target_ids, of_logits(teacher_logprobs), student)
    shaped = objective.shape(_step(objective, hidden.detach(), head, inputs)) if objective.needs_whole_step else None
    loss_of(objective, hidden, head, inputs, denominator=1, shaped=shaped).loss.backward()
    assert hidden.grad is not None
    return hidden.grad


def expected_gradient(objective: Objective, q: Tensor, p: Tensor) -> Tensor:
    """`E_{y ~ q}[gradient of the loss with y sampled]` at one position [V], by enumeration."""
    rows = q.log().expand(len(q), -1)
    gradients = fused_gradients(objective, rows, p.log().expand(len(p), -1), torch.arange(len(q)))
    return q @ gradients


def exact_gradient(value: Callable[[Tensor, Tensor], Tensor], q: Tensor, p: Tensor) -> Tensor:
    """The gradient of a divergence at one position with respect to the student's logits [V]."""
    logits = q.log().requires_grad_()
    (gradient,) = torch.autograd.grad(value(logits.log_softmax(-1), p.log()), logits)
    return gradient


def pairs() -> Iterator[tuple[Tensor, Tensor]]:
    """Random student and teacher distributions, some of them sharp."""
    generator = torch.Generator().manual_seed(0)
    for index in range(PAIRS):
        sharpness = 0.5 + index
        p, q = torch.randn(2, SIZE, dtype=torch.float64, generator=generator).mul(sharpness).softmax(-1)
        yield q, p


def _step(objective: Objective, hidden: Tensor, head: LMHead, inputs: TokenInputs) -> StepTokens:
    found: LossTerms = unshaped_terms(objective, hidden, head, inputs)
    one_rollout = torch.zeros(len(hidden), dtype=torch.long)
    return StepTokens(
        found.logprobs, found.entropies, found.teacher_logprobs, found.advantages, found.divergences,
        found.reference_kl, one_rollout, one_rollout,
    )  # fmt: skip


def _differs(got: Tensor, wanted: Tensor, tolerance: float = 1e-7) -> bool:
    return not bool((got - wanted).abs().max() <= tolerance * (1 + wanted.abs().max()))


def _numbers(values: Tensor) -> str:
    return f"[{', '.join(f'{value:.3g}' for value in values.tolist())}]"


def _need_value(objective: Objective) -> None:
    q, p = next(pairs())
    try:
        objective.full(q.log(), p.log())
    except ValueError:
        raise _DoesNotApplyError("it is a reward without a value over the vocabulary") from None


# The properties. Each yields what is wrong; the first problem is enough.


def says_what_it_is(objective: Objective) -> Iterator[str]:
    for name in ("summary", "equation", "gradient_of", "reference"):
        if not getattr(objective.row, name):
            yield f"its {name} is empty"


def refuses_what_is_out_of_range(objective: Objective) -> Iterator[str]:
    for key, setting in settings_of(objective.row).items():
        values = [setting.low - 1, "many"] if isinstance(setting, Number) else ["nonsense"]
        for value in values:
            if setting.problem(value) is None and value != float("-inf"):
                yield f"objective.{key} takes {value!r}"


def rewards_are_detached_and_finite(objective: Objective) -> Iterator[str]:
    if "sampled" not in objective.row.estimators:
        raise _DoesNotApplyError("it has no reward")
    student = torch.tensor([-1e-6, -1.0, -30.0, -30.0, -0.5], requires_grad=True)
    teacher = torch.tensor([-30.0, -1.0, -1e-6, -30.0, -0.25])
    reward = objective.reward(student, teacher)
    if reward.requires_grad:
        yield "its reward carries a gradient: it must be detached"
    if reward.shape != student.shape:
        yield f"its reward has shape {tuple(reward.shape)}, the log-probabilities have {tuple(student.shape)}"
    if not reward.isfinite().all():
        yield f"its reward is not finite at log q {_numbers(student)}, log p {_numbers(teacher)}: {_numbers(reward)}"


def nothing_moves_where_both_agree(objective: Objective) -> Iterator[str]:
    if objective.row.fixed_point != "teacher":
        raise _DoesNotApplyError(f"its update vanishes at {objective.row.fixed_point}")
    if objective.settings.get("gauge", "zero") != "zero" or objective.settings.get("tail") == "sample":
        raise _DoesNotApplyError("it holds in expectation only, with this gauge or tail")
    for _, p in pairs():
        logprobs = p.log().expand(SIZE, -1)
        gradient = fused_gradients(objective, logprobs, logprobs, torch.arange(SIZE))
        if _differs(gradient, torch.zeros_like(gradient)):
            yield f"with student = teacher = {_numbers(p)} its gradient is {gradient.abs().max():.3g}, not 0"


def is_zero_at_the_teacher_and_positive_elsewhere(objective: Objective) -> Iterator[str]:
    _need_value(objective)
    if objective.row.fixed_point != "teacher":
        raise _DoesNotApplyError(f"its update vanishes at {objective.row.fixed_point}")
    for q, p in pairs():
        away, at = objective.full(q.log(), p.log()).item(), objective.full(p.log(), p.log()).item()
        if not away > 0:
            yield f"its value is {away:.3g} for student {_numbers(q)}, teacher {_numbers(p)}; it must be positive"
        if abs(at) > 1e-9:
            yield f"its value is {at:.3g} for student = teacher = {_numbers(p)}; it must be 0"


def gradient_is_that_of_its_value(objective: Objective) -> Iterator[str]:
    """Its change along a line of logits against the integral of the gradient; kinks and quadratures do no harm there."""
    _need_value(objective)
    if objective.row.target is not None:
        raise _DoesNotApplyError("its target follows the student but is held fixed")
    points = 4000
    places = (torch.arange(points, dtype=torch.float64)[:, None] + 0.5) / points
    for q, p in pairs():
        start, way = q.log(), q.log().roll(1) - q.log()
        logits = (start + places * way).requires_grad_()
        values = objective.full(logits.log_softmax(-1), p.log().expand(points, -1))
        (gradients,) = torch.autograd.grad(values.sum(), logits)
        ends = torch.stack([start, start + way])
        change = objective.full(ends.log_softmax(-1), p.log().expand(2, -1)).diff()
        integral = (gradients @ way).mean()
        if _differs(integral, change, 2e-3):
            yield (
                f"from student {_numbers(q)} to {_numbers(q.roll(1))}, teacher {_numbers(p)}, it changes by "
                f"{change.item():.4g}, and its gradient integrates to {integral.item():.4g}"
            )


def estimators_agree_in_expectation(objective: Objective) -> Iterator[str]:
    """Each estimator's expected update against the gradient of the exact value, through the fused sweep."""
    _need_value(objective)
    if objective.needs_whole_step:
        raise _DoesNotApplyError("the update of a token depends on other tokens")
    if objective.settings.get("gauge") == "stop_gradient" and not objective.divergence.stop_gradient_is_exact:
        raise _DoesNotApplyError("the stop-gradient form is not the gradient of anything")
    kept = {key: value for key, value in objective.settings.items() if key in objective.given}
    for estimator in objective.row.estimators:
        variants: list[Mapping[str, Any]] = [{"estimator": estimator}] if len(objective.row.estimators) > 1 else [{}]
        if estimator == "top_k":
            variants = [
                {"estimator": "top_k", "k": SIZE},
                {"estimator": "top_k", "k": SIZE - 1},  # one token in the bucket
                {"estimator": "top_k", "k": 2, "tail": "sample"},
            ]
        for variant in variants:
            other = build(objective.name, **{**_fitting(objective, kept, estimator), **variant})
            for q, p in pairs():
                got, wanted = expected_gradient(other, q, p), exact_gradient(other.full, q, p)
                if _differs(got, wanted, 1e-6):
                    yield f"{other}: expected gradient {_numbers(got)}, that of its value {_numbers(wanted)}"


def _fitting(objective: Objective, given: Mapping[str, Any], estimator: str) -> dict[str, Any]:
    """The row's own settings, and those of the estimator."""
    common = set(REWARD) | set(RATIO) if estimator == "sampled" else set()
    return {key: value for key, value in given.items() if key in objective.row.settings or key in common}


def fused_gradient_is_that_of_the_written_out_loss(objective: Objective) -> Iterator[str]:
    """`-A log q(y) + exact`, with every logit there, by plain autograd; through a head, in blocks of the sweep."""
    generator = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(5, 4, generator=generator).double(), torch.randn(SIZE, 4, generator=generator).double()
    teacher = torch.randn(5, SIZE, generator=generator).double().log_softmax(1)
    targets = torch.tensor([0, 3, 6, 3, 1])
    student = Distribution((hidden,), (LMHead(weight, vocab_size=SIZE),))
    inputs = inputs_of(objective, targets, of_logits(teacher), student)
    shaped = objective.shape(_step(objective, hidden, student.heads[0], inputs)) if objective.needs_whole_step else None

    def fused(h: Tensor, w: Tensor) -> Tensor:
        return loss_of(objective, h, LMHead(w, vocab_size=SIZE), inputs, denominator=5, shaped=shaped).loss

    def written_out(h: Tensor, w: Tensor) -> Tensor:
        logprobs = (h @ w.T).log_softmax(1)
        chosen = logprobs.gather(1, targets[:, None])[:, 0]
        known = inputs.rows(slice(None)) | {"teacher": teacher}
        known["teacher_logprobs"] = teacher.gather(1, targets[:, None])[:, 0]
        advantages = unshaped_terms(objective, hidden, student.heads[0], inputs).advantages
        advantages = advantages if shaped is None else shaped.advantages
        loss = -(advantages + objective.beside_shaping(Positions(logprobs=chosen.detach(), **known))) * chosen
        if objective.has_exact:
            exact = objective.exact(Positions(logprobs=chosen.detach(), student=logprobs, **known))
            loss = loss + (exact if shaped is None else shaped.weights * exact)
        return loss.sum() / 5

    got, wanted = (
        torch.cat([part.flatten() for part in torch.autograd.grad(loss(*arguments), arguments)])
        for loss in (fused, written_out)
        for arguments in [(hidden.clone().requires_grad_(), weight.clone().requires_grad_())]
    )
    if _differs(got, wanted):
        yield f"the fused gradient differs from the written-out one by {(got - wanted).abs().max():.3g}"


def advantage_orders_by_probability(objective: Objective) -> Iterator[str]:
    """An advantage that falls while p grows, or grows with q, belongs to no f-divergence and to no Bregman divergence."""
    if objective.row.divergence is None:
        raise _DoesNotApplyError("it has no divergence")
    low = torch.linspace(-12, -0.7, 60, dtype=torch.float64)
    logprobs = torch.cat([low, torch.linspace(0.51, 0.9999, 60, dtype=torch.float64).log()])
    logq, logp = logprobs[:, None].expand(-1, 120), logprobs[None, :].expand(120, -1)
    advantage = objective.divergence.advantage(logq, logp)
    slack = 1e-9 * (1 + advantage.abs())
    for axis, motion, rise in (("p", "falls", -advantage.diff(dim=1)), ("q", "grows", advantage.diff(dim=0))):
        wrong = rise > (slack[:, 1:] if axis == "p" else slack[1:])
        if wrong.any():
            row, column = (int(place) for place in wrong.nonzero()[0])
            yield (
                f"its advantage {motion} while {axis} grows, at q = {logq[row, column].exp():.3g}, "
                f"p = {logp[row, column].exp():.3g}"
            )


PROPERTIES: dict[str, Callable[[Objective], Iterator[str]]] = {
    "says what it is": says_what_it_is,
    "refuses what is out of range": refuses_what_is_out_of_range,
    "rewards are detached and finite": rewards_are_detached_and_finite,
    "nothing moves where student and teacher agree": nothing_moves_where_both_agree,
    "value is zero at the teacher, positive elsewhere": is_zero_at_the_teacher_and_positive_elsewhere,
    "gradient is that of its value": gradient_is_that_of_its_value,
    "estimators agree in expectation": estimators_agree_in_expectation,
    "fused gradient is that of the written-out loss": fused_gradient_is_that_of_the_written_out_loss,
    "advantage grows with p and falls with q": advantage_orders_by_probability,
}

"""The table of objectives: one row each. Adding an objective is one function and one row here."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal

from torch import Tensor

from poweropd.objectives import divergences, rewards, shaping
from poweropd.objectives.shaping import RewardStatistics

Needs = Literal["nothing", "sampled", "full"]  # what an objective asks of the teacher
PAPER = "PowerOPD, arXiv 2606.17199"


@dataclass(frozen=True)
class Setting:
    """A number that an objective takes; `low` and `high` are exclusive bounds."""

    default: float
    help: str
    low: float = float("-inf")
    high: float = float("inf")


@dataclass(frozen=True)
class Row:
    """One objective, as documented and as computed: either `reward` (and `shaping`) or `divergence`."""

    summary: str
    equation: str
    gradient_of: str
    reference: str
    reward: Callable[..., Tensor] | None = None
    shaping: Callable[[Tensor, RewardStatistics], Tensor] | None = None
    divergence: Callable[..., Tensor] | None = None
    settings: Mapping[str, Setting] = field(default_factory=dict)
    on_golden_answers: bool = False

    @property
    def needs(self) -> Needs:
        """What the teacher must give: `sampled` (log p of the sampled token), `full` (its distribution) or `nothing`."""
        if self.on_golden_answers:
            return "nothing"
        return "full" if self.divergence else "sampled"


_ALPHA = {"alpha": Setting(5.0, "exponent; the paper tries 0.1 to 500", low=0.0)}

OBJECTIVES: dict[str, Row] = {
    "power": Row(
        "PowerOPD: bounded difference of powers",
        "r = p^alpha - q^alpha",
        "-B_phi(q || p), phi(x) = x^(1+alpha)/(1+alpha), prefixes held fixed",
        PAPER,
        reward=rewards.power,
        settings=_ALPHA,
    ),
    "box_cox": Row(
        "PowerOPD with the 1/alpha of the Box-Cox transform kept",
        "r = (p^alpha - q^alpha) / alpha",
        "-B_phi(q || p) / alpha; tends to -KL(q || p) as alpha -> 0",
        PAPER,
        reward=rewards.box_cox,
        settings=_ALPHA,
    ),
    "log_ratio": Row(
        "vanilla on-policy distillation",
        "r = log p - log q",
        "-KL(q || p), prefixes held fixed",
        f"{PAPER} (Vanilla); Thinking Machines, On-Policy Distillation",
        reward=rewards.log_ratio,
    ),
    "clip": Row(
        "log-ratio, clipped",
        "r = clip(log p - log q, low, high)",
        "-D_f(p || q) with f(u) = u int_1^u clip(log s, low, high) / s^2 ds",
        PAPER,
        reward=rewards.clip,
        settings={
            "low": Setting(-1.0, "smallest reward; the paper's -1, the authors' code -5", high=0.0),
            "high": Setting(1.0, "largest reward; the paper's 1, the authors' code 5", low=0.0),
        },
    ),
    "tanh": Row(
        "log-ratio, squashed",
        "r = tanh((log p - log q) / tau)",
        "-D_f(p || q) with f(u) = u int_1^u tanh(log s / tau) / s^2 ds",
        PAPER,
        reward=rewards.tanh,
        settings={"tau": Setting(5.0, "scale in nats; not in the paper, 5 in the authors' code", low=0.0)},
    ),
    "zscore": Row(
        "log-ratio, standardised over the whole batch",
        "A = (r - mean r) / std r, r = log p - log q",
        "-KL(q || p) / std r under exact sampling",
        PAPER,
        reward=rewards.log_ratio,
        shaping=shaping.zscore,
    ),
    "sign_max_abs": Row(
        "log-ratio, each sign divided by its largest magnitude in the batch",
        "A = r / max r where r > 0, else r / max -r, r = log p - log q",
        "no fixed objective: the two signs are scaled by different batch maxima",
        "authors' code of arXiv 2606.17199",
        reward=rewards.log_ratio,
        shaping=shaping.sign_max_abs,
    ),
    "reverse_kl": Row(
        "KL(student || teacher), exact over the vocabulary",
        "D = sum_v q (log q - log p)",
        "-KL(q || p), prefixes held fixed",
        f"{PAPER} (Full-vocab); GKD, arXiv 2306.13649",
        divergence=divergences.reverse_kl,
    ),
    "forward_kl": Row(
        "KL(teacher || student), exact over the vocabulary",
        "D = sum_v p (log p - log q)",
        "-KL(p || q), prefixes held fixed",
        "GKD, arXiv 2306.13649",
        divergence=divergences.forward_kl,
    ),
    "generalized_jsd": Row(
        "generalised Jensen-Shannon divergence, exact over the vocabulary",
        "D = w KL(p || m) + (1 - w) KL(q || m), m = w p + (1 - w) q, w = weight",
        "-D, prefixes held fixed",
        "GKD, arXiv 2306.13649, eq. 1",
        divergence=divergences.generalized_jsd,
        settings={"weight": Setting(0.5, "weight of the teacher in the mixture", low=0.0, high=1.0)},
    ),
    "exact_power": Row(
        "PowerOPD's expected update, exact over the vocabulary",
        "D = sum_v [q^(1+a)/(1+a) - q p^a + a p^(1+a)/(1+a)], a = alpha",
        "-B_phi(q || p), phi(x) = x^(1+a)/(1+a), prefixes held fixed",
        f"derived from {PAPER}",
        divergence=divergences.power_bregman,
        settings=_ALPHA,
    ),
    "sft": Row(
        "supervised fine-tuning on the data's golden answers: the control without a teacher",
        "A = 1 on the tokens of the golden answer",
        "the log-likelihood of the golden answers",
        "cross-entropy",
        reward=rewards.one,
        on_golden_answers=True,
    ),
}


@dataclass(frozen=True)
class Objective:
    """A row of the table with its settings filled in. Made by `build`."""

    name: str
    settings: Mapping[str, float]

    def __str__(self) -> str:
        """`power alpha=5`."""
        return " ".join([self.name, *(f"{key}={value:g}" for key, value in self.settings.items())])

    @property
    def row(self) -> Row:
        return OBJECTIVES[self.name]

    @property
    def needs(self) -> Needs:
        return self.row.needs

    @property
    def gradient_of(self) -> str:
        return self.row.gradient_of

    @property
    def reference(self) -> str:
        return self.row.reference

    @property
    def needs_batch_statistics(self) -> bool:
        """Whether the advantage of one token depends on the rewards of the whole batch."""
        return self.row.shaping is not None

    def reward(self, student_logprobs: Tensor, teacher_logprobs: Tensor | None) -> Tensor:
        """The reward of each sampled token, before shaping; any shape, nats in. Detached.

        Raises:
            ValueError: the objective is a divergence over the vocabulary.
        """
        if self.row.reward is None:
            raise ValueError(
                f"objective {self.name} has no sampled form: it is exact over the vocabulary. "
                f"Sampled objectives: {', '.join(name for name, row in OBJECTIVES.items() if row.reward)}"
            )
        return self.row.reward(student_logprobs, teacher_logprobs, **self.settings).detach()

    def sampled(
        self, student_logprobs: Tensor, teacher_logprobs: Tensor | None, statistics: RewardStatistics | None = None
    ) -> Tensor:
        """The advantage of each sampled token: the reward, shaped.

        Args:
            student_logprobs, teacher_logprobs: log q and log p of the sampled tokens, one shape.
            statistics: of the rewards of the whole optimizer step; by default of the tokens given.

        Raises:
            ValueError: the objective is a divergence over the vocabulary.
        """
        reward = self.reward(student_logprobs, teacher_logprobs)
        if self.row.shaping is None:
            return reward
        return self.row.shaping(reward, statistics or RewardStatistics.of(reward))

    def full(self, student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
        """The divergence at each position, `[..., vocabulary] -> [...]`; differentiable in the student.

        Raises:
            ValueError: the objective is a sampled reward.
        """
        if self.row.divergence is None:
            raise ValueError(
                f"objective {self.name} has no full-vocabulary form: it rewards sampled tokens. "
                f"Full-vocabulary objectives: {', '.join(name for name, row in OBJECTIVES.items() if row.divergence)}"
            )
        return self.row.divergence(student_logprobs, teacher_logprobs.detach(), **self.settings)


def build(name: str, **settings: Any) -> Objective:
    """The objective of that name, unnamed settings at their defaults.

    Raises:
        ValueError: unknown name, unknown setting, or a value outside its range; all problems in one message.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"objective.name: unknown objective {name!r}{_nearest(name, OBJECTIVES)}")
    known = OBJECTIVES[name].settings
    problems = [
        f"objective.{key}: {name} has no such setting{_nearest(key, known)}" for key in settings if key not in known
    ]
    problems += [
        f"objective.{key}: {settings[key]!r} is outside ({setting.low:g}, {setting.high:g}); {setting.help}"
        for key, setting in known.items()
        if key in settings and not _within(settings[key], setting)
    ]
    if problems:
        raise ValueError("\n".join(problems))
    return Objective(name, {key: float(settings.get(key, setting.default)) for key, setting in known.items()})


def _within(value: Any, setting: Setting) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and setting.low < value < setting.high


def _nearest(name: str, known: Mapping[str, Any]) -> str:
    match = get_close_matches(name, known, n=1)
    return f"; did you mean {match[0]!r}?" if match else f"; known: {', '.join(known) or 'none'}"


def as_markdown() -> str:
    """The table as a page: docs/objectives.md is this text."""
    lines = [
        "# Objectives",
        "",
        "Generated by `poweropd objectives --markdown`; do not edit.",
        "",
        "q is the student's and p the teacher's probability, under the full softmax at temperature 1. Rewards and",
        "advantages are detached. Rollouts are drawn from the student; the distribution over prefixes is held fixed, so",
        "each gradient is that of the quantity named, at the prefixes the student visits. A sampled objective needs the",
        "teacher's log-probability of one token, a full one its distribution over the vocabulary.",
        "",
    ]
    for name, row in OBJECTIVES.items():
        lines += [f"## {name}", "", f"{row.summary[0].upper()}{row.summary[1:]}.", "", f"    {row.equation}", ""]
        lines += [
            f"* needs of the teacher: {row.needs}",
            f"* its expected update follows the gradient of: {row.gradient_of}",
        ]
        lines += [
            f"* `objective.{key}`, default {setting.default:g}, within ({setting.low:g}, {setting.high:g}): {setting.help}"
            for key, setting in row.settings.items()
        ]
        lines += [f"* source: {row.reference}", ""]
    return "\n".join(lines)

"""An objective: a divergence, how it is estimated, and what is done to the reward of a sampled token."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from poweropd.objectives import shaping
from poweropd.objectives.csiszar import limited, reverse_kl
from poweropd.objectives.divergences import Divergence, attach_gradient, coarsen
from poweropd.objectives.lm_head import wide
from poweropd.objectives.positions import Positions
from poweropd.objectives.row import Needs, Row
from poweropd.objectives.settings import Value
from poweropd.objectives.shaping import StepTokens

IMPOSSIBLE = -1e4  # log-probability of what a model cannot emit, in nats


@dataclass(frozen=True)
class Shaped:
    """What whole-step shaping makes of a step: the advantage [N] of each token, and the weight [N] of its exact part."""

    advantages: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Objective:
    """A row of the table with every setting filled in. Made by `build`.

    Attributes:
        given: names of the settings that were set, the rest being defaults.
        progress: share of the training that is done, for what changes on the way.
    """

    name: str
    row: Row
    settings: Mapping[str, Value]
    given: tuple[str, ...] = ()
    progress: float = 0.0

    def __str__(self) -> str:
        """`power alpha=5`: the row's own settings, and others that were set."""
        return " ".join([self.name, *(f"{key}={_short(value)}" for key, value in self.shown.items())])

    @property
    def shown(self) -> dict[str, Value]:
        """What tells it from others of its name: the row's own settings, and others that were set."""
        return {key: value for key, value in self.settings.items() if key in self.row.settings or key in self.given}

    def at(self, progress: float, **current: float) -> Self:
        """The objective at a moment of training, with the current values of coefficients that have a schedule."""
        return replace(self, progress=progress, settings={**self.settings, **current})

    # What it is

    @property
    def estimator(self) -> str:
        return str(self.settings.get("estimator") or next(iter(self.row.estimators), "sampled"))

    @property
    def divergence(self) -> Divergence:
        """Raises ValueError for supervised training, which has none."""
        if self.row.divergence is None:
            raise ValueError(f"objective {self.name} has no divergence: it has no teacher")
        divergence = self.row.divergence(**{key: self.settings[key] for key in self.row.settings})
        limit = self._number("ratio_limit") or torch.inf
        return divergence if limit == torch.inf else limited(divergence, low=-limit, high=limit)

    @property
    def gradient_of(self) -> str:
        """What its expected update follows the gradient of, with the settings in force."""
        if self.settings.get("gauge") == "stop_gradient" and not self.divergence.stop_gradient_is_exact:
            return "nothing: the stop-gradient reward -f(u) leaves out u f'(u)"
        text = self.row.gradient_of
        if self._number("ratio_limit") not in (0.0, torch.inf):
            text = f"-D_f(p || q), f that of its advantage with log u within +-{self._number('ratio_limit'):g}"
        if self.estimator == "top_k" and self.row.estimators[0] != "top_k":
            text += f"; over the teacher's {self.k} likeliest tokens, the rest: {self.settings['tail']}"
        if self.settings.get("normalize") == "sign_max_abs":
            text = "no fixed objective: the two signs are scaled by different batch maxima"
        elif self.settings.get("normalize") == "zscore" and "std" not in text:
            text += "; over std r"
        if discount := self._number("discount"):
            text += "; of whole sequences" if discount == 1 else "; between that and the one of whole sequences"
        if self._number("reference_kl"):
            text += "; less reference_kl x KL(q || reference)"
        if self._number("golden"):
            text += "; plus golden x the log-likelihood of golden answers"
        return text

    @property
    def reference(self) -> str:
        return self.row.reference

    # What it asks for

    @property
    def needs(self) -> Needs:
        """What the teacher must give: see `Row.needs_with`."""
        return self.row.needs_with(self.estimator, self.settings.get("baseline", "none"))

    @property
    def needs_of_reference(self) -> Needs:
        """What the frozen initial student must give."""
        if not self._number("reference_kl"):
            return "nothing"
        return "full" if self.settings["reference_kl_form"] == "full" else "sampled"

    @property
    def needs_whole_step(self) -> bool:
        """Whether the advantage of one token depends on other tokens."""
        return bool(
            self.row.select
            or self._number("discount")
            or self.settings.get("normalize", "none") != "none"
            or self.settings.get("baseline") == "leave_one_out"
        )

    @property
    def shapes_by_logprobs_alone(self) -> bool:
        """Whether `shape` looks at log-probabilities of sampled tokens and at nothing else of the student."""
        return self.estimator == "sampled" and not self.looks_at_student and self.row.select is None

    @property
    def k(self) -> int:
        """How many of the teacher's likeliest tokens it looks at."""
        return int(self._number("k"))

    @property
    def has_score(self) -> bool:
        """Whether sampled tokens get an advantage."""
        in_reward = self.needs_of_reference == "sampled"
        samples_tail = self.estimator == "top_k" and self.settings["tail"] == "sample"
        return self.estimator == "sampled" or in_reward or samples_tail

    @property
    def has_exact(self) -> bool:
        """Whether some part is differentiated over the vocabulary."""
        return self.estimator != "sampled" or self.row.extra is not None or self.needs_of_reference == "full"

    @property
    def looks_at_student(self) -> bool:
        """Whether the advantage depends on the student's whole distribution."""
        return self.settings.get("baseline") == "exact"

    @property
    def reference_weight(self) -> float:
        """Coefficient of the reference KL, now."""
        return self._number("reference_kl")

    @property
    def golden_weight(self) -> float:
        """Coefficient of the golden answers' cross-entropy, now."""
        return self._number("golden")

    def _number(self, key: str) -> float:
        return float(self.settings.get(key, 0.0))

    # Its parts, at some positions

    def reward(self, student_logprobs: Tensor, teacher_logprobs: Tensor | None) -> Tensor:
        """The reward of each sampled token by itself, before any shaping; any shape, nats in. Detached.

        Raises:
            ValueError: the objective is exact over the vocabulary.
        """
        student_logprobs = student_logprobs.detach()
        if self.row.on_golden_answers:
            return torch.ones_like(student_logprobs)
        if "sampled" not in self.row.estimators:
            raise ValueError(
                f"objective {self.name} has no sampled form: it has {', '.join(self.row.estimators)}. "
                "For a reward of sampled tokens choose power or log_ratio"
            )
        if teacher_logprobs is None:
            raise ValueError(f"objective {self.name} needs the teacher's log-probabilities, which are not there")
        divergence, gauge = self.divergence, self.settings.get("gauge")
        if gauge == "stop_gradient":
            return -divergence.generator(teacher_logprobs - student_logprobs).detach()
        reward = divergence.advantage(student_logprobs, teacher_logprobs).detach()
        return reward + divergence.constant if gauge == "opd_plus" else reward

    def score(self, at: Positions) -> Tensor:
        """The advantage [B] of each sampled token, before whole-step shaping; detached."""
        if self.estimator == "sampled":
            score = self._gated_reward(at.logprobs, at.teacher_logprobs)
            if self.looks_at_student:
                score = score - self._expected_reward(at.student, at.teacher)
        else:
            score = torch.zeros_like(at.logprobs)
            if self.estimator == "top_k" and self.settings["tail"] == "sample":
                assert at.top_ids is not None
                in_tail = (at.top_ids != at.target_ids[:, None]).all(dim=1)
                score = self.reward(at.logprobs, at.teacher_logprobs) * in_tail
        if self.settings.get("reference_kl_form") == "k1_reward":
            score = score + self._towards_reference(at)
        return score

    def beside_shaping(self, at: Positions) -> Tensor | float:
        """What adds to the advantage [B] after shaping: k2 of the reference KL as a loss, (log q - log ref)^2 / 2."""
        return self._towards_reference(at) if self.settings.get("reference_kl_form") == "k2_loss" else 0.0

    def _towards_reference(self, at: Positions) -> Tensor | float:
        if not self.reference_weight:
            return 0.0
        if at.reference_logprobs is None:
            raise ValueError(f"objective {self.name} needs the reference's log-probabilities, which are not there")
        return -self.reference_weight * (at.logprobs - at.reference_logprobs)

    def _expected_reward(self, student: Tensor | None, teacher: Tensor | None) -> Tensor:
        """`E_{v ~ q}[reward(v)]`, [...] from [..., V]: the exact baseline."""
        if student is None or teacher is None:
            raise ValueError(f"objective {self.name} needs whole distributions for baseline exact, which are not there")
        return (student.detach().exp() * self._gated_reward(student, teacher)).sum(-1)

    def _gated_reward(self, student_logprobs: Tensor, teacher_logprobs: Tensor | None) -> Tensor:
        reward = self.reward(student_logprobs, teacher_logprobs)
        if self.row.gate is None or teacher_logprobs is None:
            return reward
        return reward * self.row.gate(student_logprobs.detach(), teacher_logprobs, self.settings)

    def divergence_estimate(self, student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor | None:
        """f(p/q) of tokens sampled from the student, whose mean estimates the f-divergence that a reward descends.

        None where that is not its objective: exact divergences are there themselves, others are no f-divergence.
        """
        if self.row.divergence is None or self.estimator != "sampled" or not self.divergence.of_ratio:
            return None
        return self.divergence.generator(teacher_logprobs - student_logprobs)

    def exact(self, at: Positions) -> Tensor:
        """What is differentiated at each position, [B]; without the reference KL."""
        assert at.student is not None
        value = at.student.new_zeros(len(at.logprobs))
        if self.estimator == "full":
            value = self.divergence.value(at.student, self._target(at.student, self._whole_teacher(at)))
        elif self.estimator == "top_k":
            value = self._top_k(at.student, at.top_ids, at.top_logprobs)
        if self.row.extra is not None:
            value = value + self.row.extra(at.with_top(self.k), self.settings)
        return value

    @property
    def knows_slope(self) -> bool:
        """Whether `exact_with_slope` takes the place of `exact` and autograd."""
        return self.estimator == "full" and self.row.extra is None and self.divergence.term_and_slope is not None

    @property
    def is_reverse_kl(self) -> bool:
        """Whether it is the exact KL(q || p) to the teacher and nothing else."""
        is_plain = self.estimator == "full" and self.row.extra is None and self.row.target is None
        is_unlimited = self._number("ratio_limit") in (0.0, torch.inf)
        return is_plain and is_unlimited and self.row.divergence is reverse_kl and not self.reference_weight

    def exact_with_slope(self, at: Positions) -> tuple[Tensor, Tensor]:
        """The same [B], and its derivative [B, V] with respect to log q, up to a multiple of q."""
        assert at.student is not None
        return self.divergence.with_slope(at.student, self._target(at.student, self._whole_teacher(at)))

    def _whole_teacher(self, at: Positions) -> Tensor:
        if at.teacher is None:
            raise ValueError(f"objective {self.name} needs the teacher's whole distribution, which is not there")
        return at.teacher

    def _target(self, student: Tensor, teacher: Tensor) -> Tensor:
        target = self.row.target
        return teacher if target is None else target(student, teacher, self.settings, self.progress)

    def _top_k(self, student: Tensor, top_ids: Tensor | None, top_logprobs: Tensor | None) -> Tensor:
        if top_ids is None or top_logprobs is None:
            raise ValueError(f"objective {self.name} needs the teacher's likeliest tokens, which are not there")
        divergence, tail = self.divergence, str(self.settings["tail"])
        if tail != "sample":
            return divergence.value(*coarsen(student, top_ids, top_logprobs, tail=tail))
        q, p = coarsen(student, top_ids, top_logprobs, tail="keep")
        return attach_gradient(divergence.term(q, p), q, divergence.advantage(q, p)).sum(-1)

    # Its parts, over a whole step

    def shape(self, tokens: StepTokens) -> Shaped:
        """Advantages and weights of a whole optimizer step, from what its tokens are by themselves."""
        advantages, weights = tokens.rewards, torch.ones_like(tokens.rewards)
        if discount := self._number("discount"):
            divergence = self.divergence
            future = -divergence.generator(tokens.teacher_logprobs - tokens.logprobs).detach()
            if self.settings.get("reference_kl_form") == "k1_reward":
                future = future - self._number("reference_kl") * tokens.reference_kl
            advantages = advantages + shaping.discounted_future(future, tokens.rollouts, discount)
        if self.settings.get("baseline") == "leave_one_out":
            advantages = shaping.leave_one_out(advantages, tokens.rollouts, tokens.prompts)
        normalize = self.settings.get("normalize")
        if normalize == "zscore":
            advantages = shaping.zscore(advantages)
        elif normalize == "sign_max_abs":
            advantages = shaping.sign_max_abs(advantages)
        if self.row.select is not None and len(advantages):
            kept = self.row.select(tokens, self.settings, self.progress).to(advantages.dtype)
            weights = kept * (len(kept) / kept.sum().clamp(min=1))  # a mean over the tokens kept
            advantages = advantages * weights
        return Shaped(advantages, weights)

    # As pure functions of log-probabilities

    def sampled(self, student_logprobs: Tensor, teacher_logprobs: Tensor | None) -> Tensor:
        """The advantage of each sampled token, detached.

        What depends on other tokens takes the last axis for one rollout; the exact baseline takes it for the vocabulary.

        Args:
            student_logprobs, teacher_logprobs: log q and log p, one shape, in nats; -inf counts as -10,000.

        Returns:
            That shape, in fp32 or wider. Which tokens `reopold` drops is decided over a whole step, by `shape`.

        Raises:
            ValueError: the objective has no sampled form, or one that a single axis cannot show.
        """
        student, teacher = self._arguments(student_logprobs, teacher_logprobs)
        reward = self._gated_reward(student, teacher)
        if teacher is None:
            return reward
        if self.settings.get("baseline") == "leave_one_out":
            raise ValueError("objective.baseline leave_one_out compares the rollouts of one prompt: use `shape`")
        shapes_rollout = self.settings.get("normalize", "none") != "none" or self._number("discount")
        if self.looks_at_student:
            if shapes_rollout:
                raise ValueError(
                    "objective.baseline exact looks along the vocabulary, and the rest along tokens: use `shape`"
                )
            reward = reward - self._expected_reward(student, teacher)[..., None]
        if not shapes_rollout or not reward.numel():
            return reward
        alone = replace(self, row=replace(self.row, select=None))  # which tokens are kept is decided over a step
        length = reward.shape[-1] if reward.dim() else 1
        rows = [values.detach().reshape(-1, length) for values in (student, teacher, reward)]
        shaped = [alone.shape(StepTokens.of_one_rollout(*row)).advantages for row in zip(*rows, strict=True)]
        return torch.stack(shaped).reshape(reward.shape)

    def full(self, student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
        """The divergence at each position, `[..., V] -> [...]`, differentiable in the student.

        In fp32 or wider; a log-probability of -inf counts as -10,000. Which tokens `tip` keeps is decided over a whole
        step, by `shape`.

        Raises:
            ValueError: there is no such function: the objective is a reward of sampled tokens alone.
        """
        shaped = self.settings.get("normalize", "none") != "none" or self._number("discount")
        if "full" not in self.row.estimators or shaped:
            exact = "" if self.row.on_golden_answers else "; reverse_kl, forward_kl and power have one"
            raise ValueError(f"objective {self.name} has no full-vocabulary form{exact}")
        student, teacher = self._arguments(student_logprobs, teacher_logprobs)
        assert teacher is not None
        value = self.divergence.value(student, self._target(student, teacher))
        if self.row.extra is None:
            return value
        rows = (values.reshape(-1, values.shape[-1]) for values in (student, teacher))
        at = Positions.of_distributions(*rows).with_top(self.k)
        return value + self.row.extra(at, self.settings).reshape(value.shape)

    def top_k(self, student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
        """The divergence on the teacher's k likeliest tokens, the tail as set; `[..., V] -> [...]`, as `full`.

        With tail sample it is the sum over those tokens alone, which may be negative: the sampled token adds the rest.

        Raises:
            ValueError: the objective has no such form.
        """
        if "top_k" not in self.row.estimators:
            raise ValueError(f"objective {self.name} has no top-k form; reverse_kl, forward_kl and power have one")
        student, teacher = self._arguments(student_logprobs, teacher_logprobs)
        assert teacher is not None
        top = teacher.topk(min(self.k, teacher.shape[-1]), dim=-1)
        return self._top_k(student, top.indices, top.values)

    def _arguments(self, student: Tensor, teacher: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Both in fp32 or wider and finite, the teacher detached."""
        if teacher is not None and teacher.shape != student.shape:
            raise ValueError(
                f"objective {self.name}: the student's log-probabilities have shape {list(student.shape)}, the teacher's "
                f"{list(teacher.shape)}; give both one shape"
            )
        student = student.to(wide(student.dtype)).clamp(min=IMPOSSIBLE)
        return student, None if teacher is None else teacher.detach().to(student.dtype).clamp(min=IMPOSSIBLE)


def _short(value: Value) -> str:
    return value if isinstance(value, str) else f"{value:g}"

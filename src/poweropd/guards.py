"""When a run must stop, or say loudly that something is wrong."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from poweropd.errors import NonFiniteError, RolloutError
from poweropd.sections import GuardConfig
from poweropd.types import Rollout
from poweropd.update import GradientResult

CLEARLY_BELOW = 0.75  # of a limit: a share that noise does not bring down from above it
MISMATCH_ALARM = 0.05  # nats; rounding between sampler and trainer is far below, another model or template far above


def refuse_non_finite(
    result: GradientResult, grad_norm: float, rollouts: Sequence[Rollout], tokenizer: PreTrainedTokenizerBase, step: int
) -> None:
    """Stop before an update that would spoil the weights.

    Raises:
        NonFiniteError: the loss or its gradient is not finite; names step, prompt, token and reward of the first cause.
    """
    if math.isfinite(result.loss) and math.isfinite(grad_norm):
        return
    if (bad := result.non_finite) is not None:
        rollout = rollouts[bad.rollout]
        token = tokenizer.decode([rollout.response_ids[bad.place]])
        advice = (
            "the models are too far apart for it: set objective.ratio_limit, or choose a bounded objective such as power"
            if step == 0 and math.isfinite(bad.logprob) and math.isfinite(bad.teacher_logprob)
            else "try a lower learning rate"
        )
        raise NonFiniteError(
            f"step {step}: not finite at token {bad.place} ({token!r}) of the response to prompt {rollout.prompt.id}: reward "
            f"{bad.signal:g}, log-probability {bad.logprob:g} (student), "
            f"{bad.teacher_logprob:g} (teacher). No update was made, {advice}"
        )
    raise NonFiniteError(
        f"step {step}: loss {result.loss:g}, gradient norm {grad_norm:g}, though every reward is finite: the backward "
        "pass overflowed. No update was made, try a lower learning rate or precision float32"
    )


def mismatch_warning(metrics: Mapping[str, float], step: int, *, own_weights: bool, first: bool) -> str | None:
    """A warning when the trainer's log-probabilities are not those the rollouts were drawn with.

    Args:
        own_weights: whether the sampler has weights of its own, whose every update may fail; else step 0 tells.
        first: whether this is the first step of a session; a sampler with its own weights must begin right.

    Raises:
        RolloutError: it does not.
    """
    mismatch = metrics.get("rollout/mismatch", 0.0)
    if not mismatch > MISMATCH_ALARM or (step and not own_weights):
        return None
    warning = (
        f"step {step}: rollout/mismatch is {mismatch:.3g} nats a token: the sampler and the trainer disagree about the "
        "student. Check precision, and that the weights were synchronised"
    )
    if own_weights and first:
        raise RolloutError(f"{warning}. Nothing of this step is kept")
    return warning


@dataclass(frozen=True)
class Alarm:
    """A collapse after step `step`; `text` says in one line what was seen and what to try."""

    step: int
    text: str


@dataclass
class _Watch:
    """What is known of one share: whether its limit holds, and for how many steps it has been on its side of it."""

    armed: bool = False
    above: bool = False
    steps: int = 0


class CollapseGuard:
    """Notices that answers begin to run to the budget or to go round in circles (StableOPD, arXiv 2604.08527).

    Its alarm is raised by a share that has been above its limit for `patience` steps in a row. A limit holds only once
    the student has kept it for as many steps, or from the start if the untrained student is a quarter below it: a base
    student that has always run to the budget has not collapsed. With action `warn` one collapse is one alarm, the next
    follows only after a recovery; with the others it comes again every `patience` steps.
    """

    def __init__(self, config: GuardConfig) -> None:
        self._config = config
        limits = {"truncation": config.truncation, "repetition": config.repetition}
        self._limits = {key: limit for key, limit in limits.items() if limit is not None}
        self._watches = {key: _Watch() for key in limits}

    def observe(self, step: int, metrics: Mapping[str, float]) -> Alarm | None:
        """Take notice of the metrics of a step, in order; `truncation` and `repetition` must be among them."""
        high = [
            key for key, limit in self._limits.items() if self._is_alarming(self._watches[key], metrics[key], limit)
        ]
        if not high:
            return None
        seen = " and ".join(f"{key} is {metrics[key]:.2f}, limit {self._limits[key]:g}" for key in high)
        return Alarm(
            step,
            f"step {step}: {seen}, for at least {self._config.patience} steps: answers "
            f"{'go round in circles' if 'repetition' in high else 'run to the budget'}. Try a lower optimizer.lr, a bounded "
            "objective such as power, objective.reference_kl or objective.golden above 0, or a smaller "
            "sampling.max_new_tokens",
        )

    def _is_alarming(self, watch: _Watch, share: float, limit: float) -> bool:
        above, first = share > limit, watch.steps == 0
        watch.steps = watch.steps + 1 if above == watch.above else 1
        watch.above = above
        patient = watch.steps % self._config.patience == 0
        if not above:
            watch.armed |= patient or (first and share <= CLEARLY_BELOW * limit)
            return False
        if not (watch.armed and patient):
            return False
        watch.armed = self._config.action != "warn"
        return True

    def state(self) -> dict[str, Any]:
        """All that decides later alarms, as plain values."""
        return {key: asdict(watch) for key, watch in self._watches.items()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._watches = {key: _Watch(**values) for key, values in state.items()}

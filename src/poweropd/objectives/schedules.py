"""The weight of a penalty over a run: constant, falling, or steered to a target."""

from collections.abc import Mapping
from typing import Literal, Self, get_args

Schedule = Literal["constant", "linear", "adaptive"]
GAIN = 0.1  # K_beta of arXiv 1909.08593, section 2.2
LARGEST_ERROR = 0.2  # its clip: no more than 2 % of change a step


class Coefficient:
    """A weight, for example of the KL to a reference model.

    `constant` keeps it; `linear` lets it fall from `initial` at the first step to 0 at the last; `adaptive` steers the
    measured penalty to `target` by the proportional controller of Ziegler et al., Fine-Tuning Language Models from Human
    Preferences (arXiv 1909.08593, section 2.2). A weight of 0 stays 0.

    Args:
        target: what `adaptive` aims at, in the unit of what is measured, for a KL nats.

    Raises:
        ValueError: an unknown schedule, a negative weight, `adaptive` without a positive target or a target without it.
    """

    def __init__(self, initial: float, schedule: Schedule = "constant", target: float | None = None) -> None:
        if schedule not in get_args(Schedule):
            raise ValueError(f"unknown schedule {schedule!r}; known: {', '.join(get_args(Schedule))}")
        if not initial >= 0:
            raise ValueError(f"the initial coefficient is {initial:g}; it must be 0 or more")
        if schedule == "adaptive" and (target is None or not target > 0):
            raise ValueError(f"schedule adaptive needs a target above 0, got {target}")
        if schedule != "adaptive" and target is not None:
            raise ValueError(f"schedule {schedule} takes no target, got {target:g}; only adaptive does")
        self._value = float(initial)
        self._schedule = schedule
        self._target = target

    @classmethod
    def of(cls, settings: Mapping[str, float | str], key: str) -> Self:
        """That of an objective's settings `key`, `key_schedule` and `key_target`; 0 where it has none."""
        schedule = str(settings.get(f"{key}_schedule", "constant"))
        target = float(settings.get(f"{key}_target", 0.0)) or None
        return cls(float(settings.get(key, 0.0)), schedule, target)  # type: ignore[arg-type]

    def at(self, step: int, steps: int) -> float:
        """The weight in step `step`, from 0, of `steps`."""
        return self._value * (1 - step / max(steps - 1, 1)) if self._schedule == "linear" else self._value

    def observe(self, measured: float) -> None:
        """Steer by the penalty just measured: `value *= 1 + 0.1 * clip(measured / target - 1, -0.2, 0.2)`.

        Other schedules take no notice.
        """
        if self._target is not None:
            error = min(max(measured / self._target - 1, -LARGEST_ERROR), LARGEST_ERROR)
            self._value *= 1 + GAIN * error

    def raise_(self, factor: float = 2.0) -> None:
        """Multiply the weight, now and at all later steps."""
        self._value *= factor

    def state(self) -> dict[str, float]:
        """All that the steps so far have changed."""
        return {"value": self._value}

    def load_state(self, state: dict[str, float]) -> None:
        self._value = state["value"]

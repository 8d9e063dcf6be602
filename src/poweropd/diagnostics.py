"""The records of one optimizer step, beside those of its tokens. docs/metrics.md defines every key."""

import resource
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from poweropd.objectives import Objective
from poweropd.repetition import compression_ratio, repetition_rate, window_for
from poweropd.rollout.engine import Sampling
from poweropd.step_statistics import SIGNALS, signal_of
from poweropd.types import Rollout
from poweropd.update import GradientResult, RolloutTerms

GRAD_NORM_WINDOW = 100  # earlier steps that a gradient norm is compared with
GIB = 2**30


def loss_metrics(result: GradientResult, golden: GradientResult | None, objective: Objective) -> dict[str, float]:
    """The whole loss, and the coefficients of what holds the student: its initial state and golden answers."""
    metrics: dict[str, float] = {"loss": result.loss, "tokens": result.num_loss_tokens}
    if objective.needs_of_reference != "nothing":
        metrics["reference_kl/coefficient"] = objective.reference_weight
    if golden is not None:
        metrics["loss"] += golden.loss
        metrics["golden/loss"] = golden.loss / objective.golden_weight
        metrics["golden/coefficient"] = objective.golden_weight
    return metrics


def rollout_metrics(
    step: int, rollouts: Sequence[Rollout], tokenizer: PreTrainedTokenizerBase, sampling: Sampling
) -> dict[str, float]:
    """Of the responses as texts; special tokens count as text."""
    texts = tokenizer.batch_decode([list(rollout.response_ids) for rollout in rollouts])
    window = window_for(sampling.max_new_tokens)
    ratios = [compression_ratio(text[-window:]) for text in texts]
    lengths = [len(rollout) for rollout in rollouts]
    truncation = statistics.fmean(rollout.finish_reason == "length" for rollout in rollouts)
    metrics = {
        "length/mean": statistics.fmean(lengths),
        "length/min": min(lengths),
        "length/max": max(lengths),
        "truncation": truncation,
        "end_token/share": 1 - truncation,
        "repetition": repetition_rate(texts, sampling.max_new_tokens),
        "compression_ratio/mean": statistics.fmean(ratios),
        "compression_ratio/max": max(ratios),
    }
    by_student = [rollout for rollout in rollouts if rollout.source in ("student", "mixture")]
    if by_student:
        staleness = [step - rollout.policy_version for rollout in by_student]
        metrics |= {"staleness/mean": statistics.fmean(staleness), "staleness/max": max(staleness)}
    return metrics


class GradNorms:
    """The gradient norm of each step, and how it stands to the median of the steps before it."""

    def __init__(self) -> None:
        self._earlier: list[float] = []

    def metrics(self, norm: float) -> dict[str, float]:
        """Of the next step, whose gradient has this norm."""
        metrics = {"grad_norm": norm}
        if self._earlier and (median := statistics.median(self._earlier)):
            metrics["grad_norm/median_ratio"] = norm / median
        self._earlier = [*self._earlier, norm][-GRAD_NORM_WINDOW:]
        return metrics

    def state(self) -> dict[str, Any]:
        """All that decides later ratios."""
        return {"earlier": self._earlier}

    def load_state(self, state: dict[str, Any]) -> None:
        self._earlier = list(state["earlier"])


def rollout_records(
    step: int,
    rollouts: Sequence[Rollout],
    terms: Sequence[RolloutTerms],
    objective: Objective,
    tokenizer: PreTrainedTokenizerBase,
) -> list[dict[str, Any]]:
    """The rollouts of a step of which there are terms, the first ones, by token; null where one is not trained on.

    `weights` are advantages, or the divergences of an exact objective.
    """
    column = SIGNALS[signal_of(objective)]
    return [
        {
            "step": step,
            "id": rollout.prompt.id,
            "prompt": rollout.prompt.text,
            "finish_reason": rollout.finish_reason,
            "tokens": [tokenizer.decode([token]) for token in rollout.response_ids],
            "weights": _by_token(rollout, own, column),
            "student_logprobs": _by_token(rollout, own, "logprobs"),
            "teacher_logprobs": _by_token(rollout, own, "teacher_logprobs"),
        }
        for rollout, own in zip(rollouts, terms, strict=False)
    ]


def _by_token(rollout: Rollout, terms: RolloutTerms, column: str) -> list[float | None]:
    """One number a response token, for JSON, which has no NaN."""
    values = torch.full((len(rollout),), torch.nan).index_copy(0, terms.places, getattr(terms, column).float())
    return [round(value, 5) if value == value else None for value in values.tolist()]


class Clock:
    """Seconds of the phases of a step, and the memory it took."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start = self._last = time.monotonic()
        self._laps: dict[str, float] = {}
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def lap(self, phase: str) -> None:
        """Everything since the last lap was `phase`."""
        now = time.monotonic()
        self._laps[phase] = now - self._last
        self._last = now

    def metrics(self, tokens: int) -> dict[str, float]:
        """Of a step that trained on so many tokens; the step ends now."""
        seconds = {**self._laps, "step": time.monotonic() - self._start}
        return {
            **{f"time/{phase}": value for phase, value in seconds.items()},
            **{f"tokens_per_second/{phase}": tokens / value for phase, value in self._laps.items()},
            "tokens_per_second": tokens / seconds["step"],
            "memory/peak": self._peak() / GIB,
        }

    def _peak(self) -> int:
        """Bytes allocated at most on the GPU since the step began or, on a CPU, resident at most since the process did."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

"""What a step's loss saw of its tokens, taken up micro-batch by micro-batch in constant memory.

docs/metrics.md defines every key. A number that no token has, say the teacher's entropy where the teacher does not tell,
leaves its key out.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from poweropd.objectives import Objective
from poweropd.objectives.sweeps import LossTerms
from poweropd.rollout.engine import Sampling
from poweropd.streaming import QUANTILES, Moments, Plane, QuantileSketch, Streaming
from poweropd.types import Rollout, TokenBatch

HEAVY_TAIL = 5.0  # |log-ratio| beyond which a token counts as tail, in nats
POSITION_BINS = 24  # 0, 1, 2-3, 4-7, ...: the last one begins at four million tokens
CELLS = 20  # of the plane of probabilities, along each axis

OF_DRAWN = ("kl/k1", "kl/k2", "kl/k3", "divergence/estimate")  # speak of tokens that the student drew, and of no others

SIGNALS = {"reward": "advantages", "divergence": "divergences"}
"""What is shown of each token: by the name in the records, the field of `LossTerms`."""


def signal_of(objective: Objective) -> str:
    """Which of `SIGNALS` an objective has."""
    return "reward" if objective.estimator == "sampled" else "divergence"


class StepStatistics:
    """The statistics of one optimizer step.

    Args:
        rollouts: those of the step.
        version: optimizer steps that the student has taken; rollouts of older versions are off-policy. None: none is.
        sampling: how they were drawn.
        device: where the tokens are.
        detailed: whether positions and distributions are wanted, beside metrics.
    """

    def __init__(
        self,
        objective: Objective,
        rollouts: Sequence[Rollout],
        sampling: Sampling,
        *,
        version: int | None = None,
        device: torch.device | str = "cpu",
        detailed: bool = True,
    ) -> None:
        self._objective = objective
        self._signal = signal_of(objective)
        self._is_full_softmax = sampling.is_plain
        self._is_on_policy = sampling.is_plain and all(
            rollout.source == "student" and (version is None or rollout.policy_version >= version)
            for rollout in rollouts
        )
        self._detailed = detailed
        bins = POSITION_BINS if detailed else 0
        self._keys: tuple[str, ...] = ()
        self._means = Moments(0, device=device)  # a row a key, as soon as they are known
        self._sketch = QuantileSketch(2, device=device)  # of the signal and of the log-ratio
        self._means_by_position = Moments(bins, device=device)
        self._sketch_by_position = QuantileSketch(bins, device=device)
        self._plane = Plane(CELLS, device=device)

    @property
    def parts(self) -> Sequence[Streaming]:
        """What `streaming.merge_ranks` combines."""
        return self._means, self._sketch, self._means_by_position, self._sketch_by_position, self._plane

    def add(self, batch: TokenBatch, terms: LossTerms) -> None:
        """Take up a micro-batch, on the device."""
        numbers = self._numbers(batch, terms)
        if not self._keys:
            self._keys = tuple(numbers)
            self._means = Moments(len(numbers), device=self._sketch.sums.device)
        self._means.add(torch.stack(list(numbers.values())))
        signal, log_ratio = numbers[self._signal], numbers["log_ratio"]
        of_log_ratio = torch.arange(2, device=signal.device).repeat_interleave(len(signal))
        self._sketch.add(torch.cat([signal, log_ratio]), of_log_ratio)
        if self._detailed:
            bins = torch.frexp(batch.places.double()).exponent.long().clamp(max=POSITION_BINS - 1)
            self._means_by_position.add(signal, bins == torch.arange(POSITION_BINS, device=bins.device)[:, None])
            self._sketch_by_position.add(signal, bins)
            self._plane.add(terms.logprobs.double().exp(), terms.teacher_logprobs.double().exp(), signal)

    def _numbers(self, batch: TokenBatch, terms: LossTerms) -> dict[str, Tensor]:
        """[N] each, fp64: what the metrics are means of, first those that are sketched; NaN where a token has none."""
        logprobs, teacher_logprobs = terms.logprobs.double(), terms.teacher_logprobs.double()
        signal, log_ratio = getattr(terms, SIGNALS[self._signal]).double(), teacher_logprobs - logprobs
        numbers = {
            self._signal: signal,
            "log_ratio": log_ratio,
            "log_ratio/tail_share": _where(log_ratio.isfinite(), log_ratio.abs() > HEAVY_TAIL),
            "end_token/log_ratio": _where(batch.ends, log_ratio),
            "entropy/student": terms.entropies.double(),
            "entropy/teacher": terms.teacher_entropies.double(),
            "top1_agreement": terms.top1_agreement.double(),
        }
        if batch.inputs.rollout_logprobs is not None:
            numbers["rollout/off_policy"] = (logprobs - batch.inputs.rollout_logprobs.double()).abs()
        if self._signal == "reward":
            both = (signal != 0) & (log_ratio != 0) & log_ratio.isfinite()
            numbers["reward/sign_agreement"] = _where(both, (signal > 0) == (log_ratio > 0))
        if self._is_full_softmax:
            numbers["rollout/mismatch"] = (logprobs - batch.own_logprobs.double()).abs()
            drawn = log_ratio if self._is_on_policy else torch.full_like(log_ratio, torch.nan)
            numbers["kl/k1"] = -drawn
            numbers["kl/k2"] = drawn.square() / 2
            numbers["kl/k3"] = torch.expm1(drawn) - drawn
            estimate = self._objective.divergence_estimate(logprobs, logprobs + drawn)
            if estimate is not None:
                numbers["divergence/estimate"] = estimate
        if self._objective.needs_of_reference != "nothing":
            numbers["reference_kl/mean"] = terms.reference_kl.double()
        return numbers

    def metrics(self) -> dict[str, float]:
        """Of the tokens, for metrics.jsonl."""
        counts = dict(zip(self._keys, self._means.count.tolist(), strict=True))
        means = zip(self._keys, self._means.mean.tolist(), strict=True)
        all_drawn = counts.get("kl/k1") == counts.get("log_ratio")  # on every rank
        there = {key: mean for key, mean in means if counts[key] and (all_drawn or key not in OF_DRAWN)}
        found: dict[str, float] = {}
        for key, described in zip(self._keys, _described(self._means, self._sketch), strict=False):
            if there.pop(key, None) is not None:
                found |= {f"{key}/{name}": value for name, value in described.items()}
        return found | there

    def position_records(self, step: int) -> list[dict[str, Any]]:
        """For positions.jsonl, a line a bin that is not empty."""
        moments = self._means_by_position
        counts, squares = moments.count.long().tolist(), moments.squares.tolist()
        records = []
        for place, described in enumerate(_described(moments, self._sketch_by_position)):
            if counts[place]:
                record = {"step": step, "first": 2**place // 2, "last": 2**place - 1, "tokens": counts[place]}
                record |= {f"{self._signal}/{name}": value for name, value in described.items()}
                if self._signal == "reward" and sum(squares):
                    record["gradient_share"] = squares[place] / sum(squares)
                records.append(record)
        return records

    def distribution_record(self, step: int) -> dict[str, Any]:
        """For distributions.jsonl."""
        counts = self._sketch.count.tolist()
        record: dict[str, Any] = {"step": step, "tokens": int(counts[0])}
        for key, count, (edges, inside) in zip(
            (self._signal, "log_ratio"), counts, self._sketch.histogram(), strict=True
        ):
            if count:
                record[key] = {"edges": edges, "counts": inside}
        if cells := self._plane.cells():
            record["plane"] = {"edges": [i / CELLS for i in range(CELLS + 1)], "cells": cells}
        return record


def _where(belongs: Tensor, values: Tensor) -> Tensor:
    return torch.where(belongs, values.double(), torch.nan)


def _described(moments: Moments, sketch: QuantileSketch) -> list[dict[str, float]]:
    """Mean, extremes and quantiles of each row of the sketch, which is the same row of the moments."""
    rows = [moments.mean, moments.lows, *sketch.quantiles(tuple(QUANTILES.values())).T, moments.highs]
    cut = torch.stack([row[: len(sketch.lows)] for row in rows], dim=1)
    return [dict(zip(("mean", "min", *QUANTILES, "max"), values, strict=True)) for values in cut.tolist()]

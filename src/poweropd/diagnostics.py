"""The records of one optimizer step. docs/metrics.md defines every key."""

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from poweropd.objectives import Objective
from poweropd.rollout.engine import Sampling
from poweropd.types import ScoredRollout
from poweropd.update import GradientResult, RolloutTerms

HEAVY_TAIL = 5.0  # |log-ratio| beyond which a token counts as tail, in nats


def step_metrics(
    scored: Sequence[ScoredRollout], result: GradientResult, objective: Objective, sampling: Sampling
) -> dict[str, float]:
    """Rewards, log-ratios, entropies, lengths of one step; see docs/metrics.md."""
    rollouts = [item.rollout for item in scored]
    logprobs, entropies, teacher_logprobs, weights = (
        torch.cat([getattr(terms, name) for terms in result.terms])
        for name in ("logprobs", "entropies", "teacher_logprobs", "weights")
    )
    metrics: dict[str, float] = {"loss": result.loss, "tokens": result.num_loss_tokens}
    metrics |= _distribution("divergence" if objective.needs == "full" else "reward", weights)
    if objective.needs != "nothing":
        log_ratio = teacher_logprobs - logprobs
        metrics |= _distribution("log_ratio", log_ratio)
        metrics["log_ratio/tail_share"] = (log_ratio.abs() > HEAVY_TAIL).float().mean().item()
    metrics["entropy/student"] = entropies.mean().item()
    teacher_entropies = [item.scores.entropies for item in scored if item.scores.entropies is not None]
    if teacher_entropies:
        metrics["entropy/teacher"] = torch.cat(teacher_entropies).mean().item()
    lengths = torch.tensor([len(rollout) for rollout in rollouts], dtype=torch.float32)
    metrics["length/mean"] = lengths.mean().item()
    metrics["length/max"] = lengths.max().item()
    metrics["truncation"] = sum(rollout.finish_reason == "length" for rollout in rollouts) / len(rollouts)
    reshaped = sampling.temperature != 1 or sampling.top_k or sampling.top_p < 1 or sampling.min_p > 0
    if not reshaped and objective.needs != "nothing":  # else the sampler drew from another distribution, or nothing
        metrics["rollout/mismatch"] = sampler_gap(scored, result.terms)
    return metrics


def _distribution(name: str, values: Tensor) -> dict[str, float]:
    quantiles = torch.quantile(_thinned(values), torch.tensor([0.01, 0.5, 0.99])).tolist()
    return {
        f"{name}/mean": values.mean().item(),
        f"{name}/min": values.min().item(),
        **{f"{name}/{key}": value for key, value in zip(("p1", "p50", "p99"), quantiles, strict=True)},
        f"{name}/max": values.max().item(),
    }


def _thinned(values: Tensor, limit: int = 2**20) -> Tensor:
    """At most `limit` evenly spread values: `torch.quantile` sorts, and refuses more than 2^24."""
    return values[:: -(-len(values) // limit)]


def sampler_gap(scored: Sequence[ScoredRollout], terms: Sequence[RolloutTerms]) -> float:
    """Mean |log q by the trainer - log q by the sampler| in nats, where the sampler drew from q itself.

    End tokens are left out: merged ones have no counterpart in the sampler.
    """
    gaps = []
    for item, term in zip(scored, terms, strict=True):
        count = len(item.rollout) - (item.rollout.finish_reason == "stop")
        gaps.append((term.logprobs[:count] - torch.tensor(item.rollout.rollout_logprobs[:count])).abs())
    every = torch.cat(gaps)
    return every.mean().item() if len(every) else 0.0


def position_records(step: int, result: GradientResult, objective: Objective) -> list[dict[str, Any]]:
    """Reward statistics by position in the response, in bins that double: 0, 1, 2-3, 4-7, ..."""
    kind = "divergence" if objective.needs == "full" else "reward"
    weights = torch.cat([terms.weights for terms in result.terms])
    positions = torch.cat([torch.arange(len(terms.weights)) for terms in result.terms])
    bins = torch.where(positions == 0, 0, positions.clamp(min=1).log2().floor().long() + 1)
    records = []
    for bin_index in bins.unique().tolist():
        values = weights[bins == bin_index]
        records.append(
            {
                "step": step,
                "first": 0 if bin_index == 0 else 2 ** (bin_index - 1),
                "last": 2**bin_index - 1,
                "tokens": len(values),
                **{f"{kind}/{key}": getattr(values, key)().item() for key in ("mean", "min", "max")},
            }
        )
    return records


def rollout_records(
    step: int, scored: Sequence[ScoredRollout], result: GradientResult, tokenizer: PreTrainedTokenizerBase, count: int
) -> list[dict[str, Any]]:
    """The first `count` rollouts of a step by token. `weights` are advantages, or divergences of a full objective."""
    return [
        {
            "step": step,
            "id": item.rollout.prompt.id,
            "prompt": item.rollout.prompt.text,
            "finish_reason": item.rollout.finish_reason,
            "tokens": [tokenizer.decode([token]) for token in item.rollout.response_ids],
            "weights": _rounded(terms.weights),
            "student_logprobs": _rounded(terms.logprobs),
            "teacher_logprobs": _rounded(terms.teacher_logprobs),
        }
        for item, terms in list(zip(scored, result.terms, strict=True))[:count]
    ]


def _rounded(values: Tensor) -> list[float | None]:
    """For JSON, which has no NaN."""
    return [round(value, 5) if value == value else None for value in values.tolist()]


class Clock:
    """Seconds of the phases of a step."""

    def __init__(self) -> None:
        self._start = self._last = time.monotonic()
        self._laps: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        """Everything since the last lap was `phase`."""
        now = time.monotonic()
        self._laps[f"time/{phase}"] = now - self._last
        self._last = now

    def metrics(self, tokens: int) -> dict[str, float]:
        total = time.monotonic() - self._start
        return {**self._laps, "time/step": total, "tokens_per_second": tokens / total}

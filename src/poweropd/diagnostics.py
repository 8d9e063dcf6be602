"""The records of one optimizer step. docs/metrics.md defines every key."""

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from poweropd.objectives import Objective
from poweropd.repetition import repetition_rate
from poweropd.rollout.engine import Sampling
from poweropd.types import Rollout, ScoredRollout
from poweropd.update import GradientResult, RolloutTerms

HEAVY_TAIL = 5.0  # |log-ratio| beyond which a token counts as tail, in nats


def step_metrics(
    scored: Sequence[ScoredRollout], result: GradientResult, objective: Objective, sampling: Sampling
) -> dict[str, float]:
    """Rewards, log-ratios, entropies, lengths of one step; see docs/metrics.md."""
    rollouts = [item.rollout for item in scored]
    logprobs, entropies, teacher_logprobs = (
        _joined(result, name) for name in ("logprobs", "entropies", "teacher_logprobs")
    )
    kind, column = _signal(objective)
    metrics: dict[str, float] = {"loss": result.loss, "tokens": result.num_loss_tokens}
    metrics |= _distribution(kind, _joined(result, column))
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
    sources = {rollout.source for rollout in rollouts}
    if not reshaped and "student" in sources:  # else the sampler drew from another distribution, or nothing
        metrics["rollout/mismatch"] = sampler_gap(scored, result.terms)
        if (
            sources == {"student"}
            and (estimate := objective.divergence_estimate(logprobs, teacher_logprobs)) is not None
        ):
            metrics["divergence/estimate"] = estimate.mean().item()
    return metrics


def stability_metrics(result: GradientResult, golden: GradientResult | None, objective: Objective) -> dict[str, float]:
    """What holds the student: KL to its initial state and golden answers, with their coefficients; the whole loss."""
    metrics = {"loss": result.loss + (golden.loss if golden else 0.0)}
    if objective.needs_of_reference != "nothing":
        metrics["reference_kl/mean"] = _joined(result, "reference_kl").mean().item()
        metrics["reference_kl/coefficient"] = objective.reference_weight
    if golden is not None:
        metrics["golden/loss"] = golden.loss / objective.golden_weight
        metrics["golden/coefficient"] = objective.golden_weight
    return metrics


def _signal(objective: Objective) -> tuple[str, str]:
    """What to show of each token: the name, and the column of its terms."""
    return ("reward", "advantages") if objective.estimator == "sampled" else ("divergence", "divergences")


def _joined(result: GradientResult, column: str) -> Tensor:
    return torch.cat([getattr(terms, column) for terms in result.terms])


def repetition(rollouts: Sequence[Rollout], tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> float:
    """Share of rollouts that end in repetition; special tokens count as text."""
    texts = tokenizer.batch_decode([list(rollout.response_ids) for rollout in rollouts])
    return repetition_rate(texts, max_new_tokens)


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

    Other sources and end tokens are left out: merged ones have no counterpart in the sampler.
    """
    gaps = []
    for item, term in zip(scored, terms, strict=True):
        if item.rollout.source == "student":
            before_end = term.places < len(item.rollout) - (item.rollout.finish_reason == "stop")
            sampled = torch.tensor(item.rollout.rollout_logprobs)[term.places]
            gaps.append((term.logprobs - sampled)[before_end].abs())
    every = torch.cat(gaps) if gaps else torch.zeros(0)
    return every.mean().item() if len(every) else 0.0


def position_records(step: int, result: GradientResult, objective: Objective) -> list[dict[str, Any]]:
    """Reward statistics by position in the response, in bins that double: 0, 1, 2-3, 4-7, ..."""
    kind, column = _signal(objective)
    weights, positions = _joined(result, column), _joined(result, "places")
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
    step: int,
    scored: Sequence[ScoredRollout],
    result: GradientResult,
    objective: Objective,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
) -> list[dict[str, Any]]:
    """The first `count` rollouts of a step by token, null where one is not trained on.

    `weights` are advantages, or the divergences of an exact objective.
    """
    _, column = _signal(objective)
    return [
        {
            "step": step,
            "id": item.rollout.prompt.id,
            "prompt": item.rollout.prompt.text,
            "finish_reason": item.rollout.finish_reason,
            "tokens": [tokenizer.decode([token]) for token in item.rollout.response_ids],
            "weights": _by_token(item, terms, column),
            "student_logprobs": _by_token(item, terms, "logprobs"),
            "teacher_logprobs": _by_token(item, terms, "teacher_logprobs"),
        }
        for item, terms in list(zip(scored, result.terms, strict=True))[:count]
    ]


def _by_token(item: ScoredRollout, terms: RolloutTerms, column: str) -> list[float | None]:
    """One number a response token, for JSON, which has no NaN."""
    values = torch.full((len(item.rollout),), torch.nan).index_copy(0, terms.places, getattr(terms, column).float())
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

"""Write `fixture_run`: a run in the schema of docs/metrics.md, small and the same each time. `python build_fixture.py`.

Tokens are drawn from two made-up models whose distance shrinks over the steps, and every number of the logs is computed
from those tokens; evaluations are binomial draws with the problems' own difficulties.
"""

import json
import shutil
from collections.abc import Iterable
from math import comb
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).with_name("fixture_run")
STEPS, EVERY, ROLLOUTS, ALPHA, BUDGET = 60, 15, 24, 5.0, 64
SAMPLES = 4
BENCHMARKS = {"gsm8k": ("GSM8K", 60), "math500": ("MATH-500", 40)}
LEVELS = {"teacher": 1.6, "000000": -0.6, "000030": 0.2, "000060": 0.5}  # shifts of log-odds
IN_LOOP = "000030"  # asks the first half of the problems
QUANTILES = {"p1": 0.01, "p5": 0.05, "p50": 0.5, "p95": 0.95, "p99": 0.99}
MAGNITUDES = 2.0 ** (np.arange(-40, 25) / 4)  # edges of the histograms
RECIPE = f"""\
student: {{model: student-0.6b}}
teacher: {{model: teacher-4b}}
data: {{source: jsonl, path: problems.jsonl}}
sampling: {{temperature: 1.0, max_new_tokens: {BUDGET}, samples_per_prompt: 1}}
objective: {{name: power, end_token: map, alpha: {ALPHA:g}}}
optimizer: {{lr: 1.0e-06}}
train: {{steps: {STEPS}, prompts_per_step: {ROLLOUTS}, seed: 0}}
evaluation: {{samples: {SAMPLES}, every: 30}}
log: {{rollouts_every: {EVERY}, rollouts: 2}}
"""
MANIFEST = {
    "started": "2026-01-01T08:00:00+0000",
    "versions": {"poweropd": "0.1.0", "torch": "2.6.0"},
    "machine": {"processor": "made up", "cores": 2, "gpu": None},
    "status": "finished",
}


def build(folder: Path) -> None:
    """Write the run; an earlier one in its place is removed."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rng = np.random.default_rng(20)
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "manifest.json").write_text(json.dumps(MANIFEST, indent=2) + "\n")
    logs: dict[str, list[Any]] = {"metrics": [], "positions": [], "distributions": [], "rollouts": []}
    norms: list[float] = []
    for step in range(STEPS):
        tokens = _tokens(rng, step / STEPS)
        norms.append(0.1 * float(rng.lognormal(0, 0.2)))
        logs["metrics"].append(_metrics(step, tokens, norms, rng))
        if step % EVERY == 0 or step == STEPS - 1:
            logs["positions"] += _positions(step, tokens)
            logs["distributions"].append(_distributions(step, tokens))
            logs["rollouts"] += _rollouts(step, tokens)
    for name, records in logs.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(rounded(record)) + "\n" for record in records))
    _evaluations(folder, rng)
    (folder / "summary.json").write_text(json.dumps({"steps": STEPS, "seed": 0, "seconds": 150.0}) + "\n")


def _tokens(rng: np.random.Generator, progress: float) -> dict[str, np.ndarray]:
    """One entry a token: rollout, position, log q, log p, reward."""
    lengths = np.clip(rng.poisson(40 - 8 * progress, ROLLOUTS), 8, BUDGET)
    count = int(lengths.sum())
    log_q = -rng.exponential(0.25, count)
    noise = rng.normal(0, 0.15, count)
    tail = np.where(rng.random(count) < 0.04 * (1 - 0.7 * progress), rng.exponential(4, count), 0.0)
    log_p = np.minimum(log_q + noise - tail, -1e-4)
    return {
        "rollout": np.repeat(np.arange(ROLLOUTS), lengths),
        "position": np.concatenate([np.arange(length) for length in lengths]),
        "log_q": log_q,
        "log_p": log_p,
        "reward": np.exp(ALPHA * log_p) - np.exp(ALPHA * log_q),
        "lengths": lengths,
    }


def _statistics(name: str, values: np.ndarray) -> dict[str, float]:
    quantiles = {f"{name}/{key}": float(np.quantile(values, share)) for key, share in QUANTILES.items()}
    return {f"{name}/mean": values.mean(), f"{name}/min": values.min(), **quantiles, f"{name}/max": values.max()}


def _metrics(step: int, tokens: dict, norms: list[float], rng: np.random.Generator) -> dict[str, float]:
    log_ratio, reward, lengths = tokens["log_p"] - tokens["log_q"], tokens["reward"], tokens["lengths"]
    progress, ratio = step / STEPS, np.exp(log_ratio)
    rollout, teacher, update = 1.2 * rng.uniform(0.9, 1.1, 3) * (0.5, 0.3, 0.2)
    total = rollout + teacher + update
    return {
        "step": step, "loss": -float((reward * tokens["log_q"]).mean()), "tokens": len(reward), "lr": 1e-6,
        **_statistics("reward", reward), **_statistics("log_ratio", log_ratio),
        "log_ratio/tail_share": float((abs(log_ratio) > 5).mean()),
        "reward/sign_agreement": float((np.sign(reward) == np.sign(log_ratio)).mean()),
        "kl/k1": -log_ratio.mean(), "kl/k2": (log_ratio**2).mean() / 2, "kl/k3": (ratio - 1 - log_ratio).mean(),
        "entropy/student": 0.5 - 0.15 * progress + rng.normal(0, 0.02), "entropy/teacher": 0.4 - 0.05 * progress,
        "top1_agreement": 0.8 + 0.1 * progress + rng.normal(0, 0.01),
        "length/mean": lengths.mean(), "length/min": int(lengths.min()), "length/max": int(lengths.max()),
        "truncation": float((lengths == BUDGET).mean()), "repetition": 0.0,
        "compression_ratio/mean": 1.8 + rng.normal(0, 0.05), "compression_ratio/max": 2.6 + rng.normal(0, 0.1),
        "end_token/log_ratio": -0.2 + rng.normal(0, 0.1), "end_token/share": float((lengths < BUDGET).mean()),
        "rollout/mismatch": 1e-6, "staleness/mean": 0.0, "staleness/max": 0,
        "grad_norm": norms[-1], "grad_norm/median_ratio": norms[-1] / np.median(norms[:-1] or norms),
        "time/rollout": rollout, "time/teacher": teacher, "time/update": update, "time/step": total,
        "tokens_per_second": len(reward) / total, "tokens_per_second/rollout": len(reward) / rollout,
        "tokens_per_second/teacher": len(reward) / teacher, "tokens_per_second/update": len(reward) / update,
        "memory/peak": 1.5,
    }  # fmt: skip


def _positions(step: int, tokens: dict) -> Iterable[dict[str, Any]]:
    position, reward = tokens["position"], tokens["reward"]
    first = 0
    while first <= position.max():
        last = max(2 * first - 1, first)
        inside = (position >= first) & (position <= last)
        yield {
            "step": step, "first": first, "last": last, "tokens": int(inside.sum()),
            **_statistics("reward", reward[inside]),
            "gradient_share": (reward[inside] ** 2).sum() / (reward**2).sum(),
        }  # fmt: skip
        first = last + 1


def _distributions(step: int, tokens: dict) -> dict[str, Any]:
    reward, log_ratio = tokens["reward"], tokens["log_p"] - tokens["log_q"]
    edges = np.linspace(0, 1, 21)
    places = [np.clip(np.digitize(np.exp(tokens[name]), edges) - 1, 0, 19) for name in ("log_q", "log_p")]
    cells: dict[tuple[int, int], list[float]] = {}
    for cell, value in zip(zip(*places, strict=True), reward, strict=True):
        cells.setdefault((int(cell[0]), int(cell[1])), []).append(float(value))
    return {
        "step": step, "tokens": len(reward),
        "reward": _histogram(reward), "log_ratio": _histogram(log_ratio),
        "plane": {"edges": edges.tolist(), "cells": [[*c, len(v), sum(v) / len(v)] for c, v in sorted(cells.items())]},
    }  # fmt: skip


def _histogram(values: np.ndarray) -> dict[str, list]:
    """Four bins to every doubling of the magnitude, one for all below 2^-10."""
    edges = np.concatenate([-MAGNITUDES[::-1], MAGNITUDES])
    counts, _ = np.histogram(values, edges)
    kept = np.flatnonzero(counts)
    first, last = int(kept[0]), int(kept[-1])
    return {"edges": edges[first : last + 2].tolist(), "counts": counts[first : last + 1].tolist()}


def _rollouts(step: int, tokens: dict) -> Iterable[dict[str, Any]]:
    for rollout in range(2):
        inside = tokens["rollout"] == rollout
        yield {
            "step": step, "id": f"p{rollout}", "prompt": f"What is {step} + {rollout}?",
            "finish_reason": "length" if inside.sum() == BUDGET else "stop",
            "tokens": [f" w{place}" for place in range(int(inside.sum()))],
            "weights": tokens["reward"][inside].tolist(),
            "student_logprobs": tokens["log_q"][inside].tolist(), "teacher_logprobs": tokens["log_p"][inside].tolist(),
        }  # fmt: skip


def _evaluations(folder: Path, rng: np.random.Generator) -> None:
    for benchmark, (title, problems) in BENCHMARKS.items():
        difficulty = rng.normal(0, 1.5, problems)
        for place, shift in LEVELS.items():
            asked = problems // 2 if place == IN_LOOP else problems
            correct = rng.binomial(SAMPLES, 1 / (1 + np.exp(-(difficulty[:asked] + shift))))
            summary = _summary(benchmark, title, correct, place)
            path = folder / "eval" / place / f"{benchmark}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(rounded(summary)) + "\n")


def _summary(benchmark: str, title: str, correct: np.ndarray, place: str) -> dict[str, Any]:
    count, right = len(correct), int(correct.sum())
    measures = {
        f"avg_at_{SAMPLES}": correct / SAMPLES,
        **{f"pass_at_{k}": np.array([1 - comb(SAMPLES - c, k) / comb(SAMPLES, k) for c in correct]) for k in (1, 2, 4)},
        f"maj_at_{SAMPLES}": (correct > SAMPLES // 2).astype(float),
        "mean_length": np.full(count, 36.0 if place == "teacher" else 45.0 if place == "000000" else 38.0),
        "truncation": np.zeros(count), "repetition": np.zeros(count),
    }  # fmt: skip
    return {
        "benchmark": benchmark, "title": title, "version": 1, "finished": True, "identity": place, "model": place,
        "problems": count, "samples": SAMPLES, **{name: values.mean() for name, values in measures.items()},
        "intervals": {
            name: [v.mean() - 1.96 * v.std() / count**0.5, v.mean() + 1.96 * v.std() / count**0.5]
            for name, v in measures.items()
        },
        "status": {"correct": right, "wrong": count * SAMPLES - right - 3, "no_answer": 3, "unparsable": 0, "timeout": 0},
        "correct": {f"{benchmark}-{place}": int(c) for place, c in enumerate(correct)},
        "sampling": {"temperature": 0.6, "top_p": 1.0, "max_new_tokens": BUDGET, "seed": 0},
    }  # fmt: skip


def rounded(value: Any) -> Any:
    """Five significant digits, and only types that JSON has."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float | np.floating) else value


if __name__ == "__main__":
    build(FOLDER)

"""Graded samples to the numbers of an evaluation."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from poweropd.evaluation.metrics import bootstrap, maj_at_k, pass_at_k

Sample = Mapping[str, Any]
Summaries = Mapping[str, Mapping[str, Any]]  # by benchmark
PAPER_ORDER = ("gsm8k", "math500", "amc23", "aime24", "aime25", "minerva_math", "olympiadbench")  # arXiv 2606.17199


def summarise(samples: Sequence[Sample]) -> dict[str, Any]:
    """Means over problems with their 95 % intervals, grade statuses, and how many samples of each problem are correct.

    Args:
        samples: records of `<benchmark>.jsonl`, equally many for each problem.
    """
    by_problem: dict[str, list[Sample]] = {}
    for sample in samples:
        by_problem.setdefault(sample["id"], []).append(sample)
    problems = list(by_problem.values())
    k = len(problems[0])
    correct = {problem: sum(s["status"] == "correct" for s in rows) for problem, rows in by_problem.items()}

    def share(key: str, value: Any) -> list[float]:
        return [sum(sample[key] == value for sample in rows) / k for rows in problems]

    measures: dict[str, list[float]] = {
        f"avg_at_{k}": [number / k for number in correct.values()],
        **{f"pass_at_{n}": [pass_at_k(k, number, n) for number in correct.values()] for n in pass_ks(k)},
        f"maj_at_{k}": [maj_at_k(_votes(rows)) for rows in problems],
        "mean_length": [sum(sample["length"] for sample in rows) / k for rows in problems],
        "truncation": share("finish_reason", "length"),
        "repetition": share("repetitive", True),
    }
    estimates = {
        name: bootstrap(values, bounds=None if name == "mean_length" else (0.0, 1.0))
        for name, values in measures.items()
    }
    return {
        "problems": len(problems),
        "samples": k,
        **{name: estimate.mean for name, estimate in estimates.items()},
        "intervals": {name: [estimate.low, estimate.high] for name, estimate in estimates.items()},
        "status": dict(Counter(sample["status"] for sample in samples)),
        "correct": correct,
    }


def pass_ks(samples: int) -> list[int]:
    """The k of Pass@k that are told: powers of two, and the number of samples."""
    return sorted({2**power for power in range(samples.bit_length()) if 2**power <= samples} | {samples})


def _votes(rows: Sequence[Sample]) -> list[tuple[str, bool]]:
    return [("".join(row["answer"].split()), row["status"] == "correct") for row in rows if row["answer"] is not None]


def solved(summary: Mapping[str, Any]) -> dict[str, float]:
    """The share of correct samples of each problem, for paired comparison."""
    return {problem: number / summary["samples"] for problem, number in summary["correct"].items()}


def in_paper_order(benchmarks: Iterable[str]) -> list[str]:
    """The paper's benchmarks in its order of columns, then the others by name."""
    names = set(benchmarks)
    return [name for name in PAPER_ORDER if name in names] + sorted(names - set(PAPER_ORDER))


def results(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What a person wants of a summary: without settings and single problems."""
    return {key: value for key, value in summary.items() if key not in ("settings", "correct", "identity", "finished")}

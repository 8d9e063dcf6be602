"""Whoever watches a run in a test, and remembers it; and what a run recorded itself."""

import json
from pathlib import Path


class Recorder:
    """An `Observer` that keeps the metrics of every step, and every warning."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []
        self.warnings: list[str] = []

    def say(self, text: str) -> None: ...

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def on_evaluation(self, name: str, done: int, total: int, accuracy: float | None) -> None: ...

    def on_step(self, step: int, steps: int, metrics: dict[str, float]) -> None:
        self.metrics.append(metrics)


def lasting_metrics(out: Path) -> list[dict[str, float]]:
    """Of every step of a run, all that does not depend on the machine's time and memory."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("time/", "tokens_per", "memory/"))} for line in lines]

"""Whoever watches a run in a test, and remembers it."""


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

"""A run in a terminal: a live progress bar, or plain lines where there is no terminal."""

import math
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

LINES = 20  # without a terminal, at most about so many lines a phase


class ConsoleObserver:
    """Shows a run. Use as a context manager."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)
        self._live = self.console.is_terminal
        self._progress = Progress(
            TextColumn("{task.description:<18}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(compact=True),
            console=self.console,
            disable=not self._live,
        )
        self._tasks: dict[str, TaskID] = {}
        self._told: dict[str, int] = {}  # how far each phase was when its last line was printed
        self._started = time.monotonic()

    def __enter__(self) -> "ConsoleObserver":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def warn(self, text: str) -> None:
        self.console.print(f"warning: {text}", style="yellow", markup=False)

    def on_evaluation(self, name: str, done: int, total: int, accuracy: float | None) -> None:
        so_far = "" if accuracy is None else f"  accuracy {accuracy:.3f}"
        self._advance(f"evaluate {name}", done, total, f"problems{so_far}")

    def on_step(self, step: int, steps: int, metrics: dict[str, float], name: str = "train") -> None:
        signal = "divergence" if "divergence/mean" in metrics else "reward"
        facts = (
            f"{signal} {metrics.get(f'{signal}/mean', math.nan):+.3f}  length {metrics['length/mean']:.0f}"
            f"  cut {metrics['truncation']:.0%}  {metrics['tokens_per_second']:,.0f} tok/s"
        )
        self._advance(name, step, steps, facts)

    def _advance(self, name: str, done: int, total: int, facts: str) -> None:
        if self._live:
            if name not in self._tasks:
                self._tasks[name] = self._progress.add_task(name, total=total, facts=facts)
            self._progress.update(self._tasks[name], completed=done, facts=facts)
        elif done == total or done - self._told.get(name, -total) >= total / LINES:
            self._told[name] = done
            self.console.print(
                f"{time.monotonic() - self._started:5.0f}s  {name} {done}/{total}  {facts}", markup=False
            )
            sys.stdout.flush()

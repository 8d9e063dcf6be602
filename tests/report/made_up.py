"""A page's content with one of everything, so that a test of the page needs no training."""

import math

from poweropd.report.figure import TEACHER, Bars, Figure, Line, Plane, Section
from poweropd.report.page import Content
from poweropd.report.pathologies import Pathology
from poweropd.report.tables import Table

HOSTILE = "</script><img src=x onerror=\"document.title='owned'\">\u2028<b>"


def made_up(runs: int = 1, steps: int = 60, tokens: int = 700) -> Content:
    """Of `runs` runs, with long rollouts, every kind of figure, and text that would run if it were not escaped."""
    names = [f"power {number}" for number in range(runs - 1)] + [f"log_ratio {HOSTILE}"]
    return Content(
        title="power alpha=5: a run",
        runs=names,
        verdict=["Avg@8 on MATH-500 went from 0.312 to 0.401 in 60 steps.", "46% of the gap to the teacher is closed."],
        pathologies=[
            Pathology(
                name="Answers never end",
                run=names[0],
                step=12,
                what="93 % of the rollouts reach the budget, and were 5 % at the start.",
                try_="a smaller learning rate, or objective.end_token: map",
                severity="warn",
            )
        ],
        tables=[
            Table(
                "Results", ["", "Avg@8", "Pass@8"], [["teacher", "0.512", "0.610"], [HOSTILE, "0.312", "0.4"]], "Avg."
            ),
            Table("Benchmarks", ["", *"ABCDEFGHIJKL"], [["teacher", *(f"0.{i:03}" for i in range(12))]], ""),
        ],
        sections=[
            Section("Health", [_curves(names, steps), _banded(names, steps), Figure("none", "Nothing", "x", "y")]),
            Section("Distributions", [_histogram(names), _plane()]),
        ],
        rollouts={name: [_rollout(step, tokens) for step in (0, 20, 40)] for name in names},
        differences=Table("Settings that differ", ["setting", *names], [["objective.alpha", *names]], "")
        if runs > 1
        else None,
        recipes=dict.fromkeys(names, f"objective:\n  name: {HOSTILE}\n"),
        machine=Table("Machine and versions", ["", "run"], [["GPU", "NVIDIA H200"], ["torch", "2.13.0"]], ""),
        notes=["a run: interrupted; its last logged step is 59."],
    )


def _curves(names: list[str], steps: int) -> Figure:
    x = [float(step) for step in range(steps)]
    lines = [Line(name, x, [math.exp(-step / 20) * (run + 1) for step in x], run=run) for run, name in enumerate(names)]
    lines[0].y[3] = math.nan
    return Figure(
        "gradient-norm", "Gradient norm", "optimizer step", "norm", lines, caption="Falls in a healthy run.", log_y=True
    )


def _banded(names: list[str], steps: int) -> Figure:
    x = [float(step) for step in range(0, steps, 20)]
    lines = [
        Line(name, x, [0.3 + step / 500 + run / 20 for step in x], [0.28] * len(x), [0.5 + run / 20] * len(x), run=run)
        for run, name in enumerate(names)
    ]
    lines.append(Line("teacher", [0.0, x[-1]], [0.5, 0.5], style="dash", run=TEACHER))
    return Figure("accuracy", "Accuracy on held-out problems", "optimizer steps", "accuracy", lines, caption=HOSTILE)


def _histogram(names: list[str]) -> Figure:
    edges = [-2 + bin_ / 5 for bin_ in range(21)]
    bars = [
        Bars(name, edges, [round(900 * math.exp(-((bin_ - 10 - run) ** 2) / 9)) for bin_ in range(20)], run=run)
        for run, name in enumerate(names)
    ]
    return Figure(
        "rewards", "Rewards of the last step", "reward", "tokens", bars=bars, log_y=True, caption="Centred at 0."
    )


def _plane() -> Figure:
    edges = [cell / 10 for cell in range(11)]
    values = [[None if abs(i - j) > 5 else (j - i) / 10 for j in range(10)] for i in range(10)]
    counts = [[100 - 10 * abs(i - j) for j in range(10)] for i in range(10)]
    plane = Plane(edges, edges, values, "mean reward", counts)
    return Figure("plane", "Reward by both probabilities", "q of the student", "p of the teacher", plane=plane)


def _rollout(step: int, tokens: int) -> dict[str, object]:
    texts = [HOSTILE, " so", "\n", " ", "", *(f" {number}" for number in range(tokens - 5))]
    return {
        "step": step,
        "id": f"math-{step}",
        "prompt": f"What is 1 + {step}? {HOSTILE}",
        "finish_reason": "length",
        "tokens": texts,
        "weights": [math.sin(at / 3) / 2 for at in range(tokens - 1)],
        "student_logprobs": [-0.5 - at % 7 / 5 for at in range(tokens)],
        "teacher_logprobs": [None, *(-0.4 - at % 5 / 5 for at in range(tokens - 1))],
    }

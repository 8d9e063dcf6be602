"""Where the time of one step goes: processor seconds by groups of operators, on one thread."""

import functools
import inspect
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from poweropd import policy
from poweropd.config import load_recipe
from poweropd.rollout.decoding import LeanDecoding
from poweropd.rollout.engine import Sampling
from poweropd.teacher import hf as teacher
from poweropd.train import train
from suite.ours import asked, kit, take_step
from suite.shapes import ROOT, tokenizer
from suite.turns import Turns

SAMPLING = "sampling"  # the name of the range around everything of `poweropd.rollout.sampling`
MODEL = "model"  # and of those around forward passes
RANGES = {SAMPLING: "sampling", "Optimizer.step": "optimizer"}  # whatever happens below them is theirs
MODELS = (
    MODEL,
    "autograd::engine::evaluate_function",
)  # the loss takes its own gradient, so all backward is the models'
OPERATORS = {  # by the beginning of their names; the first that fits
    "matrix products": ("mm", "addmm", "addmm_", "bmm", "baddbmm", "matmul", "linear", "mkldnn_linear", "mv", "addmv"),
    "attention": ("scaled_dot_product", "_scaled_dot_product", "_flash_attention", "_efficient_attention"),
    "softmax and its gradient": ("_softmax", "softmax", "_log_softmax", "log_softmax", "logsumexp"),
    "copies and indexing": ("copy_", "cat", "index", "gather", "scatter", "clone", "stack", "embedding", "_index_put",
                            "fill_", "zero_", "masked_fill", "where", "select", "slice", "nonzero", "repeat"),
}  # fmt: skip
ELEMENTWISE, PYTHON = "other elementwise and reductions", "outside of operators (Python, autograd)"
OF_MODELS = "norms, rotary embeddings and activations of the models"
WITHIN = ("matrix products", "attention", "sampling")  # all else is overhead
TOP = 12  # operators that are named
WARM, TIMED = 2, 3  # steps before the one that is profiled: to warm up, and to take the time without the profiler


def random_step(turns: Turns, *, shape: str, prompts: int, new_tokens: int, ends: bool) -> None:
    """A step on random rollouts."""
    torch.set_num_threads(1)
    name_ranges()
    own = kit(shape, "log_ratio")
    sampling = Sampling(stop_ids=(tokenizer(ends=ends).eos_token_id,), max_new_tokens=new_tokens)
    take_step(own, asked(prompts, seed=0), sampling, 0)
    turns.begin()
    start = time.process_time()
    tokens = take_step(own, asked(prompts, seed=1), sampling, 1)
    seconds = time.process_time() - start
    with profile(activities=[ProfilerActivity.CPU]) as found:
        take_step(own, asked(prompts, seed=2), sampling, 2)
    turns.end(tokens=tokens, **shares(found, seconds))


def quickstart_step(turns: Turns) -> None:
    """A step of the quickstart's own recipe, through the training loop, with its records and files."""
    name_ranges()
    settings = ["evaluation.data=null", f"train.steps={WARM + TIMED + 2}"]
    recipe = load_recipe(ROOT / "recipes" / "quickstart.yaml", settings)
    turns.begin()
    with TemporaryDirectory() as folder:
        watch = Watch()
        train(recipe, Path(folder) / "run", watch)
    turns.end(tokens=watch.tokens, **shares(watch.profile, watch.seconds))


class Watch:
    """Times some steps of a run, then profiles one: its observer."""

    def __init__(self) -> None:
        self.profile = profile(activities=[ProfilerActivity.CPU])
        self.seconds, self.tokens = 0.0, 0.0
        self._start = 0.0

    def say(self, text: str) -> None: ...
    def warn(self, text: str) -> None: ...
    def on_evaluation(self, name: str, done: int, total: int, accuracy: float | None) -> None: ...

    def on_step(self, step: int, steps: int, metrics: dict[str, float]) -> None:
        if step == WARM:
            self._start = time.process_time()
        elif step == WARM + TIMED:
            self.seconds = (time.process_time() - self._start) / TIMED
            self.profile.start()
        elif step == WARM + TIMED + 1:
            self.profile.stop()
            self.tokens = metrics["tokens"]


def shares(found: profile, seconds: float) -> dict[str, Any]:
    """Processor seconds of every group.

    Args:
        seconds: of such a step without the profiler; what operators do not account for is Python's.
    """
    groups: dict[str, float] = defaultdict(float)
    operators: dict[str, float] = defaultdict(float)
    for event in found.events():
        group = _group_of(event)
        if group is not None:
            groups[group] += event.self_cpu_time_total / 1e6
            operators[f"{event.name.removeprefix('aten::')} ({group})"] += event.self_cpu_time_total / 1e6
    groups[PYTHON] = max(0.0, seconds - sum(groups.values()))
    inside = sum(groups[name] for name in WITHIN)
    most = sorted(operators.items(), key=lambda item: -item[1])[:TOP]
    overhead = 1 - inside / sum(groups.values())
    return {
        "groups": dict(groups),
        "operators": dict(most),
        "step": seconds,
        "overhead": overhead,
        "overhead beside models": overhead - groups[OF_MODELS] / sum(groups.values()),
    }


def _group_of(event: Any) -> str | None:
    """The group of an operator; None of what only holds others."""
    at, of_models = event, False
    while at is not None:
        of_models = of_models or at.name.startswith(MODELS)
        for beginning, group in RANGES.items():
            if at.name.startswith(beginning):
                return group if event.name.startswith("aten::") else None
        at = at.cpu_parent
    if not event.name.startswith("aten::"):
        return None
    bare = event.name.removeprefix("aten::")
    for group, names in OPERATORS.items():
        if bare in names or any(bare.startswith(name) for name in names if len(name) > len("linear")):
            return group
    return OF_MODELS if of_models else ELEMENTWISE


def name_ranges() -> None:
    """Put all that engines take from `poweropd.rollout.sampling`, and every pass through a model, within a named range."""
    for name, module in list(sys.modules.items()):
        if name.startswith("poweropd.rollout.") and name != "poweropd.rollout.sampling":
            for key, value in vars(module).copy().items():
                if inspect.isfunction(value) and value.__module__ == "poweropd.rollout.sampling":
                    setattr(module, key, _ranged(SAMPLING, value))
    for owner, key in (
        (policy, "hidden_states"),
        (teacher, "hidden_states"),
        (LeanDecoding, "admit"),
        (LeanDecoding, "step"),
    ):
        setattr(owner, key, _ranged(MODEL, getattr(owner, key)))


def _ranged(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def within(*arguments: Any, **named: Any) -> Any:
        with record_function(name):
            return function(*arguments, **named)

    return within

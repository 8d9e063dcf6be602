"""A step at the sizes of the paper, on a GPU: `python benchmarks/gpu.py`.

PowerOPD (arXiv 2606.17199), Table 4: a Qwen3-0.6B student and a Qwen3-4B teacher, 32 prompts of 128 tokens, 1,024 new
tokens each, vocabulary 151,936; memory at a batch of 8. Weights are random, which speed does not depend on, so nothing is
downloaded; so are the rollouts that are scored. Compared in turns, in one process, each over whole optimizer steps:

* `power` and `reverse_kl`: ours, the sampled reward and the whole vocabulary;
* `naive power`: one rollout at a time, a pass without gradient that makes both models' log-softmaxes over [tokens,
  vocabulary] in fp32 for the rewards, and a pass with a student forward and log-softmax of its own for the loss;
* `naive reverse_kl`: one rollout at a time, both log-softmaxes, differentiated.

The naive ways are written here from their description, without what else the authors' code computes beside them.

Times are between synchronisations, medians after a step that warms up. FLOPs are those that a step needs, counted from the
shapes, the same for every method: one forward of the teacher and three of the student's worth, heads on new tokens only.
`--kernels` holds the Triton kernels against the obvious code on this card instead, and times both; `--profile` adds where a
step's time goes, and what makes the host wait for the device. Prints markdown and writes benchmarks/results/gpu-<card>.json.
Without a GPU, or with `--small`, the same runs at a size that says nothing about speed, and nothing is written.
"""

import argparse
import json
import os
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from gpu_kernels import check_kernels, machine_of, matmul_rate
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

from poweropd.models import compute_precision, load_tokenizer
from poweropd.objectives import Objective, build
from poweropd.policy import Student
from poweropd.rollout.engine import Sampling
from poweropd.rollout.hf import HFEngine
from poweropd.sections import OptimizerConfig
from poweropd.step_statistics import StepStatistics
from poweropd.teacher.hf import HFTeacher
from poweropd.teacher.scorer import judge
from poweropd.types import Prompt, Rollout
from poweropd.update import MicroBatches, accumulate_gradient

RESULTS = Path(__file__).parent / "results"
OBJECTIVES = {"power": build("power", alpha=1.0), "reverse_kl": build("reverse_kl")}
METHODS = (*OBJECTIVES, *(f"naive {name}" for name in OBJECTIVES))
GIB = 2**30


@dataclass(frozen=True)
class Model:
    """The sizes of a Qwen3 model with a tied head."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int

    def make(self, vocabulary: int, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
        config = Qwen3Config(
            vocab_size=vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            tie_word_embeddings=True,
            initializer_range=0.05,  # sharp enough that gradients are more than rounding
        )
        with device:
            return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()

    def forward_flops(self, tokens: int) -> int:
        """Of one sequence, without the head; attention is causal."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        weights = self.layers * (attention + 3 * self.hidden * self.intermediate)
        return 2 * tokens * weights + 2 * self.layers * tokens**2 * self.heads * self.head_dim


@dataclass(frozen=True)
class Setting:
    """What is measured. `micro_batch` is in sequences; `rolled_out` are the tokens of the rollouts that are timed."""

    student: Model
    teacher: Model
    vocabulary: int
    batch: int
    prompt: int
    new: int
    memory_batch: int
    micro_batch: int
    rolled_out: int
    repeats: int

    @property
    def flops(self) -> int:
        """That scoring and update of a step need."""
        fed = self.prompt + self.new - 1
        heads = 2 * self.new * self.vocabulary * (self.teacher.hidden + 3 * self.student.hidden)
        return self.batch * (self.teacher.forward_flops(fed) + 3 * self.student.forward_flops(fed) + heads)


PAPER = Setting(
    student=Model(hidden=1024, layers=28, heads=16, kv_heads=8, head_dim=128, intermediate=3072),
    teacher=Model(hidden=2560, layers=36, heads=32, kv_heads=8, head_dim=128, intermediate=9728),
    vocabulary=151_936,
    batch=32,
    prompt=128,
    new=1024,
    memory_batch=8,
    micro_batch=4,
    rolled_out=64,
    repeats=5,
)
SMALL = Setting(
    student=Model(hidden=64, layers=2, heads=4, kv_heads=2, head_dim=16, intermediate=192),
    teacher=Model(hidden=128, layers=3, heads=8, kv_heads=2, head_dim=16, intermediate=384),
    vocabulary=4096,
    batch=8,
    prompt=16,
    new=48,
    memory_batch=4,
    micro_batch=4,
    rolled_out=16,
    repeats=3,
)


class Bench:
    """The pair, and one optimizer step of each method."""

    def __init__(self, setting: Setting, device: torch.device) -> None:
        torch.manual_seed(0)
        self.setting, self.device = setting, device
        self.precision = torch.bfloat16 if device.type == "cuda" else torch.float32
        size = setting.vocabulary
        self.teacher_model = setting.teacher.make(size, device, self.precision)
        self.teacher = HFTeacher(self.teacher_model, vocab_size=size)
        self.student = Student(
            setting.student.make(size, device, torch.float32),
            load_tokenizer("quickstart:student"),
            OptimizerConfig(),
            vocab_size=size,
            end_ids=(),
            steps=1000,
            precision=self.precision,
        )
        self.how = MicroBatches(tokens=setting.micro_batch * (setting.prompt + setting.new))

    def prompts(self, count: int) -> list[Prompt]:
        ids = torch.randint(self.setting.vocabulary, (count, self.setting.prompt)).tolist()
        return [Prompt(str(index), tuple(own)) for index, own in enumerate(ids)]

    def rollouts(self, count: int) -> list[Rollout]:
        ids = torch.randint(self.setting.vocabulary, (count, self.setting.new)).tolist()
        nothing = (0.0,) * self.setting.new
        return [
            Rollout(prompt, tuple(own), nothing, "length") for prompt, own in zip(self.prompts(count), ids, strict=True)
        ]

    def step(self, method: str, rollouts: Sequence[Rollout]) -> dict[str, float]:
        """Seconds by phase, and the norm of the gradient, which says that the methods do the same work."""
        seconds: dict[str, float] = {}
        objective = OBJECTIVES[method.removeprefix("naive ")]
        if method.startswith("naive "):
            rewards: list[Tensor] = []
            if objective.needs == "sampled":
                with self._timed(seconds, "scoring"):
                    rewards = [self._naive_reward(rollout, objective) for rollout in rollouts]
            with self._timed(seconds, "update"):
                tokens = sum(map(len, rollouts))
                for place, rollout in enumerate(rollouts):
                    loss = self._naive_loss(rollout, rewards[place] if rewards else None, objective)
                    (loss / tokens).backward()
        else:
            with self._timed(seconds, "scoring"):
                scored = judge(rollouts, objective, self.teacher)
            with self._timed(seconds, "update"):
                seen = StepStatistics(
                    objective,
                    rollouts,
                    Sampling(stop_ids=(), max_new_tokens=self.setting.new),
                    device=self.device,
                    detailed=False,
                )
                accumulate_gradient(self.student, scored, objective, self.how, watch=seen.add, keep=0)
        with self._timed(seconds, "optimizer"):
            norm = self.student.gradient_norm()
            self.student.update(0, norm)
        return {"scoring": 0.0, **seconds, "norm": norm}

    def rollout(self) -> float:
        """Seconds of sampling `rolled_out` tokens for every prompt."""
        size = self.setting.vocabulary
        engine = HFEngine(self.student.model, vocab_size=size, pad_id=0, precision=self.precision)
        sampling = Sampling(stop_ids=(size,), max_new_tokens=self.setting.rolled_out)
        seconds: dict[str, float] = {}
        for phase in ("warm-up", "rollout"):
            with self._timed(seconds, phase):
                engine.generate(self.prompts(self.setting.batch), sampling, seed=0)
        return seconds["rollout"]

    @contextmanager
    def _timed(self, seconds: dict[str, float], phase: str) -> Iterator[None]:
        self._wait()
        start = time.perf_counter()
        yield
        self._wait()
        seconds[phase] = time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _naive_logprobs(self, model: PreTrainedModel, rollout: Rollout) -> Tensor:
        """[response, vocabulary], fp32."""
        ids = torch.tensor([rollout.prompt.prompt_ids + rollout.response_ids], device=self.device)
        with compute_precision(self.device, self.precision):
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        return torch.log_softmax(logits[0, len(rollout.prompt.prompt_ids) - 1 :].float(), dim=-1)

    @torch.no_grad()
    def _naive_reward(self, rollout: Rollout, objective: Objective) -> Tensor:
        both = [self._naive_logprobs(model, rollout) for model in (self.student.model, self.teacher_model)]
        student, teacher = (_chosen(logprobs, rollout) for logprobs in both)
        return objective.sampled(student, teacher)

    def _naive_loss(self, rollout: Rollout, reward: Tensor | None, objective: Objective) -> Tensor:
        if reward is not None:
            return -(reward * _chosen(self._naive_logprobs(self.student.model, rollout), rollout)).sum()
        with torch.no_grad():
            teacher = self._naive_logprobs(self.teacher_model, rollout)
        return objective.full(self._naive_logprobs(self.student.model, rollout), teacher).sum()


def _chosen(logprobs: Tensor, rollout: Rollout) -> Tensor:
    return logprobs.gather(1, torch.tensor(rollout.response_ids, device=logprobs.device)[:, None])[:, 0]


def measure(bench: Bench) -> dict[str, Any]:
    """Seconds of every repeat by phase, peak memory at both batches, by method."""
    setting = bench.setting
    rollouts = bench.rollouts(setting.batch)
    found: dict[str, Any] = {method: {"steps": [], "peak": {}} for method in METHODS}
    for repeat in range(-1, setting.repeats):
        turn = repeat % len(METHODS)
        for method in METHODS[turn:] + METHODS[:turn]:
            with _peak(bench.device, found[method]["peak"], setting.batch):
                step = bench.step(method, rollouts)
            found[method]["steps"] += [step] if repeat >= 0 else []
    for method in METHODS:
        with _peak(bench.device, found[method]["peak"], setting.memory_batch):
            bench.step(method, rollouts[: setting.memory_batch])
    return found


@contextmanager
def _peak(device: torch.device, peaks: dict[int, float], batch: int) -> Iterator[None]:
    """GiB allocated at most, weights and optimizer included; of a GPU only."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    yield
    if device.type == "cuda":
        peaks[batch] = torch.cuda.max_memory_allocated(device) / GIB


def report(bench: Bench, found: dict[str, Any], rate: float, rollout: float) -> dict[str, Any]:
    """Print the tables; returns what they say."""
    setting = bench.setting
    dtype = str(bench.precision).removeprefix("torch.")
    print(
        f"\n{dtype} matmuls reach {rate / 1e12:.4g} TFLOP/s; scoring and update need {setting.flops / 1e12:.4g} TFLOP"
    )
    speed = setting.batch * setting.rolled_out / rollout
    print(f"rollout by HFEngine, {setting.rolled_out} of {setting.new} tokens: {rollout:.2f} s, {speed:.0f} tokens/s\n")
    batches = (setting.batch, setting.memory_batch)
    peaks = " | ".join(f"peak GiB, batch {batch}" for batch in batches)
    print(
        "| method | scoring, s | update, s | both (range) | optimizer, s | share of the matmul rate | " + peaks + " |"
    )
    print("|---|---|---|---|---|---|---|---|")
    rows = {}
    for method in METHODS:
        steps = found[method]["steps"]
        both = sorted(step["scoring"] + step["update"] for step in steps)
        row = {phase: statistics.median(step[phase] for step in steps) for phase in steps[0]}
        row |= {"both": statistics.median(both), "share": setting.flops / statistics.median(both) / rate}
        row |= {f"peak {batch}": found[method]["peak"].get(batch, 0.0) for batch in batches}
        rows[method] = row
        print(
            f"| {method} | {row['scoring']:.3f} | {row['update']:.3f} | {row['both']:.3f} ({both[0]:.3f}-{both[-1]:.3f}) "
            f"| {row['optimizer']:.3f} | {row['share']:.0%} | "
            + " | ".join(f"{row[f'peak {batch}']:.1f}" if row[f"peak {batch}"] else "-" for batch in batches)
            + " |"
        )
    return rows


def verdicts(bench: Bench, rows: dict[str, Any]) -> list[str]:
    """The targets, and whether they are met."""
    power, full, naive = (rows[name] for name in ("power", "reverse_kl", "naive power"))
    peak = f"peak {bench.setting.memory_batch}"
    ratio = full["both"] / power["both"]
    targets = [
        ("scoring and update of a PowerOPD step", f"{power['both']:.3f} s", "1.5 s", power["both"] <= 1.5),
        ("share of the matmul rate", f"{power['share']:.0%}", "at least 45 %", power["share"] >= 0.45),
        ("peak at the smaller batch (paper: 60.7 GiB)", f"{power[peak]:.1f} GiB", "30 GiB", power[peak] <= 30),
        ("the whole vocabulary over PowerOPD (paper: 2.45)", f"{ratio:.2f}", "1.2", ratio <= 1.2),
    ]
    lines = [f"{what}: {got}, target {goal}: {'met' if met else 'MISSED'}" for what, got, goal, met in targets]
    lines.append(f"the naive way takes {naive['both'] / power['both']:.1f} times as long and {naive[peak]:.1f} GiB")
    return lines


def same_work(rows: dict[str, Any]) -> list[str]:
    """Whether both ways to each objective end in one gradient."""
    lines = []
    for name in ("power", "reverse_kl"):
        ours, naive = rows[name]["norm"], rows[f"naive {name}"]["norm"]
        agree = abs(ours / naive - 1) <= 0.1
        lines.append(f"{name}: gradient norms {ours:.4g} and naive {naive:.4g}, {'equal' if agree else 'NOT EQUAL'}")
    return lines


def profile(bench: Bench) -> None:
    """Print where the device's time goes in a step, and what makes the host wait for it."""
    rollouts = bench.rollouts(bench.setting.batch)
    for method in ("power", "reverse_kl"):
        bench.step(method, rollouts)
        activities = list(torch.profiler.supported_activities())
        with torch.profiler.profile(activities=activities) as seen:
            bench.step(method, rollouts)
        on_device = "device" if bench.device.type == "cuda" else "cpu"
        print(f"\n{method}\n{seen.key_averages().table(sort_by=f'self_{on_device}_time_total', row_limit=20)}")
        if bench.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
            with warnings.catch_warnings(record=True) as waits:
                warnings.simplefilter("always")
                bench.step(method, rollouts)
            torch.cuda.set_sync_debug_mode("default")
            for (file, line), count in Counter((each.filename, each.lineno) for each in waits).most_common():
                print(f"the host waits {count} times at {file}:{line}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="at a size for any machine; so without a GPU")
    parser.add_argument("--kernels", action="store_true", help="the Triton kernels alone: equality and time")
    parser.add_argument("--profile", action="store_true", help="where the time of a step goes, too")
    parser.add_argument("--repeats", type=int, help="steps of each method, after one that warms up")
    parser.add_argument("--micro-batch", type=int, help="sequences of one forward and backward pass")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    is_small = args.small or device.type == "cpu"
    setting = SMALL if is_small else PAPER
    setting = replace(
        setting, repeats=args.repeats or setting.repeats, micro_batch=args.micro_batch or setting.micro_batch
    )
    machine = machine_of(device)
    print(" | ".join(f"{key}: {value}" for key, value in machine.items()))
    if is_small:
        print("SMALL: this size shows that everything runs, and says nothing about speed; nothing is written")
    rate = matmul_rate(
        device, torch.bfloat16 if device.type == "cuda" else torch.float32, size=512 if is_small else 8192
    )
    if args.kernels:
        found: dict[str, Any] = {"kernels": check_kernels(device, setting.vocabulary, rate, is_small=is_small)}
    else:
        bench = Bench(setting, device)
        steps = measure(bench)
        rows = report(bench, steps, rate, bench.rollout())
        lines = same_work(rows) + ([] if is_small else verdicts(bench, rows))
        print("\n" + "\n".join(f"* {line}" for line in lines))
        found = {"setting": asdict(setting), "rows": rows, "verdicts": lines, "runs": steps}
        if args.profile:
            profile(bench)
    if is_small:
        return
    card = machine["device"].lower().replace(" ", "-")
    path = RESULTS / f"gpu-{'kernels-' if args.kernels else ''}{card}.json"
    path.write_text(json.dumps({"machine": machine, "matmul_flops": rate, **found}, indent=1) + "\n")
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()

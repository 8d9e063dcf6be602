"""What the diagnostics of a step cost: `python benchmarks/diagnostics.py`.

A step samples, asks the teacher and takes the gradient. It is done in pairs on the same rollouts, once with every record
of a step that is logged in detail and once with none, in turns; the ratio of a pair is that of their times, sampling
included. Beside it the time inside the diagnostics is taken directly: `statistics` is what sees each micro-batch,
`records` what is read out at the end, texts included, and `sweep` what is done inside the sweep over the vocabulary,
timed by itself on as many tokens. All times are CPU seconds of all threads, which other work on the machine hardly moves.

Two shapes: the embedded pair as in recipes/quickstart.yaml, and random weights at a vocabulary of 32,000. Prints a table
and writes benchmarks/results/diagnostics.json.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

from poweropd.assembly import assemble
from poweropd.config import load_recipe
from poweropd.diagnostics import rollout_metrics, rollout_records
from poweropd.models import load_tokenizer
from poweropd.objectives import Objective, build
from poweropd.objectives.lm_head import BLOCK_ELEMENTS, likeliest
from poweropd.policy import Student
from poweropd.rollout.engine import RolloutEngine, Sampling
from poweropd.rollout.hf import HFEngine
from poweropd.sections import OptimizerConfig
from poweropd.step_statistics import StepStatistics
from poweropd.teacher.hf import HFTeacher
from poweropd.teacher.scorer import TeacherScorer, judge
from poweropd.types import Prompt, Rollout, ScoredRollout
from poweropd.update import MicroBatches, accumulate_gradient

ROOT = Path(__file__).parents[1]
VOCABULARY, HIDDEN, TEACHER_HIDDEN = 32_000, 256, 512
ROLLOUTS, PROMPT_TOKENS, RESPONSE_TOKENS = 16, 64, 256
KEPT = 4  # rollouts that are logged token by token


@dataclass(frozen=True)
class Shape:
    """All that a step works with."""

    name: str
    student: Student
    teacher: TeacherScorer
    engine: RolloutEngine
    prompts: Callable[[int], Sequence[Prompt]]
    sampling: Sampling
    tokenizer: PreTrainedTokenizerBase
    how: MicroBatches
    vocabulary: int


def quickstart(seed: int) -> Shape:
    recipe = load_recipe(ROOT / "recipes" / "quickstart.yaml", [f"train.seed={seed}", "evaluation.data=null"])
    parts = assemble(recipe)

    def prompts(step: int) -> Sequence[Prompt]:
        return parts.stream.take(step, recipe.train.prompts_per_step)

    tokenizer, vocabulary = parts.pair.tokenizer, parts.pair.vocab_size
    return Shape(
        "quickstart", parts.student, parts.teacher, parts.engine, prompts, parts.sampling, tokenizer, parts.how, vocabulary
    )  # fmt: skip


def random_weights(seed: int) -> Shape:
    torch.manual_seed(seed)
    tokenizer = load_tokenizer("quickstart:student")
    student_model, teacher_model = (_model(size) for size in (HIDDEN, TEACHER_HIDDEN))
    student = Student(student_model, tokenizer, OptimizerConfig(), vocab_size=VOCABULARY, end_ids=(), steps=100)

    def prompts(step: int) -> Sequence[Prompt]:
        ids = torch.randint(VOCABULARY, (ROLLOUTS, PROMPT_TOKENS)).tolist()
        return [Prompt(f"{step}-{index}", tuple(own)) for index, own in enumerate(ids)]

    return Shape(
        "random weights",
        student,
        HFTeacher(teacher_model, vocab_size=VOCABULARY),
        HFEngine(student_model, vocab_size=VOCABULARY, pad_id=0),
        prompts,
        Sampling(stop_ids=(0,), max_new_tokens=RESPONSE_TOKENS),
        tokenizer,
        MicroBatches(tokens=2048),
        VOCABULARY,
    )


def _model(hidden: int) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=4,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        head_dim=64,
        initializer_range=0.1,
    )
    return Qwen3ForCausalLM(config).eval()


class Stopwatch:
    """Seconds spent in calls that go through it."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any:
        start = time.process_time()
        try:
            return function(*arguments)
        finally:
            self.seconds += time.process_time() - start


def gradient(shape: Shape, objective: Objective, rollouts: Sequence[Rollout], *, diagnose: bool) -> dict[str, float]:
    """Seconds of scoring and gradient, and of the diagnostics in them."""
    statistics_, records = Stopwatch(), Stopwatch()
    start = time.process_time()
    scored = judge(rollouts, objective, shape.teacher)
    if diagnose:
        seen = records(StepStatistics, objective, rollouts, shape.sampling)
        watch = lambda batch, terms: statistics_(seen.add, batch, terms)  # noqa: E731
        result = accumulate_gradient(shape.student, scored, objective, shape.how, watch=watch, keep=KEPT)
        readable = [_readable(item, shape) for item in scored]
        records(seen.metrics)
        records(rollout_metrics, 0, [item.rollout for item in readable], shape.tokenizer, shape.sampling)
        records(seen.position_records, 0)
        records(seen.distribution_record, 0)
        records(rollout_records, 0, readable, result.terms, objective, shape.tokenizer)
    else:
        bare = [replace(item, scores=replace(item.scores, top1_ids=None)) for item in scored]
        accumulate_gradient(shape.student, bare, objective, shape.how, keep=0)
    seconds = time.process_time() - start
    shape.student.optimizer.zero_grad()
    return {"step": seconds, "statistics": statistics_.seconds, "records": records.seconds}


def _readable(item: ScoredRollout, shape: Shape) -> ScoredRollout:
    """With tokens that the embedded tokenizer knows."""
    ids = tuple(token % len(shape.tokenizer) for token in item.rollout.response_ids)
    return replace(item, rollout=replace(item.rollout, response_ids=ids))


@torch.no_grad()
def in_the_sweep(shape: Shape, objective: Objective, tokens: int) -> float:
    """Seconds of what the two sweeps do for the diagnostics alone, block by block."""
    size = max(1, BLOCK_ELEMENTS["cpu"] // shape.vocabulary)
    logits = torch.randn(size, shape.vocabulary)
    teacher = torch.log_softmax(torch.randn(size, shape.vocabulary), dim=1)
    best = float("inf")
    for _ in range(5):
        start = time.process_time()
        for _ in range(8):
            top1_ids = likeliest(teacher)
            _ = logits.gather(1, top1_ids[:, None])[:, 0] == logits.amax(dim=1)
            if objective.needs == "full":
                _ = -teacher.exp().mul_(teacher).sum(1)
        best = min(best, (time.process_time() - start) / 8)
    return best * tokens / size


def measure(shape: Shape, objective: Objective, pairs: int, seed: int) -> dict[str, object]:
    found: list[dict[str, float]] = []
    tokens = 0
    for pair in range(pairs + 1):
        start = time.process_time()
        rollouts = shape.engine.generate(shape.prompts(pair), shape.sampling, seed=seed + pair)
        sampling = time.process_time() - start
        order = (True, False) if pair % 2 else (False, True)
        times = {diagnose: gradient(shape, objective, rollouts, diagnose=diagnose) for diagnose in order}
        tokens = sum(map(len, rollouts))
        if pair:  # the first warms up
            whole = sampling + times[True]["step"]
            found.append(
                {
                    "seconds": whole,
                    "ratio": whole / (sampling + times[False]["step"]),
                    **{part: times[True][part] / whole for part in ("statistics", "records")},
                    "sweep": in_the_sweep(shape, objective, tokens) / whole,
                }
            )
    spread = {}
    for key in found[0]:
        values = sorted(pair[key] for pair in found)
        spread[key] = {"median": statistics.median(values), "least": values[0], "most": values[-1]}
    inside = statistics.median(pair["statistics"] + pair["records"] + pair["sweep"] for pair in found)
    return {
        "shape": shape.name,
        "objective": str(objective),
        "tokens": tokens,
        "pairs": pairs,
        "inside": inside,
        **spread,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=4, help="even, since the first of a pair takes longer")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    results = []
    print(
        "| shape | objective | tokens | step, CPU s | with / without, median (range) | inside diagnostics, share of the step |"
    )
    print("|---|---|---|---|---|---|")
    for make in (quickstart, random_weights):
        shape = make(args.seed)
        for name in ("power", "reverse_kl"):
            got = measure(shape, build(name), args.pairs, args.seed)
            results.append(got)
            ratio, seconds = got["ratio"], got["seconds"]
            assert isinstance(ratio, dict)
            assert isinstance(seconds, dict)
            print(
                f"| {got['shape']} | {name} | {got['tokens']} | {seconds['median']:.2f} | {ratio['median']:.3f} "
                f"({ratio['least']:.3f}-{ratio['most']:.3f}) | {got['inside']:.2%} |",
                flush=True,
            )
    machine = {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "platform": platform.platform(),
    }
    path = ROOT / "benchmarks" / "results" / "diagnostics.json"
    path.write_text(json.dumps({"machine": machine, "seed": args.seed, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()

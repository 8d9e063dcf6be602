"""Sample, grade and summarise: the same code before, during and after training and in `poweropd evaluate`."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from poweropd.evaluation.grading import Grade, Grader
from poweropd.evaluation.metrics import bootstrap, pass_at_k
from poweropd.rollout.engine import RolloutEngine, Sampling
from poweropd.types import Prompt, Rollout

PROMPTS_PER_CALL = 32  # how often progress is told


@dataclass(frozen=True)
class Evaluation:
    """`summary` holds means and their 95 % intervals over problems; `samples` one record a response."""

    summary: dict[str, Any]
    samples: list[dict[str, Any]]

    def save(self, folder: Path, name: str) -> None:
        """`<name>.jsonl` first, `<name>.json` last: where the summary exists, the samples are complete."""
        folder.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps(sample, ensure_ascii=False) + "\n" for sample in self.samples)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        partial = folder / f"{name}.json.partial"
        partial.write_text(json.dumps(self.summary, indent=2) + "\n", encoding="utf-8")
        partial.rename(folder / f"{name}.json")


def load_summary(folder: Path, name: str) -> dict[str, Any] | None:
    """The summary of a finished evaluation, None if there is none."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def evaluate(
    engine: RolloutEngine,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    grader: Grader,
    *,
    seed: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Sample `sampling.samples_per_prompt` responses to every problem and grade them.

    Args:
        prompts: with reference answers.
        on_progress: told problems done and in all.

    Raises:
        ValueError: a prompt has no reference answer.
    """
    missing = [prompt.id for prompt in prompts if prompt.answer is None]
    if missing:
        raise ValueError(f"{len(missing)} problems have no reference answer, the first is {missing[0]}")
    samples, grades, rollouts = [], [], []
    on_progress(0, len(prompts))
    for start in range(0, len(prompts), PROMPTS_PER_CALL):
        for rollout in engine.generate(prompts[start : start + PROMPTS_PER_CALL], sampling, seed=seed):
            response = decode_response(rollout, tokenizer, sampling.stop_ids)
            grade = grader.grade(response, str(rollout.prompt.answer))
            rollouts.append(rollout)
            grades.append(grade)
            samples.append(_record(rollout, response, grade))
        on_progress(min(start + PROMPTS_PER_CALL, len(prompts)), len(prompts))
    return Evaluation(_summary(rollouts, grades, sampling, seed), samples)


def decode_response(rollout: Rollout, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]) -> str:
    """The text of a response without the token that ended it."""
    ids = rollout.response_ids
    return str(tokenizer.decode(list(ids[:-1] if ids and ids[-1] in stop_ids else ids)))


def _record(rollout: Rollout, response: str, grade: Grade) -> dict[str, Any]:
    return {
        "id": rollout.prompt.id,
        "sample": rollout.sample,
        "problem": rollout.prompt.text,
        "reference": rollout.prompt.answer,
        "response": response,
        "answer": grade.answer,
        "status": grade.status,
        "length": len(rollout),
        "finish_reason": rollout.finish_reason,
    }


def _summary(rollouts: list[Rollout], grades: list[Grade], sampling: Sampling, seed: int) -> dict[str, Any]:
    k = sampling.samples_per_prompt

    def by_problem(values: list[float]) -> list[list[float]]:
        return [values[start : start + k] for start in range(0, len(values), k)]

    correct = by_problem([float(grade.correct) for grade in grades])
    measures = {
        f"avg_at_{k}": [sum(row) / k for row in correct],
        f"pass_at_{k}": [pass_at_k(k, int(sum(row)), k) for row in correct],
        "mean_length": [sum(row) / k for row in by_problem([float(len(rollout)) for rollout in rollouts])],
        "truncation": [sum(row) / k for row in by_problem([float(r.finish_reason == "length") for r in rollouts])],
    }
    estimates = {name: bootstrap(values) for name, values in measures.items()}
    return {
        **{name: estimate.mean for name, estimate in estimates.items()},
        "intervals": {name: [estimate.low, estimate.high] for name, estimate in estimates.items()},
        "problems": len(correct),
        "samples": k,
        "status": dict(Counter(grade.status for grade in grades)),
        "sampling": {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "max_new_tokens": sampling.max_new_tokens,
            "seed": seed,
        },
    }

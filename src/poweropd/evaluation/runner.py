"""Sample, grade and summarise: the same code before, during and after training and in `poweropd evaluate`."""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from poweropd.errors import ConfigError
from poweropd.evaluation.grading import Grader
from poweropd.evaluation.record import Record
from poweropd.evaluation.summary import summarise
from poweropd.prompts import fingerprint
from poweropd.repetition import is_repetitive, threshold_for, window_for
from poweropd.rollout.engine import Sampler, Sampling
from poweropd.types import Prompt, Rollout

Progress = Callable[[int, int, float | None], None]
"""Told problems done, problems in all, and the accuracy so far; None where nothing is done."""


@dataclass(frozen=True)
class Problems:
    """A set of problems, tokenised.

    Attributes:
        name: names its files.
        title: what tables call it.
        version: of the benchmark it is; see `Benchmark`.
    """

    name: str
    prompts: list[Prompt]
    title: str
    version: int = 1

    def __post_init__(self) -> None:
        """Raises ConfigError: a problem has no reference answer, or two have one id."""
        missing = [prompt.id for prompt in self.prompts if not prompt.answer]
        if missing:
            raise ConfigError(
                f"{self.name}: no reference answer to problem {missing[0]}, nor to {len(missing) - 1} others; leave them out"
            )
        ids = Counter(prompt.id for prompt in self.prompts)
        twice = [name for name, count in ids.items() if count > 1]
        if twice:
            raise ConfigError(
                f"{self.name}: the id {twice[0]!r} is that of {ids[twice[0]]} problems; give each its own, or none"
            )

    def subset(self, count: int | None) -> "Problems":
        """`count` of them, always the same ones whatever their order; a smaller subset lies within a larger one."""
        if count is None or count >= len(self.prompts):
            return self
        drawn = sorted(self.prompts, key=lambda prompt: hashlib.sha256(prompt.id.encode()).digest())[:count]
        chosen = {prompt.id for prompt in drawn}
        return replace(self, prompts=[prompt for prompt in self.prompts if prompt.id in chosen])


@dataclass(frozen=True)
class Asking:
    """How problems are asked: what the samples and their grades depend on beside the model and the problems."""

    sampling: Sampling
    seed: int = 0
    problems_per_call: int = 32


def evaluate(
    engine: Sampler,
    tokenizer: PreTrainedTokenizerBase,
    problems: Problems,
    asking: Asking,
    grader: Grader,
    folder: Path,
    *,
    cache: Path | None = None,
    replace_other: bool = False,
    on_progress: Progress = lambda done, total, accuracy: None,
) -> dict[str, Any]:
    """Sample responses to every problem and grade them; what is on disk already is not sampled again.

    Args:
        folder: gets `<name>.json`, the summary, and `<name>.jsonl`, every sample as soon as it is graded.
        cache: see `Record`.
        replace_other: remove another evaluation that lies there, rather than refuse.

    Returns:
        The summary: see docs/metrics.md.

    Raises:
        RunError: another evaluation lies in `folder`.
    """
    sampling = asking.sampling
    settings = {
        "version": problems.version,
        "problems": fingerprint(problems.prompts),
        "model": engine.fingerprint(),
        "seed": asking.seed,
        **asdict(sampling) | {"stop_ids": list(sampling.stop_ids)},
    }
    with Record(folder, problems.name, settings, grader.version, cache) as record:
        if replace_other:
            record.make_room()
        total = len(problems.prompts)
        known = record.known()
        if known is not None:
            on_progress(total, total, known[f"avg_at_{sampling.samples_per_prompt}"])
            return known
        samples = _graded(record.begin(sampling.samples_per_prompt), grader)  # perhaps by an earlier grader
        record.rewrite(samples)
        asked = {sample["id"] for sample in samples}
        remaining = [prompt for prompt in problems.prompts if prompt.id not in asked]
        on_progress(total - len(remaining), total, _accuracy(samples))
        for start in range(0, len(remaining), asking.problems_per_call):
            prompts = remaining[start : start + asking.problems_per_call]
            rollouts = engine.generate(prompts, sampling, seed=asking.seed)
            graded = _graded([_sample(rollout, tokenizer, sampling) for rollout in rollouts], grader)
            record.append(graded)
            samples += graded
            on_progress(len(samples) // sampling.samples_per_prompt, total, _accuracy(samples))
        order = {prompt.id: place for place, prompt in enumerate(problems.prompts)}
        samples.sort(key=lambda sample: order[sample["id"]])
        return record.finish(
            {"benchmark": problems.name, "title": problems.title, "version": problems.version, **summarise(samples)}
        )


def decode_response(rollout: Rollout, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]) -> str:
    """The text of a response without the token that ended it."""
    ids = rollout.response_ids
    return str(tokenizer.decode(list(ids[:-1] if ids and ids[-1] in stop_ids else ids)))


def _sample(rollout: Rollout, tokenizer: PreTrainedTokenizerBase, sampling: Sampling) -> dict[str, Any]:
    response = decode_response(rollout, tokenizer, sampling.stop_ids)
    window = window_for(sampling.max_new_tokens)
    return {
        "id": rollout.prompt.id,
        "sample": rollout.sample,
        "problem": rollout.prompt.text,
        "reference": rollout.prompt.answer,
        "response": response,
        "length": len(rollout),
        "finish_reason": rollout.finish_reason,
        "repetitive": is_repetitive(response, window=window, threshold=threshold_for(window)),
    }


def _graded(samples: Sequence[dict[str, Any]], grader: Grader) -> list[dict[str, Any]]:
    grades = grader.grade_many([(sample["response"], sample["reference"]) for sample in samples])
    return [
        {**sample, "answer": grade.answer, "status": grade.status}
        for sample, grade in zip(samples, grades, strict=True)
    ]


def _accuracy(samples: Sequence[dict[str, Any]]) -> float | None:
    return sum(sample["status"] == "correct" for sample in samples) / len(samples) if samples else None

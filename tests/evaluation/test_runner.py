"""An evaluation from prompts to files, with an engine whose answers are known."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from conftest import END
from poweropd.evaluation.grading import Grader
from poweropd.evaluation.runner import evaluate, load_summary
from poweropd.rollout.engine import Sampling
from poweropd.types import Prompt, Rollout

SAMPLING = Sampling(stop_ids=(END,), max_new_tokens=20, samples_per_prompt=4)


class ScriptedEngine:
    """Problem n is answered rightly in its first n samples; the last sample of each never ends."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def update_weights(self, *, version: int) -> None: ...

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, *, seed: int) -> list[Rollout]:
        return [self._answer(prompt, sample) for prompt in prompts for sample in range(sampling.samples_per_prompt)]

    def _answer(self, prompt: Prompt, sample: int) -> Rollout:
        value = int(str(prompt.answer)) if sample < int(prompt.id) else 999
        ids = tuple(self._tokenizer.encode(f"It is {value}.", add_special_tokens=False))
        if sample == 3:
            ids = (ids * 20)[:20]
            return Rollout(prompt, ids, (0.0,) * 20, "length", sample)
        return Rollout(prompt, (*ids, END), (0.0,) * (len(ids) + 1), "stop", sample)


def test_summary_and_samples(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    prompts = [Prompt(str(n), (5, 6), text=f"problem {n}", answer=str(10 + n)) for n in (0, 1, 2)]
    told = []
    with Grader(mode="exact") as grader:
        result = evaluate(
            ScriptedEngine(tokenizer),
            tokenizer,
            prompts,
            SAMPLING,
            grader,
            seed=0,
            on_progress=lambda *a: told.append(a),
        )
    assert result.summary["avg_at_4"] == pytest.approx((0 + 1 + 2) / 12)
    assert result.summary["pass_at_4"] == pytest.approx(2 / 3)
    assert result.summary["truncation"] == pytest.approx(1 / 4)
    assert result.summary["status"] == {"wrong": 9, "correct": 3}
    assert result.summary["problems"] == 3
    assert told[-1] == (3, 3)
    low, high = result.summary["intervals"]["avg_at_4"]
    assert low <= result.summary["avg_at_4"] <= high

    assert load_summary(tmp_path / "eval", "toy") is None
    result.save(tmp_path / "eval", "toy")
    assert load_summary(tmp_path / "eval", "toy") == result.summary
    samples = [json.loads(line) for line in (tmp_path / "eval" / "toy.jsonl").read_text().splitlines()]
    assert len(samples) == 12
    assert samples[4]["response"] == "It is 11."
    assert samples[4]["status"] == "correct"


def test_a_problem_without_a_reference_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with Grader() as grader, pytest.raises(ValueError, match="1 problems have no reference answer, the first is 7"):
        evaluate(ScriptedEngine(tokenizer), tokenizer, [Prompt("7", (1,))], SAMPLING, grader, seed=0)

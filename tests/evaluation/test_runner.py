"""An evaluation from prompts to files, with an engine whose answers are known."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from conftest import END, make_model
from poweropd.errors import ConfigError, RunError
from poweropd.evaluation.grading import Grader
from poweropd.evaluation.record import read_summaries
from poweropd.evaluation.runner import Asking, Problems, evaluate
from poweropd.rollout.engine import Sampling
from poweropd.rollout.hf import HFEngine
from poweropd.types import Prompt, Rollout

SAMPLING = Sampling(stop_ids=(END,), max_new_tokens=20, samples_per_prompt=4)
ASKING = Asking(SAMPLING, problems_per_call=2)


class ScriptedEngine:
    """Problem n is answered rightly in its first n samples; the last sample of each never ends."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.asked: list[str] = []
        self.fails_at: str | None = None

    def fingerprint(self) -> str:
        return "scripted"

    def update_weights(self, *, version: int) -> None: ...

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, *, seed: int) -> list[Rollout]:
        if self.fails_at in {prompt.id for prompt in prompts}:
            raise KeyboardInterrupt
        self.asked += [prompt.id for prompt in prompts]
        return [self._answer(prompt, sample) for prompt in prompts for sample in range(sampling.samples_per_prompt)]

    def _answer(self, prompt: Prompt, sample: int) -> Rollout:
        value = int(str(prompt.answer)) if sample < int(prompt.id) else 999
        ids = tuple(self._tokenizer.encode(f"It is {value}.", add_special_tokens=False))
        if sample == 3:
            ids = (ids * 20)[:20]
            return Rollout(prompt, ids, (0.0,) * 20, "length", sample)
        return Rollout(prompt, (*ids, END), (0.0,) * (len(ids) + 1), "stop", sample)


def toy(*numbers: int) -> Problems:
    return Problems("toy", [Prompt(str(n), (5, 6), text=f"problem {n}", answer=str(10 + n)) for n in numbers], "Toy")


@pytest.fixture
def engine(tokenizer: PreTrainedTokenizerBase) -> ScriptedEngine:
    return ScriptedEngine(tokenizer)


def ask(engine: ScriptedEngine, problems: Problems, folder: Path, asking: Asking = ASKING, **how: object) -> dict:
    mode = how.pop("mode", "exact")
    with Grader(mode=mode) as grader:  # type: ignore[arg-type]
        return evaluate(engine, engine._tokenizer, problems, asking, grader, folder, **how)  # type: ignore[arg-type]


def test_summary_and_samples(engine: ScriptedEngine, tmp_path: Path) -> None:
    told: list[tuple[int, int, float | None]] = []
    summary = ask(engine, toy(0, 1, 2), tmp_path / "eval", on_progress=lambda *progress: told.append(progress))
    assert summary["avg_at_4"] == pytest.approx((0 + 1 + 2) / 12)
    assert summary["pass_at_4"] == pytest.approx(2 / 3)
    assert summary["pass_at_2"] == pytest.approx((0 + 1 / 2 + 5 / 6) / 3)
    assert summary["maj_at_4"] == pytest.approx(1 / 2 / 3)  # problem 2: two right, two wrong, of which one is cut off
    assert summary["truncation"] == pytest.approx(1 / 4)
    assert summary["status"] == {"wrong": 9, "correct": 3}
    assert (summary["problems"], summary["samples"]) == (3, 4)
    assert summary["correct"] == {"0": 0, "1": 1, "2": 2}
    assert told == [(0, 3, None), (2, 3, 1 / 8), (3, 3, 3 / 12)]
    for key, (low, high) in summary["intervals"].items():
        assert low <= summary[key] <= high

    assert read_summaries(tmp_path / "eval") == {"toy": summary}
    samples = [json.loads(line) for line in (tmp_path / "eval" / "toy.jsonl").read_text().splitlines()]
    assert len(samples) == 12
    assert samples[4]["response"] == "It is 11."
    assert samples[4]["status"] == "correct"


def test_a_broken_off_evaluation_samples_only_what_is_missing(engine: ScriptedEngine, tmp_path: Path) -> None:
    whole = ask(engine, toy(0, 1, 2, 3), tmp_path / "whole")
    engine.fails_at, engine.asked = "2", []
    with pytest.raises(KeyboardInterrupt):
        ask(engine, toy(0, 1, 2, 3), tmp_path / "broken")
    assert engine.asked == ["0", "1"]
    with pytest.raises(RunError, match="holds no finished evaluation"):
        read_summaries(tmp_path / "broken")
    samples = tmp_path / "broken" / "toy.jsonl"
    samples.write_text(samples.read_text()[:-30])  # killed while it wrote the last line: problem 1 is not whole
    engine.fails_at, engine.asked = None, []
    assert ask(engine, toy(0, 1, 2, 3), tmp_path / "broken") == whole
    assert engine.asked == ["1", "2", "3"]
    assert sorted(samples.read_text().splitlines()) == sorted(
        (tmp_path / "whole" / "toy.jsonl").read_text().splitlines()
    )


def test_a_finished_evaluation_is_not_repeated(engine: ScriptedEngine, tmp_path: Path) -> None:
    first = ask(engine, toy(0, 1), tmp_path)
    engine.asked = []
    assert ask(engine, toy(0, 1), tmp_path) == first
    assert engine.asked == []


def test_another_evaluation_is_refused_and_says_why(engine: ScriptedEngine, tmp_path: Path) -> None:
    ask(engine, toy(0, 1), tmp_path)
    warmer = Asking(replace(SAMPLING, temperature=0.5), seed=3)
    with pytest.raises(RunError, match=r"seed 0 there, 3 here; temperature 1\.0 there, 0\.5 here\. Use another --out"):
        ask(engine, toy(0, 1), tmp_path, warmer)
    with pytest.raises(RunError, match="the problems differ"):
        ask(engine, toy(0, 2), tmp_path)
    assert ask(engine, toy(0, 2), tmp_path, replace_other=True)["correct"] == {"0": 0, "2": 2}
    for damaged in ("[1", "5", '{"finished": true}', '{"finished": "maybe", "settings": {}, "grading": ""}'):
        (tmp_path / "toy.json").write_text(damaged)
        with pytest.raises(RunError, match="is no summary of an evaluation"):
            ask(engine, toy(0, 1), tmp_path)


def test_lines_that_are_no_samples_are_sampled_again(engine: ScriptedEngine, tmp_path: Path) -> None:
    whole = ask(engine, toy(0, 1), tmp_path)
    (tmp_path / "toy.json").unlink()
    samples = tmp_path / "toy.jsonl"
    lines = samples.read_text().splitlines()
    samples.write_text("\n".join([*lines[:4], "5", '{"id": "1"}', *lines[4:7], lines[4], "[]"]))  # one twice, one gone
    engine.asked = []
    assert ask(engine, toy(0, 1), tmp_path) == whole
    assert engine.asked == ["1"]
    assert sorted(samples.read_text().splitlines()) == sorted(lines)


def test_other_line_separators_within_a_text_split_no_line(engine: ScriptedEngine, tmp_path: Path) -> None:
    problems = Problems("toy", [Prompt("1", (5,), text="a\u2028b\x85c\u2029d", answer="11")], "Toy")
    ask(engine, problems, tmp_path)
    engine.asked = []
    ask(engine, problems, tmp_path, mode="math")  # graded again from what is on disk
    assert engine.asked == []


def test_two_at_once_in_one_place_are_refused(engine: ScriptedEngine, tmp_path: Path) -> None:
    class Nested(ScriptedEngine):
        def generate(self, prompts: Sequence[Prompt], sampling: Sampling, *, seed: int) -> list[Rollout]:
            with pytest.raises(RunError, match="in use by another process"):
                ask(engine, toy(0, 1), tmp_path)
            return super().generate(prompts, sampling, seed=seed)

    nested = Nested(engine._tokenizer)
    assert ask(nested, toy(0, 1), tmp_path)["problems"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["toy.json", "toy.jsonl"]


def test_a_place_that_cannot_be_written_is_named(engine: ScriptedEngine, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write into"):
        ask(engine, toy(0), tmp_path / "file" / "below")


def test_another_grading_grades_again_and_samples_nothing(engine: ScriptedEngine, tmp_path: Path) -> None:
    problems = Problems("toy", [Prompt("1", (5,), answer="22/2")], "Toy")
    problems.prompts[0] = replace(problems.prompts[0], answer="11")
    ask(engine, problems, tmp_path)
    samples = tmp_path / "toy.jsonl"
    samples.write_text(samples.read_text().replace("It is 11.", "It is 22/2."))
    engine.asked = []
    assert ask(engine, problems, tmp_path, mode="math")["correct"] == {"1": 1}
    assert ask(engine, problems, tmp_path, mode="exact")["correct"] == {"1": 0}
    assert engine.asked == []


def test_the_cache_knows_an_evaluation_elsewhere(engine: ScriptedEngine, tmp_path: Path) -> None:
    first = ask(engine, toy(0, 1), tmp_path / "a", cache=tmp_path / "cache")
    engine.asked = []
    assert ask(engine, toy(0, 1), tmp_path / "b", cache=tmp_path / "cache") == first
    assert engine.asked == []
    assert (tmp_path / "b" / "toy.jsonl").read_text() == (tmp_path / "a" / "toy.jsonl").read_text()
    ask(engine, toy(0, 1), tmp_path / "c", replace(ASKING, seed=1), cache=tmp_path / "cache")
    assert engine.asked == ["0", "1"]


def test_subsets_are_fixed_and_nested() -> None:
    many = toy(*range(50))
    ten, twenty = ({prompt.id for prompt in many.subset(count).prompts} for count in (10, 20))
    assert len(ten) == 10
    assert ten < twenty
    shuffled = Problems("toy", many.prompts[::-1], "Toy")
    assert {prompt.id for prompt in shuffled.subset(10).prompts} == ten
    assert many.subset(None) is many
    assert many.subset(99) is many


def test_problems_that_cannot_be_graded_are_refused() -> None:
    with pytest.raises(ConfigError, match="no reference answer to problem 7"):
        Problems("toy", [Prompt("7", (1,))], "Toy")
    with pytest.raises(ConfigError, match="the id '7' is that of 2 problems"):
        Problems("toy", [Prompt("7", (1,), answer="1"), Prompt("7", (2,), answer="1")], "Toy")


def test_the_fingerprint_of_an_engine_is_that_of_its_weights() -> None:
    model = make_model()
    engine = HFEngine(model, vocab_size=512, pad_id=0)
    first = engine.fingerprint()
    assert HFEngine(make_model(), vocab_size=512, pad_id=0).fingerprint() == first
    assert HFEngine(model, vocab_size=511, pad_id=0).fingerprint() != first
    weight = next(iter(model.parameters()))
    weight.data.view(-1)[7] += 1e-6
    assert engine.fingerprint() != first

"""The guards: what stops a step, and what it says."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from conftest import RECIPE, make_model, make_rollouts
from poweropd import checkpoint, guards
from poweropd.config import load_recipe
from poweropd.errors import CollapseError, ConfigError, NonFiniteError, RolloutError
from poweropd.objectives import build
from poweropd.policy import Student
from poweropd.runlog import status_of
from poweropd.sections import GuardConfig
from poweropd.teacher.hf import HFTeacher
from poweropd.teacher.scorer import judge
from poweropd.train import recipe_to_resume, train
from poweropd.types import ScoredRollout
from poweropd.update import MicroBatches, accumulate_gradient


def test_the_token_that_broke_a_step_is_named(
    make_student: Callable[..., Student], tokenizer: PreTrainedTokenizerBase
) -> None:
    """One NaN in a teacher's answer, at a known place."""
    student, objective, rollouts = make_student(), build("log_ratio"), make_rollouts([(3, 4), (2, 5)])
    scores = HFTeacher(make_model(seed=1), vocab_size=512).score(rollouts, needs=objective.needs)
    broken = scores[1].logprobs.clone()
    broken[2] = math.nan
    scored = [ScoredRollout(rollouts[0], scores[0]), ScoredRollout(rollouts[1], replace(scores[1], logprobs=broken))]
    result = accumulate_gradient(student, scored, objective, MicroBatches(tokens=100))
    token = tokenizer.decode([rollouts[1].response_ids[2]])
    with pytest.raises(NonFiniteError) as error:
        guards.refuse_non_finite(result, student.gradient_norm(), rollouts, tokenizer, step=7)
    message = str(error.value)
    assert f"step 7: not finite at token 2 ({token!r}) of the response to prompt p1: reward nan" in message
    assert "No update was made" in message


@pytest.mark.parametrize("tokens", [1, 10_000])
def test_the_first_of_several_broken_tokens_is_named(
    tokens: int, make_student: Callable[..., Student], tokenizer: PreTrainedTokenizerBase
) -> None:
    """The first in the order of the rollouts, of which the longest comes first in the micro-batches."""
    student, objective, rollouts = make_student(), build("log_ratio"), make_rollouts([(3, 4), (2, 5), (9, 9)])
    scored = judge(rollouts, objective, HFTeacher(make_model(seed=1), vocab_size=512))
    for index, places in ((1, (3, 4)), (2, (0,))):
        scored[index].scores.logprobs[list(places)] = math.nan
    how = MicroBatches(tokens=tokens)
    result = accumulate_gradient(student, scored, objective, how, keep=0)
    with pytest.raises(NonFiniteError, match=r"not finite at token 3 .* of the response to prompt p1: reward nan"):
        guards.refuse_non_finite(result, student.gradient_norm(), rollouts, tokenizer, step=7)


def test_an_overflow_of_the_backward_pass_is_told_apart(
    make_student: Callable[..., Student], tokenizer: PreTrainedTokenizerBase
) -> None:
    student, objective, rollouts = make_student(), build("log_ratio"), make_rollouts([(3, 4)])
    scores = HFTeacher(make_model(seed=1), vocab_size=512).score(rollouts, needs=objective.needs)
    scored = [ScoredRollout(rollouts[0], scores[0])]
    result = accumulate_gradient(student, scored, objective, MicroBatches(tokens=100))
    guards.refuse_non_finite(result, student.gradient_norm(), rollouts, tokenizer, step=7)
    with pytest.raises(NonFiniteError, match=r"step 7: loss .* though every reward is finite"):
        guards.refuse_non_finite(result, math.inf, rollouts, tokenizer, step=7)


def test_a_sampler_that_is_not_the_student_is_noticed() -> None:
    def told(mismatch: float, step: int, *, own_weights: bool = False, first: bool = False) -> str | None:
        return guards.mismatch_warning({"rollout/mismatch": mismatch}, step, own_weights=own_weights, first=first)

    assert told(1e-5, 0) is None
    assert "disagree" in str(told(0.4, 0, first=True))
    assert told(0.4, 7) is None
    assert told(1e-5, 7, own_weights=True, first=True) is None
    assert "step 7: rollout/mismatch is 0.4 nats" in str(told(0.4, 7, own_weights=True))
    with pytest.raises(RolloutError, match="disagree about the student"):
        told(0.4, 7, own_weights=True, first=True)


def alarms(shares: list[float], **settings: object) -> list[int]:
    """The steps at which a guard raises its alarm, limit 0.9 held for 3 steps unless told otherwise."""
    guard = guards.CollapseGuard(GuardConfig(**{"patience": 3, **settings}))
    seen = [guard.observe(step, {"truncation": share, "repetition": 0.0}) for step, share in enumerate(shares)]
    return [alarm.step for alarm in seen if alarm is not None]


@pytest.mark.parametrize(
    ("truncation", "steps"),
    [
        ([0.2, 0.95, 0.95, 0.95, 0.95], [3]),  # once
        ([0.2, 0.9, 0.9, 0.9, 0.9], []),  # at the limit is not above it
        ([0.2, 0.95, 0.95, 0.8, 0.95, 0.95, 0.8], []),  # never for three steps
        ([0.95] * 20, []),  # the untrained student ran to the budget all along
        ([0.95, 0.88] * 10 + [0.95] * 5, []),  # so it did here, with noise
        ([0.95, 0.85, 0.86, 0.87, 0.95, 0.95, 0.95], [6]),  # it learned to end, then lost it
        ([0.8, *[0.95] * 9], []),  # the untrained student may have been lucky
        ([0.95, 0.2, *[0.95] * 9], []),  # as may a step
        ([0.2, *[0.95] * 9, 0.85, *[0.95] * 9], [3]),  # one step below is no recovery
        ([0.2, *[0.95] * 9, 0.8, 0.8, 0.8, *[0.95] * 9], [3, 15]),  # three are, and a second collapse
    ],
)
def test_a_collapse_is_a_rise_that_lasts(truncation: list[float], steps: list[int]) -> None:
    assert alarms(truncation) == steps


def test_what_acts_repeats_while_the_collapse_lasts() -> None:
    assert alarms([0.2, *[0.95] * 9], action="raise_reference_kl") == [3, 6, 9]
    assert alarms([0.2, *[0.95] * 9], action="stop", patience=4) == [4, 8]


def test_a_limit_can_be_taken_away() -> None:
    assert alarms([0.2, *[0.95] * 9], truncation=None) == []


def test_an_alarm_says_what_and_what_to_try() -> None:
    guard = guards.CollapseGuard(GuardConfig(patience=1))
    assert guard.observe(0, {"truncation": 0.1, "repetition": 0.0}) is None
    alarm = guard.observe(1, {"truncation": 0.5, "repetition": 0.4})
    assert alarm is not None
    assert alarm.text.startswith(
        "step 1: repetition is 0.40, limit 0.3, for at least 1 steps: answers go round in circles"
    )
    alarm = guard.observe(2, {"truncation": 0.97, "repetition": 0.4})
    assert alarm is not None
    assert "truncation is 0.97, limit 0.9" in alarm.text
    assert "repetition" not in alarm.text
    for remedy in ("optimizer.lr", "power", "objective.reference_kl", "objective.golden", "sampling.max_new_tokens"):
        assert remedy in alarm.text


@pytest.mark.parametrize("action", ["warn", "stop"])
@pytest.mark.parametrize("cut", range(1, 13))
def test_a_restored_guard_goes_on_where_it_was(cut: int, action: str) -> None:
    shares = [0.2, 0.95, 0.95, 0.95, 0.95, 0.95, 0.95, 0.3, 0.3, 0.3, 0.95, 0.95, 0.95]
    config = GuardConfig(patience=3, action=action)
    whole, first, second = (guards.CollapseGuard(config) for _ in range(3))
    expected = [whole.observe(step, {"truncation": share, "repetition": 0}) for step, share in enumerate(shares)]
    got = [first.observe(step, {"truncation": share, "repetition": 0}) for step, share in enumerate(shares[:cut])]
    second.load_state(first.state())
    got += [second.observe(cut + i, {"truncation": share, "repetition": 0}) for i, share in enumerate(shares[cut:])]
    assert got == expected
    assert any(expected)


def test_only_a_kl_that_is_there_can_be_raised() -> None:
    with pytest.raises(
        ConfigError, match=r"guard.action raise_reference_kl needs a KL to raise: set objective.reference_kl"
    ):
        load_recipe(RECIPE, ["guard.action=raise_reference_kl"])


class Listener:
    """Remembers warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def say(self, text: str) -> None: ...
    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def on_evaluation(self, name: str, done: int, total: int, accuracy: float | None) -> None: ...
    def on_step(self, step: int, steps: int, metrics: dict[str, float]) -> None: ...


RUIN = [
    "train.steps=6",
    "train.prompts_per_step=8",
    "sampling.max_new_tokens=96",
    "data.limit=100",
    "evaluation.data=null",
    "optimizer={lr: 0.1}",
    "guard={patience: 2, truncation: 0.6}",
]


def test_a_ruined_student_stops_its_run(tmp_path: Path) -> None:
    """After one step at three hundred times the learning rate no answer ends; the second such step is one too many."""
    out = tmp_path / "run"
    recipe = load_recipe(RECIPE, [*RUIN, "guard.action=stop"])
    with pytest.raises(CollapseError) as error:
        train(recipe, out, Listener())
    message = str(error.value)
    assert message.startswith("step 2: truncation is 1.00, limit 0.6")
    assert "the checkpoint of step 3 is kept, go on all the same with --resume --set guard.action=warn" in message
    assert "\n" not in message
    assert status_of(out) == "failed"
    assert checkpoint.newest_step(out / "checkpoints") == 3
    assert logged(out, "step") == [0, 1, 2]

    listener = Listener()
    train(recipe_to_resume(out, ["guard.action=warn"]), out, listener, resume=True)
    assert status_of(out) == "finished"
    assert logged(out, "step") == [0, 1, 2, 3, 4, 5]
    told = [text.partition(":")[0] for text in listener.warnings]
    assert told == ["step 4"], "once, two steps later: what the guard had seen came with the checkpoint"


def test_a_ruined_student_is_held_back(tmp_path: Path) -> None:
    """The same run: the reference KL is doubled after steps 2 and 4, and stays so after a resume."""
    out, listener = tmp_path / "run", Listener()
    settings = [*RUIN, "train.steps=5", "guard.action=raise_reference_kl", "objective.reference_kl=0.01"]
    train(load_recipe(RECIPE, settings), out, listener)
    train(recipe_to_resume(out, ["train.steps=6"]), out, listener, resume=True)
    assert logged(out, "reference_kl/coefficient") == [0.01, 0.01, 0.01, 0.02, 0.02, 0.04]
    assert [text.partition(":")[0] for text in listener.warnings] == ["step 2", "step 4"]
    assert all("The reference KL is doubled" in text for text in listener.warnings)


def test_repetition_is_measured_on_the_rollouts(tmp_path: Path) -> None:
    """Two golden answers, one of them a loop."""
    answers = ["3 + 4 = 7, " * 20, "We have 3 + 4 = 7, then 7 - 5 = 2, then 2 * 8 = 16, then 16 + 9 = 25. So it is 25."]
    rows = [{"problem": f"Solve {i}", "answer": "7", "golden": answer} for i, answer in enumerate(answers)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [
        f"data={{source: jsonl, path: {data}, golden: golden}}",
        "objective=sft",
        "rollout.sources={golden: 1}",
        "sampling.max_new_tokens=160",
        "train.steps=1",
        "train.prompts_per_step=2",
        "evaluation.data=null",
    ]
    train(load_recipe(RECIPE, settings), tmp_path / "run", Listener())
    assert logged(tmp_path / "run", "repetition") == [0.5]


def logged(out: Path, key: str) -> list[float]:
    return [json.loads(line)[key] for line in (out / "metrics.jsonl").read_text().splitlines()]

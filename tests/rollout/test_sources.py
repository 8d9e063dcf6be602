"""Where trajectories come from: the mixture of two models, and the choice of who answers a prompt."""

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from conftest import CHAT_END, END, RECIPE, make_model
from fakes import FakeEngine
from poweropd.assembly import assemble
from poweropd.config import load_recipe
from poweropd.errors import ConfigError
from poweropd.rollout.engine import Sampling
from poweropd.rollout.golden import GoldenEngine
from poweropd.rollout.hf import HFEngine
from poweropd.rollout.sources import RoutedEngine, SourceEngine
from poweropd.types import Prompt, Rollout, Source

MIXING = 0.3
VOCABULARY = 8  # small enough to enumerate responses
SAMPLING = Sampling(stop_ids=(END, CHAT_END), max_new_tokens=10, samples_per_prompt=3)


@pytest.fixture
def models() -> tuple[PreTrainedModel, PreTrainedModel]:
    """Student and teacher of different width, whose heads are padded differently beyond the shared vocabulary."""
    return make_model(rows=VOCABULARY), make_model(hidden_size=24, rows=VOCABULARY + 5, seed=1)


def make_prompts(count: int = 6) -> list[Prompt]:
    return [
        Prompt(f"p{index}", tuple(torch.randint(3, VOCABULARY, (1 + index % 7,)).tolist()), golden_ids=(5, 4, END))
        for index in range(count)
    ]


def engine_of(model: PreTrainedModel, **settings: object) -> HFEngine:
    return HFEngine(model, vocab_size=VOCABULARY, pad_id=END, **settings)


def mixture_of(models: tuple[PreTrainedModel, PreTrainedModel]) -> HFEngine:
    return engine_of(models[0], mixed_in=[(models[1], MIXING)], source="mixture", sequences_per_batch=1000)


@torch.no_grad()
def next_probabilities(model: PreTrainedModel, prompt: Prompt, response: Sequence[int]) -> Tensor:
    """[T, VOCABULARY] before each response token, by one plain forward pass, padding rows left out."""
    logits = model(input_ids=torch.tensor([[*prompt.prompt_ids, *response]])).logits[0, :, :VOCABULARY]
    start = len(prompt.prompt_ids) - 1
    return logits[start : start + len(response)].softmax(-1)


def mixed_probabilities(models: tuple[PreTrainedModel, PreTrainedModel], rollout: Rollout) -> Tensor:
    q, p = (next_probabilities(model, rollout.prompt, rollout.response_ids) for model in models)
    return (1 - MIXING) * q + MIXING * p


def test_the_mixture_reports_its_own_probabilities(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    for rollout in mixture_of(models).generate(make_prompts(), SAMPLING, seed=1):
        assert rollout.source == "mixture"
        expected = mixed_probabilities(models, rollout)[range(len(rollout)), list(rollout.response_ids)].log()
        torch.testing.assert_close(torch.tensor(rollout.rollout_logprobs), expected, rtol=0, atol=1e-4)


def test_temperature_and_truncation_reshape_the_mixture_not_its_parts(
    models: tuple[PreTrainedModel, PreTrainedModel],
) -> None:
    reshaped = replace(SAMPLING, temperature=0.6, top_k=3)
    for rollout in mixture_of(models).generate(make_prompts(), reshaped, seed=1):
        kept, ids = (mixed_probabilities(models, rollout) ** (1 / 0.6)).topk(3)
        place = ids == torch.tensor(rollout.response_ids)[:, None]
        expected = (kept / kept.sum(-1, keepdim=True))[place].log()
        torch.testing.assert_close(torch.tensor(rollout.rollout_logprobs), expected, rtol=0, atol=1e-4)


def test_first_tokens_are_drawn_as_often_as_the_mixture_says(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    count = 6000
    (prompt,) = make_prompts(1)
    one_token = replace(SAMPLING, max_new_tokens=1, samples_per_prompt=count)
    rollouts = mixture_of(models).generate([prompt], one_token, seed=3)
    drawn = torch.bincount(torch.tensor([r.response_ids[0] for r in rollouts]), minlength=VOCABULARY)
    q, p = (next_probabilities(model, prompt, (0,))[0] for model in models)

    mixture = (1 - MIXING) * q + MIXING * p

    def deviations(probabilities: Tensor) -> Tensor:
        """In standard errors."""
        return (drawn - count * probabilities).abs() / (count * probabilities * (1 - probabilities)).sqrt()

    assert count * mixture.min() > 5  # else a standard error would say little of the rarest token
    assert deviations(mixture).max() < 5
    assert deviations(q).max() > 10


def test_rewards_weighted_by_q_over_the_reported_probability_are_unbiased(
    models: tuple[PreTrainedModel, PreTrainedModel],
) -> None:
    """Against the expectation under the student by enumeration of every response of two tokens."""
    count = 6000
    (prompt,) = make_prompts(1)
    stops = [(END,), (CHAT_END,)]
    going_on = [token for token in range(VOCABULARY) if token not in SAMPLING.stop_ids]
    responses = [*stops, *itertools.product(going_on, range(VOCABULARY))]
    by_student = {
        response: next_probabilities(models[0], prompt, response)[range(len(response)), list(response)].prod().item()
        for response in responses
    }
    assert sum(by_student.values()) == pytest.approx(1, abs=1e-5)
    reward = {response: math.sin(3 * index) for index, response in enumerate(responses)}
    truth = sum(by_student[response] * reward[response] for response in responses)

    two_tokens = replace(SAMPLING, max_new_tokens=2, samples_per_prompt=count)
    rollouts = mixture_of(models).generate([prompt], two_tokens, seed=7)
    rewards = torch.tensor([reward[r.response_ids] for r in rollouts], dtype=torch.float64)
    weights = torch.tensor([by_student[r.response_ids] / math.exp(sum(r.rollout_logprobs)) for r in rollouts])

    def deviation(estimates: Tensor) -> float:
        return abs(estimates.mean().item() - truth) / (estimates.std().item() / math.sqrt(count))

    assert deviation(weights * rewards) < 5
    assert deviation(rewards) > 5


class Stamped(FakeEngine):
    """The fake engine under the name of a source; remembers how often it was asked."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        self.source = source
        self.calls = 0

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, *, seed: int) -> list[Rollout]:
        self.calls += 1
        return [replace(rollout, source=self.source) for rollout in super().generate(prompts, sampling, seed=seed)]


def stamped(shares: dict[Source, float]) -> SourceEngine:
    return SourceEngine(
        {"student": Stamped("student"), "teacher": Stamped("teacher"), "golden": GoldenEngine()}, shares
    )


SHARES: dict[Source, float] = {"student": 0.5, "teacher": 0.3, "golden": 0.2}


def test_prompts_are_answered_as_often_as_the_shares_say() -> None:
    count = 4000
    prompts = make_prompts(count)
    for seed in (1, 2):
        rollouts = stamped(SHARES).generate(prompts, replace(SAMPLING, samples_per_prompt=1), seed=seed)
        answered = Counter(rollout.source for rollout in rollouts)
        for source, share in SHARES.items():
            assert abs(answered[source] - count * share) < 5 * math.sqrt(count * share * (1 - share))


def choices(engine: SourceEngine, prompts: Sequence[Prompt], seed: int) -> dict[str, Source]:
    return {rollout.prompt.id: rollout.source for rollout in engine.generate(prompts, SAMPLING, seed=seed)}


def test_a_choice_depends_on_seed_and_prompt_alone() -> None:
    prompts = make_prompts(200)
    together = choices(stamped(SHARES), prompts, 5)
    apart = {id: source for prompt in reversed(prompts) for id, source in choices(stamped(SHARES), [prompt], 5).items()}
    assert apart == together
    assert choices(stamped(dict(reversed(SHARES.items()))), prompts, 5) == together
    assert choices(stamped(SHARES), prompts, 6) != together


def test_a_resumed_run_makes_the_same_choices() -> None:
    prompts = make_prompts(40)
    unbroken = stamped(SHARES)
    steps = []
    for step in range(4):
        steps.append(unbroken.generate(prompts, SAMPLING, seed=100 + step))
        unbroken.update_weights(version=step + 1)
    resumed = stamped(SHARES)
    resumed.update_weights(version=2)
    assert resumed.generate(prompts, SAMPLING, seed=102) == steps[2]


def test_rollouts_come_in_the_order_of_the_prompts() -> None:
    prompts = make_prompts(30)
    prompts.append(prompts[0])  # a step at the end of an epoch may hold a prompt twice
    engines = {"student": Stamped("student"), "teacher": Stamped("teacher"), "golden": GoldenEngine()}
    rollouts = SourceEngine(engines, SHARES).generate(prompts, SAMPLING, seed=5)
    assert engines["student"].calls == engines["teacher"].calls == 1
    chosen = {rollout.prompt.id: rollout.source for rollout in rollouts}
    assert set(chosen.values()) == set(SHARES)
    expected = [(p.id, s) for p in prompts for s in range(1 if chosen[p.id] == "golden" else 3)]
    assert [(rollout.prompt.id, rollout.sample) for rollout in rollouts] == expected
    for rollout in rollouts:
        if rollout.source == "golden":
            assert rollout.response_ids == rollout.prompt.golden_ids
            assert rollout.rollout_logprobs == (0.0, 0.0, 0.0)


def test_the_teachers_rollouts_are_those_of_its_own_engine(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    student, teacher = models
    engines = {"student": engine_of(student), "teacher": engine_of(teacher, source="teacher")}
    prompts = make_prompts(12)
    rollouts = SourceEngine(engines, {"student": 0.5, "teacher": 0.5}).generate(prompts, SAMPLING, seed=4)
    for source in ("student", "teacher"):
        got = [rollout for rollout in rollouts if rollout.source == source]
        asked = [prompt for prompt in prompts if prompt.id in {rollout.prompt.id for rollout in got}]
        assert 0 < len(asked) < len(prompts)
        assert got == engines[source].generate(asked, SAMPLING, seed=4)


def test_a_routed_prompt_is_answered_as_by_its_own_engine_alone(
    models: tuple[PreTrainedModel, PreTrainedModel],
) -> None:
    engines = {"a": engine_of(models[0]), "b": engine_of(models[1])}
    prompts = [replace(prompt, teacher="aab"[index % 3]) for index, prompt in enumerate(make_prompts(9))]
    rollouts = RoutedEngine(engines).generate(prompts, SAMPLING, seed=4)
    assert [rollout.prompt.id for rollout in rollouts] == [prompt.id for prompt in prompts for _ in range(3)]
    for name, engine in engines.items():
        own = [prompt for prompt in prompts if prompt.teacher == name]
        assert [r for r in rollouts if r.prompt.teacher == name] == engine.generate(own, SAMPLING, seed=4)


def test_a_mixture_of_three_reports_its_own_probabilities(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    every = [*models, make_model(rows=VOCABULARY, seed=2)]
    engine = engine_of(every[0], mixed_in=[(every[1], 0.3), (every[2], 0.2)])
    for rollout in engine.generate(make_prompts(), SAMPLING, seed=1):
        parts = [next_probabilities(model, rollout.prompt, rollout.response_ids) for model in every]
        mixed = 0.5 * parts[0] + 0.3 * parts[1] + 0.2 * parts[2]
        expected = mixed[range(len(rollout)), list(rollout.response_ids)].log()
        torch.testing.assert_close(torch.tensor(rollout.rollout_logprobs), expected, rtol=0, atol=1e-4)


SMALL = ["data.limit=20", "evaluation.data=null", "sampling.max_new_tokens=8"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ([], {"student"}),
        (["rollout.teacher_mixing=0.2"], {"mixture"}),
        (["rollout.sources={teacher: 1}"], {"teacher"}),
        (["rollout.sources={golden: 1}"], {"golden"}),
        (["rollout.sources={student: 0.5, golden: 0.5}", "rollout.teacher_mixing=0.2"], {"mixture", "golden"}),
        (["rollout.sources={student: 0.4, teacher: 0.3, golden: 0.3}"], {"student", "teacher", "golden"}),
    ],
)
def test_a_recipe_gets_the_sources_it_names(settings: list[str], expected: set[Source]) -> None:
    parts = assemble(load_recipe(RECIPE, [*SMALL, *settings]))
    rollouts = parts.engine.generate(parts.stream.take(0, 20), parts.sampling, seed=1)
    assert {rollout.source for rollout in rollouts} == expected


@pytest.mark.parametrize("sources", ["{golden: 1}", "{student: 0.9, golden: 0.1}"])
def test_golden_answers_need_their_column(sources: str) -> None:
    with pytest.raises(ConfigError, match=r"rollout\.sources has golden, but the prompts have no worked answers") as e:
        assemble(load_recipe(RECIPE, [*SMALL, "data.golden=null", f"rollout.sources={sources}"]))
    assert "\n" not in str(e.value)

"""The contract of rollout engines, which every implementation runs; then what only the HF engine promises."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from conftest import CHAT_END, END, make_model, make_rollouts
from fakes import FakeEngine
from poweropd.errors import ConfigError
from poweropd.rollout.engine import RolloutEngine, Sampling
from poweropd.rollout.golden import GoldenEngine
from poweropd.rollout.hf import HFEngine
from poweropd.rollout.sources import RoutedEngine, SourceEngine
from poweropd.types import Prompt

SAMPLING = Sampling(stop_ids=(END, CHAT_END), max_new_tokens=12, samples_per_prompt=3)


def make_prompts() -> list[Prompt]:
    lengths = [(3, 5), (9, 2), (1, 20), (6, 12)]
    return [
        replace(rollout.prompt, golden_ids=rollout.response_ids, teacher=teacher)
        for rollout, teacher in zip(make_rollouts(lengths), "abba", strict=True)
    ]


def make_hf(model: PreTrainedModel, **settings: object) -> HFEngine:
    return HFEngine(model, vocab_size=512, pad_id=END, **settings)


def make_mixture(weight: float, **settings: object) -> HFEngine:
    """Of two models of different width, whose heads are padded differently."""
    return make_hf(make_model(), mixed_in=[(make_model(hidden_size=24, rows=520, seed=1), weight)], **settings)


ENGINES: dict[str, Callable[[], RolloutEngine]] = {
    "hf": lambda: make_hf(make_model()),
    "mixture": lambda: make_mixture(0.3),
    "golden": GoldenEngine,
    "one source": lambda: SourceEngine({"student": make_hf(make_model())}, {"student": 1.0}),
    "two sources": lambda: SourceEngine(
        {"student": make_mixture(0.3), "teacher": make_hf(make_model(seed=1))}, {"student": 0.5, "teacher": 0.5}
    ),
    "routed": lambda: RoutedEngine({"a": make_hf(make_model()), "b": make_hf(make_model(seed=1))}),
    "fake": FakeEngine,
}


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> RolloutEngine:
    return ENGINES[request.param]()


def test_contract(engine: RolloutEngine) -> None:
    prompts = make_prompts()
    samples = 1 if isinstance(engine, GoldenEngine) else SAMPLING.samples_per_prompt
    rollouts = engine.generate(prompts, SAMPLING, seed=5)
    assert [(r.prompt.id, r.sample) for r in rollouts] == [(p.id, s) for p in prompts for s in range(samples)]
    for rollout in rollouts:
        assert 1 <= len(rollout) <= SAMPLING.max_new_tokens
        assert len(rollout.rollout_logprobs) == len(rollout)
        assert all(value <= 0 for value in rollout.rollout_logprobs)
        ended = rollout.response_ids[-1] in SAMPLING.stop_ids
        assert rollout.finish_reason == ("stop" if ended else "length")
        assert ended or len(rollout) == SAMPLING.max_new_tokens
        assert not set(rollout.response_ids[:-1]) & set(SAMPLING.stop_ids)
    assert engine.generate(prompts, SAMPLING, seed=5) == rollouts
    engine.update_weights(version=7)
    if not isinstance(engine, GoldenEngine):
        assert engine.generate(prompts[:1], SAMPLING, seed=5)[0].policy_version == 7


def test_golden_answers_are_needed() -> None:
    with pytest.raises(ConfigError, match=r"set data\.golden"):
        GoldenEngine().generate([Prompt("bare", (1,))], SAMPLING, seed=0)


def test_logprobs_are_those_of_the_full_softmax_when_nothing_reshapes_it(model: PreTrainedModel) -> None:
    for rollout in make_hf(model).generate(make_prompts(), SAMPLING, seed=1):
        ids = torch.tensor([rollout.prompt.prompt_ids + rollout.response_ids])
        with torch.no_grad():
            logprobs = model(input_ids=ids).logits[0].log_softmax(-1)
        start = len(rollout.prompt.prompt_ids) - 1
        expected = logprobs[range(start, start + len(rollout)), list(rollout.response_ids)]
        torch.testing.assert_close(torch.tensor(rollout.rollout_logprobs), expected, rtol=1e-4, atol=1e-5)


def test_greedy_decoding_equals_that_of_transformers(model: PreTrainedModel) -> None:
    prompts = make_prompts()
    ours = make_hf(model).generate(prompts, replace(SAMPLING, temperature=0, samples_per_prompt=1), seed=0)
    for prompt, rollout in zip(prompts, ours, strict=True):
        ids = torch.tensor([prompt.prompt_ids])
        theirs = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=[END, CHAT_END],
            pad_token_id=END,
        )
        assert rollout.response_ids == tuple(theirs[0, ids.shape[1] :].tolist())


@pytest.mark.parametrize("mixing", [0.0, 0.3])
def test_a_sample_does_not_depend_on_its_batch(mixing: float) -> None:
    def engine(sequences: int) -> HFEngine:
        settings = {"sequences_per_batch": sequences}
        return make_mixture(mixing, **settings) if mixing else make_hf(make_model(), **settings)

    prompts = make_prompts()
    together = engine(64).generate(prompts, SAMPLING, seed=2)
    apart = [rollout for prompt in prompts for rollout in engine(1).generate([prompt], SAMPLING, seed=2)]
    assert [r.response_ids for r in together] == [r.response_ids for r in apart]
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(
            torch.tensor(one.rollout_logprobs), torch.tensor(other.rollout_logprobs), atol=1e-4, rtol=0
        )


def test_another_seed_gives_other_samples(model: PreTrainedModel) -> None:
    prompts = make_prompts()
    assert make_hf(model).generate(prompts, SAMPLING, seed=1) != make_hf(model).generate(prompts, SAMPLING, seed=2)


def test_padding_ids_are_never_drawn() -> None:
    """The head's rows beyond the vocabulary would win every draw if they were looked at."""
    model = make_model(rows=520)
    with torch.no_grad():
        model.get_input_embeddings().weight[512:] *= 100
    rollouts = make_hf(model).generate(make_prompts(), SAMPLING, seed=0)
    assert max(max(r.response_ids) for r in rollouts) < 512

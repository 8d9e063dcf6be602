"""The contract of rollout engines, which every implementation runs; then what only the HF engine promises."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedModel

from conftest import CHAT_END, END, make_model, make_rollouts
from fakes import FakeEngine
from poweropd.errors import ConfigError
from poweropd.rollout import decoding, llama
from poweropd.rollout.decoding import LeanDecoding
from poweropd.rollout.engine import RolloutEngine, Sampling
from poweropd.rollout.golden import GoldenEngine
from poweropd.rollout.hf import HFEngine
from poweropd.rollout.sources import RoutedEngine, SourceEngine
from poweropd.types import Prompt, Rollout

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


def make_gemma() -> PreTrainedModel:
    """Not of the family that is decoded without transformers' modules: it is decoded by these, in turns."""
    config = Gemma2Config(
        vocab_size=512,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=128,
        initializer_range=0.3,
        sliding_window=6,
        eos_token_id=END,
        pad_token_id=END,
    )
    return Gemma2ForCausalLM(config).eval()


ENGINES: dict[str, Callable[[], RolloutEngine]] = {
    "hf": lambda: make_hf(make_model()),
    "other architecture": lambda: make_hf(make_gemma()),
    "a few at a time": lambda: make_hf(make_model(), sequences_per_batch=4),
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
    for again, rollout in zip(engine.generate(prompts, SAMPLING, seed=5), rollouts, strict=True):
        assert replace(again, rollout_logprobs=()) == replace(rollout, rollout_logprobs=())
        assert again.rollout_logprobs == pytest.approx(rollout.rollout_logprobs, abs=1e-5)
    engine.update_weights(version=7)
    if not isinstance(engine, GoldenEngine):
        assert engine.generate(prompts[:1], SAMPLING, seed=5)[0].policy_version == 7


def test_golden_answers_are_needed() -> None:
    with pytest.raises(ConfigError, match=r"set data\.golden"):
        GoldenEngine().generate([Prompt("bare", (1,))], SAMPLING, seed=0)


@torch.no_grad()
def full_logprobs(model: PreTrainedModel, rollout: Rollout) -> Tensor:
    """[T, 512] before each response token, by one forward pass of transformers."""
    logits = model(input_ids=torch.tensor([rollout.prompt.prompt_ids + rollout.response_ids])).logits[0, :, :512]
    start = len(rollout.prompt.prompt_ids) - 1
    return logits[start : start + len(rollout)].log_softmax(-1)


def chosen(logprobs: Tensor, rollout: Rollout) -> Tensor:
    return logprobs[range(len(rollout)), list(rollout.response_ids)]


@pytest.mark.parametrize("make", [make_model, make_gemma])
@pytest.mark.parametrize("sequences", [5, 64])
def test_logprobs_are_those_of_the_full_softmax_when_nothing_reshapes_it(
    make: Callable[[], PreTrainedModel], sequences: int
) -> None:
    model = make()
    for rollout in make_hf(model, sequences_per_batch=sequences).generate(make_prompts(), SAMPLING, seed=1):
        expected = chosen(full_logprobs(model, rollout), rollout)
        torch.testing.assert_close(torch.tensor(rollout.rollout_logprobs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [make_model, make_gemma])
def test_greedy_decoding_equals_that_of_transformers(make: Callable[[], PreTrainedModel]) -> None:
    model = make()
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


@pytest.mark.parametrize("kind", ["lean", "mixture", "other architecture", "mixture with another architecture"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("sequences", [3, 8])
def test_a_sample_does_not_depend_on_its_batch(kind: str, temperature: float, sequences: int) -> None:
    """Rows that end early leave, others come in their places: as if each had been alone."""

    def engine(sequences: int) -> HFEngine:
        mixed_in = {
            "lean": [],
            "mixture": [(make_model(hidden_size=24, rows=520, seed=1), 0.3)],
            "other architecture": [],
            "mixture with another architecture": [(make_gemma(), 0.3)],
        }[kind]
        first = make_gemma() if kind == "other architecture" else make_model()
        return make_hf(first, mixed_in=mixed_in, sequences_per_batch=sequences)

    torch.manual_seed(5)
    prompts = [
        replace(rollout.prompt, id=f"p{place}") for place, rollout in enumerate(make_rollouts([(3, 1), (9, 1)] * 5))
    ]
    sampling = replace(
        SAMPLING, max_new_tokens=20, samples_per_prompt=2, temperature=temperature, stop_ids=tuple(range(60))
    )
    torch.manual_seed(0)
    together = engine(sequences).generate(prompts, sampling, seed=2)
    assert len({len(rollout) for rollout in together}) > (4 if temperature else 1)
    torch.manual_seed(0)
    alone = engine(1)
    apart = [rollout for prompt in prompts for rollout in alone.generate([prompt], sampling, seed=2)]
    assert [r.response_ids for r in together] == [r.response_ids for r in apart]
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(
            torch.tensor(one.rollout_logprobs), torch.tensor(other.rollout_logprobs), atol=1e-5, rtol=0
        )


def test_rows_that_only_fill_a_product_change_nothing(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [rollout.prompt for rollout in make_rollouts([(length, 1) for length in range(1, 13)])]
    sampling = replace(SAMPLING, stop_ids=tuple(range(60)))
    expected = make_hf(model, sequences_per_batch=10).generate(prompts, sampling, seed=2)
    monkeypatch.setattr(llama, "COPIED_WEIGHTS", 0)
    monkeypatch.setattr(decoding, "CACHED_WEIGHTS", 0)
    shapes = []
    shape = LeanDecoding._shape
    monkeypatch.setattr(LeanDecoding, "_shape", lambda self: shapes.append(shape(self)[0]) or shape(self))
    found = make_hf(model, sequences_per_batch=10).generate(prompts, sampling, seed=2)
    assert 16 in shapes
    assert min(shapes) < 7
    assert [r.response_ids for r in found] == [r.response_ids for r in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.rollout_logprobs == pytest.approx(other.rollout_logprobs, abs=1e-5)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_weights_trained_in_place_are_seen(model: PreTrainedModel, precision: torch.dtype) -> None:
    prompts = make_prompts()
    engine = make_hf(model, precision=precision)
    before = engine.generate(prompts, SAMPLING, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1.2
    engine.update_weights(version=1)
    after = engine.generate(prompts, SAMPLING, seed=1)
    assert [r.response_ids for r in after] != [r.response_ids for r in before]
    anew = make_hf(model, precision=precision)
    anew.update_weights(version=1)
    assert after == anew.generate(prompts, SAMPLING, seed=1)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("mixing", [0.0, 0.3])
def test_merged_ends_are_drawn_as_one_with_the_probability_of_all(mixing: float, temperature: float) -> None:
    models = [make_model(), make_model(hidden_size=24, rows=520, seed=1)] if mixing else [make_model()]
    (prompt, *_) = make_prompts()

    def probabilities(rollout: Rollout) -> Tensor:
        """[T, 512] of the models, before ends are merged."""
        parts = [full_logprobs(model, rollout).exp() for model in models]
        return (1 - mixing) * parts[0] + mixing * parts[1] if mixing else parts[0]

    likeliest = probabilities(Rollout(prompt, (0,), (0.0,), "stop"))[0].topk(40).indices.tolist()
    ends = tuple(likeliest[1:])  # together more than the likeliest

    def merged(rollout: Rollout) -> Tensor:
        """[T, 512] of the distribution sampled from."""
        found = probabilities(rollout)
        of_end = found[:, list(ends)].sum(1)
        found[:, list(ends)] = 0
        found[:, ends[0]] = of_end
        if temperature:
            found **= 1 / temperature
        return found / found.sum(1, keepdim=True)

    engine = make_hf(models[0], mixed_in=[(each, mixing) for each in models[1:]], end_ids=ends)
    count = 3000
    sampling = Sampling(
        stop_ids=ends, max_new_tokens=2, temperature=temperature, samples_per_prompt=count if temperature else 1
    )
    rollouts = engine.generate([prompt], sampling, seed=3)
    expected = merged(rollouts[0])[0]
    first = torch.tensor([rollout.response_ids[0] for rollout in rollouts])
    assert not set(first.tolist()) & set(ends[1:])
    if not temperature:
        assert first.tolist() == [ends[0]] == [expected.argmax()]
        return
    error = (count * expected * (1 - expected)).sqrt()
    deviation = (torch.bincount(first, minlength=512) - count * expected).abs() / error
    assert deviation[count * expected > 5].max() < 5
    for rollout in rollouts[:50]:
        logprobs = chosen(merged(rollout).log(), rollout)
        torch.testing.assert_close(torch.tensor(rollout.rollout_logprobs), logprobs, atol=1e-4, rtol=0)


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

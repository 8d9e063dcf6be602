"""Decoding token by token gives the hidden states of a whole forward pass, for each architecture and each way to do it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from conftest import END, make_model
from poweropd.rollout import decoding, llama
from poweropd.rollout.batch import Move
from poweropd.rollout.cache import CHUNK, KeyValueCache
from poweropd.rollout.decoding import Decoder, Decoding, LeanDecoding, ModuleDecoding
from poweropd.rollout.llama import is_llama

SIZES = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": END,
    "eos_token_id": END,
}
TOKENS = 40
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0}


def llama_of(**settings: object) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SIZES | settings))


FAMILY: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": llama_of,
    "llama, tied, 1 head a key": lambda: llama_of(tie_word_embeddings=True, num_key_value_heads=6),
    "llama, biases": lambda: llama_of(attention_bias=True, mlp_bias=True),
    "llama 3.1": lambda: llama_of(rope_parameters=LLAMA3),
    "llama, yarn": lambda: llama_of(rope_parameters=YARN),
    "llama, gelu": lambda: llama_of(hidden_act="gelu"),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, head_dim=16, sliding_window=None)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True)),
}
OTHERS: dict[str, Callable[[], PreTrainedModel]] = {
    "gemma 2": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, sliding_window=16)),
    "gpt neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=2)),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, residual_multiplier=0.5)),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.5)),
    "mistral, sliding": lambda: MistralForCausalLM(MistralConfig(**SIZES, head_dim=16, sliding_window=16)),
    "qwen2, sliding": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=16, max_window_layers=1)
    ),
    "llama, dynamic rope": lambda: llama_of(rope_parameters=DYNAMIC, max_position_embeddings=16),
    "llama, hooked": lambda: hooked(llama_of()),
    "llama, adapters": lambda: adapted(llama_of()),
}


def spread(model: PreTrainedModel) -> PreTrainedModel:
    """Biases start as 0 and norms as 1, which would hide that they are left out."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    return model.eval()


def hooked(model: PreTrainedModel) -> PreTrainedModel:
    model.model.layers[1].mlp.register_forward_hook(lambda module, inputs, output: 2 * output)
    return model


class Adapted(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.1 * x.sum(-1, keepdim=True)


def adapted(model: PreTrainedModel) -> PreTrainedModel:
    model.model.layers[0].self_attn.q_proj.__class__ = Adapted
    return model


def decoder(model: PreTrainedModel, precision: torch.dtype = torch.float32) -> Decoder:
    return Decoder(model, precision=precision, pad_id=END)


def texts(count: int) -> list[list[int]]:
    return torch.randint(3, 96, (count, TOKENS)).tolist()


@torch.no_grad()
def whole(model: PreTrainedModel, text: list[int]) -> Tensor:
    """Hidden states [tokens, H] by one forward pass of transformers."""
    return model.base_model(input_ids=torch.tensor([text]), use_cache=False).last_hidden_state[0]


@torch.no_grad()
def check_against_whole_passes(model: PreTrainedModel, run: Decoding, tolerance: float = 1e-5) -> None:
    """Ragged rows, two with one prompt, rows that leave and others that come: as in a pass over each whole text."""
    rows = texts(4)
    starts = [7, 2, 11, 2]
    rows[3][:2] = rows[1][:2]
    prompts = [rows[0][:7], rows[1][:2], rows[2][:11]]
    lengths = list(starts)

    def check(found: Tensor, which: list[int]) -> None:
        for got, row in zip(found, which, strict=True):
            expected = whole(model, rows[row])
            torch.testing.assert_close(
                got, expected[lengths[row] - 1], rtol=0, atol=tolerance * expected.abs().max().item()
            )

    def go_on(steps: int) -> None:
        for _ in range(steps):
            ids = torch.tensor([rows[row][lengths[row]] for row in there])
            found = run.step(ids)
            for row in there:
                lengths[row] += 1
            check(found, there)

    there = [0, 1, 2, 3]
    check(run.admit(prompts, [0, 1, 2, 1]), there)
    go_on(9)
    run.keep(Move.without(torch.tensor([False, True, False, False])))
    there = [0, 3, 2]
    go_on(3)
    if run.refills:
        rows += texts(2)
        lengths += [9, 4]
        check(run.admit([rows[4][:9], rows[5][:4]], [0, 1]), [4, 5])
        there += [4, 5]
        go_on(5)
    run.keep(Move.without(torch.tensor([True, False, True, *[False] * (len(there) - 3)])))
    there = [4, 3, 5] if run.refills else [3]
    go_on(3)


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("copied", [True, False])
def test_a_lean_decoding_equals_transformers(name: str, copied: bool, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: FBT001
    monkeypatch.setattr(llama, "COPIED_WEIGHTS", 32_000_000 if copied else 0)
    model = spread(FAMILY[name]())
    run = decoder(model).start(rows=6, tokens=TOKENS)
    assert isinstance(run, LeanDecoding)
    check_against_whole_passes(model, run)


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures_run_as_they_are(name: str) -> None:
    model = spread(OTHERS[name]())
    assert is_llama(model) == (name == "granite")  # what a comparison on short texts would not show is known without it
    run = decoder(model).start(rows=6, tokens=TOKENS)
    assert isinstance(run, ModuleDecoding)
    if name != "llama, dynamic rope":  # whose keys change with the length of the text, unless they are in a cache
        check_against_whole_passes(model, run)


def test_other_arithmetic_in_the_same_modules_is_noticed() -> None:
    model = OTHERS["granite"]()
    assert is_llama(model)
    assert not decoder(model).is_lean
    model.model.config.residual_multiplier = 1.0
    for layer in model.model.layers:
        layer.residual_multiplier = 1.0
        layer.self_attn.scaling = 0.5
    assert decoder(model).is_lean


@torch.no_grad()
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_bfloat16_is_as_close_as_that_of_transformers(stored: torch.dtype) -> None:
    """Weights in fp32 whose products are in bf16, as the student's, and weights in bf16, as a teacher's."""
    model = spread(FAMILY["qwen3"]())
    rows = texts(5)
    exact = torch.stack([whole(model, row)[19:25] for row in rows], dim=1)
    model = model.to(stored)

    def error(run: Decoding) -> float:
        found = [run.admit([row[:20] for row in rows], range(5))]
        found += [run.step(torch.tensor([row[at] for row in rows])) for at in range(20, 25)]
        return (torch.stack(found).float() - exact).square().mean().sqrt().item()

    chosen = decoder(model, torch.bfloat16)
    assert chosen.is_lean
    lean = error(chosen.start(rows=5, tokens=TOKENS))
    theirs = error(ModuleDecoding(model, precision=torch.bfloat16, pad_id=END))
    assert 0 < lean < 1.5 * theirs < 0.2 * exact.square().mean().sqrt().item()


@torch.no_grad()
def test_a_decoding_keeps_the_precision_of_the_residual_stream() -> None:
    model = make_model()
    run = decoder(model, torch.bfloat16).start(rows=1, tokens=TOKENS)
    assert run.admit([[3, 4]], [0]).dtype == torch.float32


@torch.no_grad()
def test_rows_of_one_prompt_share_its_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    run = decoder(model).start(rows=8, tokens=TOKENS)
    tokens = []
    call = llama.Llama.__call__
    monkeypatch.setattr(
        llama.Llama, "__call__", lambda self, ids, *rest: tokens.append(len(ids)) or call(self, ids, *rest)
    )
    run.admit([[3, 4, 5], [6, 7]], [0, 0, 0, 1, 1])
    run.step(torch.tensor([8, 9, 10, 11, 12]))
    assert tokens == [5, 5]  # of two prompts; of five rows


@torch.no_grad()
@pytest.mark.parametrize("budget", [1, 9, 24])
def test_prompts_may_be_run_a_few_at_a_time(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = spread(make_model())
    prompts = [row[:length] for row, length in zip(texts(4), (12, 8, 3, 1), strict=True)]
    together = decoder(model).start(rows=6, tokens=TOKENS).admit(prompts, [3, 0, 1, 2, 0, 1])
    monkeypatch.setattr(decoding, "PREFILL_TOKENS", budget)
    run = decoder(model).start(rows=6, tokens=TOKENS)
    torch.testing.assert_close(run.admit(prompts, [3, 0, 1, 2, 0, 1]), together)
    check_against_whole_passes(model, decoder(model).start(rows=6, tokens=TOKENS))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@torch.no_grad()
def test_steps_recorded_on_a_gpu_equal_steps_on_a_cpu() -> None:
    model = spread(FAMILY["qwen3"]())
    rows = texts(3)

    def run(device: str) -> tuple[Tensor, LeanDecoding]:
        model.to(device)
        lean = LeanDecoding(model, precision=torch.float32, rows=3, tokens=TOKENS)
        found = [lean.admit([row[:5] for row in rows], range(3))]
        found += [lean.step(torch.tensor([row[at] for row in rows], device=device)).clone() for at in range(5, 25)]
        return torch.stack(found).cpu(), lean

    expected, _ = run("cpu")
    found, lean = run("cuda")
    assert lean._replay._recordings
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_a_cache_grows_with_what_it_holds_and_keeps_it() -> None:
    cache = KeyValueCache(layers=2, rows=3, tokens=1000, shape=(1, 2), dtype=torch.float32, device=torch.device("cpu"))
    assert cache.reserve(5)
    assert cache.capacity == CHUNK
    assert not cache.reserve(CHUNK)
    cache.write(1, torch.tensor([2 * CHUNK + 4]), torch.ones(1, 1, 2), 2 * torch.ones(1, 1, 2))
    assert cache.reserve(CHUNK + 1)
    assert cache.capacity == 2 * CHUNK
    assert cache.keys[1][2, 4].tolist() == [[1, 1]]
    assert cache.keys[1].sum() == 2
    assert cache.values[1].sum() == 4
    cache.move(torch.tensor([0]), torch.tensor([2]), 5)
    assert cache.keys[1][0, 4].tolist() == [[1, 1]]
    cache.reserve(999)
    assert cache.capacity == 1000


@pytest.mark.parametrize(
    ("leaving", "order"),
    [([0, 0, 1], [0, 1]), ([1, 0, 0], [2, 1]), ([1, 1, 0, 0], [2, 3]), ([1, 0, 1, 0, 1, 0], [3, 1, 5]), ([1, 1], [])],
)
def test_rows_from_behind_fill_the_gaps(leaving: list[int], order: list[int]) -> None:
    move = Move.without(torch.tensor(leaving).bool())
    rows = torch.arange(len(leaving))
    rows[move.gaps] = rows[move.sources]
    assert rows[: move.rows].tolist() == order

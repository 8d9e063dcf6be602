"""Rows end to end: what a model makes of them must be what it makes of each row alone."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    FalconConfig,
    GPT2Config,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from conftest import make_model
from poweropd.models import hidden_states
from poweropd.packing import Packing, enable_packing, takes_packs

LENGTHS = (9, 1, 12, 3, 3, 1, 17, 2)  # in no order
COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.4,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
SMALL_GPT2: dict[str, Any] = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "initializer_range": 0.4}

PACKED: dict[str, Callable[[], PreTrainedConfig]] = {
    "qwen3": lambda: Qwen3Config(**COMMON, head_dim=8, tie_word_embeddings=False),
    "qwen3 tied": lambda: Qwen3Config(**COMMON, head_dim=8, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**COMMON),
    "llama": lambda: LlamaConfig(**COMMON),
    "learnt positions": lambda: GPT2Config(vocab_size=64, bos_token_id=0, eos_token_id=1, **SMALL_GPT2),
}
PADDED: dict[str, Callable[[], PreTrainedConfig]] = {
    "sliding windows by layer": lambda: Qwen3Config(
        **COMMON, head_dim=8, use_sliding_window=True, sliding_window=4, max_window_layers=1
    ),
    "sliding windows": lambda: MistralConfig(**COMMON, sliding_window=4),
    "convolutions": lambda: Lfm2Config(**COMMON, layer_types=["conv", "full_attention"]),
    "attention of its own": lambda: FalconConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, bos_token_id=0, eos_token_id=1
    ),
}


def build(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).eval()


def some_ids(lengths: tuple[int, ...] = LENGTHS, vocabulary: int = 64) -> Tensor:
    return torch.randint(3, vocabulary, (sum(lengths),), generator=torch.Generator().manual_seed(1))


def each_alone(model: PreTrainedModel, ids: Tensor, lengths: tuple[int, ...] = LENGTHS) -> Tensor:
    rows = [model.base_model(input_ids=row[None], use_cache=False).last_hidden_state[0] for row in ids.split(lengths)]
    return torch.cat(rows)


def gradients(model: PreTrainedModel, hidden: Tensor) -> dict[str, Tensor]:
    """Of some function of all hidden states and of the head."""
    model.zero_grad()
    model.get_output_embeddings()(hidden).square().mean().backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def assert_rows_are_alone(model: PreTrainedModel, lengths: tuple[int, ...] = LENGTHS) -> None:
    ids = some_ids(lengths)
    alone, got = each_alone(model, ids, lengths), hidden_states(model, ids, lengths)
    torch.testing.assert_close(got, alone, rtol=1e-5, atol=1e-5)
    expected, found = gradients(model, alone), gradients(model, got)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("lengths", [LENGTHS, (1,), (5,), (4, 4, 4), tuple(range(20, 0, -1))])
@pytest.mark.parametrize("name", PACKED)
def test_packed_rows_are_as_each_alone(name: str, lengths: tuple[int, ...]) -> None:
    model = build(PACKED[name]())
    assert enable_packing(model)
    assert takes_packs(model)
    assert_rows_are_alone(model, lengths)


@pytest.mark.parametrize("name", PADDED)
def test_models_that_look_elsewhere_are_padded(name: str) -> None:
    model = build(PADDED[name]())
    before = model.config._attn_implementation
    assert not enable_packing(model)
    assert not takes_packs(model)
    assert model.config._attn_implementation == before
    assert_rows_are_alone(model)


class ShiftedMLP(torch.nn.Module):
    """Mixes each token with the one before it, as RWKV does: attention is not all that joins tokens."""

    def __init__(self, mlp: torch.nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, hidden: Tensor) -> Tensor:
        return self.mlp(hidden + torch.nn.functional.pad(hidden, (0, 0, 1, -1)))


def test_a_model_that_passes_on_beside_its_attention_is_padded() -> None:
    """Nothing in its config says so: only the comparison can tell."""
    model = build(PACKED["qwen3"]())
    model.base_model.layers[1].mlp = ShiftedMLP(model.base_model.layers[1].mlp)
    assert not enable_packing(model)
    assert_rows_are_alone(model)


def test_no_rows_are_no_hidden_states(model: PreTrainedModel) -> None:
    assert hidden_states(model, torch.zeros(0, dtype=torch.long), ()).shape == (0, 16)


def test_gradient_checkpointing_recomputes_packed_attention() -> None:
    model = build(PACKED["qwen3"]())
    enable_packing(model)
    plain = gradients(model, hidden_states(model, some_ids(), LENGTHS))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    recomputed = gradients(model.train(), hidden_states(model, some_ids(), LENGTHS))
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient)


@pytest.mark.parametrize("name", ["qwen3", "learnt positions"])
def test_bf16_stays_near_fp32(name: str) -> None:
    model = build(PACKED[name]())
    enable_packing(model)
    exact = hidden_states(model, some_ids(), LENGTHS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = hidden_states(model, some_ids(), LENGTHS)
    assert (rough - exact).norm() <= 0.05 * exact.norm()


def test_bf16_weights_can_be_packed() -> None:
    model = build(PACKED["qwen3"]()).to(torch.bfloat16)
    assert enable_packing(model)
    alone, got = each_alone(model, some_ids()), hidden_states(model, some_ids(), LENGTHS)
    assert got.dtype == torch.bfloat16
    assert (got - alone).norm() <= 0.05 * alone.norm()


def test_decoding_and_saving_stay_as_they_were(tmp_path: Path) -> None:
    """Left-padded prompts, with a cache: the attention that rollouts use."""
    model, prompts = make_model(), torch.randint(3, 512, (3, 6))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6, [0, 0, 0, 0, 0, 1]])

    def decode() -> Tensor:
        return model.generate(prompts, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0)

    model.save_pretrained(tmp_path / "before")
    before = decode()
    assert enable_packing(model)
    assert torch.equal(decode(), before)
    model.save_pretrained(tmp_path / "after")
    saved = [json.loads((tmp_path / when / "config.json").read_text()) for when in ("before", "after")]
    assert saved[0] == saved[1]


def test_similar_neighbours_are_padded_together() -> None:
    packing = Packing.of((8, 7, 2, 2, 9), torch.device("cpu"))
    assert packing.positions.tolist() == [*range(8), *range(7), 0, 1, 0, 1, *range(9)]
    assert [(group.rows, group.longest) for group in packing.groups] == [(2, 8), (2, 2), (1, 9)]
    packed = torch.arange(28)
    padded = [group.pad(packed) for group in packing.groups]
    assert padded[0].tolist() == [[*range(8)], [*range(8, 15), 0]]
    assert padded[1].tolist() == [[15, 16], [17, 18]]
    assert torch.equal(
        torch.cat([group.unpad(rows) for group, rows in zip(packing.groups, padded, strict=True)]), packed
    )

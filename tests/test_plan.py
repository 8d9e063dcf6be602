"""A plan against what models, torch and runs really do."""

import json
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)
from typer.testing import CliRunner

import plan_check
import plan_tables
from poweropd.cli import app
from poweropd.config import load_recipe
from poweropd.errors import ConfigError, ModelError
from poweropd.packing import enable_packing, packed_hidden_states
from poweropd.plan import show
from poweropd.plan.activations import activations
from poweropd.plan.advice import advise
from poweropd.plan.load import Load
from poweropd.plan.machines import GIB, MACHINES, machine
from poweropd.plan.memory import Memory, memory, total
from poweropd.plan.shapes import shape_of, shape_of_config
from poweropd.plan.timing import seconds, step_time

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "quickstart.yaml"
SIZES = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": None,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "llama tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama with biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, head_dim=24),
    "gemma2": Gemma2Config(**SIZES, head_dim=16),
    "gpt2": GPT2Config(vocab_size=160, n_embd=64, n_layer=4, n_head=4, n_positions=64),
}


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> PreTrainedConfig:
    return CONFIGS[request.param]


def planned(sets: Sequence[str] = (), gpu: str = "h100", **how: Any) -> Load:
    return Load.of(load_recipe(RECIPE, [*sets, "sampling.max_new_tokens=64"]), machine(gpu), prompt=32, **how)


def peak(sets: Sequence[str] = (), gpu: str = "h100", **how: Any) -> float:
    return memory(planned(sets, gpu, **how)).peak


def time(sets: Sequence[str] = (), gpu: str = "h100", **how: Any) -> float:
    return seconds(step_time(planned(sets, gpu, **how)))


def test_parameters_and_cache_are_those_of_the_real_model(config: PreTrainedConfig) -> None:
    shape, model = shape_of_config(config, "it"), AutoModelForCausalLM.from_config(config)
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert shape.head == model.get_output_embeddings().weight.numel()
    cache = DynamicCache(config=model.config)
    model(input_ids=torch.zeros(1, 7, dtype=torch.long), past_key_values=cache)
    held = sum(tensor.numel() for layer in cache.layers for tensor in (layer.keys, layer.values))
    assert shape.kv_elements * 7 == held


def test_flops_are_those_that_torch_counts(config: PreTrainedConfig) -> None:
    shape, model = shape_of_config(config, "it"), AutoModelForCausalLM.from_config(config)
    rows, length = 3, 40
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.zeros(rows, length, dtype=torch.long), use_cache=False)
    # The counter takes attention for what it would be without its mask: every token attends to all.
    expected = shape.body_flops(rows * length, 2 * length - 1) + shape.head_flops(rows * length)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)


def test_of_experts_those_count_that_a_token_is_sent_to() -> None:
    sizes = SIZES | {"moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2}
    shape = shape_of_config(Qwen3MoeConfig(**sizes), "it")
    all_sent = shape_of_config(Qwen3MoeConfig(**sizes | {"num_experts_per_tok": 8}), "it")
    assert shape.parameters == all_sent.parameters
    assert all_sent.products - shape.products == 4 * 6 * 3 * 64 * 32  # layers, experts spared, matrices
    assert activations(shape, 2, 8, torch.bfloat16, train=False).peak > 0  # as a teacher


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_activations_are_those_that_autograd_keeps(name: str) -> None:
    rows, length = 5, 23
    model = AutoModelForCausalLM.from_config(deepcopy(CONFIGS[name])).eval()
    assert enable_packing(model)
    model.get_input_embeddings().weight.requires_grad_(False)
    known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = packed_hidden_states(model, torch.zeros(rows * length, dtype=torch.long), [length] * rows)
    real = sum(size for place, size in kept.items() if place not in known) + hidden.nbytes
    found = activations(shape_of_config(CONFIGS[name], name), rows, length, torch.float32, train=True)
    assert found.kept == pytest.approx(real, rel=1e-3)
    assert found.peak > found.kept


def test_checkpointing_keeps_less_and_scoring_keeps_nothing() -> None:
    shape = shape_of_config(CONFIGS["qwen3"], "it")
    whole = activations(shape, 8, 64, torch.float32, train=True)
    recomputed = activations(shape, 8, 64, torch.float32, train=True, checkpointing=True)
    scoring = activations(shape, 8, 64, torch.float32, train=False)
    assert 4 * 8 * 64 * 64 * 4 <= recomputed.kept < whole.kept / 4  # what goes into each of 4 layers
    assert scoring.peak < recomputed.peak < whole.peak
    assert activations(shape, 8, 64, torch.bfloat16, train=True).kept < whole.kept


@pytest.mark.parametrize(
    "more",
    [
        "train.tokens_per_micro_batch=6000",
        "sampling.samples_per_prompt=4",
        "objective={name: reverse_kl}",
        "objective={name: power, alpha: 5, reference_kl: 0.1}",
        "student.precision=float32",
        "student.model=quickstart:teacher",
    ],
)
def test_more_of_anything_needs_more_memory(more: str) -> None:
    assert peak([more]) > peak()


@pytest.mark.parametrize(
    "less", ["student.gradient_checkpointing=true", "train.tokens_per_micro_batch=500", "student.lora={rank: 4}"]
)
def test_what_saves_memory_saves_memory(less: str) -> None:
    whole = "student.model=quickstart:teacher"  # larger, so that weights count
    assert total(memory(planned([whole, less])).phases["update, heads"]) < total(
        memory(planned([whole])).phases["update, heads"]
    )


def test_time_falls_with_gpus_and_rises_with_work() -> None:
    assert time(gpu="h200") < time(gpu="a100-80") < time(gpu="l4")
    assert time(["train.prompts_per_step=4096"], gpus=8) < time(["train.prompts_per_step=4096"])
    assert time(["student.gradient_checkpointing=true"]) > time()
    assert time(["sampling.top_p=0.9", "objective={name: power, alpha: 5, normalize: zscore}"]) > time()
    names = [phase.name for phase in step_time(planned(gpus=8))]
    assert names == ["rollout", "teacher scores", "update", "optimizer", "communication"]


def test_the_peak_is_what_lies_there_always_and_the_fullest_phase() -> None:
    plan = memory(planned())
    assert plan.peak == total(plan.always) + max(total(lines) for lines in plan.phases.values())
    assert plan.fits
    small = Memory(replace(plan.machine, memory=plan.peak), plan.always, plan.phases)
    assert not small.fits  # a run may not take all of it


def line(load: Load, name: str) -> float:
    """Bytes of what is always there under this name; 0 where nothing is."""
    return sum(each.bytes for each in memory(load).always if each.name == name)


def test_what_is_spread_over_gpus_is_divided_and_sent() -> None:
    alone, together = planned(gpus=4), replace(planned(gpus=4), shards=4)
    for name in ("student, weights", "student, AdamW"):
        assert line(together, name) == line(alone, name) / 4
    assert line(together, "student, copy") == 2 * together.student.parameters  # bf16, to sample from
    sent = {phase.name: phase.bytes for phase in step_time(together)}["communication"]
    batches, _ = together.batches(together.recipe.train.tokens_per_micro_batch)
    assert sent == 0.75 * together.student.parameters * (batches * (2 * 2 + 4) + 2)


def test_a_teacher_weighs_what_lies_on_the_gpu() -> None:
    load = planned()
    (here,) = load.teachers

    def weight(**change: Any) -> float:
        return line(replace(load, teachers=(replace(here, **change),)), "teacher, weights")

    layers, rest = here.shape.in_layers, here.shape.parameters - here.shape.in_layers
    assert weight() == 2 * (layers + rest)
    assert weight(layer_bytes=0.5) == 0.5 * layers + 2 * rest
    assert weight(offloaded=True) == 2 * rest
    assert weight(local=False) == 0
    assert weight(shards=8) == (layers + rest) / 4


def advised(gib: float, sets: Sequence[str] = ()) -> Any:
    """Advice for a GPU of so much memory."""
    gpu = replace(machine("h100"), memory=gib * GIB)

    def reload(more: Sequence[str], gpus: int) -> Load:
        return replace(planned([*sets, *more], gpus=gpus), machine=gpu)

    return advise(reload((), 1), reload), reload


def test_advice_is_the_cheapest_that_fits_and_none_of_it_can_be_left_out() -> None:
    sets = ["student.model=quickstart:teacher", "train.prompts_per_step=512", "rollout.sequences_per_batch=512"]
    sets.append("train.tokens_per_micro_batch=5000")
    needed = memory(planned(sets)).peak / GIB
    advice, _ = advised(needed, sets)
    assert advice.fits
    assert [change.sets for change in advice.changes] == [("train.tokens_per_micro_batch=2500",)]
    tight, reload = advised(1.22, sets)
    assert tight.fits
    assert len(tight.changes) > 1
    for change in tight.changes:
        others = [setting for other in tight.changes if other is not change for setting in other.sets]
        assert not memory(reload(others, 1)).fits


def test_where_nothing_helps_the_advice_says_so() -> None:
    advice, _ = advised(0.5, ["train.tokens_per_micro_batch=200"])
    assert not advice.fits
    assert "no change makes it fit" in " ".join(show.advised(advice, planned(), memory(advice.load), 1.0))


def test_rollouts_that_overlap_with_training_have_room_of_their_own() -> None:
    overlapping = planned(["rollout.max_staleness=1"])
    names = [each.name for each in memory(overlapping).always]
    assert "keys and values" in names
    assert "student, copy" in names
    assert memory(overlapping).peak > memory(planned()).peak


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no figures of 'H20'; did you mean 'h200'"):
        machine("H20")
    with pytest.raises(ConfigError, match=r"known here: a100-40, .* mi300x, cpu"):
        machine("voodoo")
    with pytest.raises(ModelError, match="cannot read a config in the folder"):
        shape_of(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ModelError, match="is no causal language model"):
        shape_of(str(tmp_path))
    experts = SIZES | {"moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2}
    with pytest.raises(ModelError, match=r"qwen3_moe.*cannot be planned"):
        activations(shape_of_config(Qwen3MoeConfig(**experts), "it"), 2, 8, torch.bfloat16, train=True)


def test_every_gpu_of_the_table_is_offered() -> None:
    words = " ".join(CliRunner().invoke(app, ["plan", "--help"], env={"COLUMNS": "200"}).output.split())
    assert all(name in words for name in MACHINES)


def test_the_command_prints_lines_that_add_up_and_settings_that_fit(tmp_path: Path) -> None:
    sizes = SIZES | {"vocab_size": 32_000, "hidden_size": 2048, "num_hidden_layers": 18, "intermediate_size": 8192}
    LlamaConfig(**sizes, head_dim=64).save_pretrained(tmp_path)
    command = ["plan", str(RECIPE), "--gpu", "rtx4090", "--set", f"student.model={tmp_path}", "--prompt", "32"]
    found = CliRunner().invoke(app, command, env={"COLUMNS": "400"})
    assert found.exit_code == 3, found.output
    assert "does not fit" in found.output
    assert "unchanged it fits on rtx5090" in found.output
    (line,) = (line for line in found.output.splitlines() if line.startswith("the cheapest change that fits"))
    assert "--set 'student.gradient_checkpointing=true'" in line or "--set 'train.tokens_per_micro_batch" in line
    changes = [part for part in line.replace("'", "").split() if "=" in part]
    again = CliRunner().invoke(app, [*command, *(word for change in changes for word in ("--set", change))])
    assert again.exit_code == 0, again.output


def test_the_tables_of_the_document_are_what_the_command_makes() -> None:
    assert plan_tables.filled(plan_tables.DOCUMENT.read_text()) == plan_tables.DOCUMENT.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sampled, checkpointing", "full vocabulary"])
def test_predicted_memory_is_within_a_tenth_of_a_run(name: str, tmp_path: Path) -> None:
    (case,) = (case for case in plan_check.CASES if case.name == name)
    assert abs(plan_check.check(case, tmp_path).error) < 0.1

"""Adapters: what is trained, sampled from, saved and resumed."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from conftest import CHAT_END, END, RECIPE, make_model, make_rollouts
from poweropd.adapters import plain_weights
from poweropd.config import load_recipe
from poweropd.console import ConsoleObserver
from poweropd.errors import ConfigError
from poweropd.models import hidden_states, load_model
from poweropd.policy import Student
from poweropd.rollout.engine import Sampling
from poweropd.rollout.hf import HFEngine
from poweropd.rollout.replica import Replica
from poweropd.sections import LoRAConfig, OptimizerConfig
from poweropd.train import train
from recording import lasting_metrics

LORA = LoRAConfig(rank=4, alpha=8)
SETTINGS = ["train.steps=4", "train.prompts_per_step=8", "sampling.max_new_tokens=16", "data.limit=40", "checkpoint.every=2",
            "student.lora={rank: 4}", "optimizer.lr=0.01", "optimizer.schedule=constant", "evaluation.data=null"]  # fmt: skip


def make_student(model: PreTrainedModel, lora: LoRAConfig | None = LORA, **settings: object) -> Student:
    return Student(model, None, OptimizerConfig(), vocab_size=512, end_ids=(), steps=1, lora=lora, **settings)


def disturb(student: Student) -> None:
    """As training would: adapters begin as zero."""
    with torch.no_grad():
        for parameter in student.model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("modules", [[], ["q_proj", "down_proj"]])
def test_merged_weights_compute_what_the_adapted_model_does(modules: list[str], *, tied: bool) -> None:
    plain, adapted = (make_model(tie_word_embeddings=tied) for _ in range(2))
    student = make_student(adapted, LoRAConfig(rank=4, modules=modules))
    before = dict(plain_weights(plain))
    assert all(torch.equal(before[name], weight) for name, weight in student.weights())
    disturb(student)
    merged = dict(student.weights())
    assert merged.keys() == before.keys()
    changed = {name.split(".")[-2] for name in merged if not torch.equal(merged[name], before[name])}
    assert changed == set(modules or ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
    plain.load_state_dict(merged, strict=False)
    ids = torch.randint(0, 512, (30,))
    torch.testing.assert_close(hidden_states(plain, ids, [12, 18]), hidden_states(adapted, ids, [12, 18]))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_replica_samples_as_the_student_itself(precision: torch.dtype, *, tied: bool) -> None:
    model = make_model(tie_word_embeddings=tied)
    student, twin = make_student(model, lora=None), Replica(model, precision)
    disturb(student)
    engines = [HFEngine(each, vocab_size=512, pad_id=END, precision=precision) for each in (model, twin.model)]
    prompts = [rollout.prompt for rollout in make_rollouts([(3, 1), (9, 1), (5, 1)])]
    sampling = Sampling(stop_ids=(END, CHAT_END), max_new_tokens=20, samples_per_prompt=2)
    expected, stale = (engine.generate(prompts, sampling, seed=1) for engine in engines)
    assert stale != expected
    twin.update(student.weights, 1)
    assert engines[1].generate(prompts, sampling, seed=1) == expected
    disturb(student)
    twin.update(student.weights, 1)  # it has that version
    assert engines[1].generate(prompts, sampling, seed=1) == expected


@pytest.mark.parametrize(
    ("modules", "named"), [(["q_proj", "lm_head"], "lm_head cannot"), (["nonsense"], "layers are down_proj")]
)
def test_a_layer_that_cannot_have_an_adapter_is_refused(modules: list[str], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        make_student(make_model(), LoRAConfig(modules=modules))


def run(out: Path, *settings: str, resume: bool = False) -> None:
    recipe = load_recipe(out / "recipe.yaml" if resume else RECIPE, [*([] if resume else SETTINGS), *settings])
    with ConsoleObserver(Console(quiet=True)) as observer:
        train(recipe, out, observer, resume=resume)


def test_a_run_trains_adapters_alone_samples_what_it_trains_resumes_and_saves_both(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(whole)
    assert all(line["rollout/mismatch"] < 1e-4 for line in lasting_metrics(whole))

    run(parts, "train.steps=2")
    state = torch.load(parts / "checkpoints/step-000002/state.pt", weights_only=True)
    assert all(".lora_" in name for name in state["student"]["model"])
    run(parts, "train.steps=4", resume=True)
    assert lasting_metrics(parts) == lasting_metrics(whole)

    student, again = (load_file(out / "student" / "model.safetensors") for out in (whole, parts))
    assert student.keys() == again.keys()
    assert all(torch.equal(student[name], again[name]) for name in student)
    base = load_model("quickstart:student", dtype=torch.float32, device=torch.device("cpu"))
    before = dict(plain_weights(base))
    assert torch.equal(before["model.embed_tokens.weight"], student["model.embed_tokens.weight"])
    assert not torch.equal(before["model.layers.0.mlp.up_proj.weight"], student["model.layers.0.mlp.up_proj.weight"])
    ids = torch.arange(3, 20)[None]
    merged = AutoModelForCausalLM.from_pretrained(whole / "student")
    with_adapter = PeftModel.from_pretrained(base, whole / "student" / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(with_adapter(ids).logits, merged(ids).logits, rtol=1e-4, atol=1e-4)

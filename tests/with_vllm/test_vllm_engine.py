"""The real vLLM in this process. `make test-vllm` runs this in the environment of vLLM; elsewhere it is skipped."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

pytest.importorskip("vllm", reason="vLLM is not here: `make test-vllm` runs these in an environment of its own")

from conftest import END, RECIPE
from poweropd.adapters import plain_weights
from poweropd.config import load_recipe
from poweropd.errors import RolloutError
from poweropd.guards import MISMATCH_ALARM
from poweropd.models import load_model
from poweropd.rollout.engine import Sampling
from poweropd.rollout.hf import HFEngine
from poweropd.rollout.vllm import VLLMEngine
from poweropd.rollout.vllm_requests import Requests
from poweropd.rollout.vllm_weights import tied_names, under_every_name
from poweropd.sections import VLLMConfig
from poweropd.train import train
from poweropd.types import Rollout
from recording import Recorder
from test_engines import SAMPLING, chosen, full_logprobs, make_prompts, test_contract  # noqa: F401  runs here too

ENDS = tuple(range(200, 260))  # likely enough together


def engine_of(model: PreTrainedModel, name: str, requests: Requests, dtype: torch.dtype = torch.float32) -> VLLMEngine:
    return VLLMEngine(
        name,
        lambda: under_every_name(lambda: plain_weights(model), tied_names(model)),
        requests=requests,
        config=VLLMConfig(kv_cache_gib=0.1, enforce_eager=True),
        precision=dtype,
        longest=128,
        sequences_per_batch=64,
    )


@pytest.fixture(scope="module")
def student() -> PreTrainedModel:
    return load_model("quickstart:student", dtype=torch.float32, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def engine(student: PreTrainedModel) -> VLLMEngine:
    return engine_of(student, "quickstart:student", Requests(512, 512))


@pytest.fixture(scope="module")
def padded() -> PreTrainedModel:
    """Its eight rows of padding would win every draw if they were looked at; its LM head is its own."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=520, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=128, initializer_range=0.3, eos_token_id=END,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight[512:] *= 100
    return model


@pytest.fixture(scope="module")
def merging_engine(padded: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> VLLMEngine:
    folder = tmp_path_factory.mktemp("padded")
    padded.save_pretrained(folder)
    return engine_of(padded, str(folder), Requests(512, 520, ENDS))


@pytest.fixture
def _restored(student: PreTrainedModel, engine: VLLMEngine) -> Iterator[None]:
    """For tests that train: afterwards student and engine are as they were."""
    before = {name: weight.clone() for name, weight in student.state_dict().items()}
    yield
    student.load_state_dict(before)
    engine.update_weights(version=-1)
    engine.update_weights(version=0)


@torch.no_grad()
def perturb(model: PreTrainedModel) -> None:
    """Every weight moves, as in an update."""
    for parameter in model.parameters():
        parameter += 0.03 * torch.randn_like(parameter)


def gap(model: PreTrainedModel, rollouts: list[Rollout]) -> Tensor:
    """|log q| of every token by sampler less that by a forward of transformers."""
    told = torch.tensor([value for rollout in rollouts for value in rollout.rollout_logprobs])
    return (told - torch.cat([chosen(full_logprobs(model, rollout), rollout) for rollout in rollouts])).abs()


@pytest.mark.usefixtures("_restored")
def test_logprobs_are_the_trainers_after_every_update(student: PreTrainedModel, engine: VLLMEngine) -> None:
    prompts = make_prompts()
    assert gap(student, engine.generate(prompts, SAMPLING, seed=0)).max() <= 1e-4
    for version in (1, 2, 3):
        perturb(student)
        assert gap(student, engine.generate(prompts, SAMPLING, seed=version)).mean() > MISMATCH_ALARM
        engine.update_weights(version=version)
        rollouts = engine.generate(prompts, SAMPLING, seed=version)
        assert gap(student, rollouts).max() <= 1e-4
        assert {rollout.policy_version for rollout in rollouts} == {version}


@pytest.mark.usefixtures("_restored")
@pytest.mark.parametrize("left_out", ["lm_head.weight", "model.layers.2."])
def test_a_partial_update_is_noticed(
    student: PreTrainedModel, engine: VLLMEngine, left_out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM says nothing of weights that it does not get; the mismatch, over which a run is warned, does."""
    perturb(student)
    whole = engine._weights
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_weights", lambda: (each for each in whole() if not each[0].startswith(left_out)))
        engine.update_weights(version=1)
    assert gap(student, engine.generate(make_prompts(), SAMPLING, seed=0)).mean() > MISMATCH_ALARM
    engine.update_weights(version=2)
    assert gap(student, engine.generate(make_prompts(), SAMPLING, seed=0)).max() <= 1e-4


def test_greedy_decoding_equals_ours(student: PreTrainedModel, engine: VLLMEngine) -> None:
    greedy = replace(SAMPLING, temperature=0, samples_per_prompt=1)
    prompts = make_prompts()
    ours = HFEngine(student, vocab_size=512, pad_id=END).generate(prompts, greedy, seed=0)
    assert engine.generate(prompts, greedy, seed=0) == ours


def truncated(logprobs: Tensor, sampling: Sampling) -> Tensor:
    """[T, V] log-probabilities after temperature, top_k, top_p and min_p in this order, row by row as the words say."""
    rows = []
    for row in (logprobs / sampling.temperature).softmax(-1).double():
        order = row.argsort(descending=True)[: sampling.top_k or None].tolist()
        total, kept, before = sum(row[id].item() for id in order), [], 0.0
        for id in order:
            probability = row[id].item() / total
            if before < sampling.top_p and row[id] >= sampling.min_p * row[order[0]]:
                kept.append(id)
            before += probability
        mass = sum(row[id].item() for id in kept)
        out = torch.full_like(row, -math.inf)
        out[kept] = (row[kept] / mass).log()
        rows.append(out)
    return torch.stack(rows)


@pytest.mark.parametrize(
    "how",
    [
        {"temperature": 0.6},
        {"top_k": 5},
        {"top_p": 0.7},
        {"min_p": 0.1},
        {"temperature": 1.4, "top_k": 20, "top_p": 0.8},
        {"temperature": 1.4, "top_k": 6, "min_p": 0.05},
    ],
)
def test_truncations_are_ours(student: PreTrainedModel, engine: VLLMEngine, how: dict[str, float]) -> None:
    sampling = replace(SAMPLING, **how)
    for rollout in engine.generate(make_prompts(), sampling, seed=1):
        expected = chosen(truncated(full_logprobs(student, rollout), sampling), rollout)
        torch.testing.assert_close(torch.tensor(rollout.rollout_logprobs).double(), expected, atol=1e-4, rtol=0)


def test_padding_is_never_drawn_and_ends_are_one_outcome(padded: PreTrainedModel, merging_engine: VLLMEngine) -> None:
    sampling = replace(SAMPLING, stop_ids=ENDS, samples_per_prompt=40)
    rollouts = merging_engine.generate(make_prompts(), sampling, seed=0)
    assert max(max(rollout.response_ids) for rollout in rollouts) < 512
    ended = [rollout for rollout in rollouts if rollout.finish_reason == "stop"]
    assert len(ended) > 40
    assert {rollout.response_ids[-1] for rollout in ended} == {ENDS[0]}
    for rollout in rollouts:
        merged = full_logprobs(padded, rollout).exp()
        merged[:, ENDS[0]] = merged[:, list(ENDS)].sum(1)
        expected = chosen(merged.log(), rollout)
        torch.testing.assert_close(torch.tensor(rollout.rollout_logprobs), expected, atol=1e-4, rtol=0)


def test_half_precision_is_close(student: PreTrainedModel) -> None:
    engine = engine_of(student, "quickstart:student", Requests(512, 512), torch.bfloat16)
    engine.update_weights(version=1)
    assert 1e-4 < gap(student, engine.generate(make_prompts(), SAMPLING, seed=0)).mean() < MISMATCH_ALARM


def test_a_folder_without_a_model(student: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(RolloutError, match=f"vLLM cannot run '{tmp_path}'") as refused:
        engine_of(student, str(tmp_path), Requests(512, 512))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("setting", "staleness"), [
    ("rollout.max_staleness=0", 0), ("rollout.max_staleness=1", 1), ("student.lora={rank: 4}", 0),
])  # fmt: skip
def test_a_whole_run(setting: str, staleness: int, tmp_path: Path) -> None:
    recipe = load_recipe(RECIPE, [
        "rollout.engine=vllm", "rollout.vllm.kv_cache_gib=0.1", "rollout.vllm.enforce_eager=true", "train.steps=3",
        "train.prompts_per_step=6", "data.limit=18", "sampling.max_new_tokens=24", "evaluation.data.limit=4",
        "evaluation.samples=2", "evaluation.teacher=false", "optimizer.warmup_steps=0",
        "optimizer.lr=0.003", setting,
    ])  # fmt: skip
    observer = Recorder()
    train(recipe, tmp_path / "run", observer)
    assert [metrics["staleness/mean"] for metrics in observer.metrics] == [0, staleness, staleness]
    told = [metrics["rollout/mismatch"] for metrics in observer.metrics if "rollout/mismatch" in metrics]
    assert len(told) == (1 if staleness else 3)
    assert max(told) <= 1e-4
    assert observer.warnings == []
    assert (tmp_path / "run" / "student" / "model.safetensors").is_file()

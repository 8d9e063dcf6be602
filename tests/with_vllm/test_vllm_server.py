"""Real vLLM servers as processes on this machine: one that samples, one that teaches."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

pytest.importorskip("vllm", reason="vLLM is not here: `make test-vllm` runs these in an environment of its own")

from test_vllm_engine import ENDS, gap, padded, perturb  # noqa: F401  a fixture
from vllm_process import VLLMProcess, vllm_process

from conftest import CHAT_END, END, RECIPE, make_rollouts
from poweropd.adapters import plain_weights
from poweropd.checkpoint import newest_step
from poweropd.config import load_recipe
from poweropd.errors import RolloutError, TeacherError
from poweropd.guards import MISMATCH_ALARM
from poweropd.models import load_model, resolve
from poweropd.rollout.vllm_requests import Requests
from poweropd.rollout.vllm_server import VLLMServerEngine
from poweropd.rollout.vllm_weights import tied_names, under_every_name
from poweropd.sections import VLLMConfig
from poweropd.teacher.hf import HFTeacher
from poweropd.teacher.vllm import VLLMTeacher
from poweropd.train import train
from poweropd.types import Rollout
from recording import Recorder, lasting_metrics
from test_distributed import together
from test_engines import SAMPLING, make_prompts, test_contract  # noqa: F401  runs here too
from test_scorers import LENGTHS, keeps_its_promises

KEY = "sesame"
SAMPLER = ("--enable-scale-out", "--logprobs-mode", "processed_logprobs", "--max-model-len", "256", "--api-key", KEY)


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_KEY", KEY)


def load(name: str) -> PreTrainedModel:
    return load_model(name, dtype=torch.float32, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def sampler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLMProcess]:
    """Serves the untrained student."""
    log = tmp_path_factory.mktemp("sampler") / "log"
    with vllm_process(resolve("quickstart:student"), log, *SAMPLER) as process:
        yield process


def engine_at(process: VLLMProcess, model: PreTrainedModel, longest: int = 128, **settings: object) -> VLLMServerEngine:
    return VLLMServerEngine(
        process.url,
        settings.pop("student", "quickstart:student"),
        lambda: under_every_name(lambda: plain_weights(model), tied_names(model)),
        requests=Requests(512, 512, settings.pop("ends", ())),
        config=VLLMConfig(url=process.url, **{"token_env": "VLLM_KEY", "timeout_s": 60, "deadline_s": 120, **settings}),
        precision=torch.float32,
        longest=longest,
        concurrency=16,
    )


@pytest.fixture
def engine(sampler: VLLMProcess) -> VLLMServerEngine:
    return engine_at(sampler, load("quickstart:student"))


def test_logprobs_are_the_trainers_after_every_update(sampler: VLLMProcess) -> None:
    student = load("quickstart:student")
    perturb(student)  # no longer what the server was started with
    engine = engine_at(sampler, student)
    assert gap(student, engine.generate(make_prompts(), SAMPLING, seed=0)).max() <= 1e-4
    for version in (1, 2, 3):
        perturb(student)
        assert gap(student, engine.generate(make_prompts(), SAMPLING, seed=version)).mean() > MISMATCH_ALARM
        engine.update_weights(version=version)
        rollouts = engine.generate(make_prompts(), SAMPLING, seed=version)
        assert gap(student, rollouts).max() <= 1e-4
        assert {rollout.policy_version for rollout in rollouts} == {version}


def test_ends_are_one_outcome(sampler: VLLMProcess) -> None:
    student = load("quickstart:student")
    engine = engine_at(sampler, student, ends=ENDS[:19])
    rollouts = engine.generate(make_prompts(), replace(SAMPLING, stop_ids=ENDS[:19], samples_per_prompt=40), seed=0)
    ended = [rollout for rollout in rollouts if rollout.finish_reason == "stop"]
    assert len(ended) > 3
    for rollout in ended:
        assert rollout.response_ids[-1] == ENDS[0]
        # the probability of each end token at this place, by rollouts that would have ended so
        each = [replace(rollout, response_ids=(*rollout.response_ids[:-1], end)) for end in ENDS[:19]]
        alone = [replace(one, rollout_logprobs=(0.0,) * len(one)) for one in each]
        logprobs = torch.stack([-gap(student, [one])[-1] for one in alone])
        assert logprobs.logsumexp(0).item() == pytest.approx(rollout.rollout_logprobs[-1], abs=1e-4)


def run_settings(sampler: VLLMProcess) -> list[str]:
    return [
        "rollout.engine=vllm", f"rollout.vllm.url={sampler.url}", "rollout.vllm.token_env=VLLM_KEY", "train.steps=3",
        "train.prompts_per_step=6", "data.limit=18", "sampling.max_new_tokens=24", "evaluation.data=null",
        "optimizer.warmup_steps=0", "optimizer.lr=0.003",
    ]  # fmt: skip


def test_a_run_goes_on_when_its_server_is_started_anew(sampler: VLLMProcess, tmp_path: Path) -> None:
    """It is killed after the first step. The new one has the untrained weights, is noticed, and given the student's."""
    recipe = load_recipe(RECIPE, run_settings(sampler))

    class Killer(Recorder):
        def on_step(self, step: int, steps: int, metrics: dict[str, float]) -> None:
            super().on_step(step, steps, metrics)
            if step == 1:
                sampler.kill()
                sampler.start()

    observer = Killer()
    train(recipe, tmp_path / "run", observer)
    assert len(observer.metrics) == 3
    assert max(metrics["rollout/mismatch"] for metrics in observer.metrics) <= 1e-4
    assert observer.warnings == []


@pytest.mark.parametrize("sharding", ["none", "fsdp"])
def test_one_server_samples_for_several_processes(sampler: VLLMProcess, sharding: str, tmp_path: Path) -> None:
    evaluation = "{data: {source: reasoning_gym, families: {gcd: {}}, prompt: question, split: held_out, limit: 5}, samples: 2, teacher: false}"
    settings = [*run_settings(sampler), f"train.sharding={sharding}", f"evaluation={evaluation}"]
    together(tmp_path, [(str(RECIPE), settings, str(tmp_path / "run"))])
    steps = lasting_metrics(tmp_path / "run")
    assert [step["staleness/max"] for step in steps] == [0, 0, 0]
    assert max(step["rollout/mismatch"] for step in steps) <= 1e-4
    assert (tmp_path / "run" / "student" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"token_env": None}, "the vLLM server at .* refuses: 401 .* Set rollout.vllm.token_env"),
        ({"longest": 300}, "its --max-model-len is 256, and prompts with their answers have up to 300 tokens"),
    ],
)
def test_a_server_that_cannot_be_used(sampler: VLLMProcess, settings: dict[str, object], message: str) -> None:
    with pytest.raises(RolloutError, match=message) as refused:
        engine_at(sampler, load("quickstart:student"), **settings)
    assert "\n" not in str(refused.value)


def test_a_server_of_another_model(sampler: VLLMProcess) -> None:
    with pytest.raises(RolloutError, match=r"it serves .*student, and student.model is quickstart:teacher; serve that"):
        engine_at(sampler, load("quickstart:teacher"), student="quickstart:teacher")


def test_a_run_without_its_server_saves_and_stops(sampler: VLLMProcess, tmp_path: Path) -> None:
    """The last of the tests of this server, which stays dead."""
    recipe = load_recipe(RECIPE, [*run_settings(sampler), "rollout.vllm.deadline_s=3"])

    class Killer(Recorder):
        def on_step(self, step: int, steps: int, metrics: dict[str, float]) -> None:
            super().on_step(step, steps, metrics)
            if step == 2:
                sampler.kill()

    with pytest.raises(RolloutError, match=r"gave no usable answer .* the checkpoint of step 2 is kept") as stopped:
        train(recipe, tmp_path / "run", Killer())
    assert "\n" not in str(stopped.value)
    assert newest_step(tmp_path / "run" / "checkpoints") == 2


@pytest.fixture(scope="module")
def teaching(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLMProcess]:
    """A vLLM server as it comes, of the embedded teacher."""
    log = tmp_path_factory.mktemp("teacher") / "log"
    with vllm_process(resolve("quickstart:teacher"), log, "--api-key", KEY) as process:
        yield process


@pytest.fixture
def make_teacher(teaching: VLLMProcess, tokenizer: PreTrainedTokenizerBase) -> Callable[..., VLLMTeacher]:
    def make(**settings: object) -> VLLMTeacher:
        usual = {
            "model": "quickstart:teacher",
            "vocab_size": 512,
            "tokenizer": tokenizer,
            "head_rows": 512,
            "token": KEY,
        }
        return VLLMTeacher(teaching.url, **{**usual, **settings})

    return make


def rollouts_and_truth(ends: tuple[int, ...] = ()) -> tuple[list[Rollout], HFTeacher]:
    return make_rollouts([*LENGTHS, (4, 30)]), HFTeacher(load("quickstart:teacher"), vocab_size=512, end_ids=ends)


def test_contract_of_teachers(make_teacher: Callable[..., VLLMTeacher]) -> None:
    keeps_its_promises(make_teacher(), make_rollouts(LENGTHS))


@pytest.mark.parametrize("ends", [(), (END, CHAT_END)])
@pytest.mark.parametrize("tokens_per_batch", [20, 16384])
def test_scores_are_those_of_a_forward_here(
    make_teacher: Callable[..., VLLMTeacher], ends: tuple[int, ...], tokens_per_batch: int
) -> None:
    rollouts, truth = rollouts_and_truth(ends)
    teacher = make_teacher(end_ids=ends, tokens_per_batch=tokens_per_batch)
    for found, expected in zip(
        teacher.score(rollouts, needs="sampled"), truth.score(rollouts, needs="sampled"), strict=True
    ):
        torch.testing.assert_close(found.logprobs, expected.logprobs, atol=1e-4, rtol=0)
        assert ends or torch.equal(found.top1_ids, expected.top1_ids)


def test_likeliest_tokens_are_those_of_a_forward_here(make_teacher: Callable[..., VLLMTeacher]) -> None:
    rollouts, truth = rollouts_and_truth()
    teacher = make_teacher()
    for found, expected in zip(
        teacher.score(rollouts, needs="top_k", k=20), truth.score(rollouts, needs="top_k", k=20), strict=True
    ):
        torch.testing.assert_close(found.logprobs, expected.logprobs, atol=1e-4, rtol=0)
        torch.testing.assert_close(found.top_logprobs, expected.top_logprobs, atol=1e-4, rtol=0)
        assert (found.top_ids == expected.top_ids).float().mean() > 0.99  # but for ties within rounding
    assert make_teacher(end_ids=(END, CHAT_END)).provides == {"nothing", "sampled"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"token": "wrong"}, "refuses: 401 .* teacher.token_env"),
        ({"model": "Qwen/Qwen3-8B"}, "it serves .*teacher, and teacher.model is Qwen/Qwen3-8B; serve that one"),
        ({"vocab_size": 300}, "the padding rows of its LM head have probability"),
    ],
)
def test_a_teacher_that_cannot_be_used(
    make_teacher: Callable[..., VLLMTeacher], settings: dict[str, object], message: str
) -> None:
    with pytest.raises(TeacherError, match=message) as refused:
        make_teacher(**settings)
    assert "\n" not in str(refused.value)


def test_more_likely_tokens_than_the_server_gives(make_teacher: Callable[..., VLLMTeacher]) -> None:
    with pytest.raises(TeacherError, match="--max-logprobs"):
        make_teacher().score(make_rollouts(LENGTHS), needs="top_k", k=21)
    with pytest.raises(TeacherError, match="--max-model-len 1024, and a prompt with its answer needs 1025"):
        make_teacher().score(make_rollouts([(4, 1020)]), needs="sampled")


def test_a_whole_run_with_a_vllm_teacher(teaching: VLLMProcess, tmp_path: Path) -> None:
    recipe = load_recipe(RECIPE, [
        "teacher.engine=vllm", f"teacher.url={teaching.url}", "teacher.token_env=VLLM_KEY", "teacher.verify=true",
        "teacher.precision=float32", "train.steps=2", "train.prompts_per_step=6", "data.limit=12",
        "sampling.max_new_tokens=24", "evaluation.data=null",
    ])  # fmt: skip
    observer = Recorder()
    train(recipe, tmp_path / "run", observer)
    assert len(observer.metrics) == 2

"""What is asked of vLLM and what its answers mean, without vLLM; `tests/with_vllm` runs the real one."""

import math
import re
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from conftest import RECIPE, make_model
from poweropd.adapters import plain_weights
from poweropd.assembly import assemble
from poweropd.config import load_recipe, parse_recipe
from poweropd.errors import ConfigError, RolloutError
from poweropd.rollout.engine import Sampling
from poweropd.rollout.vllm import VLLMEngine
from poweropd.rollout.vllm_requests import NEVER, Requests, check_sampling
from poweropd.rollout.vllm_server import VLLMServerEngine, answered
from poweropd.rollout.vllm_weights import FILE, copies, tied_names, under_every_name, write_weights
from poweropd.sections import VLLMConfig
from poweropd.teacher.vllm_http import version_problem
from poweropd.types import Prompt, Rollout
from test_http import Fault, answer, server

PROMPT = Prompt("p7", (5, 6, 7))
SAMPLING = Sampling(stop_ids=(0, 2), max_new_tokens=3, temperature=0.7, top_k=5)


def test_what_is_asked() -> None:
    asked = Requests(510, 512).parameters(PROMPT, 1, SAMPLING, seed=3)
    assert asked["logit_bias"] == {510: NEVER, 511: NEVER}
    assert (asked["temperature"], asked["top_k"], asked["stop_token_ids"]) == (0.7, 5, [0, 2])
    assert asked["logprobs"] == 0
    assert "logprob_token_ids" not in asked
    merging = Requests(512, 512, (0, 2)).parameters(PROMPT, 1, SAMPLING, seed=3)
    assert (merging["logprobs"], merging["logprob_token_ids"]) == (2, [0, 2])
    assert "logit_bias" not in merging


def test_a_seed_is_a_function_of_call_prompt_and_sample() -> None:
    def seed(prompt: Prompt = PROMPT, sample: int = 1, seed: int = 3) -> int:
        return Requests(512, 512).parameters(prompt, sample, SAMPLING, seed=seed)["seed"]

    others = {seed(replace(PROMPT, id="p8")), seed(sample=2), seed(seed=4)}
    assert len({*others, seed()}) == 4
    assert seed(replace(PROMPT, text="other words")) == seed()
    assert all(0 <= each < 2**63 for each in others)


def recorded(*tokens: tuple[int, dict[int, float]], version: str = "a-1") -> dict:
    """As vLLM 0.32 wrote it, cut to what is read."""
    content = [
        {
            "token_id": id,
            "logprob": told[id],
            "rank": 1,
            "top_logprobs": [{"token_id": other, "logprob": value, "rank": 1} for other, value in told.items()],
        }
        for id, told in tokens
    ]
    choice = {
        "index": 0,
        "finish_reason": "stop",
        "token_ids": [id for id, _ in tokens],
        "weight_versions": [{"version": version, "start": 0, "end": len(tokens)}],
        "logprobs": {"content": content},
    }
    return {"request_id": "generate-tokens-821c4505f5df449f", "choices": [choice]}


def test_what_an_answer_says() -> None:
    """The last token is any of the end tokens, and told as the first with the probability of all."""
    requests = Requests(512, 512, (0, 2))
    told = recorded((9, {9: -1.0, 0: -3.0, 2: -4.0}), (2, {2: -0.5, 0: -2.0}))
    versions, ids, logprobs = answered(told)
    assert versions == {"a-1"}
    rollout = requests.rollout(PROMPT, 1, SAMPLING, ids, logprobs, version=4)
    both = math.log(math.exp(-0.5) + math.exp(-2.0))
    expected = Rollout(PROMPT, (9, 0), (-1.0, pytest.approx(both)), "stop", sample=1, policy_version=4)
    assert rollout == expected
    greedy = requests.rollout(PROMPT, 1, replace(SAMPLING, temperature=0), ids, logprobs, version=4)
    assert greedy.rollout_logprobs == (0.0, 0.0)
    cut = requests.rollout(PROMPT, 0, SAMPLING, [9, 9, 9], [{9: -1.0}] * 3, version=0)
    assert cut.finish_reason == "length"


@pytest.mark.parametrize(("ids", "told"), [([], 0), ([9, 9], 2), ([9, 511, 2], 3), ([9, 2], 1)])
def test_an_answer_that_is_none_is_refused(ids: list[int], told: int) -> None:
    with pytest.raises(RolloutError, match=f"answered prompt p7 with {len(ids)} tokens and {told} log-probabilities"):
        Requests(510, 512).rollout(PROMPT, 0, SAMPLING, ids, [dict.fromkeys(ids, -1.0)] * told, version=0)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"temperature": 3.0}, "sampling.temperature 3: vLLM samples at 0, or from 0.01 to 2"),
        ({"temperature": 0.001}, "sampling.temperature 0.001"),
        ({"min_p": 0.1, "top_p": 0.9}, r"sampling: vLLM applies min_p (0.1) before top_p (0.9)"),
    ],
)
def test_what_vllm_would_sample_otherwise_is_refused(how: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_sampling(replace(SAMPLING, **how), "sampling")
    check_sampling(replace(SAMPLING, temperature=0), "sampling")
    check_sampling(replace(SAMPLING, min_p=0.1), "sampling")


def test_more_than_vllm_can_leave_out_or_tell() -> None:
    with pytest.raises(ConfigError, match="has 1025 rows beyond the 512 tokens shared"):
        Requests(512, 1537)
    with pytest.raises(ConfigError, match="129 end tokens, and vLLM tells 128"):
        Requests(512, 512, tuple(range(129)))


@pytest.mark.parametrize("version", ["0.31.2", "0.9", "dev", ""])
def test_an_old_vllm_is_refused(version: str) -> None:
    assert f"0.32 or newer is needed, this is {version}" in str(version_problem(version))
    assert version_problem("0.32.0") is None
    assert version_problem("1.0.0rc1") is None


def test_tied_weights_go_by_all_their_names(model: PreTrainedModel, tmp_path: Path) -> None:
    tied = make_model(tie_word_embeddings=True)
    assert tied_names(model) == {}
    assert tied_names(tied) == {"lm_head.weight": "model.embed_tokens.weight"}
    found = dict(under_every_name(lambda: plain_weights(tied), tied_names(tied)))
    assert found.keys() == tied.state_dict().keys()
    assert found["lm_head.weight"] is found["model.embed_tokens.weight"]
    write_weights(copies(found.items, torch.bfloat16), tmp_path / "weights")
    for name, weight in load_file(tmp_path / "weights" / FILE).items():
        assert torch.equal(weight, found[name].bfloat16())


def test_weights_that_cannot_be_written(model: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(RolloutError, match=f"cannot write the student's weights into {tmp_path}/no/where for vLLM"):
        write_weights(copies(lambda: plain_weights(model), torch.float32), tmp_path / "no" / "where")


def settings(**rollout: object) -> dict:
    models = {"student": {"model": "quickstart:student"}, "teacher": {"model": "quickstart:teacher"}}
    return {**models, "data": {"source": "jsonl", "path": "x"}, "rollout": rollout}


@pytest.mark.parametrize(
    ("rollout", "message"),
    [
        ({"vllm": {"sleep": True}}, "rollout.vllm does nothing while rollout.engine is hf"),
        (
            {"engine": "vllm", "vllm": {"token_env": "A"}},
            "rollout.vllm: token_env A is for a server, and there is no url",
        ),
        (
            {"engine": "vllm", "vllm": {"url": "http://a:1", "sleep": True}},
            "rollout.vllm: sleep True is for vLLM in this process, and there is a url",
        ),
        ({"engine": "vllm", "sources": {"golden": 1}}, "rollout.engine vllm samples from the student alone"),
        ({"engine": "vllm", "teacher_mixing": 0.2}, "rollout.engine vllm samples from the student alone"),
    ],
)
def test_settings_that_do_nothing_are_refused(rollout: dict, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_recipe(settings(**rollout))
    assert str(refused.value).startswith(message), str(refused.value)
    assert "\n" not in str(refused.value)


def test_sampling_is_checked_before_anything_is_started() -> None:
    with pytest.raises(ConfigError, match=r"^evaluation\.temperature 2\.5: vLLM samples at 0"):
        assemble(load_recipe(RECIPE, ["rollout.engine=vllm", "evaluation.temperature=2.5"]))


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_there_is_one_line(model: PreTrainedModel) -> None:
    with pytest.raises(ConfigError, match=r"needs vLLM, which is not installed: pip install 'poweropd\[vllm\]'"):
        VLLMEngine(
            "quickstart:student",
            lambda: plain_weights(model),
            requests=Requests(512, 512),
            config=VLLMConfig(),
            precision=torch.float32,
            longest=20,
            sequences_per_batch=2,
        )


def test_a_length_that_is_too_short_is_refused(model: PreTrainedModel) -> None:
    with pytest.raises(ConfigError, match=r"rollout\.vllm\.max_model_len 10: prompts with their answers have up to 20"):
        VLLMEngine(
            "quickstart:student",
            lambda: plain_weights(model),
            requests=Requests(512, 512),
            config=VLLMConfig(max_model_len=10),
            precision=torch.float32,
            longest=20,
            sequences_per_batch=2,
        )


def connect(url: str, model: PreTrainedModel, **more: object) -> VLLMServerEngine:
    return VLLMServerEngine(
        url,
        "some/student",
        lambda: plain_weights(model),
        requests=Requests(512, 512),
        config=VLLMConfig(url=url, **{"timeout_s": 1, "deadline_s": 0.3, **more}),
        precision=torch.float32,
        longest=20,
        concurrency=2,
    )


INFO = b"""{"vllm_config": {"model_config": {"logprobs_mode": "raw_logprobs", "dtype": "torch.bfloat16", "quantization": null,
"max_model_len": 10, "max_logprobs": 20}}}"""


def test_a_server_that_cannot_be_used(model: PreTrainedModel, tmp_path: Path) -> None:
    def refusal(*answers: Fault, **more: object) -> str:
        with server(*answers) as (url, _), pytest.raises((RolloutError, ConfigError)) as refused:
            connect(url, model, **more)
        assert "\n" not in str(refused.value)
        return str(refused.value)

    version, models = answer(b'{"version": "0.32.0"}'), answer(b'{"data": [{"id": "student", "max_model_len": 20}]}')
    assert "0.32 or newer is needed, this is 0.11.0" in refusal(answer(b'{"version": "0.11.0"}'))
    assert "refuses: 401 Unauthorized. Set rollout.vllm.token_env" in refusal(version, answer(b"Unauthorized", 401))
    assert "refuses: 404 Not Found; start it with VLLM_SERVER_DEV_MODE=1" in refusal(
        version, models, answer(b"Not Found", 404)
    )
    told = refusal(version, models, answer(INFO))
    assert "--logprobs-mode raw_logprobs" in told
    assert "its --dtype is torch.bfloat16, the student's precision torch.float32" in told
    assert "its --max-model-len is 10, and prompts with their answers have up to 20 tokens" in told
    assert "not what was asked for" in refusal(answer(b"no JSON"))
    fits = INFO.replace(b"raw_", b"processed_").replace(b"bfloat16", b"float32").replace(b"10,", b"20,")
    assert f"rollout.vllm.weights_folder {tmp_path}/no: No such file or directory" in refusal(
        version, models, answer(fits), weights_folder=f"{tmp_path}/no"
    )
    assert "rollout.vllm.token_env: the environment variable VLLM_KEY is not set" in refusal(
        version, token_env="VLLM_KEY"
    )


def test_no_server(model: PreTrainedModel) -> None:
    with pytest.raises(RolloutError, match=r"the vLLM server at http://127.0.0.1:9 gave no usable answer to /version"):
        connect("http://127.0.0.1:9", model)

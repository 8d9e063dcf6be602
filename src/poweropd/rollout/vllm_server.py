"""Rollouts by a vLLM server, on this machine or another, with weights of its own that follow the student's."""

import hashlib
import shutil
import threading
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from poweropd.distributed import ALONE, World
from poweropd.errors import ConfigError, RolloutError
from poweropd.rollout.engine import Sampling
from poweropd.rollout.replica import Weights
from poweropd.rollout.vllm_requests import Requests
from poweropd.rollout.vllm_weights import FILE, copies, write_weights
from poweropd.sections import VLLMConfig
from poweropd.teacher.http import UnusableAnswerError, token_from
from poweropd.teacher.vllm_http import VLLMConnection, message_of
from poweropd.types import Prompt, Rollout

HOW_TO_START = (
    "start it with VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --enable-scale-out --logprobs-mode processed_logprobs"
)
LOADS = 3  # attempts to give a server its weights, between which it was started anew


class SamplerConnection(VLLMConnection):
    """To the vLLM server that samples."""

    peer = "the vLLM server"
    section = "rollout.vllm"
    error = RolloutError

    def _refusal(self, status: int, told: str) -> str:
        if status == 401:
            return super()._refusal(status, told)
        advice = (
            HOW_TO_START
            if status in (403, 404)
            else "look at its log, and whether it was started with the student and can read rollout.vllm.weights_folder"
        )
        return f"{self.peer} at {self.url} refuses: {status} {message_of(told).rstrip('.')}; {advice}"


class VLLMServerEngine:
    """Samples from a copy of the student that a vLLM server holds.

    The weights go through a folder that both machines see. Each answer says of which weights it is; a server that was
    started anew has others, is given the student's again, and asked again. Answers are the same in another call up to
    rounding: the server batches them as it likes. Merged end tokens: see `VLLMEngine`.

    Args:
        url, config: of the server.
        student: Hub id or folder, which it must have been started with.
        weights, requests, precision, longest: see `VLLMEngine`; the server's dtype must be the precision.
        concurrency: samples asked for at a time.
        world: the ranks that train the student. Each asks for itself; the first gives the server the weights.

    Raises:
        ConfigError: the folder or the token cannot be used.
        RolloutError: there is no such server, or it cannot do what is needed, or later: it no longer answers.
    """

    def __init__(
        self,
        url: str,
        student: str,
        weights: Weights,
        *,
        requests: Requests,
        config: VLLMConfig,
        precision: torch.dtype,
        longest: int,
        concurrency: int,
        world: World = ALONE,
    ) -> None:
        self._world = world
        self._weights = weights
        self._requests = requests
        self._precision = precision
        self._version = 0
        token = token_from(config.token_env, "rollout.vllm.token_env")
        self._connect = partial(
            SamplerConnection, url, token=token, timeout_s=config.timeout_s, deadline_s=config.deadline_s
        )
        self._own = threading.local()  # a connection for each thread
        self._threads = ThreadPoolExecutor(concurrency, thread_name_prefix="vllm")
        self._loading = threading.Lock()
        world.agreed(partial(self._check_server, student, longest))
        self._settings = [str(requests), str(precision), url]
        self._folder = Path(world.on_main(partial(self._make_folder, config.weights_folder)))
        self._tag = ""
        self._hand_over(version=0)

    def _make_folder(self, parent: str | None) -> str:
        try:
            self._kept = TemporaryDirectory(prefix="poweropd-weights-", dir=parent)
            Path(self._kept.name).chmod(0o755)  # the server may be another user's
        except OSError as error:
            raise ConfigError(
                f"rollout.vllm.weights_folder {parent}: {error.strerror or error}; give a folder that can be written to here "
                "and read by the server"
            ) from None
        return self._kept.name

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, *, seed: int) -> list[Rollout]:
        pairs = [(prompt, sample) for prompt in prompts for sample in range(sampling.samples_per_prompt)]
        return list(self._threads.map(partial(self._answer, sampling=sampling, seed=seed), pairs))

    def update_weights(self, *, version: int) -> None:
        if version != self._version:
            self._hand_over(version)

    def fingerprint(self) -> str:
        with (self._folder / self._tag / FILE).open("rb") as file:  # gathering weights is no matter of one rank alone
            weights = hashlib.file_digest(file, "sha256").hexdigest()
        return hashlib.sha256(repr(["vllm server", weights, *self._settings]).encode()).hexdigest()

    def _answer(self, pair: tuple[Prompt, int], *, sampling: Sampling, seed: int) -> Rollout:
        prompt, sample = pair
        question = {
            "token_ids": list(prompt.prompt_ids),
            "sampling_params": self._requests.parameters(prompt, sample, sampling, seed=seed),
        }
        for _ in range(LOADS):
            versions, ids, logprobs = self._connection.ask_json("POST", "/inference/v1/generate", answered, question)
            if versions == {self._tag}:
                return self._requests.rollout(prompt, sample, sampling, ids, logprobs, self._version)
            with self._loading:
                if self._held() != self._tag:
                    self._load()
        raise RolloutError(f"{SamplerConnection.peer} keeps other weights than it was given; is another run using it?")

    def _hand_over(self, version: int) -> None:
        """Write the student's weights, and have the server load them."""
        old, self._tag = self._tag, self._world.broadcast(f"{uuid.uuid4().hex}-{version}")
        if self._world.is_main:
            tensors = copies(self._weights, self._precision)
        else:
            tensors = {}
            for _ in self._weights():  # what is spread over ranks is gathered by all of them
                pass

        def publish() -> None:
            write_weights(tensors, self._folder / self._tag)
            self._load()
            if old:
                shutil.rmtree(self._folder / old)

        self._world.on_main(publish)
        self._version = version

    def _load(self) -> None:
        """Have the server load the weights last written.

        It is told that they are coming first: one that was started anew meanwhile says otherwise afterwards, and what is
        drawn meanwhile does not pass for theirs.
        """
        ask, folder, coming = self._connection.ask_json, str(self._folder / self._tag), f"{self._tag}-coming"
        for _ in range(LOADS):
            ask("POST", "/update_weight_version", _whole, {"new_version": coming})
            ask("POST", "/collective_rpc", _whole, {"method": "reload_weights", "kwargs": {"weights_path": folder}})
            ask("POST", "/reset_prefix_cache", _succeeded)
            if self._held() == coming:
                ask("POST", "/update_weight_version", _whole, {"new_version": self._tag})
                return
        raise RolloutError(
            f"{SamplerConnection.peer} was started anew {LOADS} times while it loaded weights; look at its log"
        )

    def _held(self) -> str:
        """The version of the server's weights."""
        return self._connection.ask_json("GET", "/weight_info", itemgetter("weight_version"))

    @property
    def _connection(self) -> SamplerConnection:
        """This thread's."""
        if not hasattr(self._own, "connection"):
            self._own.connection = self._connect()
        own: SamplerConnection = self._own.connection
        return own

    def _check_server(self, student: str, longest: int) -> None:
        self._connection.check_version()
        self._connection.served(student, "student.model")  # weights that it cannot take would spoil it
        model = self._connection.ask_json(
            "GET", "/server_info?config_format=json", lambda told: told["vllm_config"]["model_config"]
        )
        wanted = str(self._precision)
        problems = {
            f"it has --logprobs-mode {model['logprobs_mode']}": model["logprobs_mode"] != "processed_logprobs",
            f"its --dtype is {model['dtype']}, the student's precision {wanted}": model["dtype"] != wanted,
            f"its weights are quantized ({model['quantization']})": model["quantization"] is not None,
            f"its --max-model-len is {model['max_model_len']}, and prompts with their answers have up to {longest} tokens": (
                model["max_model_len"] < longest
            ),
            f"its --max-logprobs is {model['max_logprobs']}, and there are {len(self._requests.end_ids)} end tokens": (
                0 <= model["max_logprobs"] < len(self._requests.end_ids)
            ),
        }
        if found := [problem for problem, is_one in problems.items() if is_one]:
            raise self._connection.refused(f"{'; '.join(found)}; {HOW_TO_START}")


def _whole(answer: Any) -> Any:
    return answer


def _succeeded(answer: dict[str, Any]) -> None:
    if answer["success"] is not True:
        raise UnusableAnswerError("it is still busy")


def answered(answer: dict[str, Any]) -> tuple[set[str], list[int], list[dict[int, float]]]:
    """Versions of the weights that an answer was drawn with, its tokens, and the log-probabilities told of each."""
    (choice,) = answer["choices"]
    logprobs = [
        {one["token_id"]: one["logprob"] for one in (token, *token["top_logprobs"])}
        for token in choice["logprobs"]["content"]
    ]
    return {span["version"] for span in choice["weight_versions"]}, choice["token_ids"], logprobs

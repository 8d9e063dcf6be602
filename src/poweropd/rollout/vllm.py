"""Rollouts by vLLM in this process, with weights of its own that follow the student's."""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from poweropd.errors import ConfigError, RolloutError
from poweropd.models import resolve
from poweropd.rollout.engine import Sampling
from poweropd.rollout.replica import Weights
from poweropd.rollout.vllm_requests import Requests
from poweropd.rollout.vllm_weights import copies, fingerprint, write_weights
from poweropd.sections import VLLMConfig
from poweropd.teacher.vllm_http import version_problem
from poweropd.types import Prompt, Rollout

GIB = 2**30
OURS = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # on a CPU it would bind the trainer's threads too
}
"""Environment of vLLM, unless the user's says otherwise."""


class VLLMEngine:
    """Samples from a copy of the student that vLLM holds.

    A call's answers do not depend on earlier calls: vLLM's cache of prefixes is emptied before each. Where end tokens are
    merged, they are merged after temperature and truncations, which see each by itself.

    Args:
        model: the student's folder or Hub id, in which its weights are those of the start.
        weights: the student's, tied ones under all their names; read at every update.
        requests: how it is sampled from.
        precision: dtype of weights and matmuls.
        longest: tokens of the longest prompt with its longest answer.
        sequences_per_batch: sequences decoded together.

    Raises:
        ConfigError: vLLM is not installed, or `max_model_len` is too short.
        RolloutError: it is too old, or cannot run the model.
    """

    def __init__(
        self,
        model: str,
        weights: Weights,
        *,
        requests: Requests,
        config: VLLMConfig,
        precision: torch.dtype,
        longest: int,
        sequences_per_batch: int,
        revision: str | None = None,
    ) -> None:
        if config.max_model_len is not None and config.max_model_len < longest:
            raise ConfigError(
                f"rollout.vllm.max_model_len {config.max_model_len}: prompts with their answers have up to {longest} tokens; "
                "leave it out, or set it higher"
            )
        self._weights = weights
        self._requests = requests
        self._sleeps, self._asleep = config.sleep, False
        self._in_this_process = config.tensor_parallel_size == 1
        self._precision = precision
        self._settings = [str(requests), str(precision)]
        self._version = 0
        self._llm = _load(
            model=resolve(model),
            revision=revision,
            skip_tokenizer_init=True,
            dtype=str(precision).removeprefix("torch."),
            max_model_len=config.max_model_len or longest,
            max_num_seqs=sequences_per_batch,
            max_logprobs=max(len(requests.end_ids), 1),
            logprobs_mode="processed_logprobs",
            tensor_parallel_size=config.tensor_parallel_size,
            gpu_memory_utilization=config.gpu_memory_utilization,
            kv_cache_memory_bytes=config.kv_cache_gib and int(config.kv_cache_gib * GIB),
            enforce_eager=config.enforce_eager,
            enable_sleep_mode=config.sleep,
            use_tqdm_on_load=False,
        )
        self._fall_asleep()

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, *, seed: int) -> list[Rollout]:
        from vllm import SamplingParams

        pairs = [(prompt, sample) for prompt in prompts for sample in range(sampling.samples_per_prompt)]
        if not pairs:
            return []
        asked = [SamplingParams(**self._requests.parameters(*pair, sampling, seed=seed)) for pair in pairs]
        self._wake_up()
        self._llm.reset_prefix_cache()
        torch.get_num_threads()  # a new thread takes up torch's count when it is asked for; vLLM's CPU kernels do not ask
        texts = [{"prompt_token_ids": list(prompt.prompt_ids)} for prompt, _ in pairs]
        outputs = [answer.outputs[0] for answer in self._llm.generate(texts, asked, use_tqdm=False)]
        self._fall_asleep()
        told = ([{id: one.logprob for id, one in found.items()} for found in output.logprobs] for output in outputs)
        return [
            self._requests.rollout(*pair, sampling, output.token_ids, logprobs, self._version)
            for pair, output, logprobs in zip(pairs, outputs, told, strict=True)
        ]

    def update_weights(self, *, version: int) -> None:
        if version == self._version:
            return
        self._wake_up()  # to stay so: it is updated in order to sample
        if self._in_this_process:
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(self._weights())})
        else:
            with TemporaryDirectory(prefix="poweropd-weights-") as folder:
                write_weights(copies(self._weights, self._precision), Path(folder))
                self._llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})
        self._version = version

    def fingerprint(self) -> str:
        return fingerprint(self._weights, self._settings)

    def _fall_asleep(self) -> None:
        """Give its memory back until it is needed again."""
        if self._sleeps:
            self._llm.sleep(level=1)
            self._asleep = True

    def _wake_up(self) -> None:
        if self._asleep:
            self._llm.wake_up()
            self._asleep = False


def _load(**settings: Any) -> Any:
    """A `vllm.LLM`."""
    for name, value in OURS.items():
        os.environ.setdefault(name, value)
    if settings["tensor_parallel_size"] == 1:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # weights are handed over as they are, not as files
    try:
        with warnings.catch_warnings(action="ignore"):  # of what its packages do to each other
            import vllm
    except ImportError:
        raise ConfigError(
            "rollout.engine vllm needs vLLM, which is not installed: pip install 'poweropd[vllm]', or set rollout.vllm.url "
            "to a server that has it"
        ) from None
    if problem := version_problem(vllm.__version__):
        raise RolloutError(f"rollout.engine vllm: {problem}")
    try:
        with warnings.catch_warnings(action="ignore"):
            return vllm.LLM(**settings)
    except (ValueError, RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()
        raise RolloutError(
            f"vLLM cannot run {settings['model']!r}: {reason[-1] if reason else type(error).__name__}. Look at rollout.vllm in "
            "the recipe; VLLM_LOGGING_LEVEL=INFO shows what vLLM says"
        ) from error

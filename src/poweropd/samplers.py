"""The engine that samples from the student, from its recipe."""

from collections.abc import Mapping
from functools import partial

from poweropd.config import Recipe
from poweropd.distributed import World
from poweropd.pair import ModelPair, head_rows
from poweropd.rollout.engine import Sampler
from poweropd.rollout.replica import Weights
from poweropd.rollout.vllm import VLLMEngine
from poweropd.rollout.vllm_requests import Requests
from poweropd.rollout.vllm_server import VLLMServerEngine
from poweropd.rollout.vllm_weights import under_every_name


def vllm_sampler(
    recipe: Recipe, pair: ModelPair, weights: Weights, tied: Mapping[str, str], *, longest: int, world: World
) -> Sampler:
    """vLLM, in this process or as a server.

    Args:
        weights: the student's, tied ones once.
        tied: their further names.
        longest: tokens of the longest prompt with its longest answer.
        world: the ranks that train the student.

    Raises:
        ConfigError, RolloutError: it cannot be used.
    """
    config, student, merged = recipe.rollout.vllm, recipe.student, pair.end_tokens.merged_ids
    requests = Requests(pair.vocab_size, head_rows(pair.student), merged)
    every_weight = partial(under_every_name, weights, tied)
    if config.url is not None:
        return VLLMServerEngine(
            config.url,
            student.model,
            every_weight,
            requests=requests,
            config=config,
            precision=pair.precision,
            longest=longest,
            concurrency=recipe.rollout.sequences_per_batch,
            world=world,
        )
    return VLLMEngine(
        student.model,
        every_weight,
        requests=requests,
        config=config,
        precision=pair.precision,
        longest=longest,
        sequences_per_batch=recipe.rollout.sequences_per_batch,
        revision=student.revision,
    )

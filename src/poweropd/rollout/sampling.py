"""One token from each row of logits, by inverse transform: a row's draw depends on its own uniform number alone."""

import hashlib

import numpy as np
import torch
from torch import Tensor

from poweropd.rollout.engine import Sampling
from poweropd.types import Prompt


def uniforms(prompt: Prompt, sample: int, *, seed: int, count: int) -> Tensor:
    """`[count]` uniform numbers in [0, 1), float64, of one sample of one prompt: a pure function of its arguments."""
    digest = hashlib.blake2b(f"{seed}/{prompt.id}/{sample}".encode(), digest_size=16).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
    return torch.from_numpy(generator.random(count))


def draw(logits: Tensor, uniform: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Draw a token from each row.

    Args:
        logits: [B, V], fp32.
        uniform: [B] in [0, 1), float64.

    Returns:
        Token ids [B], and their log-probabilities [B] under the distribution drawn from, fp32 (0 when greedy).
    """
    if sampling.temperature == 0:
        return logits.argmax(dim=1), logits.new_zeros(len(logits))
    logprobs = torch.log_softmax(logits / sampling.temperature, dim=1)
    truncated = sampling.top_k or sampling.top_p < 1 or sampling.min_p > 0
    if not truncated:
        ids = _invert(logprobs.exp(), uniform)
        return ids, logprobs.gather(1, ids[:, None])[:, 0]
    keep = min(sampling.top_k or logits.shape[1], logits.shape[1])
    sorted_logprobs, order = logprobs.topk(keep, dim=1)
    probabilities = torch.softmax(sorted_logprobs, dim=1)
    before = probabilities.cumsum(dim=1) - probabilities
    dropped = (before >= sampling.top_p) | (probabilities < sampling.min_p * probabilities[:, :1])
    dropped[:, 0] = False
    kept_logprobs = torch.log_softmax(sorted_logprobs.masked_fill(dropped, -torch.inf), dim=1)
    place = _invert(kept_logprobs.exp(), uniform)[:, None]
    return order.gather(1, place)[:, 0], kept_logprobs.gather(1, place)[:, 0]


def _invert(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """The index at which the cumulative probability passes `uniform`; never one of probability zero."""
    cumulative = probabilities.double().cumsum(dim=1)
    level = uniform[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, level, right=True).clamp(max=probabilities.shape[1] - 1)[:, 0]

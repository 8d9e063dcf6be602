"""One token from each row of logits, by inverse transform: a row's draw depends on its own uniform number alone."""

import hashlib
import math
from collections.abc import Sequence
from functools import reduce

import numpy as np
import torch
from torch import Tensor

from poweropd.rollout.engine import Sampling
from poweropd.types import Prompt


def uniforms(prompt: Prompt, sample: int | str, *, seed: int, count: int) -> Tensor:
    """`[count]` uniform numbers in [0, 1), float64: a pure function of its arguments.

    Args:
        sample: which of the prompt's samples they draw, or the name of something else that is drawn for the prompt.
    """
    digest = hashlib.blake2b(f"{seed}/{prompt.id}/{sample}".encode(), digest_size=16).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
    return torch.from_numpy(generator.random(count))


def mix(logits: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """Logits [B, V] of a mixture of probabilities, from the logits [B, V] of each part; one alone is left as it is.

    Args:
        shares: of every part but the first, which has what they leave of 1.
    """
    if not shares:
        return logits[0]
    log_shares = [math.log1p(-sum(shares)), *map(math.log, shares)]
    parts = [torch.log_softmax(each, dim=1) + share for each, share in zip(logits, log_shares, strict=True)]
    return reduce(torch.logaddexp, parts)


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

"""One token from each row of logits, by inverse transform: a row's draw depends on its own uniform number alone."""

import hashlib
import math
from collections.abc import Sequence
from functools import reduce

import numpy as np
import torch
from torch import Tensor

from poweropd.objectives.lm_head import SEGMENT, likeliest
from poweropd.rollout.engine import Sampling
from poweropd.types import Prompt

LOOKED_AT = 256  # likeliest tokens among which a truncation is sought first


def draw_key(prompt: Prompt, sample: int | str, *, seed: int) -> int:
    """128 bits that decide a draw: a pure function of its arguments.

    Args:
        sample: which of the prompt's samples is drawn, or the name of something else that is drawn for the prompt.
    """
    digest = hashlib.blake2b(f"{seed}/{prompt.id}/{sample}".encode(), digest_size=16).digest()
    return int.from_bytes(digest, "little")


def uniforms(prompt: Prompt, sample: int | str, *, seed: int, count: int) -> Tensor:
    """`[count]` uniform numbers in [0, 1), float64: a pure function of its arguments; see `draw_key`."""
    generator = np.random.Generator(np.random.Philox(key=draw_key(prompt, sample, seed=seed)))
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
        return likeliest(logits), logits.new_zeros(len(logits))
    if sampling.temperature != 1:
        logits = logits / sampling.temperature
    probabilities = torch.softmax(logits, dim=1)
    if sampling.top_k or sampling.top_p < 1 or sampling.min_p > 0:
        return _draw_truncated(probabilities, uniform, sampling, looked_at=sampling.top_k or LOOKED_AT)
    ids = _invert(probabilities, uniform)
    return ids, probabilities.gather(1, ids[:, None])[:, 0].log()


def _draw_truncated(
    probabilities: Tensor, uniform: Tensor, sampling: Sampling, looked_at: int
) -> tuple[Tensor, Tensor]:
    """`draw` where some tokens are left out, from the likeliest `looked_at` or, where these do not tell, from more."""
    looked_at = min(looked_at, probabilities.shape[1])
    sorted_probabilities, order = probabilities.topk(looked_at, dim=1)
    if sampling.top_k:
        sorted_probabilities /= sorted_probabilities.sum(dim=1, keepdim=True)
    before = sorted_probabilities.cumsum(dim=1) - sorted_probabilities
    dropped = (before >= sampling.top_p) | (sorted_probabilities < sampling.min_p * sorted_probabilities[:, :1])
    dropped[:, 0] = False
    kept = sorted_probabilities.masked_fill(dropped, 0)
    kept /= kept.sum(dim=1, keepdim=True)
    place = _invert(kept, uniform)[:, None]
    ids, logprobs = order.gather(1, place)[:, 0], kept.gather(1, place)[:, 0].log()
    more = ~dropped[:, -1]  # once a token is left out, so are all less likely ones
    if not sampling.top_k and looked_at < probabilities.shape[1] and more.any():
        ids[more], logprobs[more] = _draw_truncated(probabilities[more], uniform[more], sampling, 16 * looked_at)
    return ids, logprobs


def _invert(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """The index [B] at which the cumulative probability [B, V] passes `uniform`; never one of probability zero.

    Large vocabularies are summed by segments, then the tokens of one segment. What is summed over the whole vocabulary is
    in float64, so that the least likely tokens come as often as they should.
    """
    size = probabilities.shape[1]
    if size <= 4 * SEGMENT:
        return _passed(probabilities, uniform[:, None])[0][:, 0]
    whole = size // SEGMENT * SEGMENT
    sums = probabilities[:, :whole].unflatten(1, (-1, SEGMENT)).sum(dim=2)
    if whole < size:
        sums = torch.cat([sums, probabilities[:, whole:].sum(dim=1, keepdim=True)], dim=1)
    segment, missing = _passed(sums, uniform[:, None])
    ids = segment * SEGMENT + torch.arange(SEGMENT, device=segment.device)
    inside = probabilities.gather(1, ids.clamp(max=size - 1)).masked_fill_(ids >= size, 0)
    into_segment = (1 - missing / sums.gather(1, segment)).clamp(0, 1)
    return ids.gather(1, _passed(inside, into_segment)[0])[:, 0]


def _passed(weights: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Where the cumulative weight [B, W] passes a share [B, 1] of all: the index, and what that weight exceeds it by."""
    cumulative = weights.cumsum(dim=1, dtype=torch.float64)
    total = cumulative[:, -1:]
    level = torch.minimum(share * total, total.nextafter(torch.zeros_like(total)))
    index = torch.searchsorted(cumulative, level, right=True)
    return index, cumulative.gather(1, index) - level

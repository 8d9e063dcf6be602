"""What is done to the rewards of a whole optimizer step, over every micro-batch and rank.

All tensors are [N], over the loss tokens of the step: tokens of one rollout stand together, in order.
"""

from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor

DEVIATION_FLOOR = 1e-8  # as in the authors' code: a batch of equal rewards is left at zero, not divided by zero


@dataclass(frozen=True)
class StepTokens:
    """What whole-step shaping may look at, [N] each.

    Attributes:
        logprobs, entropies: the student's log q of the token, and the entropy of the distribution it came from.
        teacher_logprobs: log p of the token.
        rewards: of the token, before whole-step shaping; 0 for exact objectives.
        divergences: exact ones of the position; 0 for sampled objectives.
        reference_kl: of the position or, where the reference only scores tokens, log q - log reference of the token.
        rollouts, prompts: numbers of the rollout and of the prompt that the token belongs to.
    """

    logprobs: Tensor
    entropies: Tensor
    teacher_logprobs: Tensor
    rewards: Tensor
    divergences: Tensor
    reference_kl: Tensor
    rollouts: Tensor
    prompts: Tensor

    @classmethod
    def of_one_rollout(cls, logprobs: Tensor, teacher_logprobs: Tensor, rewards: Tensor) -> Self:
        """Tokens of one rollout, of which no more is known."""
        nothing, first = torch.zeros_like(rewards), torch.zeros_like(rewards, dtype=torch.long)
        return cls(logprobs, nothing, teacher_logprobs, rewards, nothing, nothing, first, first)

    @classmethod
    def cat(cls, parts: list[Self]) -> Self:
        return replace(parts[0], **{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(cls)})


def zscore(rewards: Tensor) -> Tensor:
    """`(r - mean) / standard deviation`, the population's. arXiv 2606.17199; there the statistics are those of one rank."""
    if rewards.numel() == 0:
        return rewards
    exact = rewards.double()
    deviation = exact.std(unbiased=False).clamp(min=DEVIATION_FLOOR)
    return ((exact - exact.mean()) / deviation).to(rewards.dtype)


def sign_max_abs(rewards: Tensor) -> Tensor:
    """Positive rewards over the largest reward, negative ones over the largest magnitude among them: in [-1, 1].

    In the authors' code of arXiv 2606.17199, not in the paper. Keeps every sign.
    """
    if rewards.numel() == 0:
        return rewards
    up, down = rewards.max().clamp(min=DEVIATION_FLOOR), (-rewards.min()).clamp(min=DEVIATION_FLOOR)
    return torch.where(rewards > 0, rewards / up, rewards / down)


def discounted_future(rewards: Tensor, rollouts: Tensor, discount: float) -> Tensor:
    """`F_t = sum_{s > t} discount^(s - t) r_s` within each rollout; the token's own reward is not in it."""
    # sums[t] holds the discounted rewards of t and the `reach - 1` tokens after it; each round doubles the reach.
    sums, reach = rewards.to(torch.float64, copy=True), 1
    while reach < len(rewards):
        follows = rollouts[reach:] == rollouts[:-reach]
        sums[:-reach] += torch.where(follows, discount**reach * sums[reach:], 0.0)
        reach *= 2
    future = torch.zeros_like(sums)
    future[:-1] = torch.where(rollouts[1:] == rollouts[:-1], discount * sums[1:], 0.0)
    return future.to(rewards.dtype)


def leave_one_out(rewards: Tensor, rollouts: Tensor, prompts: Tensor) -> Tensor:
    """The rewards less the mean reward per token of the *other* rollouts of the same prompt.

    A sample's baseline does not depend on the sample, so the expected update is unchanged. A prompt with one rollout has
    no baseline.
    """
    _, rollout_of, lengths = rollouts.unique(return_inverse=True, return_counts=True)
    _, prompt_of = prompts.unique(return_inverse=True)
    sums = rewards.new_zeros(len(lengths), dtype=torch.float64).index_add(0, rollout_of, rewards.double())
    prompt_of_rollout = prompt_of.new_zeros(len(lengths)).index_copy(0, rollout_of, prompt_of)
    means = sums / lengths
    groups = int(prompt_of.max()) + 1 if len(prompt_of) else 0
    group_sums = means.new_zeros(groups).index_add(0, prompt_of_rollout, means)
    group_sizes = means.new_zeros(groups).index_add(0, prompt_of_rollout, torch.ones_like(means))
    others = group_sizes[prompt_of_rollout] - 1
    baseline = (group_sums[prompt_of_rollout] - means) / others.clamp(min=1) * (others > 0)
    return rewards - baseline[rollout_of].to(rewards.dtype)


def top_share(scores: Tensor, share: float) -> Tensor:
    """Which tokens are among the `share` of highest scores, at least one; ties go to the earlier token."""
    kept = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    if len(scores):
        count = max(1, round(share * len(scores)))
        kept[scores.argsort(descending=True, stable=True)[:count]] = True
    return kept


def min_max(values: Tensor, rollouts: Tensor) -> Tensor:
    """`values` scaled to [0, 1] within each rollout; 0 where all of a rollout's are equal."""
    _, rollout_of = rollouts.unique(return_inverse=True)
    groups = int(rollout_of.max()) + 1 if len(rollout_of) else 0
    low = values.new_full((groups,), torch.inf).scatter_reduce(0, rollout_of, values, "amin")[rollout_of]
    high = values.new_full((groups,), -torch.inf).scatter_reduce(0, rollout_of, values, "amax")[rollout_of]
    spread = high - low
    return torch.where(spread > 0, (values - low) / spread.clamp(min=torch.finfo(values.dtype).tiny), 0.0)

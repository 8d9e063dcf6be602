"""PowerOPD the naive way, restated from its description: two whole fp32 log-softmaxes and a pass for the reward alone.

Written here from the formulas and from what the authors' training code was found to do, none of it copied: both models'
logits of every position are upcast, log-softmax of each is a tensor of [rollouts, positions, vocabulary] that is kept, the
student's entropy is taken from its own (two more such tensors, transient), and rewards are computed in a pass of their own,
after which the student runs again for the loss. Three ways to cut a step into passes:

* `window`: a reward pass without gradient over the whole step, then a loss pass, one rollout at a time;
* `window, at once`: the same, all rollouts together;
* `one pass`: the student runs once, with its logits kept for the gradient. Kinder than the original, whose entropy
  stands in the graph there too.

The best naive way is the fastest of them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from suite.shapes import SHAPES, Pair, build, random_rollouts
from suite.turns import Turns


class Batch(NamedTuple):
    ids: Tensor  # [B, T]
    targets: Tensor  # [B, T - 1], the next token
    mask: Tensor  # [B, T - 1], True where it is of the response


def batch_of(pairs: Sequence[Pair]) -> Batch:
    """Rollouts of equal length side by side."""
    ids = torch.tensor([pair.prompt + pair.response for pair in pairs])
    mask = torch.zeros_like(ids[:, 1:], dtype=torch.bool)
    mask[:, len(pairs[0].prompt) - 1 :] = True
    return Batch(ids, ids[:, 1:], mask)


def logprobs_of(model: PreTrainedModel, batch: Batch) -> Tensor:
    """[B, T - 1, V], fp32."""
    return torch.log_softmax(model(input_ids=batch.ids, use_cache=False).logits[:, :-1].float(), dim=-1)


def of_targets(logprobs: Tensor, batch: Batch) -> Tensor:
    return logprobs.gather(-1, batch.targets[..., None])[..., 0]


def reward(teacher: Tensor, student: Tensor, alpha: float) -> Tensor:
    """p^alpha - q^alpha of the sampled tokens."""
    return torch.exp(alpha * teacher) - torch.exp(alpha * student)


@torch.no_grad()
def entropies_of(logprobs: Tensor) -> Tensor:
    return -(logprobs.exp() * logprobs).sum(-1)


@torch.no_grad()
def reward_pass(student: PreTrainedModel, teacher: PreTrainedModel, batch: Batch, alpha: float) -> Tensor:
    """The reward of every token, [B, T - 1]."""
    of_student = logprobs_of(student, batch)
    of_teacher = logprobs_of(teacher, batch)
    entropies_of(of_student)
    return reward(of_targets(of_teacher, batch), of_targets(of_student, batch), alpha)


def window(student: PreTrainedModel, teacher: PreTrainedModel, batches: Sequence[Batch], alpha: float) -> float:
    """A reward pass over the whole step, then a loss pass."""
    rewards = [reward_pass(student, teacher, batch, alpha) for batch in batches]
    tokens = sum(int(batch.mask.sum()) for batch in batches)
    total = 0.0
    for batch, own in zip(batches, rewards, strict=True):
        logprobs = of_targets(logprobs_of(student, batch), batch)
        loss = -(own * logprobs)[batch.mask].sum() / tokens
        loss.backward()
        total += loss.item()
    return total


def one_pass(student: PreTrainedModel, teacher: PreTrainedModel, batches: Sequence[Batch], alpha: float) -> float:
    """One student pass, its logits kept for the gradient."""
    tokens = sum(int(batch.mask.sum()) for batch in batches)
    total = 0.0
    for batch in batches:
        of_student = logprobs_of(student, batch)
        with torch.no_grad():
            of_teacher = logprobs_of(teacher, batch)
        entropies_of(of_student)
        logprobs = of_targets(of_student, batch)
        own = reward(of_targets(of_teacher, batch), logprobs.detach(), alpha)
        loss = -(own * logprobs)[batch.mask].sum() / tokens
        loss.backward()
        total += loss.item()
    return total


WAYS = {"window": (window, 1), "window, at once": (window, None), "one pass": (one_pass, None)}
"""The function, and how many rollouts go together; None: all."""


def score(turns: Turns, *, shape: str, way: str, rollouts: int, prompt: int, response: int, alpha: float) -> None:
    """Scoring and update of a step's rollouts."""
    step, together = WAYS[way]
    pair = SHAPES[shape]
    student, teacher = build(pair, "student"), build(pair, "teacher").requires_grad_(False)
    step(student, teacher, [batch_of(random_rollouts(pair, 1, prompt=prompt, response=32))], alpha)
    pairs = random_rollouts(pair, rollouts, prompt=prompt, response=response)
    size = together or rollouts
    batches = [batch_of(pairs[at : at + size]) for at in range(0, rollouts, size)]
    for _ in range(turns.count):
        student.zero_grad()
        turns.begin()
        loss = step(student, teacher, batches, alpha)
        turns.end(tokens=rollouts * response, loss=loss, gradient_norm=gradient_norm(student))


def gradient_norm(model: PreTrainedModel) -> float:
    return torch.nn.utils.get_total_norm([own.grad for own in model.parameters() if own.grad is not None]).item()

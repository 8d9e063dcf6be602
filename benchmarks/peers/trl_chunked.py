"""TRL's chunked functions on a step's rollouts: scoring and update without [tokens, vocabulary] in memory.

They are used as TRL's own trainers use them: hidden states of the response positions alone, all rollouts at once, and of
`ChunkedLogProbFunction` the log-probabilities without its optional outputs, which is its fastest form.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
from trl.kernels.chunked_logprob import ChunkedLogProbFunction
from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

from suite.naive import Batch, batch_of, gradient_norm, reward
from suite.shapes import SHAPES, build, random_rollouts
from suite.turns import Turns


def hidden_of(model: PreTrainedModel, batch: Batch) -> Tensor:
    """[N, H] of the positions that predict response tokens."""
    hidden = model.base_model(input_ids=batch.ids, use_cache=False).last_hidden_state
    return hidden[:, :-1][batch.mask]


def logprobs_of(model: PreTrainedModel, batch: Batch) -> Tensor:
    """[N] of the response tokens."""
    head = model.get_output_embeddings().weight
    targets = batch.targets[batch.mask]
    arguments = (hidden_of(model, batch), head, None, targets, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ())
    return ChunkedLogProbFunction.apply(*arguments)[0]


def sampled(student: PreTrainedModel, teacher: PreTrainedModel, batch: Batch, alpha: float) -> Tensor:
    """PowerOPD's loss."""
    with torch.no_grad():
        of_teacher = logprobs_of(teacher, batch)
    of_student = logprobs_of(student, batch)
    return -(reward(of_teacher, of_student.detach(), alpha) * of_student).mean()


def reverse_kl(student: PreTrainedModel, teacher: PreTrainedModel, batch: Batch, alpha: float) -> Tensor:
    """The exact reverse KL over the vocabulary; `alpha` means nothing here."""
    with torch.no_grad():
        of_teacher = hidden_of(teacher, batch)
    heads = [model.get_output_embeddings().weight for model in (student, teacher)]
    divergence = ChunkedDivergenceFunction.apply(
        hidden_of(student, batch), heads[0], None, of_teacher, heads[1], None, 1.0
    )
    return divergence[0].mean()


LOSSES = {"power": sampled, "reverse_kl": reverse_kl}


def score(turns: Turns, *, shape: str, objective: str, rollouts: int, prompt: int, response: int, alpha: float) -> None:
    """Scoring and update of a step's rollouts."""
    pair, loss_of = SHAPES[shape], LOSSES[objective]
    student, teacher = build(pair, "student"), build(pair, "teacher").requires_grad_(False)
    loss_of(student, teacher, batch_of(random_rollouts(pair, 1, prompt=prompt, response=32)), alpha).backward()
    batch = batch_of(random_rollouts(pair, rollouts, prompt=prompt, response=response))
    for _ in range(turns.count):
        student.zero_grad()
        turns.begin()
        loss = loss_of(student, teacher, batch, alpha)
        loss.backward()
        turns.end(tokens=rollouts * response, loss=loss.item(), gradient_norm=gradient_norm(student))

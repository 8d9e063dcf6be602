"""poweropd's own parts, measured through the classes that training uses."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from poweropd import cpu
from poweropd.objectives import Objective
from poweropd.objectives import build as objective_named
from poweropd.policy import Student
from poweropd.rollout.engine import Sampling
from poweropd.rollout.hf import HFEngine
from poweropd.sections import OptimizerConfig
from poweropd.step_statistics import StepStatistics
from poweropd.teacher.hf import HFTeacher
from poweropd.teacher.scorer import judge
from poweropd.types import Prompt, Rollout, ScoredRollout
from poweropd.update import MicroBatches, accumulate_gradient
from suite.shapes import SHAPES, Pair, Role, Shape, build, questions, random_rollouts, tokenizer
from suite.turns import Turns

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Kit:
    """All that a step works with."""

    shape: Shape
    student: Student
    teacher: HFTeacher
    engine: HFEngine
    objective: Objective
    how: MicroBatches
    reference: HFTeacher | None

    def judge(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        return judge(rollouts, self.objective, self.teacher, self.reference)


def kit(
    shape: str,
    objective: str,
    *,
    settings: dict[str, float] | None = None,
    precision: str = "float32",
    lr: float = 1e-6,
    micro_batch: int = 16_384,
    together: int = 64,
) -> Kit:
    """A pair with its student's optimizer, its sampler and its judge.

    Args:
        settings: of the objective.
        precision: of all matrix products; weights that are trained stay fp32.
        micro_batch: tokens of one forward and backward pass, and of one scoring pass.
        together: sequences decoded together.
    """
    cpu.settle()
    pair, dtype, goal = SHAPES[shape], DTYPES[precision], objective_named(objective, **(settings or {}))
    model = build(pair, "student")

    def scorer(role: Role) -> HFTeacher:
        return HFTeacher(
            torch.nn.Module.to(build(pair, role), dtype), vocab_size=pair.vocabulary, tokens_per_batch=micro_batch
        )

    student = Student(
        model,
        tokenizer(),
        OptimizerConfig(lr=lr),
        vocab_size=pair.vocabulary,
        end_ids=(),
        steps=1000,
        precision=dtype,
    )
    return Kit(
        pair,
        student,
        scorer("teacher"),
        HFEngine(model, vocab_size=pair.vocabulary, pad_id=0, precision=dtype, sequences_per_batch=together),
        goal,
        MicroBatches(tokens=micro_batch, rollouts_tell=True),
        scorer("student") if goal.needs_of_reference != "nothing" else None,
    )


def as_rollouts(pairs: Sequence[Pair]) -> list[Rollout]:
    """Given answers, whose sampler told nothing of them."""
    return [
        Rollout(Prompt(str(place), pair.prompt), pair.response, (torch.nan,) * len(pair.response), "length")
        for place, pair in enumerate(pairs)
    ]


def as_drawn(rollouts: Sequence[Rollout], sampler: HFTeacher) -> list[Rollout]:
    """The same as if `sampler`, the untrained student, had drawn them."""
    told = [scores.logprobs for scores in sampler.score(rollouts, needs="sampled")]
    return [
        replace(rollout, rollout_logprobs=tuple(logprobs.tolist()))
        for rollout, logprobs in zip(rollouts, told, strict=True)
        if logprobs is not None
    ]


def asked(count: int, seed: int) -> list[Prompt]:
    """The questions of a step in the chat format."""
    tokens = tokenizer()
    prompts = []
    for place, question in enumerate(questions(count, seed=seed)):
        message = [{"role": "user", "content": question}]
        text = tokens.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        prompts.append(Prompt(f"{seed}-{place}", tuple(tokens.encode(text)), text=question))
    return prompts


def score(
    turns: Turns,
    *,
    shape: str,
    objective: str,
    rollouts: int,
    prompt: int,
    response: int,
    alpha: float | None = None,
    precision: str = "float32",
    micro_batch: int = 16_384,
) -> None:
    """Scoring and update of a step's rollouts."""
    settings = {} if alpha is None else {"alpha": alpha}
    own = kit(shape, objective, settings=settings, precision=precision, micro_batch=micro_batch)
    sampler = HFTeacher(build(own.shape, "student"), vocab_size=own.shape.vocabulary, tokens_per_batch=micro_batch)
    judged = own.judge(as_rollouts(random_rollouts(own.shape, 1, prompt=prompt, response=32)))
    accumulate_gradient(own.student, judged, own.objective, own.how, version=0, keep=0)
    given = as_drawn(as_rollouts(random_rollouts(own.shape, rollouts, prompt=prompt, response=response)), sampler)
    del sampler
    for _ in range(turns.count):
        own.student.optimizer.zero_grad()
        del judged
        turns.begin()
        judged = own.judge(given)
        turns.lap("teacher")
        result = accumulate_gradient(own.student, judged, own.objective, own.how, version=0, keep=0)
        turns.lap("update")
        turns.end(
            tokens=rollouts * response,
            loss=result.loss,
            gradient_norm=own.student.gradient_norm(),
            gradient_bytes=_bytes([parameter.grad for parameter in own.student.model.parameters()]),
        )


def steps(
    turns: Turns,
    *,
    shape: str,
    objective: str,
    prompts: int,
    new_tokens: int,
    ends: bool,
    lr: float,
    alpha: float | None = None,
    precision: str = "float32",
) -> None:
    """Whole training steps: what `poweropd.train` does of a step, its files and texts left out."""
    settings = {} if alpha is None else {"alpha": alpha}
    own = kit(shape, objective, settings=settings, precision=precision, lr=lr)
    end_id = tokenizer(ends=ends).eos_token_id
    sampling = Sampling(stop_ids=(end_id,), max_new_tokens=new_tokens)
    for step in range(turns.count):
        given = asked(prompts, seed=step)
        turns.begin()
        tokens = take_step(own, given, sampling, step, turns)
        prompt_tokens = sum(len(prompt.prompt_ids) for prompt in given)
        turns.end(tokens=tokens, rollouts=prompts, prompt_tokens=prompt_tokens)


def take_step(own: Kit, given: Sequence[Prompt], sampling: Sampling, step: int, turns: Turns | None = None) -> int:
    """One optimizer step; returns the tokens trained on."""
    lap = turns.lap if turns is not None else lambda phase: None
    rollouts = own.engine.generate(given, sampling, seed=step)
    lap("rollout")
    judged = own.judge(rollouts)
    lap("teacher")
    seen = StepStatistics(own.objective, rollouts, sampling, device=own.student.device, detailed=False)
    result = accumulate_gradient(own.student, judged, own.objective, own.how, version=step, watch=seen.add, keep=0)
    grad_norm = own.student.gradient_norm()
    lap("update")
    own.student.update(step, grad_norm)
    lap("optimizer")
    own.engine.update_weights(version=step + 1)
    lap("weight sync")
    seen.metrics()
    lap("metrics")
    return result.num_loss_tokens


def _bytes(tensors: Sequence[Tensor | None]) -> int:
    return sum(own.numel() * own.element_size() for own in tensors if own is not None)

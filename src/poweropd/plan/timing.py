"""Time of a step on each GPU, phase by phase, from counted FLOPs and bytes and an assumed share of each rate."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from poweropd.config import label
from poweropd.plan.load import Load, Teacher
from poweropd.plan.machines import GB
from poweropd.plan.memory import FP32
from poweropd.plan.shapes import Shape

# Shares of what the makers state. They are assumptions, not measurements: none of it has yet run on a GPU.
COMPUTE = 0.40  # of FLOP/s, in passes over many tokens
DECODING = 0.60  # of bandwidth, token by token
LINK = 0.70  # of the link
KERNELS, LATENCY = 15, 3e-6  # of a layer in a decode step, and seconds that each takes at least on a GPU
FP32_RATE = 1 / 16  # of the bf16 rate of a GPU, for fp32 products without tensor cores
AT_RATE = f" at {COMPUTE:.0%} of FLOP/s"
NODE, NETWORK = 8, 50 * GB  # GPUs of a machine; bytes a second of each GPU between machines (400 Gbit/s)
PCIE = 32 * GB  # bytes a second between a GPU and main memory, PCIe 4.0 x16
ADAMW = 7 * FP32  # bytes a parameter: weight, gradient and moments read, all but the gradient written


class Phase(NamedTuple):
    """Seconds, what a GPU computes and moves in them, and what they rest on."""

    name: str
    seconds: float
    flops: float
    bytes: float
    why: str


def step_time(load: Load) -> list[Phase]:
    """The phases of a step, one after the other."""
    return [*_rollout(load), *_scoring(load), _update(load), _optimizer(load), *_communication(load)]


def seconds(phases: Sequence[Phase]) -> float:
    return sum(phase.seconds for phase in phases)


def _rate(load: Load, precision: torch.dtype) -> float:
    slow = load.machine.device == "cuda" and precision == torch.float32
    return load.machine.flops * COMPUTE * (FP32_RATE if slow else 1)


def _rollout(load: Load) -> Iterator[Phase]:
    golden = load.recipe.rollout.sources.get("golden", 0)
    if golden == 1:
        return
    student, size, rows = load.student, load.precision.itemsize, load.rows
    steps = load.response * load.sequences / rows
    weights = size * (student.products + student.head)
    cache = size * rows * (load.prompt + load.response / 2) * student.kv_elements
    flops = rows * (student.body_flops(1, load.prompt + load.response) + student.head_flops(1))
    launches = student.layers * KERNELS * LATENCY if load.machine.device == "cuda" else 0.0
    step = max((weights + cache) / (load.machine.bandwidth * DECODING), flops / _rate(load, load.precision)) + launches
    prompts = student.body_flops(load.sequences * load.prompt, load.prompt) / load.recipe.sampling.samples_per_prompt
    taken = (steps * step + prompts / _rate(load, load.precision)) * (1 - golden)
    why = f"{steps:,.0f} decode steps of {rows} rows; each reads {weights / GB:.3g} GB of weights at {DECODING:.0%} of bandwidth"
    yield Phase("rollout", taken, steps * flops + prompts, steps * (weights + cache), why)


def _scoring(load: Load) -> Iterator[Phase]:
    objective = load.recipe.objective.build()
    if objective.needs != "nothing":
        for each in load.teachers:
            yield _scores(load, each, head=objective.needs != "full")
    if objective.needs_of_reference != "nothing":
        flops = _forward(load, load.student, head=objective.needs_of_reference != "full")
        yield Phase("reference scores", flops / _rate(load, load.precision), flops, 0, f"one forward pass{AT_RATE}")


def _scores(load: Load, teacher: Teacher, *, head: bool) -> Phase:
    flops = _forward(load, teacher.shape, head=head)
    taken, moved = flops / _rate(load, teacher.precision), 0.0
    why = f"one forward pass{AT_RATE}"
    if teacher.offloaded:
        batches, _ = load.batches(teacher.tokens_per_batch)
        moved = batches * teacher.in_layers
        taken = max(taken, moved / (PCIE * LINK))
        why += f", or {batches} times its layers at {LINK:.0%} of {PCIE / GB:g} GB/s if that is longer"
    elif not teacher.local:
        why += ", on a machine like this one"
    return Phase(f"{label(teacher.name)} scores", taken, flops, moved, why)


def _forward(load: Load, shape: Shape, *, head: bool) -> float:
    """FLOPs of a forward pass over the step; the head looks at response tokens alone."""
    body = shape.body_flops(load.sequences * load.fed, load.fed)
    return body + (shape.head_flops(load.responses) if head else 0)


def _update(load: Load) -> Phase:
    objective, student = load.recipe.objective.build(), load.student
    body, head = _forward(load, student, head=False), student.head_flops(load.responses)
    passes = 4 if load.recipe.student.gradient_checkpointing else 3
    flops = passes * body + 3 * head
    why = f"{passes} forward passes' worth of the body, 3 of the head{AT_RATE}"
    if objective.needs_whole_step and not (objective.shapes_by_logprobs_alone and load.samples_plainly):
        flops += body + head
        why += ", and one more to see the whole step first"
    if objective.needs == "full":
        flops += sum(each.shape.head_flops(load.responses) for each in load.teachers)
    return Phase("update", flops / _rate(load, load.precision), flops, 0, why)


def _optimizer(load: Load) -> Phase:
    moved = ADAMW * load.trained / load.shards
    return Phase(
        "optimizer", moved / (load.machine.bandwidth * DECODING), 0, moved, f"{ADAMW} bytes a trained parameter"
    )


def _communication(load: Load) -> Iterator[Phase]:
    """Between GPUs, as if nothing of it were hidden behind arithmetic."""
    if load.gpus > 1:
        link = min(load.machine.link, NETWORK) if load.gpus > NODE else load.machine.link
        others = (load.gpus - 1) / load.gpus
        if load.shards > 1:
            batches, _ = load.batches(load.recipe.train.tokens_per_micro_batch)
            size = load.precision.itemsize
            moved = others * (
                batches * (2 * size * load.student.parameters + FP32 * load.trained) + size * load.student.parameters
            )
            what = f"weights gathered twice and gradients scattered in each of {batches} micro-batches, weights once to sample"
        else:
            moved = 2 * others * FP32 * load.trained
            what = "gradients added up over all GPUs"
        yield Phase(
            "communication",
            moved / (link * LINK),
            0,
            moved,
            f"{what}, at {LINK:.0%} of {link / GB:g} GB/s; none of it hidden",
        )
        for each in load.teachers:
            if each.shards > 1 and each.local:
                batches, _ = load.batches(each.tokens_per_batch)
                moved = others * batches * (each.in_layers + each.beside_layers)
                yield Phase(
                    f"{label(each.name)} gathered",
                    moved / (link * LINK),
                    0,
                    moved,
                    f"its weights for each of {batches} batches",
                )
    if load.vllm is not None:
        moved = load.precision.itemsize * load.student.parameters
        yield Phase("weights to vLLM", moved / (load.machine.bandwidth * DECODING), 0, moved, "copied once a step")

"""Memory of a run on each GPU, phase by phase. Every figure says what it rests on."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from poweropd.config import label
from poweropd.cpu import KEPT_HEAP
from poweropd.objectives import Objective
from poweropd.objectives.lm_head import ALIGNED, BLOCK_ELEMENTS, PANEL, tile_rows
from poweropd.pair import readable
from poweropd.plan.activations import activations
from poweropd.plan.load import Load, Teacher
from poweropd.plan.machines import GIB, Machine
from poweropd.plan.shapes import Shape
from poweropd.rollout.llama import COPIED_WEIGHTS
from poweropd.sections import VLLMConfig

USABLE = {"cuda": 0.92, "cpu": 1.0}  # of the memory stated: drivers, error correction and fragments take the rest
RUNTIME = {"cuda": 1.0 * GIB, "cpu": 0.42 * GIB}  # of a process without models; the GPU's is an assumption
FP32 = 4  # bytes
DRAWING = 3  # tensors of [rows, vocabulary], fp32, while a token is drawn: logits, probabilities, what is left of them
NOISE = 20  # bytes a token that may be drawn: its uniform number, id and log-probability
BLOCKS = 6  # tensors of a block of logits, fp32
FREED = 2 / 3  # of what a phase frees on a CPU: what glibc keeps and later tensors do not fit into, as measured
GATHERED = 2  # layers of a sharded model that are whole at a time: the one at work and the next


class Line(NamedTuple):
    """Bytes, and what they rest on."""

    name: str
    bytes: float
    why: str


@dataclass(frozen=True)
class Memory:
    """Of one GPU: what is there always, and beside it what each phase of a step needs; a step is in one at a time."""

    machine: Machine
    always: list[Line]
    phases: dict[str, list[Line]]

    @property
    def peak(self) -> float:
        """Bytes."""
        return total(self.always) + total(self.phases[self.fullest])

    @property
    def fullest(self) -> str:
        """The phase of the peak."""
        return max(self.phases, key=lambda phase: total(self.phases[phase]))

    @property
    def room(self) -> float:
        """Bytes that a run may take."""
        return USABLE[self.machine.device] * self.machine.memory

    @property
    def fits(self) -> bool:
        return self.peak <= self.room


def total(lines: list[Line]) -> float:
    return sum(line.bytes for line in lines)


def memory(load: Load) -> Memory:
    """What one GPU holds.

    Raises:
        ModelError: an architecture that `activations` cannot run.
    """
    objective = load.recipe.objective.build()
    rollout = list(_rollout(load))
    phases = {} if load.overlaps else {"rollout": rollout}
    for each in load.teachers:
        if each.local:
            phases[f"{label(each.name)} scores"] = list(_scoring(load, each, objective))
    if objective.needs_of_reference != "nothing":
        tokens = min(each.tokens_per_batch for each in load.teachers)
        phases["reference scores"] = list(_scores(load, load.student, load.precision, tokens))
    kept = [*_gradients(load), *_kept_hidden(load, objective)]
    phases["update, heads"] = [*kept, *_heads(load, objective)]
    phases["update, backward"] = [*kept, *_backward(load)]
    always = list(_always(load, objective, freed=max(map(total, phases.values()))))
    return Memory(load.machine, [*always, *(rollout if load.overlaps else [])], phases)


def _always(load: Load, objective: Objective, *, freed: float) -> Iterator[Line]:
    device, student = load.machine.device, load.student
    over = f", over {load.shards} GPUs" if load.shards > 1 else ""
    if device == "cpu":
        yield Line("process", RUNTIME[device], "Python, torch, transformers and tokenizers, as measured")
        why = f"freed, and too small for later tensors; at most {KEPT_HEAP >> 20} MiB"
        yield Line("free heap", min(KEPT_HEAP, FREED * freed), why)
    else:
        yield Line("process", RUNTIME[device], "context, kernels and workspaces; an assumption")
    count = readable(student.parameters)
    yield Line("student, weights", FP32 * student.parameters / load.shards, f"{count} in fp32{over}")
    yield Line(
        "student, AdamW",
        2 * FP32 * load.trained / load.shards,
        f"two moments in fp32 of {readable(load.trained)} trained{over}",
    )
    if load.has_replica:
        size = load.precision.itemsize
        yield Line(
            "student, copy", size * student.parameters, f"whole and merged, to sample from; {size} bytes a weight"
        )
    for each in load.teachers:
        if each.local:
            held = each.beside_layers + (0 if each.offloaded else each.in_layers)
            where = "its layers in main memory" if each.offloaded else f"layers of {each.layer_bytes:g} bytes a weight"
            spread = f", over {each.shards} GPUs" if each.shards > 1 else ""
            told = f"{readable(each.shape.parameters)}, {where}{spread}"
            yield Line(f"{label(each.name)}, weights", held / each.shards, told)
    if objective.needs_of_reference != "nothing":
        size = load.precision.itemsize
        yield Line("reference, weights", size * student.parameters, f"the initial student, {count} of {size} bytes")
    if load.vllm is not None and not load.vllm.sleep:
        yield _vllm(load, load.vllm)


def _vllm(load: Load, settings: VLLMConfig) -> Line:
    size = load.precision.itemsize
    if settings.kv_cache_gib is not None:
        held = GIB * settings.kv_cache_gib + size * load.student.parameters
        return Line("vLLM", held, f"{settings.kv_cache_gib:g} GiB of keys and values, {size} bytes a weight")
    share = settings.gpu_memory_utilization
    return Line("vLLM", share * load.machine.memory, f"gpu_memory_utilization {share:g} of the GPU")


def _rollout(load: Load) -> Iterator[Line]:
    if not load.decodes_here:
        if load.vllm is not None and load.vllm.sleep:
            yield _vllm(load, load.vllm)
        return
    student, size, rows = load.student, load.precision.itemsize, load.rows
    if size < FP32 and not load.has_replica:
        yield Line("copies of weights", size * (student.in_layers + student.head), "in the precision of decoding")
    elif load.machine.device == "cpu" and student.in_layers <= COPIED_WEIGHTS:
        yield Line("copies of weights", size * student.in_layers, "side by side, which small matrices like")
    models = [("keys and values", student)]
    if load.recipe.rollout.teacher_mixing or "teacher" in load.recipe.rollout.sources:
        models += [(f"keys and values, {label(each.name)}", each.shape) for each in load.teachers]
    tokens = load.prompt + load.response
    for name, shape in models:
        why = f"{rows} rows of {tokens} tokens, {shape.kv_elements * size / 1024:.4g} KiB a token"
        yield Line(name, size * rows * tokens * shape.kv_elements, why)
    yield Line(
        "logits",
        DRAWING * FP32 * rows * student.vocabulary,
        f"{DRAWING} tensors of {rows} x {student.vocabulary:,} in fp32",
    )
    yield Line("draws", NOISE * rows * load.response, f"{NOISE} bytes a token that may be drawn")


def _scoring(load: Load, teacher: Teacher, objective: Objective) -> Iterator[Line]:
    yield from _kept_hidden(load, objective)
    yield from _scores(load, teacher.shape, teacher.precision, teacher.tokens_per_batch)
    if teacher.shards > 1 or teacher.offloaded:
        size = GATHERED * teacher.layer_bytes * teacher.shape.largest_layer
        yield Line("gathered layers", size, f"{GATHERED} at a time")


def _scores(load: Load, shape: Shape, precision: torch.dtype, tokens: int) -> Iterator[Line]:
    """A forward pass without gradient."""
    _, rows = load.batches(tokens)
    peak = activations(shape, rows, load.fed, precision, train=False).peak
    yield Line("activations", peak, f"{rows} sequences of {load.fed} tokens, one layer at a time")
    most, columns = PANEL.get(
        load.machine.device, (tile_rows(rows * load.response, shape.vocabulary, _device(load)), shape.vocabulary)
    )
    yield Line("tile of logits", precision.itemsize * most * columns, f"{most} x {columns:,}")


def _gradients(load: Load) -> Iterator[Line]:
    yield Line("gradients", FP32 * load.trained / load.shards, f"of {readable(load.trained)} trained, in fp32")
    if load.shards > 1:
        size = GATHERED * (load.precision.itemsize + FP32) * load.student.largest_layer
        yield Line("gathered layers", size, f"{GATHERED} layers with their gradients at a time")
        yield Line("gathered head", 2 * FP32 * load.student.head, "with its gradient, in fp32")


def _kept_hidden(load: Load, objective: Objective) -> Iterator[Line]:
    if objective.needs != "full":
        return
    for each in load.teachers:
        size = each.precision.itemsize * load.responses * each.shape.hidden
        yield Line(
            f"hidden states, {label(each.name)}",
            size,
            f"of all {load.responses:,} response tokens, until they are trained on",
        )


def _update_activations(load: Load) -> tuple[int, float, float]:
    """Sequences of a micro-batch, and bytes kept and at the peak."""
    _, rows = load.batches(load.recipe.train.tokens_per_micro_batch)
    checkpointing = load.recipe.student.gradient_checkpointing
    found = activations(load.student, rows, load.fed, load.precision, train=True, checkpointing=checkpointing)
    return rows, found.kept, found.peak


def _heads(load: Load, objective: Objective) -> Iterator[Line]:
    """At the end of the forward pass, when all that the backward pass needs is there."""
    rows, kept, _ = _update_activations(load)
    how = "recomputed layer by layer" if load.recipe.student.gradient_checkpointing else "all layers"
    yield Line("activations", kept, f"{rows} sequences of {load.fed} tokens, {how}; what autograd keeps of them")
    student, size, device = load.student, load.precision.itemsize, load.machine.device
    tokens = rows * load.response
    yield Line(
        "hidden states", 3 * size * tokens * student.hidden, f"of {tokens:,} response tokens, and their gradient"
    )
    if size < FP32:
        yield Line("head and gradient", 2 * size * student.head, "copies in the precision of matrix products")
    height = tile_rows(tokens, student.vocabulary, _device(load))
    width = student.vocabulary + ALIGNED.get(device, ALIGNED["cuda"]) - 1
    seen = [("student", size)]
    if objective.needs == "full":
        seen += [(label(each.name), each.precision.itemsize) for each in load.teachers]
    if objective.needs_of_reference == "full":
        seen.append(("reference", size))
    for name, bytes_ in seen:
        yield Line(
            f"tile of logits, {name}", bytes_ * height * width, f"{height} x {student.vocabulary:,}, never all tokens"
        )
    block = min(BLOCK_ELEMENTS.get(device, BLOCK_ELEMENTS["cuda"]), height * width)
    yield Line("blocks of logits", BLOCKS * FP32 * block, f"{BLOCKS} tensors of {block / 1e6:.3g}M in fp32")


def _backward(load: Load) -> Iterator[Line]:
    rows, _, peak = _update_activations(load)
    yield Line("activations", peak, f"{rows} sequences of {load.fed} tokens, and gradients on their way")
    tokens = rows * load.response
    size = load.precision.itemsize * tokens * load.student.hidden
    yield Line("hidden states", size, f"gradient of {tokens:,} response tokens")


def _device(load: Load) -> torch.device:
    return torch.device(load.machine.device)

"""What a recipe asks of each GPU in one step."""

import math
from dataclasses import dataclass

import torch

from poweropd.config import Recipe
from poweropd.models import resolve_precision
from poweropd.plan.machines import Machine
from poweropd.plan.shapes import Shape, shape_of
from poweropd.rollout.engine import Sampling
from poweropd.sections import TeacherConfig, TrainConfig, VLLMConfig

PROMPT_TOKENS = 256  # where a recipe does not say
QUANTIZED = {"8bit": 1.0, "4bit": 0.5}  # bytes a weight


@dataclass(frozen=True)
class Teacher:
    """A model that judges.

    Attributes:
        layer_bytes: of a weight of its decoder layers; all others are of `precision`.
        local: whether it lies on the GPUs that train.
        shards: GPUs that share one copy of it.
        offloaded: whether its layers lie in main memory.
    """

    name: str
    shape: Shape
    precision: torch.dtype
    layer_bytes: float
    tokens_per_batch: int
    local: bool
    shards: int
    offloaded: bool

    @property
    def in_layers(self) -> float:
        """Bytes of its decoder layers."""
        return self.layer_bytes * self.shape.in_layers

    @property
    def beside_layers(self) -> int:
        """Bytes of its embedding and LM head."""
        return self.precision.itemsize * (self.shape.parameters - self.shape.in_layers)


@dataclass(frozen=True)
class Load:
    """One GPU's part of a step.

    Attributes:
        gpus: that share the step, each with its own sequences.
        sequences: of one GPU.
        prompt, response: tokens of each sequence; every response is as long as it may be, unless told otherwise.
        precision: of the student's matrix products.
        trained: parameters that are trained.
        shards: GPUs that share one copy of the student's weights, gradients and moments.
    """

    recipe: Recipe
    machine: Machine
    gpus: int
    sequences: int
    prompt: int
    response: int
    student: Shape
    teachers: tuple[Teacher, ...]
    precision: torch.dtype
    trained: int
    shards: int

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        machine: Machine,
        *,
        gpus: int = 1,
        prompt: int | None = None,
        response: int | None = None,
    ) -> "Load":
        """
        Raises:
            ModelError: a model has no config, or none of a causal language model.
        """
        device = torch.device(machine.device)
        student = shape_of(recipe.student.model, recipe.student.revision)
        longest = [section.max_prompt_tokens for section in recipe.data_sections.values()]
        lora = recipe.student.lora
        return cls(
            recipe=recipe,
            machine=machine,
            gpus=gpus,
            sequences=math.ceil(recipe.train.prompts_per_step * recipe.sampling.samples_per_prompt / gpus),
            prompt=prompt or min(PROMPT_TOKENS, *(tokens or PROMPT_TOKENS for tokens in longest)),
            response=response or recipe.sampling.max_new_tokens,
            student=student,
            teachers=tuple(_teacher(name, config, device, gpus) for name, config in recipe.named_teachers.items()),
            precision=resolve_precision(recipe.student.precision, device),
            trained=student.parameters if lora is None else lora.rank * student.sides_of(lora.modules),
            shards=_shards(recipe.train, gpus),
        )

    @property
    def fed(self) -> int:
        """Tokens of a sequence that are fed to a model: its last one predicts nothing."""
        return self.prompt + self.response - 1

    @property
    def responses(self) -> int:
        """Response tokens of all sequences."""
        return self.sequences * self.response

    @property
    def rows(self) -> int:
        """Sequences decoded together."""
        return min(self.recipe.rollout.sequences_per_batch, self.sequences)

    @property
    def samples_plainly(self) -> bool:
        """Whether rollouts are drawn from the whole softmax."""
        return Sampling(stop_ids=(), **self.recipe.sampling.model_dump(exclude={"stop"})).is_plain

    @property
    def overlaps(self) -> bool:
        """Whether the next steps are sampled while this one trains."""
        return self.recipe.rollout.max_staleness > 0

    @property
    def has_replica(self) -> bool:
        """Whether a copy of the student is sampled from: its own weights are spread, lack their adapters, or change."""
        return self.decodes_here and (self.shards > 1 or self.recipe.student.lora is not None or self.overlaps)

    @property
    def vllm(self) -> VLLMConfig | None:
        """The settings of vLLM, where it samples on these GPUs; else None."""
        rollout = self.recipe.rollout
        return rollout.vllm if rollout.engine == "vllm" and rollout.vllm.url is None else None

    @property
    def decodes_here(self) -> bool:
        """Whether transformers samples on these GPUs."""
        return self.recipe.rollout.engine == "hf"

    def batches(self, tokens: int) -> tuple[int, int]:
        """Into how many batches of at most `tokens` tokens the sequences fall, and how many are in each."""
        count = math.ceil(self.sequences / max(1, tokens // self.fed))
        return count, math.ceil(self.sequences / count)


def _shards(section: TrainConfig | TeacherConfig, gpus: int) -> int:
    """Over how many GPUs the weights of this section's model are spread."""
    return gpus if section.sharding == "fsdp" else 1


def _teacher(name: str, config: TeacherConfig, device: torch.device, gpus: int) -> Teacher:
    precision = resolve_precision(config.precision, device)
    return Teacher(
        name=name,
        shape=shape_of(config.model, config.revision),
        precision=precision,
        layer_bytes=QUANTIZED.get(config.quantization, precision.itemsize),
        tokens_per_batch=config.tokens_per_batch,
        local=config.is_local,
        shards=_shards(config, gpus),
        offloaded=config.offload,
    )

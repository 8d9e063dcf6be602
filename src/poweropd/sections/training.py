"""What is trained, how, and what is kept of it."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from poweropd import objectives
from poweropd.sections.section import NonNegative, Positive, Section, Share


class ObjectiveConfig(BaseModel):
    """`name`, `end_token`, and the settings of that row of the objective table."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)

    name: str = "power"
    """A row of `poweropd objectives`."""
    end_token: Literal["map", "mask", "keep"] = "map"
    """Where student and teacher end answers differently: `map` counts all end tokens as one outcome, `mask` trains on
    none, `keep` scores them as they stand."""
    masked_tokens: list[str] = []
    """Tokens that are never trained on, wherever they stand, such as `<think>`; each a single token."""

    @model_validator(mode="after")
    def _settings_exist(self) -> Self:
        self.build()
        return self

    def build(self) -> objectives.Objective:
        return objectives.build(self.name, **(self.model_extra or {}))


class OptimizerConfig(Section):
    lr: Annotated[float, Field(gt=0)] = 1e-6
    """Peak learning rate of AdamW."""
    betas: tuple[Share, Share] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Clip the global gradient norm to this."""
    warmup_steps: NonNegative = 0
    """Linear warm-up."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up: stay, or fall to zero at the last step."""


class TrainConfig(Section):
    steps: Positive = 500
    """Optimizer steps."""
    prompts_per_step: Positive = 32
    """Prompts of one optimizer step."""
    tokens_per_micro_batch: Positive = 16384
    """Tokens in one forward and backward pass; the gradient does not depend on it. Padding counts too for models that
    cannot do without, such as those with sliding windows."""
    seed: NonNegative = 0
    """Decides data order and every sample."""
    sharding: Literal["none", "fsdp"] = "none"
    """Of several processes, see `torchrun`. `none`: each has the whole student. `fsdp`: weights, gradients and optimizer
    state are spread over them, and each samples from a copy in the precision of matmuls."""
    threads: Positive | None = None
    """CPU threads; null leaves the choice to torch. Tiny models are faster with one."""


class CheckpointConfig(Section):
    every: Positive = 50
    """Steps between checkpoints; the last step always has one."""
    keep: Positive = 2
    """How many of the newest to keep."""


class GuardConfig(Section):
    """What to do when answers grow to the budget or go round in circles: the collapse of StableOPD, arXiv 2604.08527."""

    truncation: Share | None = 0.9
    """Largest share of rollouts that reach `max_new_tokens`; null: any."""
    repetition: Share | None = 0.3
    """Largest share of rollouts that end in repetition; null: any."""
    patience: Positive = 5
    """Consecutive steps above a limit that count as a collapse. A limit holds once the student has kept it for as many
    steps, or from the start if the untrained student is a quarter below it."""
    action: Literal["warn", "stop", "raise_reference_kl"] = "warn"
    """`warn`: say so. `stop`: save a checkpoint and stop. `raise_reference_kl`: double the weight of the KL to the
    reference, again after every `patience` steps for as long as it lasts."""


class LogConfig(Section):
    rollouts_every: Positive = 10
    """Steps between entries of rollouts.jsonl, positions.jsonl and distributions.jsonl."""
    rollouts: NonNegative = 4
    """Rollouts written each time."""
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = []
    """Where metrics and evaluations go too; each is a package to install. A run is called as its directory."""
    project: str = "poweropd"
    """Project of Weights & Biases and trackio."""

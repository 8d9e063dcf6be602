"""The recipe: every setting, its default, its range and its meaning, in one place."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from poweropd import objectives, recipes
from poweropd.errors import ConfigError
from poweropd.recipes import check_sum, flow

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(gt=0, le=1)]
TeacherName = Annotated[str, Field(pattern="^[A-Za-z0-9_-]+$")]  # it names a folder too
ALONE = "teacher"  # what the teacher goes by where there is one, or one mixture


class Section(BaseModel):
    """A group of settings. Unknown keys are refused, so that a misspelt one never passes in silence."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class StudentConfig(Section):
    model: str
    """Hub id, local folder, or `quickstart:student`."""
    revision: str | None = None
    """Hub revision."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of matmuls; weights and optimizer stay fp32. `auto`: bfloat16 on a GPU, float32 on a CPU."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""


class TeacherConfig(Section):
    model: str
    """Hub id, local folder, or `quickstart:teacher`."""
    revision: str | None = None
    """Hub revision."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of its weights. `auto`: bfloat16 on a GPU, float32 on a CPU."""
    tokens_per_batch: Positive = 16384
    """Tokens scored in one forward pass."""
    weight: Share | None = None
    """Its share of the mixture of all `teachers`; they sum to 1."""


class DataConfig(Section):
    source: Literal["hub", "jsonl", "parquet", "reasoning_gym"]
    """Where rows come from."""
    path: str | None = None
    """Hub id or file; not for `reasoning_gym`."""
    subset: str | None = None
    """Configuration name of a Hub data set."""
    split: str = "train"
    """Split of a Hub data set; for `reasoning_gym`, `train` or `held_out`."""
    prompt: str = "problem"
    """Column with the question."""
    answer: str | None = "answer"
    """Column with the reference answer, for grading; null where there is none."""
    golden: str | None = None
    """Column with a whole worked answer, for objectives on golden answers."""
    families: dict[str, dict[str, Any]] = {}
    """`reasoning_gym` generators and their settings."""
    limit: Positive | None = None
    """Use this many rows at most; required for `reasoning_gym`."""
    template: str = "{prompt}"
    """The user message; `{prompt}` becomes the question."""
    system: str | None = None
    """System message."""
    chat: bool = True
    """Apply the chat template; false gives the bare text."""
    enable_thinking: bool | None = None
    """Thinking mode, for chat templates that have one; null leaves the template's default."""
    max_prompt_tokens: Positive | None = None
    """Longest prompt; by default what the context leaves beside `max_new_tokens`."""
    overlong: Literal["error", "drop"] = "error"
    """What to do with longer prompts."""

    @model_validator(mode="after")
    def _source_is_complete(self) -> Self:
        if self.source == "reasoning_gym":
            if not self.families or self.limit is None:
                raise ValueError("source reasoning_gym needs families (generator name: settings) and limit")
            if self.split not in ("train", "held_out"):
                raise ValueError(f"split of reasoning_gym is train or held_out, not {self.split!r}")
        elif self.path is None:
            raise ValueError(f"source {self.source} needs path: a {'Hub id' if self.source == 'hub' else 'file'}")
        if "{prompt}" not in self.template:
            raise ValueError(f"template needs {{prompt}} in it, got {self.template!r}")
        return self


class TrainingDataConfig(DataConfig):
    teacher: str | None = None
    """Which of `teachers` judges the answers to these prompts."""


class SamplingConfig(Section):
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """0 is greedy."""
    top_p: Share = 1.0
    """Keep the most likely tokens that hold this much probability."""
    top_k: NonNegative = 0
    """Keep this many tokens; 0 keeps all."""
    min_p: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Drop tokens less likely than this share of the likeliest."""
    max_new_tokens: Positive = 1024
    """Longest response; one that reaches it is truncated."""
    samples_per_prompt: Positive = 1
    """Responses to each prompt."""
    stop: list[str] = []
    """Further tokens that end a response, beside the end tokens of student and teacher."""


class RolloutConfig(Section):
    engine: Literal["hf"] = "hf"
    """What runs the models that sample: `hf`, transformers in this process."""
    sequences_per_batch: Positive = 64
    """Sequences decoded together."""
    sources: dict[Literal["student", "teacher", "golden"], Share] = {"student": 1.0}
    """Probability that a prompt of a step is answered by each; they sum to 1. `golden`: by the data's worked answer, one
    whatever `samples_per_prompt` is. GKD's lambda (arXiv 2306.13649) is `{student: lambda, golden: 1 - lambda}`."""
    teacher_mixing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """m: the student's rollouts are drawn token by token from `(1 - m) q + m p`. MiniLLM (arXiv 2306.08543): 0.2."""
    importance: Literal["token", "none"] = "token"
    """Rollouts of the teacher and of the mixture are off-policy. `token`: each sampled reward is weighted by
    `min(q / sampling probability, importance_cap)`, detached. `none`: nothing corrects them. Rollouts of the student
    have weight 1; so have golden answers, which no one sampled: their prefixes remain the data's."""
    importance_cap: Annotated[float, Field(gt=0)] = 5.0
    """Largest weight of a sampled reward."""

    @field_validator("sources")
    @classmethod
    def _sources_sum_to_one(cls, sources: dict[str, float]) -> dict[str, float]:
        advice = "give every prompt a source, for example {student: 0.5, golden: 0.5}"
        check_sum("the probabilities", sources, advice)
        return sources

    @model_validator(mode="after")
    def _mixing_has_a_student(self) -> Self:
        if self.teacher_mixing > 0 and "student" not in self.sources:
            raise ValueError(
                f"rollout.teacher_mixing {self.teacher_mixing:g} mixes the teacher into the student's rollouts, but "
                f"rollout.sources is {flow(self.sources)}; give student a share there, or set teacher_mixing to 0"
            )
        return self


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
    """Padded tokens in one forward and backward pass; the gradient does not depend on it."""
    seed: NonNegative = 0
    """Decides data order and every sample."""
    threads: Positive | None = None
    """CPU threads; null leaves the choice to torch. Tiny models are faster with one."""


class EvaluationConfig(Section):
    data: DataConfig | None = None
    """Problems with reference answers; null: no evaluation."""
    every: NonNegative = 0
    """Evaluate every so many steps; 0: only before and after training."""
    samples: Positive = 8
    """Samples per problem, the k of Avg@k and Pass@k."""
    temperature: Annotated[float, Field(ge=0)] = 0.6
    """Sampling temperature of the evaluation."""
    max_new_tokens: Positive | None = None
    """By default that of `sampling`."""
    grading: Literal["math", "exact"] = "math"
    """Compare answers as values (math-verify), or as text alone."""
    teacher: bool = True
    """Evaluate the teacher too, once, before training."""


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
    """Steps between entries of rollouts.jsonl and positions.jsonl."""
    rollouts: NonNegative = 4
    """Rollouts written each time."""


def _form(data: Any) -> str:
    return "several sections" if isinstance(data, list) else "one section"


class Recipe(Section):
    """A training run."""

    student: StudentConfig
    """The model that is trained."""
    teachers: dict[TeacherName, TeacherConfig] = {}
    """Several teachers by name, in the place of `teacher`. Every section of `data` names the one that judges the answers
    to its prompts; or every teacher has a `weight`, and all prompts are judged by the mixture of their probabilities."""
    teacher: Annotated[TeacherConfig | None, Field(validate_default=True)] = None
    """The model that judges every answer."""
    data: Annotated[
        Annotated[TrainingDataConfig, Tag("one section")]
        | Annotated[list[TrainingDataConfig], Field(min_length=1), Tag("several sections")],
        Discriminator(_form),
    ]
    """Where prompts come from: one section, or a list of which all prompts are drawn alike."""
    sampling: SamplingConfig = SamplingConfig()
    rollout: RolloutConfig = RolloutConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
    log: LogConfig = LogConfig()

    @field_validator("objective", mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("teacher")
    @classmethod
    def _one_or_several(cls, teacher: TeacherConfig | None, others: ValidationInfo) -> TeacherConfig | None:
        several = others.data.get("teachers")
        if teacher is None and several == {}:
            raise ValueError("missing, and it has no default; name one teacher, or several under teachers")
        if teacher is not None and several:
            raise ValueError(
                f"a recipe has one teacher or several, got teacher and teachers ({', '.join(several)}); "
                "leave out one, or set teacher: null where extends brings it"
            )
        return teacher

    @model_validator(mode="after")
    def _every_prompt_has_its_teacher(self) -> Self:
        weights = {name: config.weight for name, config in self.named_teachers.items()}
        recipes.check_judges(weights, {key: section.teacher for key, section in self.data_sections.items()})
        return self

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.objective.build().row.on_golden_answers and set(self.rollout.sources) != {"golden"}:
            raise ValueError(
                f"objective.name {self.objective.name} trains on golden answers alone: it needs rollout.sources "
                f"{{golden: 1}}, got {flow(self.rollout.sources)}; set rollout.sources, or choose another objective"
            )
        objective, rollout = self.objective.build(), self.rollout
        weighed = {name: getattr(rollout, name) for name in ("importance", "importance_cap")}
        changed = [name for name, value in weighed.items() if value != RolloutConfig.model_fields[name].default]
        if changed and not (objective.has_score and (rollout.teacher_mixing or "teacher" in rollout.sources)):
            raise ValueError(
                f"rollout.{changed[0]}: {weighed[changed[0]]} does nothing: it weighs the sampled rewards of the teacher's "
                "rollouts, and there are none; leave it out, or change rollout.sources, teacher_mixing or objective.estimator"
            )
        settings = objective.settings
        if settings.get("baseline") == "leave_one_out" and self.sampling.samples_per_prompt < 2:
            raise ValueError(
                "objective.baseline leave_one_out compares the rollouts of one prompt: set sampling.samples_per_prompt to 2 or "
                f"more, got {self.sampling.samples_per_prompt}, or choose baseline exact"
            )
        if settings.get("baseline") == "leave_one_out" and set(rollout.sources) == {"golden"}:
            raise ValueError(
                "objective.baseline leave_one_out compares the rollouts of one prompt, and rollout.sources {golden: 1} has "
                "one answer to each; choose another baseline"
            )
        if self.guard.action == "raise_reference_kl" and not settings.get("reference_kl", 0):
            raise ValueError(
                "guard.action raise_reference_kl needs a KL to raise: set objective.reference_kl above 0, or choose warn or "
                "stop"
            )
        return self

    @property
    def named_teachers(self) -> dict[str, TeacherConfig]:
        """Every model that judges, by name."""
        return dict(self.teachers) if self.teacher is None else {ALONE: self.teacher}

    @property
    def judges(self) -> dict[str, dict[str, float]]:
        """Who judges answers: the models of each judge, with their shares. Where there are several, each is the one
        model of its name, and judges the answers to the prompts that name it."""
        shares = {name: 1.0 if config.weight is None else config.weight for name, config in self.named_teachers.items()}
        if len(shares) == 1 or any(config.weight is not None for config in self.teachers.values()):
            return {ALONE: shares}
        return {name: {name: share} for name, share in shares.items()}

    @property
    def data_sections(self) -> dict[str, TrainingDataConfig]:
        """Every section of `data` by its key: `data`, or `data.0`, `data.1`, ..."""
        if not isinstance(self.data, list):
            return {"data": self.data}
        return {f"data.{place}": section for place, section in enumerate(self.data)}

    def to_yaml(self) -> str:
        """The whole recipe with every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, width=120)


def label(teacher: str) -> str:
    """What messages call a teacher: `teacher`, or `teacher math`."""
    return teacher if teacher == ALONE else f"{ALONE} {teacher}"


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Read a YAML recipe, its `extends:` parents first, then `a.b=c` overrides.

    Raises:
        ConfigError: every problem found, one line each.
    """
    values = recipes.read(path)
    for setting in overrides or []:
        values = recipes.override(values, setting)
    return parse_recipe(values)


def parse_recipe(values: dict[str, Any]) -> Recipe:
    """A recipe from nested values.

    Raises:
        ConfigError: every problem found, one line each.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        lines = dict.fromkeys(recipes.in_words(problem, Recipe) for problem in error.errors())
        raise ConfigError("\n".join(lines)) from None

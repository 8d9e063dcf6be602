"""The recipe: every setting, its default, its range and its meaning, in one place."""

from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from poweropd import objectives
from poweropd.errors import ConfigError

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(gt=0, le=1)]


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
    engine: Literal["hf", "golden"] = "hf"
    """`hf`: the student samples. `golden`: the data's golden answers are used instead, for `sft`."""
    sequences_per_batch: Positive = 64
    """Sequences decoded together."""


class ObjectiveConfig(BaseModel):
    """`name`, `end_token`, and the settings of that row of the objective table."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)

    name: str = "power"
    """A row of `poweropd objectives`."""
    end_token: Literal["map", "mask", "keep"] = "map"
    """Where student and teacher end answers differently: `map` counts all end tokens as one outcome, `mask` trains on
    none, `keep` scores them as they stand."""

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


class LogConfig(Section):
    rollouts_every: Positive = 10
    """Steps between entries of rollouts.jsonl and positions.jsonl."""
    rollouts: NonNegative = 4
    """Rollouts written each time."""


class Recipe(Section):
    """A training run."""

    student: StudentConfig
    teacher: TeacherConfig
    data: DataConfig
    sampling: SamplingConfig = SamplingConfig()
    rollout: RolloutConfig = RolloutConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    @field_validator("objective", mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        golden = self.objective.build().row.on_golden_answers
        if golden != (self.rollout.engine == "golden"):
            raise ValueError(
                f"objective.name {self.objective.name} needs rollout.engine {'golden' if golden else 'hf'}, "
                f"got {self.rollout.engine}"
            )
        return self

    def to_yaml(self) -> str:
        """The whole recipe with every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, width=120)


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Read a YAML recipe, its `extends:` parents first, then `a.b=c` overrides.

    Raises:
        ConfigError: every problem found, one line each.
    """
    values = _read(path)
    for override in overrides or []:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"--set {override!r}: give it as section.key=value, for example train.steps=20")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"--set {override!r}: the value is not valid YAML") from None
        if key == "objective.name":
            _forget_settings_of_other_objective(values, value)
        _set(values, key.split("."), value)
    return parse_recipe(values)


def parse_recipe(values: dict[str, Any]) -> Recipe:
    """A recipe from nested values.

    Raises:
        ConfigError: every problem found, one line each.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(dict.fromkeys(_line(problem) for problem in error.errors()))) from None


def _read(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    if path.resolve() in seen:
        raise ConfigError(f"{path}: its extends chain comes back to itself")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read recipe {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(
            f"recipe {path} holds a {type(values).__name__}; sections such as student, teacher, data are needed"
        )
    parent = values.pop("extends", None)
    return values if parent is None else _merge(_read(path.parent / parent, (*seen, path.resolve())), values)


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    both = {
        key: _merge(below[key], value) if isinstance(value, dict) and isinstance(below.get(key), dict) else value
        for key, value in above.items()
    }
    return {**below, **both}


def _set(values: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        below = values.get(key)
        if isinstance(below, str) and key == "objective":
            below = {"name": below}
        values[key] = values = dict(below) if isinstance(below, dict) else {}
    values[keys[-1]] = value


def _forget_settings_of_other_objective(values: dict[str, Any], name: Any) -> None:
    """A setting of one objective means nothing to another: a new name starts from a bare section."""
    section = values.get("objective")
    if isinstance(section, dict) and section.get("name", "power") != name:
        values["objective"] = {key: section[key] for key in ("end_token",) if key in section}


def _line(problem: Any) -> str:
    """One validation problem in words: where, what is wrong, what was received, what is accepted."""
    location = [str(part) for part in problem["loc"]]
    name = ".".join(location)
    if problem["type"] == "extra_forbidden":
        known = _fields_at(location[:-1])
        match = get_close_matches(location[-1], known, n=1)
        hint = f"did you mean {match[0]!r}?" if match else f"known here: {', '.join(known)}"
        return f"{name}: unknown key; {hint}"
    if problem["type"] == "missing":
        return f"{name}: missing, and it has no default"
    if problem["type"] == "value_error":
        message = str(problem["ctx"]["error"])
        return message if not name or message.startswith(f"{name}.") else f"{name}: {message}"
    message = problem["msg"][:1].lower() + problem["msg"][1:]
    return f"{name}: {message}, got {problem['input']!r}"


def _fields_at(location: list[str]) -> list[str]:
    """Names of the settings of the section at `location`."""
    section: Any = Recipe
    for part in location:
        annotation = section.model_fields[part].annotation
        section = next(
            (t for t in (annotation, *get_args(annotation)) if isinstance(t, type) and issubclass(t, BaseModel)), None
        )
        if section is None:
            return []
    return list(section.model_fields)

"""The recipe: its sections together, and what they must agree on."""

from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import Discriminator, Field, Tag, ValidationError, ValidationInfo, field_validator, model_validator

from poweropd import recipes
from poweropd.errors import ConfigError
from poweropd.recipes import flow
from poweropd.sections import (
    CheckpointConfig,
    EvaluationConfig,
    GuardConfig,
    LogConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RolloutConfig,
    SamplingConfig,
    Section,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
    TrainingDataConfig,
)

TeacherName = Annotated[str, Field(pattern="^[A-Za-z0-9_-]+$")]  # it names a folder too
ALONE = "teacher"  # what the teacher goes by where there is one, or one mixture


def _form(data: Any) -> str:
    return "several sections" if isinstance(data, list) else "one section"


class Recipe(Section):
    """A training run."""

    student: StudentConfig
    """The model that is trained."""
    teachers: dict[TeacherName, TeacherConfig] = Field(default_factory=dict)
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
        off_policy = rollout.teacher_mixing or rollout.max_staleness or "teacher" in rollout.sources
        if changed and not (objective.has_score and off_policy):
            raise ValueError(
                f"rollout.{changed[0]}: {weighed[changed[0]]} does nothing: it weighs the sampled rewards of off-policy "
                "rollouts, and there are none; leave it out, or change rollout.sources, teacher_mixing, max_staleness or "
                "objective.estimator"
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

    @model_validator(mode="after")
    def _teachers_can_do_what_is_asked(self) -> Self:
        teachers = self.named_teachers
        remote = [name for name, config in teachers.items() if not config.can_sample]
        asked = "rollout.teacher_mixing" if self.rollout.teacher_mixing else "rollout.sources teacher"
        if remote and (self.rollout.teacher_mixing or "teacher" in self.rollout.sources):
            raise ValueError(
                f"{asked} samples from the teacher, and {label(remote[0])} is "
                + (
                    "sharded and only scores; leave it out, or use sharding: none"
                    if teachers[remote[0]].is_local
                    else "behind a server that only scores; leave it out, or use engine: hf"
                )
            )
        sharded = [name for name, config in teachers.items() if config.sharding == "fsdp"]
        if sharded and len(teachers) > 1:
            raise ValueError(
                f"teachers.{sharded[0]}.sharding: fsdp is for one teacher, got {len(teachers)}; leave it out, or serve them "
                "by `poweropd serve-teacher`"
            )
        mixed = len(teachers) > 1 and len(self.judges) == 1
        numbers_alone = [name for name, config in teachers.items() if config.engine == "vllm"]
        if mixed and numbers_alone:
            raise ValueError(
                f"teachers.{numbers_alone[0]}.engine: vllm gives numbers of single tokens, and a mixture needs whole "
                "distributions; serve it by `poweropd serve-teacher` (engine: served)"
            )
        cached = [name for name, config in teachers.items() if config.cache]
        if cached and (mixed or self.objective.build().needs == "full"):
            what = "a mixture" if mixed else f"objective {self.objective.name}"
            raise ValueError(
                f"{label(cached[0])} has a cache, which keeps numbers of single tokens, and {what} needs whole distributions; "
                "leave out cache" + ("" if mixed else ", or set objective.estimator: sampled or top_k")
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

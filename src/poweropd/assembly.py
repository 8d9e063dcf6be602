"""The parts of a run, built and checked from its recipe: everything wrong with them is said before the first step."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from poweropd.config import DataConfig, Recipe, StudentConfig, TeacherConfig, label
from poweropd.errors import ConfigError, ModelError
from poweropd.models import default_device, load_model, load_tokenizer, resolve_precision
from poweropd.objectives import Objective
from poweropd.policy import Student
from poweropd.prompts import PromptStream, load_prompts
from poweropd.rollout.engine import RolloutEngine, Sampling
from poweropd.rollout.golden import GoldenEngine
from poweropd.rollout.hf import HFEngine
from poweropd.rollout.sources import RoutedEngine, SourceEngine
from poweropd.teacher.ensemble import MixtureTeacher, RoutedTeacher
from poweropd.teacher.hf import HFTeacher
from poweropd.teacher.scorer import TeacherScorer
from poweropd.types import Prompt, Source
from poweropd.update import MicroBatches
from poweropd.vocabulary import EndTokens, end_token_ids, shared_vocab_size


@dataclass(frozen=True)
class ModelPair:
    """The student and its teacher, or teachers by name, as loaded, and what they share."""

    student: PreTrainedModel
    teachers: Mapping[str, PreTrainedModel]
    tokenizer: PreTrainedTokenizerBase
    teacher_tokenizers: Mapping[str, PreTrainedTokenizerBase]
    vocab_size: int
    end_tokens: EndTokens
    precision: torch.dtype

    @property
    def pad_id(self) -> int:
        return self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.end_tokens.student[0]

    @property
    def context(self) -> int:
        """Positions that all models were made for."""
        return min(model.config.get_text_config().max_position_embeddings for model in self.models.values())

    @property
    def models(self) -> dict[str, PreTrainedModel]:
        """The student and every teacher, by what messages call them."""
        return {"student": self.student, **{label(name): model for name, model in self.teachers.items()}}

    @property
    def templating(self) -> PreTrainedTokenizerBase:
        """Whose chat template is applied: the student's, else that of the first teacher that has one."""
        tokenizers = (self.tokenizer, *self.teacher_tokenizers.values())
        return next((tokenizer for tokenizer in tokenizers if tokenizer.chat_template), self.tokenizer)

    def introduction(self) -> list[str]:
        """What a user should know of the pair before it is trained."""
        sizes = ", ".join(f"{name} {_readable(model.num_parameters())}" for name, model in self.models.items())
        lines = [f"{sizes} parameters; {self.vocab_size} tokens; {self.student.device.type}"]
        ends = self.end_tokens
        if ends.differ:
            every = {"student": ends.student, **{label(name): ids for name, ids in ends.teachers.items()}}
            spelt = ", ".join(
                f"{' or '.join(map(str, self.tokenizer.convert_ids_to_tokens(list(ids))))} ({name})"
                for name, ids in every.items()
            )
            handling = {
                "map": f"{'both' if len(every) == 2 else 'all'} count as one outcome",
                "mask": "none is trained on",
                "keep": "scored as they stand, so the student may learn never to end",
            }[ends.policy]
            lines.append(f"end tokens differ: {spelt}; {handling} (objective.end_token={ends.policy})")
        return lines


def _readable(count: int) -> str:
    """`630M`, `1.78B`."""
    return f"{count / 1e6:.3g}M" if count < 1e9 else f"{count / 1e9:.3g}B"


def load_pair(recipe: Recipe) -> ModelPair:
    """Load all models and settle vocabulary and end tokens.

    Raises:
        ModelError: a model cannot be read, or a teacher does not fit the student.
    """
    device = default_device()
    named = recipe.named_teachers
    tokenizer = load_tokenizer(recipe.student.model, recipe.student.revision)
    tokenizers = {name: load_tokenizer(config.model, config.revision) for name, config in named.items()}
    student = _load(recipe.student, torch.float32)
    teachers = {name: _load(config, resolve_precision(config.precision, device)) for name, config in named.items()}
    sizes = [
        shared_vocab_size(tokenizer, tokenizers[name], head_rows(student), head_rows(teacher), name=label(name))
        for name, teacher in teachers.items()
    ]
    return ModelPair(
        student=student,
        teachers=teachers,
        tokenizer=tokenizer,
        teacher_tokenizers=tokenizers,
        vocab_size=min(sizes),
        end_tokens=EndTokens(
            student=_end_ids(student, tokenizer, recipe.student),
            teachers={name: _end_ids(teacher, tokenizers[name], named[name]) for name, teacher in teachers.items()},
            policy=recipe.objective.end_token,
        ),
        precision=resolve_precision(recipe.student.precision, device),
    )


def _load(config: StudentConfig | TeacherConfig, dtype: torch.dtype) -> PreTrainedModel:
    return load_model(config.model, dtype=dtype, device=default_device(), revision=config.revision)


def head_rows(model: PreTrainedModel) -> int:
    """Rows of the LM head, padding included."""
    return int(model.get_output_embeddings().weight.shape[0])


def _end_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: StudentConfig | TeacherConfig
) -> tuple[int, ...]:
    ids = end_token_ids(model, tokenizer)
    if not ids:
        raise ModelError(f"{config.model!r} names no end token (eos_token_id); set one in its generation_config.json")
    return ids


@dataclass(frozen=True)
class Problems:
    """What an evaluation asks and how it samples."""

    name: str
    prompts: list[Prompt]
    sampling: Sampling


@dataclass(frozen=True)
class Parts:
    """Everything the training loop works with."""

    pair: ModelPair
    student: Student
    teacher: TeacherScorer  # judges, whichever models that takes
    teachers: Mapping[str, TeacherScorer]  # each alone, by name
    engine: RolloutEngine  # gives the trajectories that are trained on
    student_engine: RolloutEngine  # samples from the student, for evaluation
    teacher_engines: Mapping[str, RolloutEngine]  # samples from each judge, for evaluation
    objective: Objective
    reference: TeacherScorer | None  # the frozen initial student, where the objective is held to it
    how: MicroBatches
    stream: PromptStream
    sampling: Sampling
    problems: Problems | None
    data_fingerprint: str


def assemble(recipe: Recipe) -> Parts:
    """Build every part of a run.

    Raises:
        ConfigError, ModelError: what is wrong, all problems of the data together.
    """
    pair = load_pair(recipe)
    objective = recipe.objective.build()
    sampling = Sampling(
        stop_ids=pair.end_tokens.stop_ids + _single_ids(recipe.sampling.stop, pair.tokenizer, "sampling.stop"),
        **recipe.sampling.model_dump(exclude={"stop"}),
    )
    prompts, problems = load_data(recipe, pair, sampling)
    student = Student(
        pair.student,
        pair.tokenizer,
        recipe.optimizer,
        vocab_size=pair.vocab_size,
        end_ids=pair.end_tokens.merged_ids,
        steps=recipe.train.steps,
        precision=pair.precision,
        gradient_checkpointing=recipe.student.gradient_checkpointing,
    )
    teachers = {
        name: _scorer(pair.teachers[name], pair, config.tokens_per_batch)
        for name, config in recipe.named_teachers.items()
    }
    rollout = recipe.rollout
    teacher_engines = _engines(recipe, pair, 1.0, "teacher")
    engines: dict[Source, RolloutEngine] = {
        "student": _student_engine(recipe, pair),
        "teacher": _for_each_prompt(teacher_engines),
        "golden": GoldenEngine(),
    }
    if rollout.teacher_mixing:
        engines["student"] = _for_each_prompt(_engines(recipe, pair, rollout.teacher_mixing, "mixture"))
    return Parts(
        pair=pair,
        student=student,
        teacher=_judge(recipe, teachers),
        teachers=teachers,
        engine=SourceEngine(engines, dict(rollout.sources.items())),
        student_engine=_student_engine(recipe, pair),
        teacher_engines=teacher_engines,
        objective=objective,
        reference=_reference(recipe, pair) if objective.needs_of_reference != "nothing" else None,
        how=MicroBatches(
            tokens=recipe.train.tokens_per_micro_batch,
            pad_id=pair.pad_id,
            masked_end_ids=pair.end_tokens.masked_ids,
            masked_ids=_single_ids(recipe.objective.masked_tokens, pair.tokenizer, "objective.masked_tokens"),
            importance_cap=rollout.importance_cap if rollout.importance == "token" else None,
        ),
        stream=PromptStream(prompts, seed=recipe.train.seed),
        sampling=sampling,
        problems=problems,
        data_fingerprint=fingerprint(prompts),
    )


def _scorer(model: PreTrainedModel, pair: ModelPair, tokens_per_batch: int) -> HFTeacher:
    return HFTeacher(
        model, vocab_size=pair.vocab_size, end_ids=pair.end_tokens.merged_ids, tokens_per_batch=tokens_per_batch
    )


def _judge(recipe: Recipe, teachers: Mapping[str, TeacherScorer]) -> TeacherScorer:
    def mixture(shares: Mapping[str, float]) -> TeacherScorer:
        members = [teachers[name] for name in shares]
        if len(members) == 1:
            return members[0]
        return MixtureTeacher(members, list(shares.values()), tokens_per_batch=_least_tokens_per_batch(recipe))

    judges = {name: mixture(shares) for name, shares in recipe.judges.items()}
    return RoutedTeacher(judges) if len(judges) > 1 else next(iter(judges.values()))


def _least_tokens_per_batch(recipe: Recipe) -> int:
    return min(config.tokens_per_batch for config in recipe.named_teachers.values())


def _student_engine(recipe: Recipe, pair: ModelPair) -> HFEngine:
    return _sampler([(pair.student, 1.0)], recipe, pair, "student")


def _engines(recipe: Recipe, pair: ModelPair, share: float, source: Source) -> dict[str, RolloutEngine]:
    """For each judge, an engine that samples from its mixture with the student, in which the judge has `share`."""
    student = [(pair.student, 1 - share)] if share < 1 else []
    return {
        name: _sampler(
            [*student, *((pair.teachers[member], share * own) for member, own in shares.items())], recipe, pair, source
        )
        for name, shares in recipe.judges.items()
    }


def _sampler(
    models: Sequence[tuple[PreTrainedModel, float]], recipe: Recipe, pair: ModelPair, source: Source
) -> HFEngine:
    (first, _), *mixed_in = models
    return HFEngine(
        first,
        vocab_size=pair.vocab_size,
        pad_id=pair.pad_id,
        precision=pair.precision,
        sequences_per_batch=recipe.rollout.sequences_per_batch,
        source=source,
        mixed_in=mixed_in,
    )


def _for_each_prompt(engines: Mapping[str, RolloutEngine]) -> RolloutEngine:
    return RoutedEngine(engines) if len(engines) > 1 else next(iter(engines.values()))


def load_data(recipe: Recipe, pair: ModelPair, sampling: Sampling) -> tuple[list[Prompt], Problems | None]:
    """Training prompts, and the problems of the evaluation if there is one.

    Raises:
        ConfigError: all problems of all data sets together.
    """
    complaints: list[str] = []

    def load(config: DataConfig, key: str, max_new_tokens: int) -> list[Prompt]:
        try:
            return load_prompts(
                config,
                pair.templating,
                end_id=pair.end_tokens.student[0],
                max_prompt_tokens=pair.context - max_new_tokens,
                seed=recipe.train.seed,
                key=key,
            )
        except ConfigError as error:
            complaints.append(str(error))
            return []

    wants_golden = {
        "rollout.sources has golden": "golden" in recipe.rollout.sources,
        "objective.golden is above 0": recipe.objective.build().golden_weight > 0,
    }
    prompts: list[Prompt] = []
    for place, (key, section) in enumerate(recipe.data_sections.items()):
        found = load(section, key, sampling.max_new_tokens)
        if any(prompt.golden_ids is None for prompt in found):
            complaints += [
                f"{setting}, but the prompts have no worked answers; set {key}.golden to the column that holds them"
                for setting, wanted in wants_golden.items()
                if wanted
            ]
        prefix = f"{place}/" if len(recipe.data_sections) > 1 else ""
        prompts += [replace(prompt, id=f"{prefix}{prompt.id}", teacher=section.teacher) for prompt in found]
    problems = None
    if (asked := recipe.evaluation).data is not None:
        if asked.data.answer is None:
            complaints.append("evaluation.data.answer: an evaluation needs the column with reference answers")
        max_new_tokens = asked.max_new_tokens or sampling.max_new_tokens
        problems = Problems(
            name=Path(asked.data.path).stem if asked.data.path else asked.data.split,
            prompts=load(asked.data, "evaluation.data", max_new_tokens),
            sampling=Sampling(
                stop_ids=sampling.stop_ids,
                max_new_tokens=max_new_tokens,
                temperature=asked.temperature,
                samples_per_prompt=asked.samples,
            ),
        )
    if complaints:
        raise ConfigError("\n".join(complaints))
    return prompts, problems


def _reference(recipe: Recipe, pair: ModelPair) -> HFTeacher:
    """The student as it was before the first step, also in a run that is resumed."""
    return _scorer(_load(recipe.student, pair.precision), pair, _least_tokens_per_batch(recipe))


def _single_ids(texts: list[str], tokenizer: PreTrainedTokenizerBase, key: str) -> tuple[int, ...]:
    ids = []
    for text in texts:
        encoded = tokenizer.encode(text, add_special_tokens=False)
        if len(encoded) != 1:
            raise ConfigError(f"{key}: {text!r} is {len(encoded)} tokens; only single tokens can be named here")
        ids += encoded
    return tuple(ids)


def fingerprint(prompts: list[Prompt]) -> str:
    """A hash of every prompt's tokens and answer, in order."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(repr((prompt.id, prompt.prompt_ids, prompt.answer, prompt.golden_ids)).encode())
    return digest.hexdigest()

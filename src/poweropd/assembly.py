"""The parts of a run, built and checked from its recipe: everything wrong with them is said before the first step."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from poweropd.config import DataConfig, Recipe
from poweropd.errors import ConfigError, ModelError
from poweropd.models import default_device, load_model, load_tokenizer, resolve_precision
from poweropd.objectives import Objective
from poweropd.policy import Student
from poweropd.prompts import PromptStream, load_prompts
from poweropd.rollout.engine import RolloutEngine, Sampling
from poweropd.rollout.golden import GoldenEngine
from poweropd.rollout.hf import HFEngine
from poweropd.rollout.sources import SourceEngine
from poweropd.teacher.hf import HFTeacher
from poweropd.teacher.scorer import TeacherScorer
from poweropd.types import Prompt, Source
from poweropd.update import MicroBatches
from poweropd.vocabulary import EndTokens, end_token_ids, shared_vocab_size


@dataclass(frozen=True)
class ModelPair:
    """Student and teacher as loaded, and what they share."""

    student: PreTrainedModel
    teacher: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    teacher_tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    end_tokens: EndTokens
    precision: torch.dtype

    @property
    def pad_id(self) -> int:
        return self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.end_tokens.student[0]

    @property
    def context(self) -> int:
        """Positions that both models were made for."""
        return min(m.config.get_text_config().max_position_embeddings for m in (self.student, self.teacher))

    def introduction(self) -> list[str]:
        """What a user should know of the pair before it is trained."""
        sizes = [_readable(model.num_parameters()) for model in (self.student, self.teacher)]
        lines = [
            f"student {sizes[0]}, teacher {sizes[1]} parameters; {self.vocab_size} tokens; {self.student.device.type}"
        ]
        ends = self.end_tokens
        if ends.differ:
            student, teacher = (
                " or ".join(map(str, self.tokenizer.convert_ids_to_tokens(list(ids))))
                for ids in (ends.student, ends.teacher)
            )
            handling = {
                "map": "both count as one outcome",
                "mask": "neither is trained on",
                "keep": "scored as they stand, so the student may learn never to end",
            }[ends.policy]
            lines.append(
                f"end tokens differ: {student} (student), {teacher} (teacher); {handling} "
                f"(objective.end_token={ends.policy})"
            )
        return lines


def _readable(count: int) -> str:
    """`630M`, `1.78B`."""
    return f"{count / 1e6:.3g}M" if count < 1e9 else f"{count / 1e9:.3g}B"


def load_pair(recipe: Recipe) -> ModelPair:
    """Load both models and settle vocabulary and end tokens.

    Raises:
        ModelError: a model cannot be read, or the two do not fit together.
    """
    device = default_device()
    tokenizer = load_tokenizer(recipe.student.model, recipe.student.revision)
    teacher_tokenizer = load_tokenizer(recipe.teacher.model, recipe.teacher.revision)
    student = load_model(recipe.student.model, dtype=torch.float32, device=device, revision=recipe.student.revision)
    teacher = load_model(
        recipe.teacher.model,
        dtype=resolve_precision(recipe.teacher.precision, device),
        device=device,
        revision=recipe.teacher.revision,
    )
    rows = [model.get_output_embeddings().weight.shape[0] for model in (student, teacher)]
    student_ends, teacher_ends = end_token_ids(student, tokenizer), end_token_ids(teacher, teacher_tokenizer)
    for ids, name in ((student_ends, recipe.student.model), (teacher_ends, recipe.teacher.model)):
        if not ids:
            raise ModelError(f"{name!r} names no end token (eos_token_id); set one in its generation_config.json")
    return ModelPair(
        student=student,
        teacher=teacher,
        tokenizer=tokenizer,
        teacher_tokenizer=teacher_tokenizer,
        vocab_size=shared_vocab_size(tokenizer, teacher_tokenizer, *rows),
        end_tokens=EndTokens(student_ends, teacher_ends, recipe.objective.end_token),
        precision=resolve_precision(recipe.student.precision, device),
    )


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
    teacher: TeacherScorer
    engine: RolloutEngine  # gives the trajectories that are trained on
    student_engine: RolloutEngine  # samples from the student, for evaluation
    teacher_engine: RolloutEngine  # samples from the teacher, for evaluation
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
    teacher = HFTeacher(
        pair.teacher,
        vocab_size=pair.vocab_size,
        end_ids=pair.end_tokens.merged_ids,
        tokens_per_batch=recipe.teacher.tokens_per_batch,
    )
    rollout = recipe.rollout
    student_engine = sampler(pair.student, pair, rollout.sequences_per_batch)
    teacher_engine = sampler(pair.teacher, pair, rollout.sequences_per_batch, source="teacher")
    mixed_in = (pair.teacher, rollout.teacher_mixing) if rollout.teacher_mixing else None
    engines: dict[Source, RolloutEngine] = {
        "student": sampler(pair.student, pair, rollout.sequences_per_batch, mixed_in=mixed_in),
        "teacher": teacher_engine,
        "golden": GoldenEngine(),
    }
    return Parts(
        pair=pair,
        student=student,
        teacher=teacher,
        engine=SourceEngine(engines, dict(rollout.sources.items())),
        student_engine=student_engine,
        teacher_engine=teacher_engine,
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


def sampler(
    model: PreTrainedModel,
    pair: ModelPair,
    sequences_per_batch: int,
    *,
    source: Source = "student",
    mixed_in: tuple[PreTrainedModel, float] | None = None,
) -> HFEngine:
    return HFEngine(
        model,
        vocab_size=pair.vocab_size,
        pad_id=pair.pad_id,
        precision=pair.precision,
        sequences_per_batch=sequences_per_batch,
        source=source,
        mixed_in=mixed_in,
    )


def load_data(recipe: Recipe, pair: ModelPair, sampling: Sampling) -> tuple[list[Prompt], Problems | None]:
    """Training prompts, and the problems of the evaluation if there is one.

    Raises:
        ConfigError: all problems of both data sets together.
    """
    complaints: list[str] = []
    tokenizer = pair.tokenizer if pair.tokenizer.chat_template else pair.teacher_tokenizer

    def load(config: DataConfig, key: str, max_new_tokens: int) -> list[Prompt]:
        try:
            return load_prompts(
                config,
                tokenizer,
                end_id=pair.end_tokens.student[0],
                max_prompt_tokens=pair.context - max_new_tokens,
                seed=recipe.train.seed,
                key=key,
            )
        except ConfigError as error:
            complaints.append(str(error))
            return []

    prompts = load(recipe.data, "data", sampling.max_new_tokens)
    wants_golden = {
        "rollout.sources has golden": "golden" in recipe.rollout.sources,
        "objective.golden is above 0": recipe.objective.build().golden_weight > 0,
    }
    if any(prompt.golden_ids is None for prompt in prompts):
        complaints += [
            f"{setting}, but the prompts have no worked answers; set data.golden to the column that holds them"
            for setting, wanted in wants_golden.items()
            if wanted
        ]
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
    model = load_model(
        recipe.student.model, dtype=pair.precision, device=default_device(), revision=recipe.student.revision
    )
    return HFTeacher(
        model,
        vocab_size=pair.vocab_size,
        end_ids=pair.end_tokens.merged_ids,
        tokens_per_batch=recipe.teacher.tokens_per_batch,
    )


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

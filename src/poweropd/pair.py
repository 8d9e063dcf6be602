"""The models of a run: the student and its teachers, loaded and checked to speak of the same tokens."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from poweropd.config import Recipe, label
from poweropd.errors import ModelError
from poweropd.models import default_device, load_model, load_outline, load_tokenizer, resolve_precision
from poweropd.sections import StudentConfig, TeacherConfig
from poweropd.vocabulary import EndTokens, end_token_ids, shared_vocab_size


@dataclass(frozen=True)
class TeacherModel:
    """What is known of a teacher.

    Attributes:
        head_rows: rows of its LM head, padding included.
        context: positions that it was made for.
        end_ids: tokens that end its answers.
        model: as loaded; None of one behind a server.
        url: of that server.
    """

    tokenizer: PreTrainedTokenizerBase
    head_rows: int
    context: int
    end_ids: tuple[int, ...]
    parameters: int
    model: PreTrainedModel | None = None
    url: str | None = None

    @classmethod
    def load(cls, config: TeacherConfig) -> Self:
        """Load it; of one behind a server tokenizer and config alone.

        Raises:
            ModelError: it cannot be read, or names no end token.
        """
        tokenizer = load_tokenizer(config.model, config.revision)
        if config.is_local:
            model = load_configured(config, resolve_precision(config.precision, default_device()))
        else:
            model = load_outline(config.model, config.revision)
        return cls(
            tokenizer=tokenizer,
            head_rows=head_rows(model),
            context=context(model),
            end_ids=_end_ids(model, tokenizer, config),
            parameters=model.num_parameters(),
            model=model if config.is_local else None,
            url=config.url,
        )


@dataclass(frozen=True)
class ModelPair:
    """The student and its teacher, or teachers by name, and what they share."""

    student: PreTrainedModel
    teachers: Mapping[str, TeacherModel]
    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    end_tokens: EndTokens
    precision: torch.dtype

    @property
    def pad_id(self) -> int:
        return self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.end_tokens.student[0]

    @property
    def context(self) -> int:
        """Positions that all models were made for."""
        return min(context(self.student), *(teacher.context for teacher in self.teachers.values()))

    @property
    def templating(self) -> PreTrainedTokenizerBase:
        """Whose chat template is applied: the student's, else that of the first teacher that has one."""
        tokenizers = (self.tokenizer, *(teacher.tokenizer for teacher in self.teachers.values()))
        return next((tokenizer for tokenizer in tokenizers if tokenizer.chat_template), self.tokenizer)

    def introduction(self) -> list[str]:
        """What a user should know of the pair before it is trained."""
        counts = {"student": self.student.num_parameters()}
        counts |= {label(name): teacher.parameters for name, teacher in self.teachers.items()}
        sizes = ", ".join(f"{name} {readable(count)}" for name, count in counts.items())
        lines = [f"{sizes} parameters; {self.vocab_size} tokens; {self.student.device.type}"]
        lines += [
            f"{label(name)} is at {teacher.url}; it scores and does not sample, so it is not evaluated"
            for name, teacher in self.teachers.items()
            if teacher.url is not None
        ]
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


def readable(count: int) -> str:
    """`630M`, `1.78B`."""
    return f"{count / 1e6:.3g}M" if count < 1e9 else f"{count / 1e9:.3g}B"


def load_pair(recipe: Recipe) -> ModelPair:
    """Load all models and settle vocabulary and end tokens.

    Raises:
        ModelError: a model cannot be read, or a teacher does not fit the student.
    """
    tokenizer = load_tokenizer(recipe.student.model, recipe.student.revision)
    student = load_configured(recipe.student, torch.float32)
    teachers = {name: TeacherModel.load(config) for name, config in recipe.named_teachers.items()}
    sizes = [
        shared_vocab_size(tokenizer, teacher.tokenizer, head_rows(student), teacher.head_rows, name=label(name))
        for name, teacher in teachers.items()
    ]
    return ModelPair(
        student=student,
        teachers=teachers,
        tokenizer=tokenizer,
        vocab_size=min(sizes),
        end_tokens=EndTokens(
            student=_end_ids(student, tokenizer, recipe.student),
            teachers={name: teacher.end_ids for name, teacher in teachers.items()},
            policy=recipe.objective.end_token,
        ),
        precision=resolve_precision(recipe.student.precision, default_device()),
    )


def load_configured(config: StudentConfig | TeacherConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a recipe's section, on the default device."""
    how = config.model_dump(include={"quantization", "offload"})
    return load_model(config.model, dtype=dtype, device=default_device(), revision=config.revision, **how)


def head_rows(model: PreTrainedModel) -> int:
    """Rows of the LM head, padding included."""
    return int(model.get_output_embeddings().weight.shape[0])


def context(model: PreTrainedModel) -> int:
    """Positions that it was made for."""
    return int(model.config.get_text_config().max_position_embeddings)


def _end_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: StudentConfig | TeacherConfig
) -> tuple[int, ...]:
    ids = end_token_ids(model, tokenizer)
    if not ids:
        raise ModelError(f"{config.model!r} names no end token (eos_token_id); set one in its generation_config.json")
    return ids

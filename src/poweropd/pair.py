"""The models of a run: the student and its teachers, loaded and checked to speak of the same tokens."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from poweropd.config import Recipe, label
from poweropd.errors import ModelError
from poweropd.models import default_device, load_model, load_tokenizer, resolve_precision
from poweropd.sections import StudentConfig, TeacherConfig
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
        sizes = ", ".join(f"{name} {readable(model.num_parameters())}" for name, model in self.models.items())
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


def readable(count: int) -> str:
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
    student = load_configured(recipe.student, torch.float32)
    teachers = {
        name: load_configured(config, resolve_precision(config.precision, device)) for name, config in named.items()
    }
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


def load_configured(config: StudentConfig | TeacherConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a recipe's section, on the default device."""
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

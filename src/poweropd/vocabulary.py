"""What models must share to speak of the same tokens: ids, real vocabulary size, end tokens."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from poweropd.errors import ModelError

EndTokenPolicy = Literal["map", "mask", "keep"]


def real_vocab_size(tokenizer: PreTrainedTokenizerBase, head_rows: int) -> int:
    """Ids that mean a token: the tokenizer's largest id plus one, at most the rows of the LM head."""
    return min(max(tokenizer.get_vocab().values()) + 1, head_rows)


def shared_vocab_size(
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    student_rows: int,
    teacher_rows: int,
    *,
    name: str = "teacher",
) -> int:
    """The ids below this number mean the same token to both models; at or above it both only have padding or extras.

    Qwen2.5 pads its head to 151,936 or 152,064 rows according to model size; both have the same 151,665 tokens.

    Args:
        student_rows, teacher_rows: of their LM heads.
        name: what messages call the teacher.

    Raises:
        ModelError: an id below that number means different tokens.
    """
    size = min(real_vocab_size(student, student_rows), real_vocab_size(teacher, teacher_rows))
    student_tokens, teacher_tokens = (
        {id: token for token, id in tokenizer.get_vocab().items() if id < size} for tokenizer in (student, teacher)
    )
    different = [id for id in range(size) if student_tokens.get(id) != teacher_tokens.get(id)]
    if different:
        first = different[0]
        raise ModelError(
            f"student and {name} have different tokenizers: {len(different)} of {size} ids differ, first id {first} "
            f"({student_tokens.get(first)!r} and {teacher_tokens.get(first)!r}). Choose two models of one family"
        )
    return size


def vocabulary_hash(tokenizer: PreTrainedTokenizerBase, size: int) -> str:
    """A hash of the tokens that the ids below `size` mean."""
    tokens = sorted((id, token) for token, id in tokenizer.get_vocab().items() if id < size)
    return hashlib.blake2b(json.dumps(tokens).encode(), digest_size=16).hexdigest()


def end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that end this model's answers: those of its generation config and its tokenizer's, in order."""
    declared: Iterable[int | list[int] | None] = (
        getattr(model.generation_config, "eos_token_id", None),
        model.config.get_text_config().eos_token_id,
        tokenizer.eos_token_id,
    )
    ids = [id for value in declared if value is not None for id in (value if isinstance(value, list) else [value])]
    return tuple(dict.fromkeys(ids))


@dataclass(frozen=True)
class EndTokens:
    """How an answer ends, when student and teachers may have learnt different end tokens.

    A base student ends with `<|endoftext|>`, its chat teacher with `<|im_end|>`. Scored as they stand, the teacher finds
    the student's way of ending almost impossible, and the student learns never to end. The policies:

    * `map`: ending is one event however it is spelt. Every model's probabilities of all end tokens are summed into one
      outcome (`LMHead.end_ids`), in every objective. With equal end tokens nothing changes.
    * `mask`: the final end token is not trained on. Nothing then teaches the student when to stop.
    * `keep`: every token is scored as it stands.

    Attributes:
        student: its end token ids.
        teachers: those of each teacher, by name.
    """

    student: tuple[int, ...]
    teachers: Mapping[str, tuple[int, ...]]
    policy: EndTokenPolicy = "map"

    @property
    def differ(self) -> bool:
        return any(set(self.student) != set(ids) for ids in self.teachers.values())

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a rollout: those of any model."""
        return tuple(dict.fromkeys(id for ids in (self.student, *self.teachers.values()) for id in ids))

    @property
    def masked_ids(self) -> tuple[int, ...]:
        """Tokens that are not trained on where they end a response."""
        return self.stop_ids if self.policy == "mask" else ()

    @property
    def merged_ids(self) -> tuple[int, ...]:
        """Tokens that count as one outcome, for `LMHead.end_ids`."""
        return self.stop_ids if self.policy == "map" and self.differ else ()

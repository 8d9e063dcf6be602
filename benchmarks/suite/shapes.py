"""What everybody works on: models, prompts and rollouts that are the same in every process, whoever measures.

Speed does not depend on weights, so most models are random; their sizes are those of a small Qwen3 pair at a vocabulary
of 151,936, and of the same pair at one of 512. The embedded pair of the quickstart is the real one.
"""

from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, Qwen3Config
from transformers import Qwen3ForCausalLM as Qwen3

ROOT = Path(__file__).parents[2]
EMBEDDED = ROOT / "src" / "poweropd" / "quickstart" / "models"
NEVER = "<|never|>"  # the end token of models that are to go on to the last token: they cannot emit it

Role = Literal["student", "teacher"]


@dataclass(frozen=True)
class Size:
    """A Qwen3 body. The LM head is tied to the embeddings."""

    hidden: int
    layers: int
    head_dim: int = 64

    @property
    def heads(self) -> int:
        return self.hidden // self.head_dim

    @property
    def intermediate(self) -> int:
        return 3 * self.hidden

    @property
    def body_parameters(self) -> int:
        """Of the linear maps: queries and output, keys and values of half as many heads, and the gated MLP."""
        return self.layers * (3 * self.hidden**2 + 3 * self.hidden * self.intermediate)


@dataclass(frozen=True)
class Shape:
    """A pair of models."""

    name: str
    vocabulary: int
    student: Size
    teacher: Size
    random: bool = True

    def size(self, role: Role) -> Size:
        return self.student if role == "student" else self.teacher

    def parameters(self, role: Role) -> int:
        """Of the linear maps and the head; norms are too few to count."""
        return self.size(role).body_parameters + self.vocabulary * self.size(role).hidden


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("real vocabulary", 151_936, Size(256, 4), Size(512, 8)),
        Shape("quickstart-sized", 512, Size(256, 4), Size(512, 8)),
        Shape("quickstart", 512, Size(128, 4, head_dim=32), Size(192, 6, head_dim=32), random=False),
    )
}


def build(shape: Shape, role: Role) -> PreTrainedModel:
    """A model of the pair, in fp32 and eval mode, with the same weights in every process."""
    if not shape.random:
        return AutoModelForCausalLM.from_pretrained(EMBEDDED / role, dtype=torch.float32).eval()
    size = shape.size(role)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=shape.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads // 2,
        head_dim=size.head_dim,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return Qwen3(config).eval()


def tokenizer(*, ends: bool = True) -> PreTrainedTokenizerBase:
    """The tokenizer of the embedded student.

    Args:
        ends: whether its end token is one that the models can emit.
    """
    found = AutoTokenizer.from_pretrained(EMBEDDED / "student")
    if not ends:
        found.add_special_tokens({"eos_token": NEVER})
    return found


def questions(count: int, *, seed: int) -> list[str]:
    """Problems in the embedded student's manner, of equal length in tokens."""
    random = Random(seed)
    numbers = ([random.randint(10, 99) for _ in range(3)] for _ in range(count))
    return [
        "State the final answer to the following arithmetic problem: {} + {} - {} =".format(*own) for own in numbers
    ]


class Pair(NamedTuple):
    """A prompt and its response, as ids."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]


def random_rollouts(shape: Shape, count: int, *, prompt: int, response: int) -> list[Pair]:
    """Rollouts of `prompt` and `response` random tokens each."""
    ids = torch.randint(shape.vocabulary, (count, prompt + response), generator=torch.Generator().manual_seed(0))
    return [Pair(tuple(row[:prompt]), tuple(row[prompt:])) for row in ids.tolist()]

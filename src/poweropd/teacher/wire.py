"""What a trainer and a teacher on another machine say to each other: safetensors bytes with facts in their header.

A question has the token ids of rollouts, an answer one row for each response token. Nothing that is read can run code, and
no message is [tokens, vocabulary]: whole distributions travel as last hidden states, the LM head once.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import Any, Self, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from poweropd.errors import TeacherError
from poweropd.objectives import Needs
from poweropd.objectives.lm_head import LMHead
from poweropd.teacher.http import UnusableAnswerError
from poweropd.types import Prompt, Rollout

PROTOCOL = 1
COLUMNS = {
    "nothing": (),
    "sampled": ("logprobs", "entropies", "top1_ids"),
    "top_k": ("logprobs", "entropies", "top1_ids", "top_ids", "top_logprobs"),
    "full": ("hidden",),
    "ids": ("logprobs",),
}
FACTS = "facts"  # the key of safetensors' metadata that holds ours


def pack(tensors: Mapping[str, Tensor], **facts: Any) -> bytes:
    """One message."""
    return save({name: tensor.contiguous() for name, tensor in tensors.items()}, {FACTS: json.dumps(facts)})


def unpack(body: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts of a message.

    Raises:
        ValueError: it is none.
    """
    try:
        tensors = load(body)
        header = json.loads(body[8 : 8 + int.from_bytes(body[:8], "little")])
        facts = json.loads(header["__metadata__"][FACTS])
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"no message of this protocol: {error}") from None
    if not isinstance(facts, dict):
        raise ValueError(f"no message of this protocol: its facts are {facts!r}")
    return tensors, facts


@dataclass(frozen=True)
class Info:
    """What a server says of itself.

    Attributes:
        model: its name on the server.
        weights: hash of every weight, in the precision of the server.
        vocab_size, vocabulary: ids that mean a token, and a hash of what they mean.
        head_rows: of the LM head, padding included.
        end_ids: tokens that end its answers.
        context: positions that it was made for.
        dtype: of its hidden states.
        provides: as in `TeacherScorer`.
    """

    protocol: int
    model: str
    weights: str
    vocab_size: int
    vocabulary: str
    head_rows: int
    end_ids: tuple[int, ...]
    context: int
    dtype: str
    parameters: int
    provides: tuple[str, ...]

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=2).encode() + b"\n"

    @classmethod
    def read(cls, body: bytes) -> Self:
        """Raises UnusableAnswerError if it is none, TeacherError if the server is of another version."""
        try:
            values = json.loads(body)
            protocol = values["protocol"]
        except (ValueError, TypeError, KeyError):
            raise UnusableAnswerError("it does not say what it serves; is it `poweropd serve-teacher`?") from None
        if protocol != PROTOCOL:
            raise TeacherError(
                f"the teacher speaks protocol {protocol}, this poweropd {PROTOCOL}; install one version on both machines"
            )
        try:
            info = cls(**values)
        except TypeError as error:
            raise UnusableAnswerError(f"it does not say all that it serves: {error}") from None
        return replace(info, end_ids=tuple(info.end_ids), provides=tuple(info.provides))


@dataclass(frozen=True)
class Question:
    """What is asked of some rollouts.

    Attributes:
        needs: as of an objective, or `ids`: log-probabilities of the tokens in `ids`.
        vocab_size, end_ids: as in `LMHead`; they depend on the student too.
        ids: [N, m], any m tokens at each of the N response tokens' places.
    """

    rollouts: Sequence[Rollout]
    needs: str
    vocab_size: int
    end_ids: tuple[int, ...] = ()
    k: int = 0
    ids: Tensor | None = None

    def to_bytes(self) -> bytes:
        rows = [(rollout.prompt.prompt_ids, rollout.response_ids) for rollout in self.rollouts]
        tensors = {
            "tokens": _int32(chain.from_iterable((*prompt, *response) for prompt, response in rows)),
            "prompt_lengths": _int32(len(prompt) for prompt, _ in rows),
            "response_lengths": _int32(len(response) for _, response in rows),
        }
        if self.ids is not None:
            tensors["ids"] = self.ids.to("cpu", torch.int32)
        return pack(
            tensors, protocol=PROTOCOL, needs=self.needs, k=self.k, vocab_size=self.vocab_size, end_ids=self.end_ids
        )

    @classmethod
    def read(cls, body: bytes, *, head_rows: int, context: int) -> Self:
        """A question that a model with so many rows of its head, and so long a context, can answer.

        Raises:
            ValueError: it is none.
        """
        tensors, facts = unpack(body)
        if facts.get("protocol") != PROTOCOL:
            raise ValueError(f"protocol {facts.get('protocol')} is asked for, this server speaks {PROTOCOL}")
        asked: list[Any] = [facts.get(name) for name in ("needs", "k", "vocab_size", "end_ids")]
        needs, k, vocab_size, end_ids = asked
        if needs not in (*get_args(Needs), "ids"):
            raise ValueError(f"needs is {needs!r}; known: {', '.join(COLUMNS)}")
        if not _is_count(vocab_size, 1, head_rows) or not _is_count(k, 0, vocab_size):
            raise ValueError(f"vocab_size {vocab_size!r} and k {k!r} must be integers, at most {head_rows}")
        if not isinstance(end_ids, list) or not all(_is_count(id, 0, vocab_size - 1) for id in end_ids):
            raise ValueError(f"end_ids are {end_ids!r}; each is an id below {vocab_size}")
        rollouts = _rollouts(tensors, vocab_size, context)
        ids = tensors.get("ids")
        if (needs == "ids") != (ids is not None):
            raise ValueError("ids go with needs ids, and with that alone")
        if ids is not None:
            _check_ids("ids", ids, 2, vocab_size)
            if len(ids) != sum(map(len, rollouts)):
                raise ValueError(f"ids have {len(ids)} rows for {sum(map(len, rollouts))} response tokens")
        return cls(rollouts, needs, vocab_size, tuple(end_ids), k, None if ids is None else ids.long())


def _rollouts(tensors: Mapping[str, Tensor], vocab_size: int, context: int) -> list[Rollout]:
    names = ("tokens", "prompt_lengths", "response_lengths")
    if missing := [name for name in names if name not in tensors]:
        raise ValueError(f"{', '.join(missing)} missing")
    tokens, *lengths = (tensors[name] for name in names)
    _check_ids("tokens", tokens, 1, vocab_size)
    for name, values in zip(names[1:], lengths, strict=True):
        _check_ids(name, values, 1, len(tokens) + 1)
    prompts, responses = (values.tolist() for values in lengths)
    if len(prompts) != len(responses) or sum(prompts) + sum(responses) != len(tokens):
        raise ValueError(
            f"{len(tokens)} tokens do not fall into prompts {prompts[:5]} and responses {responses[:5]} ..."
        )
    if min((*prompts, *responses), default=1) < 1:
        raise ValueError("a prompt or response is empty")
    longest = max((sum(pair) for pair in zip(prompts, responses, strict=True)), default=0)
    if longest - 1 > context:  # the last token predicts nothing and is not fed
        raise ValueError(f"a rollout has {longest} tokens, the model's context {context}")
    parts = iter(tokens.split([length for pair in zip(prompts, responses, strict=True) for length in pair]))
    pairs = [(tuple(prompt.tolist()), tuple(next(parts).tolist())) for prompt in parts]
    return [Rollout(Prompt("", prompt), response, (0.0,) * len(response), "length") for prompt, response in pairs]


def pack_head(head: LMHead, weights: str) -> bytes:
    """An LM head without its padding rows."""
    tensors = {"weight": head.weight[: head.vocab_size]}
    if head.bias is not None:
        tensors["bias"] = head.bias[: head.vocab_size]
    tensors = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    return pack(tensors, weights=weights, softcap=head.softcap, scale=head.scale)


def unpack_head(body: bytes, *, vocab_size: int, end_ids: tuple[int, ...], device: torch.device) -> LMHead:
    """Raises UnusableAnswerError if it is none of so many tokens."""
    try:
        tensors, facts = unpack(body)
        weight, bias = tensors["weight"].to(device), tensors.get("bias")
        softcap, scale = facts["softcap"], float(facts["scale"])
    except (ValueError, KeyError, TypeError) as error:
        raise UnusableAnswerError(f"its LM head cannot be read: {error}") from None
    if weight.ndim != 2 or len(weight) != vocab_size or (bias is not None and bias.shape != (vocab_size,)):
        raise UnusableAnswerError(f"its LM head has shape {tuple(weight.shape)}, not {vocab_size} rows")
    return LMHead(weight, vocab_size, None if bias is None else bias.to(device), softcap, scale, end_ids)


def _int32(values: Any) -> Tensor:
    return torch.tensor([*values], dtype=torch.int32)


def _is_count(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _check_ids(name: str, ids: Tensor, dimensions: int, limit: int) -> None:
    if ids.dtype != torch.int32 or ids.ndim != dimensions:
        raise ValueError(f"{name} are {ids.dtype} of shape {tuple(ids.shape)}, not int32 of {dimensions} dimensions")
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < limit:
        raise ValueError(f"{name} go from {int(ids.min())} to {int(ids.max())}; each is at least 0 and below {limit}")

"""The student's weights as vLLM takes them."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from poweropd.errors import RolloutError
from poweropd.models import weights_fingerprint
from poweropd.rollout.replica import Weights

FILE = "model.safetensors"


def tied_names(model: PreTrainedModel) -> dict[str, str]:
    """Further names of weights that have several, such as the LM head that is the embedding, with the first of each."""
    first = {id(weight): name for name, weight in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {name: first[id(weight)] for name, weight in every if first[id(weight)] != name}


def under_every_name(weights: Weights, tied: Mapping[str, str]) -> Iterator[tuple[str, Tensor]]:
    """The weights, tied ones under each of their names.

    vLLM leaves a layer as it is for which it gets no weights, and says nothing. A tied LM head that is not named stays the
    head of the first step, whatever becomes of the embedding.
    """
    for name, weight in weights():
        yield name, weight
        yield from ((other, weight) for other, first in tied.items() if first == name)


def copies(weights: Weights, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights in main memory, in the precision that vLLM holds them in."""
    return {name: torch.empty_like(weight, dtype=dtype, device="cpu").copy_(weight) for name, weight in weights()}


def write_weights(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """A folder with a safetensors file from which vLLM loads the weights.

    Raises:
        RolloutError: it cannot be written.
    """
    try:
        folder.mkdir(exist_ok=True)
        save_file(dict(tensors), folder / FILE, metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise RolloutError(
            f"cannot write the student's weights into {folder} for vLLM: {error}; make room there"
        ) from None


def fingerprint(weights: Weights, settings: Sequence[str]) -> str:
    """A hash of the weights that are sampled from, and of the settings that decide how."""
    return hashlib.sha256(repr(["vllm", weights_fingerprint(weights()), *settings]).encode()).hexdigest()

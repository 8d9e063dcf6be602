"""What a forward and a backward pass hold, found by running them on tensors without numbers.

Torch's own operators say what they make and what autograd keeps, so nothing is assumed of the architecture: the pass runs
on two and on three layers, and grows by the same with every further one.
"""

import logging
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedConfig

from poweropd.errors import ModelError
from poweropd.models import compute_precision
from poweropd.packing import ATTENTION, Packing, may_take_packs, run_packed
from poweropd.plan.shapes import Shape, with_layers

TRACED = 2, 3  # layers
CPU = torch.device("cpu")


class Activations(NamedTuple):
    """Bytes, beside parameters and their gradients.

    Attributes:
        kept: after the forward pass, for the backward pass.
        peak: at any time of both.
    """

    kept: float
    peak: float


@cache
def activations(
    shape: Shape, rows: int, length: int, precision: torch.dtype, *, train: bool, checkpointing: bool = False
) -> Activations:
    """Of the body over `rows` rows of `length` tokens.

    Args:
        precision: of matrix products; and of the weights where it does not train.
        train: whether there is a backward pass.
        checkpointing: whether it recomputes activations.

    Raises:
        ModelError: the architecture cannot run on tensors without numbers.
    """
    fewer, more = (
        _trace(
            with_layers(shape, layers), shape.name, rows, length, precision, train=train, checkpointing=checkpointing
        )
        for layers in TRACED
    )
    further = shape.layers - TRACED[1]
    return Activations(*(high + further * (high - low) for low, high in zip(fewer, more, strict=True)))


def _trace(
    config: PreTrainedConfig,
    name: str,
    rows: int,
    length: int,
    precision: torch.dtype,
    *,
    train: bool,
    checkpointing: bool,
) -> Activations:
    packing = Packing.of([length] * rows, CPU)
    try:
        with _without_numbers():
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32 if train else precision).eval()
            packed = may_take_packs(model)
            if packed:
                model.set_attn_implementation(ATTENTION)
            _prepare(model, train=train, checkpointing=checkpointing)
            ids = torch.zeros(rows * length, dtype=torch.long)
            with torch.set_grad_enabled(train), _Living(model) as living:
                with compute_precision(CPU, precision):
                    if packed:
                        hidden = run_packed(model, ids, packing)
                    else:
                        hidden = model.base_model(input_ids=ids.view(rows, length), use_cache=False).last_hidden_state
                kept = living.bytes
                if train:
                    hidden.backward(torch.empty_like(hidden))
                return Activations(kept, living.peak)
    except (RuntimeError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ModelError(
            f"{name!r} ({config.model_type}) cannot be planned: its activations depend on numbers that a config does not "
            f"tell ({reason}). Plan with a dense model of its size"
        ) from None


def _prepare(model: Any, *, train: bool, checkpointing: bool) -> None:
    """As `Student` does it: gradients are there to be added to, that of the embedding by row."""
    model.requires_grad_(train)
    if not train:
        return
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    embedding = model.get_input_embeddings()
    embedding.weight.requires_grad_(type(embedding) is not torch.nn.Embedding)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for module in model.modules():
            module.training = getattr(module, "gradient_checkpointing", False)


@contextmanager
def _without_numbers() -> Iterator[None]:
    """Tensors know their shape, dtype and storage, and hold nothing. What libraries say meanwhile is not for the user."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(action="ignore"), FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        log.setLevel(level)


class _Living(TorchDispatchMode):
    """Counts the bytes of storages made while it is on, as long as each lives."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        held = [*model.parameters(), *model.buffers()]
        held += [parameter.grad for parameter in held if parameter.grad is not None]
        self._known: dict[int, Any] = {tensor.untyped_storage()._cdata: None for tensor in held}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if isinstance(made, Tensor) and not made.is_sparse:
                self._count(made.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self.bytes += size
            self.peak = max(self.peak, self.bytes)
            self._known[key] = weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.bytes -= size
        del self._known[key]

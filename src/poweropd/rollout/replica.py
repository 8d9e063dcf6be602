"""A copy of the student to sample from, for where its own weights cannot be: they are sharded, have adapters beside them,
or are being trained meanwhile."""

import copy
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from transformers import PreTrainedModel

Weights = Callable[[], Iterable[tuple[str, Tensor]]]
"""The student's weights as they are now, whole and merged, by name: `Student.weights`."""


class Replica:
    """A copy of a model, brought up to date when it is told to.

    Its linear layers are held in the precision of matmuls. What it computes is the same to the bit: under autocast the
    model's own are converted to it before each product.

    Attributes:
        model: the copy.

    Args:
        original: as loaded, before it is sharded or given adapters.
        precision: dtype of matmuls.
    """

    def __init__(self, original: PreTrainedModel, precision: torch.dtype) -> None:
        self.model = copy.deepcopy(original).requires_grad_(False)
        embedding = self.model.get_input_embeddings().weight  # a tied LM head stays as precise as the embedding
        for module in self.model.modules():
            if isinstance(module, torch.nn.Linear) and module.weight is not embedding:
                module.to(precision)
        self._version: int | None = None

    @torch.no_grad()
    def update(self, weights: Weights, version: int) -> None:
        """Take over the weights after `version` optimizer steps, unless it has them."""
        if version == self._version:
            return
        own = dict(self.model.named_parameters())
        for name, weight in weights():
            own[name].copy_(weight)
        self._version = version

"""Models whose weights are spread over ranks (FSDP2): each layer is whole only while it computes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from poweropd.models import hidden_states


class Trunk(torch.nn.Module):
    """A model up to its last hidden states, as the module around whose calls weights are gathered.

    Its embedding, last norm and LM head stay whole from a call to the end of its backward pass, so that the head can be
    used outside.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, lengths: Sequence[int], positions: Tensor) -> Tensor:
        """Those at `positions` [N], of the rows that `hidden_states` takes."""
        return hidden_states(self.model, input_ids, lengths).index_select(0, positions)

    def shard(self, *, layers_only: bool = False) -> None:
        """Leave this rank its part of every weight, and its part of the mean over all ranks of every gradient.

        Args:
            layers_only: embedding, last norm and LM head stay whole on every rank; for a model that is not trained.
        """
        layers = decoder_layers(self.model)
        for layer in layers:
            fully_shard(layer, reshard_after_forward=True)
        inside = {parameter for layer in layers for parameter in layer.parameters()}
        whole = {parameter for parameter in self.model.parameters() if parameter not in inside}
        fully_shard(self, reshard_after_forward=False, ignored_params=whole if layers_only else None)


def decoder_layers(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The layers of a model: its longest list of modules."""
    lists = [list(module) for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    return max(lists, key=len)


def own_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor; of one that is spread, all ranks must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def put(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into one that may be spread: each rank its part."""
    if isinstance(target, DTensor):
        placed: Any = distribute_tensor(
            value.to(target.device), target.device_mesh, target.placements, src_data_rank=None
        )
        target.to_local().copy_(placed.to_local())
    else:
        target.copy_(value)

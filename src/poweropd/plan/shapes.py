"""What a model's config says of its size. Modules are made without weights, so every architecture counts itself."""

from collections import Counter
from collections.abc import Collection, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from poweropd.errors import ModelError
from poweropd.models import load_config

EXPERTS = "num_experts", "num_local_experts", "n_routed_experts"  # what configs call their number


@dataclass(frozen=True, eq=False)
class Shape:
    """Sizes of a causal language model, in numbers of weights unless said otherwise.

    Attributes:
        name: what the recipe calls it.
        config: of the text model.
        parameters: all, tied ones once.
        in_layers: those of decoder layers.
        products: those that every token of the body is multiplied with; of experts, the ones that it is sent to.
        largest_layer: parameters of one decoder layer.
        sides: inputs and outputs of the linear maps of the body, added up by name.
        vocabulary, hidden: sides of the LM head.
        layers: number of them.
    """

    name: str
    config: PreTrainedConfig
    parameters: int
    in_layers: int
    products: int
    largest_layer: int
    sides: Mapping[str, int]
    vocabulary: int
    hidden: int
    layers: int

    @property
    def head(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def kv_elements(self) -> int:
        """Elements of the keys and values of one token."""
        heads = getattr(self.config, "num_key_value_heads", None) or self.config.num_attention_heads
        return 2 * self.layers * heads * self._head_size

    def sides_of(self, modules: Collection[str]) -> int:
        """Inputs and outputs of these linear maps, or of all: what an adapter of rank 1 has of parameters."""
        return sum(size for name, size in self.sides.items() if name in modules or not modules)

    def body_flops(self, tokens: float, length: float) -> float:
        """Of a forward pass of the body over `tokens` tokens in rows of `length`; attention is causal."""
        attended = (length + 1) / 2
        return tokens * (2 * self.products + 4 * self.layers * attended * self._attention_width)

    def head_flops(self, tokens: float) -> float:
        """Of the LM head."""
        return 2 * tokens * self.head

    @property
    def _head_size(self) -> int:
        return getattr(self.config, "head_dim", None) or self.hidden // self.config.num_attention_heads

    @property
    def _attention_width(self) -> int:
        return self.config.num_attention_heads * self._head_size


@cache
def shape_of(name: str, revision: str | None = None) -> Shape:
    """The shape of a local folder, Hub id or embedded model, from its config.

    Raises:
        ModelError: there is no config, or none of a causal language model.
    """
    return shape_of_config(load_config(name, revision), name)


def shape_of_config(config: PreTrainedConfig, name: str) -> Shape:
    """The same of a config."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (ValueError, TypeError, AttributeError, ImportError) as error:
        raise ModelError(f"{name!r} is no causal language model that transformers knows: {error}") from None
    text = model.config.get_text_config()
    layers = max((module for module in model.modules() if isinstance(module, nn.ModuleList)), key=_size)
    weights = [weight for module in layers.modules() for weight in module.parameters(recurse=False)]
    matrices = [weight for weight in weights if weight.dim() == 2]
    experts = sum(weight.numel() for weight in weights if weight.dim() == 3)
    sides: Counter[str] = Counter()
    for name, module in layers.named_modules():
        if isinstance(module, nn.Linear):
            sides[name.rpartition(".")[2]] += module.in_features + module.out_features
    chosen = getattr(text, "num_experts_per_tok", None) or 1
    there = next((count for name in EXPERTS if (count := getattr(text, name, None))), chosen)
    return Shape(
        name=name,
        config=text,
        parameters=_size(model),
        in_layers=_size(layers),
        products=sum(weight.numel() for weight in matrices) + experts * chosen // there,
        largest_layer=max(map(_size, layers)),
        sides=dict(sides),
        vocabulary=model.get_output_embeddings().weight.shape[0],
        hidden=text.hidden_size,
        layers=text.num_hidden_layers,
    )


def with_layers(shape: Shape, layers: int) -> PreTrainedConfig:
    """The config of the same model with so many layers."""
    config = deepcopy(shape.config)
    kinds = getattr(config, "layer_types", None)
    config.num_hidden_layers = layers
    if kinds is not None:
        config.layer_types = (kinds * layers)[:layers]
    return config


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())

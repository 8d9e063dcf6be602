"""Llama and what is built like it: which models these are, and their arithmetic on a transformers model's own weights.

Shapes: N tokens, H hidden size, Q query heads, K key-value heads, D head size.
"""

from collections.abc import Callable, Set
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from poweropd.objectives.lm_head import wide

COPIED_WEIGHTS = 32_000_000  # of all layers; up to so many, copies cost less time than they save

BASE = {"embed_tokens", "layers", "norm", "rotary_emb"}
LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
HEAD_NORMS = {"q_norm", "k_norm"}
FIXED_ROPE = {"default", "linear", "llama3", "yarn"}  # whose frequencies do not depend on the length of a text
ROPE_SETTINGS = {
    *("rope_type", "rope_theta", "factor", "original_max_position_embeddings", "attention_factor", "truncate"),
    *("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
}


def is_llama(model: PreTrainedModel) -> bool:
    """Whether a model consists of the modules that `Llama` reads, and nothing in it is special to long texts.

    That they also work together as in Llama (where norms stand, what is scaled) only a comparison can tell.
    """
    base: Any = model.base_model
    if not _has(base, BASE) or type(base.embed_tokens) is not nn.Embedding or not _is_norm(base.norm):
        return False
    if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
        return False
    config, rope = model.config.get_text_config(), base.rotary_emb
    kinds = getattr(config, "layer_types", None)
    sees_all = set(kinds) == {"full_attention"} if kinds else getattr(config, "sliding_window", None) is None
    settings = getattr(config, "rope_parameters", None) or {}
    if not sees_all or settings.get("rope_type") not in FIXED_ROPE or not set(settings) <= ROPE_SETTINGS:
        return False
    return all(_is_layer(layer, 2 * len(rope.inv_freq)) for layer in base.layers)


def _is_layer(layer: Any, head_size: int) -> bool:
    if not _has(layer, LAYER):
        return False
    attention, mlp = layer.self_attn, layer.mlp
    if not (_has(attention, ATTENTION) or _has(attention, ATTENTION | HEAD_NORMS)) or not _has(mlp, MLP):
        return False
    fused = [[attention.q_proj, attention.k_proj, attention.v_proj], [mlp.gate_proj, mlp.up_proj]]
    linears = [*fused[0], *fused[1], attention.o_proj, mlp.down_proj]
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    head_norms = [getattr(attention, name) for name in HEAD_NORMS if hasattr(attention, name)]
    return (
        all(type(linear) is nn.Linear for linear in linears)
        and all(len({linear.bias is None for linear in side_by_side}) == 1 for side_by_side in fused)
        and all(linear.out_features % head_size == 0 for linear in fused[0])
        and all(_is_norm(norm) for norm in norms + head_norms)
        and all(norm.weight.shape == (head_size,) for norm in head_norms)
    )


def _has(module: nn.Module, children: Set[str]) -> bool:
    """Whether a module has just these children, and no parameters of its own."""
    return {name for name, _ in module.named_children()} == children and not list(module.parameters(recurse=False))


def _is_norm(module: nn.Module) -> bool:
    return {name for name, _ in module.named_parameters()} == {"weight"} and hasattr(module, "variance_epsilon")


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


class _Norm:
    """RMSNorm over the last dimension, in the weight's precision."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight = weight
        self.eps = eps
        self._floor = weight.new_tensor(eps)

    def __call__(self, x: Tensor) -> Tensor:
        x = x.to(self.weight.dtype)
        if x.is_cuda:
            return F.rms_norm(x, x.shape[-1:], None, self.eps) * self.weight
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)  # on a CPU torch's own takes half as long again
        return (x * torch.addcmul(self._floor, norm, norm, value=1 / x.shape[-1]).rsqrt_()).mul_(self.weight)


class _Linear(NamedTuple):
    """Linear maps of one input [N, in], outputs side by side: weights [in, out] and biases, of each or of all fused."""

    parts: list[tuple[Tensor, Tensor | None]]

    def outputs(self, x: Tensor) -> list[Tensor]:
        """Of each part."""
        x = x.to(self.parts[0][0].dtype)
        return [torch.mm(x, weight) if bias is None else torch.addmm(bias, x, weight) for weight, bias in self.parts]

    def __call__(self, x: Tensor) -> Tensor:
        outputs = self.outputs(x)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


class _Layer(NamedTuple):
    attention_norm: _Norm
    qkv: _Linear
    head_norm: _Norm | None  # of queries and keys, its weight [Q + K, D]
    output: _Linear
    mlp_norm: _Norm
    gate_up: _Linear
    activation: Callable[[Tensor], Tensor]
    down: _Linear


Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""Of a layer's number, queries [N, Q, D], keys and values [N, K, D]: what each token attends to, [N, Q, D]."""


class Llama:
    """The weights of a model as they are when this is made: its own tensors, or copies where these are faster.

    Args:
        model: see `is_llama`.
        precision: dtype of matmuls; the sums between layers stay as the model has them.
        tokens: positions there may be.
    """

    def __init__(self, model: PreTrainedModel, *, precision: torch.dtype, tokens: int) -> None:
        base: Any = model.base_model
        attention = base.layers[0].self_attn
        self.dtype = precision if precision == torch.bfloat16 else model.dtype
        self.device = model.device
        self.head_size = 2 * len(base.rotary_emb.inv_freq)
        self.query_heads = attention.q_proj.out_features // self.head_size
        self.key_heads = attention.k_proj.out_features // self.head_size
        self.scale: float = attention.scaling
        self.copied = self.dtype != model.dtype or _size(base.layers) <= COPIED_WEIGHTS
        self.matrix_size = base.layers[0].mlp.gate_proj.weight.numel()
        self._embedding = base.embed_tokens.weight.detach()
        self._norm = self._read_norm(base.norm)
        self.layers = [self._read_layer(layer) for layer in base.layers]
        self._rotations = self._rotary_table(base.rotary_emb, tokens)

    def _read_layer(self, layer: Any) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        head_norm = None
        if hasattr(attention, "q_norm"):
            of_queries, of_keys = self._read_norm(attention.q_norm), self._read_norm(attention.k_norm)
            weights = of_queries.weight.expand(self.query_heads, -1), of_keys.weight.expand(self.key_heads, -1)
            head_norm = _Norm(torch.cat(weights), of_queries.eps)
        return _Layer(
            self._read_norm(layer.input_layernorm),
            self._read_linear(attention.q_proj, attention.k_proj, attention.v_proj),
            head_norm,
            self._read_linear(attention.o_proj),
            self._read_norm(layer.post_attention_layernorm),
            self._read_linear(mlp.gate_proj, mlp.up_proj),
            mlp.act_fn,
            self._read_linear(mlp.down_proj),
        )

    def _read_norm(self, norm: Any) -> _Norm:
        weight = norm.weight.detach()
        return _Norm(weight.to(wide(weight.dtype)), norm.variance_epsilon)

    def _read_linear(self, *modules: nn.Linear) -> _Linear:
        weights = [module.weight.detach().to(self.dtype).T for module in modules]
        biases = [module.bias.detach().to(self.dtype) for module in modules if module.bias is not None]
        if self.copied:
            # Few rows are multiplied up to twice as fast where the weights of one input lie side by side.
            weights, biases = [torch.cat(weights, dim=1)], [torch.cat(biases)] if biases else []
        if not biases:
            return _Linear([(weight, None) for weight in weights])
        return _Linear(list(zip(weights, biases, strict=True)))

    def _rotary_table(self, rope: Any, tokens: int) -> Tensor:
        """[tokens, 2, 1, D]: by what a head and its swapped halves are multiplied, to rotate it to each position."""
        angles = torch.outer(torch.arange(tokens, device=self.device).float(), rope.inv_freq.float())
        cos, sin = angles.cos() * rope.attention_scaling, angles.sin() * rope.attention_scaling
        return torch.stack([torch.cat([cos, cos], 1), torch.cat([-sin, sin], 1)], dim=1)[:, :, None]

    def __call__(self, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Hidden states [N, H] of tokens [N] at their positions [N], before the last norm."""
        rotation = self._rotations[positions].unbind(1)
        x = F.embedding(ids, self._embedding)
        for number, layer in enumerate(self.layers):
            x += self._attention(number, layer, x, rotation, attend)
            outputs = layer.gate_up.outputs(layer.mlp_norm(x))
            gate, up = outputs[0].chunk(2, dim=1) if len(outputs) == 1 else outputs
            x += layer.down(layer.activation(gate).mul_(up))
        return x

    def final(self, x: Tensor) -> Tensor:
        """The last norm, in the model's precision."""
        return self._norm(x).to(self._embedding.dtype)

    def _attention(self, number: int, layer: _Layer, x: Tensor, rotation: tuple[Tensor, ...], attend: Attend) -> Tensor:
        heads = layer.qkv(layer.attention_norm(x)).view(len(x), -1, self.head_size)
        rotated, values = heads.split([self.query_heads + self.key_heads, self.key_heads], dim=1)
        rotated = rotated.to(wide(self.dtype)) if layer.head_norm is None else layer.head_norm(rotated)
        cos, sin = rotation
        swapped = rotated.roll(self.head_size // 2, dims=-1)
        rotated = (rotated * cos).addcmul_(swapped, sin).to(self.dtype)
        queries, keys = rotated.split([self.query_heads, self.key_heads], dim=1)
        return layer.output(attend(number, queries, keys, values).reshape(len(x), -1))

"""Low-rank adapters on a frozen model (LoRA, arXiv 2106.09685), by PEFT; and a model's weights with them merged."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from poweropd.errors import ConfigError
from poweropd.sections import LoRAConfig

if TYPE_CHECKING:
    from peft import PeftModel

ADAPTER = "default"


def add_adapters(model: PreTrainedModel, config: LoRAConfig, *, seed: int) -> "PeftModel":
    """Freeze a model and add adapters to its linear layers, in place; their products begin as zero.

    Args:
        seed: of the one of an adapter's two matrices that begins as random.

    Returns:
        PEFT's wrapper, which can save the adapters; the model itself is used as before.

    Raises:
        ConfigError: PEFT is missing, or a layer cannot have an adapter.
    """
    try:
        import peft
    except ImportError:
        raise ConfigError("student.lora needs PEFT, which is not installed: pip install 'poweropd[lora]'") from None
    linear = {name.rpartition(".")[2] for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)}
    linear.discard("lm_head")  # it is read by what computes the loss, past any adapter
    if unknown := sorted(set(config.modules) - linear):
        raise ConfigError(
            f"student.lora.modules: {', '.join(unknown)} cannot have an adapter; the student's linear layers are "
            f"{', '.join(sorted(linear))}"
        )
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=sorted(config.modules or linear),
        use_rslora=config.rank_stabilized,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return peft.get_peft_model(model, settings, adapter_name=ADAPTER)


@torch.no_grad()
def plain_weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Every weight as it is now, adapters merged, by the name it has in the model without them; tied ones once."""
    adapted: dict[str, Any] = {name: part for name, part in model.named_modules() if hasattr(part, "get_delta_weight")}
    for name, parameter in model.named_parameters():
        layer, _, leaf = name.rpartition(".")
        plain = layer.removesuffix(".base_layer")
        if plain != layer and leaf == "weight":
            yield f"{plain}.weight", parameter + adapted[plain].get_delta_weight(ADAPTER)
        elif not any(layer.startswith(f"{each}.lora_") for each in adapted):
            yield f"{plain}.{leaf}", parameter.detach()

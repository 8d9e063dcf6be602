"""Loading causal language models, and their two halves: last hidden states and LM head."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from poweropd.errors import ConfigError, ModelError
from poweropd.objectives.lm_head import LMHead, head_logits
from poweropd.packing import packed_hidden_states, padded_hidden_states, takes_packs

UNREADABLE = (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError)  # what loading may raise
EMBEDDED = "quickstart:"  # `quickstart:student` and `quickstart:teacher` name the embedded pair
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
HEAD_TOLERANCE = 2e-2  # relative; a wrong head is off by far more, bf16 rounding by less


def resolve(name: str) -> str:
    """The folder of an embedded model, else the name itself: a local folder or a Hub id."""
    if name.startswith(EMBEDDED):
        return str(files("poweropd.quickstart") / "models" / name.removeprefix(EMBEDDED))
    return name


def is_local(name: str) -> bool:
    """Whether the name is a folder on this machine, rather than a Hub id."""
    return Path(resolve(name)).is_dir()


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of `auto`, `float32` or `bfloat16` on a device."""
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[precision]


def compute_precision(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """A context in which matmuls of fp32 weights run in `precision`."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == torch.bfloat16)


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """The library's bars for loading and saving would break into ours."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def load_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder or Hub id.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    try:
        return AutoTokenizer.from_pretrained(resolve(name), revision=revision)
    except UNREADABLE as error:
        raise _unreadable("tokenizer", name, error) from error


def load_config(name: str, revision: str | None = None) -> PreTrainedConfig:
    """The config of a local folder or Hub id, which is all that is read.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    try:
        return AutoConfig.from_pretrained(resolve(name), revision=revision)
    except UNREADABLE as error:
        raise _unreadable("config", name, error) from error


def load_model(
    name: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    revision: str | None = None,
    quantization: str = "none",
    offload: bool = False,
) -> PreTrainedModel:
    """A causal language model in eval mode, checked to be the sum of its two halves.

    Args:
        quantization: `none`, `8bit` or `4bit`: of its layers' weights, on a GPU alone.
        offload: keep its layers in main memory; each comes to the GPU when it is its turn.

    Raises:
        ModelError: the folder or Hub id cannot be read, or the architecture computes logits in an unknown way.
        ConfigError: what `quantization` or `offload` need is not here.
    """
    how = _placement(name, revision, dtype, device, quantization, offload=offload)
    try:
        _check_complete(name)
        with no_progress_bars():
            model = AutoModelForCausalLM.from_pretrained(resolve(name), dtype=dtype, revision=revision, **how)
            if not how:
                torch.nn.Module.to(model, device)
    except UNREADABLE as error:
        raise _unreadable("model", name, error) from error
    model.eval()
    _check_halves(model, name)
    return model


def load_outline(name: str, revision: str | None = None) -> PreTrainedModel:
    """A model without its weights: configs, and modules of the right shapes.

    Raises:
        ModelError: the folder or Hub id cannot be read.
    """
    config = load_config(name, revision)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except UNREADABLE as error:
        raise _unreadable("model", name, error) from error
    with suppress(OSError):  # not every model has one of its own
        model.generation_config = GenerationConfig.from_pretrained(resolve(name), revision=revision or "main")
    return model


def _placement(
    name: str, revision: str | None, dtype: torch.dtype, device: torch.device, quantization: str, *, offload: bool
) -> dict[str, Any]:
    """What `from_pretrained` is told of weights that are not simply moved to the device."""
    if quantization == "none" and not offload:
        return {}
    what = "offload" if offload else f"quantization {quantization}"
    if device.type != "cuda":
        raise ConfigError(f"{name!r}: {what} is for a GPU, and there is none here; leave it out")
    needed = ("accelerate",) if offload else ("accelerate", "bitsandbytes")
    if missing := [package for package in needed if find_spec(package) is None]:
        raise ConfigError(f"{name!r}: {what} needs {' and '.join(missing)}; pip install 'poweropd[quantized]'")
    if offload:
        return {"device_map": layers_apart(load_outline(name, revision), device)}
    bits: dict[str, Any] = {"load_in_8bit": True}
    if quantization == "4bit":
        bits = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    return {"device_map": {"": device}, "quantization_config": BitsAndBytesConfig(**bits)}


def layers_apart(model: PreTrainedModel, device: torch.device) -> dict[str, torch.device | str]:
    """A device map that has the layers in main memory; embedding, final norm and LM head, which is read whole, stay."""
    places: dict[str, torch.device | str] = {}
    for name, child in model.named_children():
        if child is not model.base_model:
            places[name] = device
            continue
        for part, module in child.named_children():
            places[f"{name}.{part}"] = "cpu" if isinstance(module, torch.nn.ModuleList) else device
    return places


def _unreadable(what: str, name: str, error: Exception) -> ModelError:
    reason = " ".join(str(error).split()).partition(" Check your internet")[0].rstrip(".")
    if len(reason) > 200:
        reason = f"{reason[:200]} ..."
    if is_local(name):
        return ModelError(
            f"cannot read a {what} in the folder {name!r}: {reason}. Give a folder with config, weights and tokenizer"
        )
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        return ModelError(f"there is no folder {name!r}. Give a folder with config, weights and tokenizer, or a Hub id")
    return ModelError(
        f"cannot read a {what} for the Hub id {name!r}, and there is no such folder: {reason}. Check the name and the "
        "network, or give a folder with config, weights and tokenizer"
    )


def _check_complete(name: str) -> None:
    """Refuse a local folder whose weight files are cut short, which the loader reports in riddles or not at all."""
    folder = Path(resolve(name))
    for path in sorted(folder.glob("*.safetensors")) if folder.is_dir() else []:
        size = path.stat().st_size
        with path.open("rb") as file:
            header_size = int.from_bytes(file.read(8), "little")
            header = file.read(header_size) if 0 < header_size < size else b""
        try:
            tensors = [entry for key, entry in json.loads(header).items() if key != "__metadata__"]
            expected = 8 + header_size + max((entry["data_offsets"][1] for entry in tensors), default=0)
        except (ValueError, KeyError):
            raise ModelError(f"{path} is damaged: its header cannot be read. Copy the model again") from None
        if size != expected:
            raise ModelError(f"{path} is damaged: {size} bytes where {expected} are declared. Copy the model again")


@torch.no_grad()
def weights_fingerprint(weights: PreTrainedModel | Iterable[tuple[str, Tensor]]) -> str:
    """A hash of every weight of a model, or of those given by name: what differs anywhere differs in it. About a second a
    GB."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in _all_weights(weights).items() if isinstance(weights, PreTrainedModel) else weights:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _all_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    weights = model.state_dict()
    if any(tensor.is_meta for tensor in weights.values()):  # they lie in main memory, layer by layer
        from accelerate.utils.modeling import get_state_dict_offloaded_model

        weights |= get_state_dict_offloaded_model(model)
    return weights


def lm_head(model: PreTrainedModel, *, vocab_size: int, end_ids: tuple[int, ...] = ()) -> LMHead:
    """The model's LM head, padding rows cut off at `vocab_size` and `end_ids` merged."""
    head = model.get_output_embeddings()
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere multiplies
    divisor = getattr(config, "logits_scaling", None) or 1.0  # Granite divides
    return LMHead(
        weight=head.weight,
        bias=getattr(head, "bias", None),
        softcap=getattr(config, "final_logit_softcapping", None),
        scale=scale / divisor,
        vocab_size=vocab_size,
        end_ids=end_ids,
    )


def hidden_states(model: PreTrainedModel, input_ids: Tensor, lengths: Sequence[int]) -> Tensor:
    """Last hidden states [S, H], after the final norm, of rows that lie end to end.

    Args:
        input_ids: [S].
        lengths: of the rows; they sum to S.
    """
    if not lengths:
        return input_ids.new_empty((0, model.config.get_text_config().hidden_size), dtype=model.dtype)
    compute = packed_hidden_states if takes_packs(model) else padded_hidden_states
    return compute(model, input_ids, lengths)


@torch.no_grad()
def _check_halves(model: PreTrainedModel, name: str) -> None:
    """Refuse a model whose logits are not `lm_head(hidden_states)`: everything here is computed from these two."""
    head = model.get_output_embeddings()
    if head is None:
        raise ModelError(f"{name!r} ({type(model).__name__}) has no LM head; a causal language model is needed")
    ids = torch.arange(1, 5, device=model.device)[None]
    expected = model(input_ids=ids, use_cache=False).logits[0].float()
    if not expected.isfinite().all():
        raise ModelError(f"{name!r} gives logits that are not finite: its weights are spoilt. Use another copy")
    hidden = hidden_states(model, ids[0], ids.shape[1:])
    got = head_logits(hidden, lm_head(model, vocab_size=expected.shape[-1]))
    if not torch.allclose(got, expected, rtol=HEAD_TOLERANCE, atol=HEAD_TOLERANCE * expected.abs().max().item()):
        raise ModelError(
            f"{name!r} ({type(model).__name__}) computes its logits in a way unknown here: its LM head applied to its "
            f"last hidden states is off by {(got - expected).abs().max():.3g}. Please report the architecture"
        )

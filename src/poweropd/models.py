"""Loading causal language models, and their two halves: last hidden states and LM head."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from poweropd.errors import ModelError
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


def load_model(name: str, *, dtype: torch.dtype, device: torch.device, revision: str | None = None) -> PreTrainedModel:
    """A causal language model in eval mode, checked to be the sum of its two halves.

    Raises:
        ModelError: the folder or Hub id cannot be read, or the architecture computes logits in an unknown way.
    """
    try:
        _check_complete(name)
        with no_progress_bars():
            model = AutoModelForCausalLM.from_pretrained(resolve(name), dtype=dtype, revision=revision)
            torch.nn.Module.to(model, device)
    except UNREADABLE as error:
        raise _unreadable("model", name, error) from error
    model.eval()
    _check_halves(model, name)
    return model


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
def weights_fingerprint(model: PreTrainedModel) -> str:
    """A hash of every weight: models that differ anywhere differ in it. About a second a GB."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


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

"""The student: hidden states, LM head, optimizer step, save. Where it runs and in what precision stays in here."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from poweropd.adapters import add_adapters, plain_weights
from poweropd.models import compute_precision, hidden_states, lm_head, no_progress_bars
from poweropd.objectives.lm_head import LMHead
from poweropd.packing import enable_packing
from poweropd.sections import LoRAConfig, OptimizerConfig
from poweropd.types import TokenBatch, UpdateResult


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The rate of optimizer step `step` (from 0) of `steps`: a pure function, so there is no schedule state to save."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    share = (step - config.warmup_steps) / max(steps - config.warmup_steps, 1)
    factor = {"constant": 1.0, "linear": 1 - share, "cosine": 0.5 * (1 + math.cos(math.pi * share))}
    return config.lr * factor[config.schedule]


class Student:
    """The model that is trained.

    It stays in eval mode: dropout would make the trained policy another one than the policy that sampled.

    Attributes:
        packed: whether its forward pass sees no padding; see `enable_packing`.

    Args:
        model: fp32 weights.
        vocab_size, end_ids: see `LMHead`.
        steps: of the whole run, for the learning-rate schedule.
        precision: dtype of matmuls.
        lora: adapters to train in the place of the weights, which then stay as they are.
        seed: of how they begin.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: OptimizerConfig,
        *,
        vocab_size: int,
        end_ids: tuple[int, ...],
        steps: int,
        precision: torch.dtype = torch.float32,
        gradient_checkpointing: bool = False,
        lora: LoRAConfig | None = None,
        seed: int = 0,
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self._config = config
        self._steps = steps
        self._vocab_size = vocab_size
        self._end_ids = end_ids
        self._precision = precision
        self.packed = enable_packing(model)
        self._adapters = add_adapters(model, lora, seed=seed) if lora else None
        if gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self._checkpointed = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
        embedding = model.get_input_embeddings()
        self._lookup = embedding if type(embedding) is torch.nn.Embedding and embedding.weight.requires_grad else None
        self.optimizer = torch.optim.AdamW(
            [parameter for parameter in model.parameters() if parameter.requires_grad],
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,  # the other ways make temporaries as large as the parameters
        )

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def head(self) -> LMHead:
        return lm_head(self.model, vocab_size=self._vocab_size, end_ids=self._end_ids)

    def hidden_at_loss(self, batch: TokenBatch) -> Tensor:
        """Last hidden states [N, H] that predict the loss tokens of a batch, in the precision of matmuls, with their graph."""
        with self._lean_backward(), compute_precision(self.device, self._precision):
            every_hidden = hidden_states(self.model, batch.input_ids, batch.lengths)
        return every_hidden.index_select(0, batch.loss_positions).to(self._precision)

    @contextmanager
    def _lean_backward(self) -> Iterator[None]:
        """For a forward pass whose backward pass is to recompute activations, if so configured, and to add to the rows of
        the embedding that were looked up alone, not a gradient of the whole vocabulary."""
        on = torch.is_grad_enabled()
        if on and self._lookup is not None and self._lookup.weight.grad is None:
            self._lookup.weight.grad = torch.zeros_like(self._lookup.weight)  # what is sparse is added in place to it
        self._set_lean(on=on)
        try:
            yield
        finally:
            self._set_lean(on=False)

    def _set_lean(self, *, on: bool) -> None:
        for layer in self._checkpointed:
            layer.training = on  # that recomputes; its parts, which may drop out, stay as they are
        if self._lookup is not None:
            self._lookup.sparse = on

    def gradient_norm(self) -> float:
        """Global norm of the gradient as it stands; not finite if any entry is not."""
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        return torch.nn.utils.get_total_norm(gradients).item()

    def update(self, step: int, grad_norm: float) -> UpdateResult:
        """Clip, apply and clear the gradient, as optimizer step `step` counted from 0."""
        lr = learning_rate(self._config, step, self._steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        torch.nn.utils.clip_grads_with_norm_(
            self.model.parameters(), self._config.max_grad_norm, torch.tensor(grad_norm, device=self.device)
        )
        self.optimizer.step()
        self.optimizer.zero_grad()
        return UpdateResult(grad_norm=grad_norm, lr=lr)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Its weights as they are now, adapters merged, by the names of the plain model; tied ones once."""
        return plain_weights(self.model)

    def state(self) -> dict[str, Any]:
        """All that decides the next update: of a student with adapters, not the weights that stay as they are."""
        return {"model": self._trained(), "optimizer": self.optimizer.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict({**self.model.state_dict(), **state["model"]})
        self.optimizer.load_state_dict(state["optimizer"])

    def _trained(self) -> dict[str, Tensor]:
        state = self.model.state_dict()
        if self._adapters is None:
            return state
        return {name: state[name] for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def save(self, folder: Path) -> None:
        """A folder that plain `AutoModelForCausalLM.from_pretrained` loads, with the tokenizer; the adapters merged, and
        also by themselves below it, as `PeftModel.from_pretrained` loads them."""
        with no_progress_bars():
            self.model.save_pretrained(folder, state_dict=dict(self.weights()))
            if self._adapters is not None:
                self._adapters.save_pretrained(str(folder / "adapter"))
        self.tokenizer.save_pretrained(folder)

"""The student: hidden states, LM head, optimizer step, save. Where it runs and in what precision stays in here."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from poweropd.adapters import add_adapters, plain_weights
from poweropd.distributed import ALONE, World
from poweropd.errors import RunError
from poweropd.models import compute_precision, lm_head, no_progress_bars
from poweropd.objectives.lm_head import LMHead
from poweropd.packing import enable_packing
from poweropd.sections import LoRAConfig, OptimizerConfig
from poweropd.sharding import Trunk, own_part, put, whole
from poweropd.types import TokenBatch, UpdateResult

MODEL = "model."  # before the names of weights in `Student.shards`


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
        is_sharded: whether this rank holds a part of every weight only.

    Args:
        model: fp32 weights.
        vocab_size, end_ids: see `LMHead`.
        steps: of the whole run, for the learning-rate schedule.
        precision: dtype of matmuls.
        lora: adapters to train in the place of the weights, which then stay as they are.
        seed: of how they begin.
        world: the ranks that train it together, all with the same weights.
        sharded: whether these spread weights, gradients and optimizer state among them.
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
        world: World = ALONE,
        sharded: bool = False,
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.world = world
        self.is_sharded = sharded and world.size > 1
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
        lean = type(embedding) is torch.nn.Embedding and embedding.weight.requires_grad and not self.is_sharded
        self._lookup: Any = embedding if lean else None
        self._trunk = Trunk(model)
        world.copy_from_main([parameter.detach() for parameter in model.parameters()])
        if self.is_sharded:
            self._trunk.shard()
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
            hidden = self._trunk(batch.input_ids, batch.lengths, batch.loss_positions)
        return hidden.to(self._precision)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a loss; where weights are spread, that of the sum of all ranks' losses, which all call."""
        (loss * self.world.size if self.is_sharded else loss).backward()  # spread gradients are means over the ranks

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

    def add_up_gradients(self) -> None:
        """Have every rank hold the sum of the gradients of all, once a step; spread ones have been added up already."""
        if self.is_sharded:
            return
        trained = self._trained()
        there = torch.tensor([parameter.grad is not None for parameter in trained.values()], dtype=torch.float32)
        self.world.add_up([there])
        for parameter, ranks in zip(trained.values(), there.tolist(), strict=True):
            if ranks and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.world.add_up(self._gradients())

    def gradient_norm(self) -> float:
        """Global norm of the gradient as it stands; not finite if any entry is not.

        Raises:
            RunError: ranks do not agree, so their weights are no longer the same.
        """
        norm = torch.nn.utils.get_total_norm(self._gradients())
        if self.is_sharded:
            square = norm.square()
            self.world.add_up([square])
            norm = square.sqrt()
        norms = self.world.gather(norm.item())
        if len(set(map(repr, norms))) > 1:
            raise RunError(
                f"the ranks of this run no longer agree: their gradient norms are {norms}. Go on from the last checkpoint "
                "with --resume; if it comes again, a device or a link is faulty"
            )
        return norms[0]

    def update(self, step: int, grad_norm: float) -> UpdateResult:
        """Clip, apply and clear the gradient, as optimizer step `step` counted from 0."""
        lr = learning_rate(self._config, step, self._steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        factor = (self._config.max_grad_norm / (torch.tensor(grad_norm, device=self.device) + 1e-6)).clamp(max=1.0)
        for gradient in self._gradients():
            gradient.mul_(factor)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return UpdateResult(grad_norm=grad_norm, lr=lr)

    def _gradients(self) -> list[Tensor]:
        """What this rank holds of them."""
        return [own_part(parameter.grad) for parameter in self._trained().values() if parameter.grad is not None]

    def _trained(self) -> dict[str, torch.nn.Parameter]:
        return {name: each for name, each in self.model.named_parameters() if each.requires_grad}

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Its weights as they are now, whole, adapters merged, by the names of the plain model; tied ones once.

        Where they are spread, all ranks must ask together.
        """
        return ((name, whole(weight)) for name, weight in plain_weights(self.model))

    def state(self) -> dict[str, Any]:
        """All that decides the next update of a student that is not spread: of one with adapters, not the weights that stay
        as they are."""
        weights = self.model.state_dict() if self._adapters is None else dict(self._trained())
        return {"model": weights, "optimizer": self.optimizer.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up such a state, also where it is to be spread.

        Raises:
            RunError: it is that of another model.
        """
        self.refuse_another({f"{MODEL}{name}": value.shape for name, value in state["model"].items()})
        if not self.is_sharded:
            self.model.load_state_dict({**self.model.state_dict(), **state["model"]})
            self.optimizer.load_state_dict(state["optimizer"])
            return
        for place, (name, parameter) in enumerate(self._trained().items()):
            put(parameter, state["model"][name])
            for key, target in self._moments(parameter).items():
                put(target, state["optimizer"]["state"][place][key])

    def shards(self) -> dict[str, Tensor]:
        """The same as this rank holds it, by name: to be saved, or to be read into."""
        found = {}
        for name, parameter in self._trained().items():
            found[f"{MODEL}{name}"] = parameter.detach()
            found |= {f"optimizer.{name}.{key}": value for key, value in self._moments(parameter).items()}
        return found

    def _moments(self, parameter: torch.nn.Parameter) -> dict[str, Tensor]:
        """The optimizer's state of a parameter; as it begins, before the first step."""
        state = self.optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        return state

    def refuse_another(self, shapes: Mapping[str, torch.Size]) -> None:
        """Raises RunError unless all that is trained is among these shapes of `shards`."""
        own = {f"{MODEL}{name}": parameter.shape for name, parameter in self._trained().items()}
        different = [name for name, shape in own.items() if shapes.get(name) != shape]
        if different:
            name, *more = different
            there = tuple(shapes[name]) if name in shapes else "missing"
            raise RunError(
                f"the checkpoint is of another model: {name.removeprefix(MODEL)} is {there} in it and {tuple(own[name])} in "
                f"the student, and {len(more)} more weights differ. Resume with the student that the run was started with"
            )

    def save(self, folder: Path) -> None:
        """A folder that plain `AutoModelForCausalLM.from_pretrained` loads, with the tokenizer; the adapters merged, and
        also by themselves below it, as `PeftModel.from_pretrained` loads them. Rank 0 writes it, all ranks call."""
        weights = self._on_main(self.weights())
        adapters = {} if self._adapters is None else self._adapters.state_dict()
        adapters = self._on_main((name, whole(value)) for name, value in adapters.items() if "lora_" in name)
        self.world.on_main(partial(self._write, folder, weights, adapters))

    def _on_main(self, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Those tensors on rank 0, none on others."""
        return {name: value.cpu() for name, value in tensors if self.world.is_main}

    def _write(self, folder: Path, weights: dict[str, Tensor], adapters: dict[str, Tensor]) -> None:
        with no_progress_bars():
            self.model.save_pretrained(folder, state_dict=weights)
            if self._adapters is not None:
                self._adapters.save_pretrained(str(folder / "adapter"), state_dict=adapters)
        self.tokenizer.save_pretrained(folder)

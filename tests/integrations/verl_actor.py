"""A process of verl's own actor, FSDP2 on a CPU: the rollouts of a file in, the gradient of a step out.

    python verl_actor.py FOLDER RANK PROCESSES

verl knows GPUs and NPUs; other devices are registered with it, which is what happens to the CPU here.
"""

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

os.environ["VERL_PLATFORM"] = "cpu"

import torch
from hydra import compose, initialize_config_dir
from tensordict import TensorDict
from torch import distributed
from torch.nested import as_nested_tensor
from verl.plugin.platform.platform_cuda import PlatformCUDA
from verl.plugin.platform.platform_manager import PlatformRegistry
from verl.trainer.distillation.losses import distillation_ppo_loss
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.tensordict_utils import assign_non_tensor

ROOT = Path(__file__).parents[2]
STUDENT = ROOT / "src" / "poweropd" / "quickstart" / "models" / "student"
SETTINGS = [
    "hydra.searchpath=[pkg://verl.trainer.config]",
    f"actor_rollout_ref.model.path={STUDENT}",
    "actor_rollout_ref.model.use_remove_padding=false",  # packing needs flash-attn, which wants a GPU
    "+actor_rollout_ref.model.override_config.attn_implementation=sdpa",
    "actor_rollout_ref.actor.fsdp_config.use_torch_compile=false",
    "+distillation.distillation_loss.objective_settings.alpha=0.5",
    "+actor_rollout_ref.actor.fsdp_config.mixed_precision={param_dtype: fp32, reduce_dtype: fp32, buffer_dtype: fp32}",
]


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformCUDA):
    device_name = "cpu"
    device_module = torch.cpu

    def is_available(self) -> bool:
        return True

    def current_device(self) -> str:
        return "cpu"


def as_batch(rollouts: list[dict[str, Any]]) -> TensorDict:
    """Rollouts as verl's trainer hands them to its actor, one micro-batch each."""

    def column(make: Any) -> torch.Tensor:
        return as_nested_tensor([make(rollout) for rollout in rollouts], layout=torch.jagged)

    def teacher(rollout: dict[str, Any]) -> torch.Tensor:
        """Place t speaks of token t + 1; of the prompt nobody asks."""
        scores = torch.zeros(len(rollout["prompt"]) + len(rollout["response"]), 1)
        scores[len(rollout["prompt"]) - 1 : -1, 0] = rollout["teacher_logprobs"]
        return scores

    data = TensorDict(
        {
            "prompts": column(lambda rollout: rollout["prompt"]),
            "responses": column(lambda rollout: rollout["response"]),
            "input_ids": column(lambda rollout: torch.cat([rollout["prompt"], rollout["response"]])),
            "position_ids": column(lambda rollout: torch.arange(len(rollout["prompt"]) + len(rollout["response"]))),
            "response_mask": column(lambda rollout: torch.ones_like(rollout["response"])),
            "loss_mask": column(lambda rollout: torch.ones_like(rollout["response"])),
            "teacher_logprobs": column(teacher),
        },
        batch_size=len(rollouts),
    )
    assign_non_tensor(
        data, temperature=1.0, use_remove_padding=False, use_dynamic_bsz=False, micro_batch_size_per_gpu=1,
        global_batch_size=len(rollouts) * distributed.get_world_size(),
    )  # fmt: skip
    return data


def main(folder: Path, rank: int, processes: int) -> None:
    # It asks for the platform when it is imported.
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=processes)
    with initialize_config_dir(str(ROOT / "recipes" / "verl"), version_base=None):
        config = compose("2-gpus", overrides=SETTINGS)
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    model = omega_conf_to_dataclass(config.actor_rollout_ref.model)
    distillation = omega_conf_to_dataclass(config.distillation)
    engine = FSDPEngineWithLMHead(model, actor.engine, actor.optim, actor.checkpoint)
    engine.initialize()
    loss = partial(distillation_ppo_loss, config=actor, distillation_config=distillation)
    rollouts = torch.load(folder / "rollouts.pt")
    with engine.train_mode():
        engine.forward_backward_batch(as_batch(rollouts[rank::processes]), loss)
        named = engine.module.named_parameters()
        gradient = {name: parameter.grad.full_tensor() for name, parameter in named}
    if rank == 0:
        torch.save(gradient, folder / "gradient.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))

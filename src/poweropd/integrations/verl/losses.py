"""Distillation losses of verl, one for every objective that looks at a sampled token by itself: `loss_mode=poweropd_power`.

verl imports this in every process, by the entry point `verl.plugins`; importing it registers the losses. What they give is the
advantage of the objective table; rollouts, teachers, sharding and checkpoints stay verl's. Written for verl 0.9.1.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from verl.trainer.distillation.losses import DistillationLossSettings, register_distillation_loss
from verl.utils.metric import AggregationType, Metric
from verl.utils.tensordict_utils import get_non_tensor_data
from verl.workers.config import ActorConfig, DistillationConfig, DistillationLossConfig
from verl.workers.utils.padding import no_padding_2_padding

from poweropd.objectives import OBJECTIVES, Objective, build, row_of

PREFIX = "poweropd"


def _sampled(name: str, settings: Mapping[str, Any]) -> Objective:
    """The objective, estimated by the sampled token where it has other estimators too."""
    chosen = {"estimator": "sampled"} if "sampled" in row_of(name).estimators[1:] else {}
    return build(name, **chosen | dict(settings))


def _lacking(objective: Objective) -> str | None:
    """What it needs that verl does not hand to a loss, if there is such."""
    needs = {
        "the rewards of the whole step: a loss sees one micro-batch": objective.needs_whole_step,
        "the frozen initial student": objective.needs_of_reference != "nothing",
        "golden answers": objective.row.on_golden_answers or objective.golden_weight > 0,
        "more of the teacher than its log-probability of the sampled token": objective.needs in ("top_k", "full"),
    }
    return next((what for what, is_needed in needs.items() if is_needed), None)


NOT_SERVED = {name: what for name in OBJECTIVES if (what := _lacking(_sampled(name, {})))}
LOSS_MODES = {f"{PREFIX}_{name}": name for name in OBJECTIVES if name not in NOT_SERVED}


@dataclass
class PowerOPDLossConfig(DistillationLossConfig):  # type: ignore[misc]
    """`DistillationLossConfig` with settings of the objective; `distillation.distillation_loss._target_` names it.

    Args:
        objective: with `loss_mode=poweropd`, a name of `poweropd objectives`, or `module:attribute` of your own.
        objective_settings: settings of the objective, such as `{alpha: 5}`; those left out have the table's defaults.

    Raises:
        ValueError: an objective or a setting that verl cannot serve, or one of verl's that would change the advantage.
    """

    loss_mode: str = f"{PREFIX}_power"
    use_task_rewards: bool = False
    use_policy_gradient: bool = False
    loss_max_clamp: float | None = None
    log_prob_min_clamp: float | None = None
    objective: str | None = None
    objective_settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        objective_of(self)


def objective_of(config: DistillationLossConfig) -> Objective:
    """What a loss config asks for; a stock one has no settings of the objective. Raises as `PowerOPDLossConfig`."""
    name, asked = LOSS_MODES.get(config.loss_mode), config.get("objective")
    if name is None and config.loss_mode != PREFIX:
        raise ValueError(
            f"distillation_loss.loss_mode is {config.loss_mode!r}, none of ours; give {PREFIX}, or {PREFIX}_<objective>: "
            f"{', '.join(LOSS_MODES)}"
        )
    if name is None and asked is None:
        raise ValueError(
            f"distillation_loss.loss_mode {PREFIX} takes its objective from distillation_loss.objective, which is not set; "
            f"set it, with _target_={__name__}.{PowerOPDLossConfig.__name__}, or give {PREFIX}_<objective>"
        )
    if None not in (name, asked) and name != asked:
        raise ValueError(
            f"distillation_loss.objective is {asked!r}, but loss_mode {config.loss_mode} is {name!r}; "
            f"leave one out, or set loss_mode={PREFIX}"
        )
    for key, harm in {
        "loss_max_clamp": "would clip the advantages of the objective",
        "log_prob_min_clamp": "would do nothing: advantages are those of the log-probabilities as they are",
    }.items():
        if config.get(key) is not None:
            raise ValueError(f"distillation_loss.{key} is {config.get(key)}: it {harm}; set it to null")
    objective = _sampled(name or asked, config.get("objective_settings", {}))
    if lacking := _lacking(objective):
        raise ValueError(
            f"objective {objective} needs {lacking}, which verl does not hand to a loss; `poweropd train` has it"
        )
    return objective


@register_distillation_loss(DistillationLossSettings(names=[PREFIX, *LOSS_MODES], use_estimator=True))  # type: ignore[untyped-decorator]
def token_losses(
    config: ActorConfig, distillation_config: DistillationConfig, model_output: dict[str, Tensor], data: Any
) -> tuple[Tensor, dict[str, Metric]]:
    """Per token of a micro-batch `-advantage`, with the gradient `-advantage * grad log q`; and means over trained tokens.

    So verl follows the same gradient whether it makes an advantage of the negative loss (`use_policy_gradient`) or
    differentiates the loss.

    Returns:
        [responses, longest response]; `opd/signal` (the advantage), `opd/log_ratio` (log p - log q of the sampled token),
        `opd/last_log_ratio` (of each response's last one, the end token of those that ended) and `opd/mismatch` (of
        log q from that of the sampling policy, as verl has it).

    Raises:
        ValueError: a temperature other than 1, a token that the teacher did not score, or as `PowerOPDLossConfig`.
    """
    objective = objective_of(distillation_config.distillation_loss)
    _require_temperature_one(data)
    logprobs = no_padding_2_padding(model_output["log_probs"], data)
    teacher_logprobs = no_padding_2_padding(data["teacher_logprobs"], data).squeeze(-1)
    is_trained = _padded(data["response_mask"]).bool()
    missing = int(teacher_logprobs[is_trained].isnan().sum())
    if missing:
        raise ValueError(
            f"the teacher gave no log-probability of {missing} of {int(is_trained.sum())} sampled tokens; "
            "see the log of its server"
        )
    advantages = objective.sampled(logprobs, teacher_logprobs)
    losses = -advantages * (logprobs - logprobs.detach()).exp()

    log_ratios = (teacher_logprobs - logprobs.detach()).float()
    is_last = is_trained & (is_trained.cumsum(1) == is_trained.sum(1, keepdim=True))
    means = {
        "opd/signal": advantages[is_trained],
        "opd/log_ratio": log_ratios[is_trained],
        "opd/last_log_ratio": log_ratios[is_last],
    }
    if "old_log_probs" in data:
        drift = logprobs.detach() - _padded(data["old_log_probs"])
        means["opd/mismatch"] = drift[is_trained].abs()
    return losses, {key: Metric(AggregationType.MEAN, values.mean()) for key, values in means.items()}


def _padded(values: Tensor) -> Tensor:
    return values.to_padded_tensor(0.0) if values.is_nested else values


def _require_temperature_one(data: Any) -> None:
    """verl divides the student's logits by it, and no teacher's: log-probabilities of two temperatures do not compare."""
    temperature = get_non_tensor_data(data, "temperature", default=1.0)
    if bool((torch.as_tensor(temperature) != 1.0).any()):
        raise ValueError(
            f"rollout.temperature is {temperature}; objectives compare the models' own distributions, so set "
            "actor_rollout_ref.rollout.temperature=1.0"
        )

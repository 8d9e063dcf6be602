"""From a name and settings to an objective: which settings each row takes, and which do not go together."""

import importlib
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from poweropd.objectives.divergences import Divergence
from poweropd.objectives.objective import Objective
from poweropd.objectives.row import Row
from poweropd.objectives.settings import Choice, Number, Setting, Value, fill, nearest
from poweropd.objectives.table import OBJECTIVES

_K3 = "k3 as a loss follows the gradient of KL(reference || student); full and k2_loss follow KL(student || reference)"

USUAL_NAMES = {
    **dict.fromkeys(("opd", "vanilla", "k1"), "log_ratio"),
    **dict.fromkeys(("poweropd", "power_opd"), "power"),
    **dict.fromkeys(("rkl", "minillm"), "reverse_kl"),
    **dict.fromkeys(("fkl", "kl", "kd"), "forward_kl"),
    **dict.fromkeys(("jsd", "js"), "jensen_shannon"),
    **dict.fromkeys(("gkd", "gjs"), "generalized_jsd"),
    **dict.fromkeys(("tv", "tvd"), "total_variation"),
    **dict.fromkeys(("opd+", "opd_plus"), "any f-divergence with estimator sampled, for example forward_kl,"),
    "hellinger": "squared_hellinger",
    "stableopd": "stable_opd",
}  # what papers and other programs call them: named in the message, not accepted

TOP_K: dict[str, Setting] = {
    "k": Number(32, "teacher tokens of estimator top_k", low=1, closed="low", integer=True),
    "tail": Choice(
        "bucket",
        "the rest of the vocabulary under estimator top_k. bucket: one outcome; renormalize: left out, both models "
        "renormalised; sample: the sampled token where it lies there, which agrees with full in expectation",
        ("bucket", "renormalize", "sample"),
        refused={"keep": "left as it is, the update does not vanish where both models agree"},
    ),
}
REWARD: dict[str, Setting] = {
    "baseline": Choice(
        "none",
        "taken off the reward. exact: its expectation under the student; leave_one_out: the mean of the prompt's other "
        "rollouts",
        ("none", "exact", "leave_one_out"),
    ),
    "normalize": Choice(
        "none",
        "rewards of a step. zscore: standardised; sign_max_abs: each sign over its largest magnitude",
        ("none", "zscore", "sign_max_abs"),
    ),
}
RATIO: dict[str, Setting] = {
    "gauge": Choice(
        "zero",
        "zero: the advantage vanishes where both models agree; opd_plus: the paper's u f'(u) - f(u); stop_gradient: the "
        "biased -f(u), for comparison",
        ("zero", "opd_plus", "stop_gradient"),
    ),
    "discount": Number(
        0.0,
        "reward-to-go, A_t - sum_{s>t} discount^(s-t) f(u_s); 1 follows the divergence of whole sequences",
        0.0,
        1.0,
        "both",
    ),
    "ratio_limit": Number(float("inf"), "the log-ratio is clamped to +- this, in nats: another f-divergence", low=0.0),
}
STABILITY: dict[str, Setting] = {
    "reference_kl": Number(0.0, "coefficient of KL(student || initial student)", low=0.0, closed="low"),
    "reference_kl_form": Choice(
        "full",
        "full: exact over the vocabulary; k2_loss: k2 of the sampled token as a loss; k1_reward: k1 in its reward",
        ("full", "k2_loss", "k1_reward"),
        refused={
            "k3": _K3,
            "k3_loss": _K3,
            "k1_loss": "k1 as a loss has an expected gradient of zero; in the reward it has the right one: k1_reward",
        },
    ),
    "reference_kl_schedule": Choice(
        "constant", "of reference_kl; linear falls to 0 at the last step", ("constant", "linear", "adaptive")
    ),
    "reference_kl_target": Number(0.0, "KL a token, in nats, that schedule adaptive steers to", low=0.0, closed="low"),
    "golden": Number(0.0, "coefficient of the cross-entropy of each prompt's golden answer", low=0.0, closed="low"),
    "golden_schedule": Choice("constant", "of golden; linear falls to 0 at the last step", ("constant", "linear")),
}


def settings_of(row: Row) -> dict[str, Setting]:
    """Every setting that a row takes: its own first, then those of its estimators, then those of all."""
    common: dict[str, Setting] = {}
    if len(row.estimators) > 1:
        help = "sampled: the reward of the sampled token; top_k: the teacher's k likeliest tokens; full: the vocabulary"
        common["estimator"] = Choice(row.estimators[0], help, row.estimators)
    if "top_k" in row.estimators:
        common |= TOP_K
    if "sampled" in row.estimators:
        common |= REWARD | (RATIO if _is_of_ratio(row) else {})
    if not row.on_golden_answers:
        common |= STABILITY
    common |= {key: replace(common[key], default=value) for key, value in row.defaults.items()}  # type: ignore[arg-type]
    kept = {key: setting for key, setting in common.items() if key not in row.settings and key not in row.fixed}
    return {**row.settings, **kept}


def _is_of_ratio(row: Row) -> bool:
    defaults = {key: setting.default for key, setting in row.settings.items()}
    return row.divergence is not None and row.divergence(**defaults).of_ratio


def build(name: str, **settings: Any) -> Objective:
    """The objective of that name, settings that are not given at their defaults.

    Args:
        name: a row of the table, or `module:attribute` of a user's own `Row` or `Divergence`.

    Raises:
        ValueError: unknown name or setting, a value outside its range, settings without meaning together; all in one
            message, a line each.
    """
    row = row_of(name)
    known = settings_of(row)
    foreign = {key: reason for key in settings if key not in known and (reason := _belongs_to(key, row))}
    values, problems = fill(known, {key: value for key, value in settings.items() if key not in foreign}, name)
    problems += [f"objective.{key}: {name} does not take it: {reason}" for key, reason in foreign.items()]
    if not problems:
        objective = Objective(name, row, {**values, **row.fixed}, given=tuple(settings))
        problems = _without_meaning(objective)
    if problems:
        raise ValueError("\n".join(problems))
    return objective


def _belongs_to(key: str, row: Row) -> str | None:
    """Why a setting that other rows take is not one of this row."""
    if key in row.fixed:
        return f"{key} {row.fixed[key]} is what makes it what it is; log_ratio and reverse_kl take any"
    if row.on_golden_answers:
        return "it has no teacher" if key in (*TOP_K, *REWARD, *RATIO, *STABILITY, "estimator") else None
    if key in RATIO and "sampled" in row.estimators:
        return "it speaks of the ratio p/q, which only f-divergences depend on; log_ratio, clip and forward_kl take it"
    if key in (*REWARD, *RATIO):
        return "it shapes the reward of a sampled token, and there is none; log_ratio and power have one"
    if key in (*TOP_K, "estimator"):
        return f"it is always estimated one way, {' or '.join(row.estimators)}; reverse_kl and power take it"
    return None


def row_of(name: str) -> Row:
    """The row of a name; see `build`.

    Raises:
        ValueError: there is none.
    """
    if not isinstance(name, str):
        raise ValueError(
            f"objective.name: {name!r} is a {type(name).__name__}; give the name of a row, or module:attribute"
        )
    if ":" in name:
        return _own_row(name)
    if name not in OBJECTIVES:
        usual = USUAL_NAMES.get(name.lower().replace("-", "_"))
        hint = f"; it is {usual} here" if usual else nearest(name, OBJECTIVES) or f"; known: {', '.join(OBJECTIVES)}"
        raise ValueError(f"objective.name: unknown objective {name!r}{hint}")
    return OBJECTIVES[name]


def _own_row(name: str) -> Row:
    module_name, _, attribute = name.partition(":")
    here = str(Path.cwd())
    if not all(part.isidentifier() for part in (*module_name.split("."), attribute)):
        raise ValueError(
            f"objective.name: {name!r} names no attribute of a module; give module:attribute, for example "
            f"my_file:my_objective for my_objective in {here}/my_file.py"
        )
    if here not in sys.path:
        sys.path.insert(0, here)  # a command's path starts at its own folder, not at the user's
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a user's own file may raise anything
        what = (
            str(error) if isinstance(error, ImportError) else f"{type(error).__name__}: {' '.join(str(error).split())}"
        )
        raise ValueError(f"objective.name: cannot import {module_name!r} from {here}: {what}") from error
    if not hasattr(module, attribute):
        raise ValueError(
            f"objective.name: module {module_name!r} has no {attribute!r}{nearest(attribute, vars(module))}"
        )
    found = getattr(module, attribute)
    if isinstance(found, Divergence):
        equation = f"see {name}"
        return Row(f"the divergence {name}", equation, f"-D of {name}, prefixes held fixed", name, lambda: found,
                   ("sampled", "top_k", "full"))  # fmt: skip
    if not isinstance(found, Row):
        raise ValueError(
            f"objective.name: {name} is a {type(found).__name__}; give a poweropd.objectives.Row or a Divergence"
        )
    return found


def _without_meaning(objective: Objective) -> list[str]:
    """Settings that would do nothing, or that contradict each other."""
    values, given, estimator = objective.settings, set(objective.given), objective.estimator
    problems = []
    if estimator != "sampled":
        problems += [_needs_sampled(key, values[key], estimator) for key in _in_force(values, (*REWARD, *RATIO))]
    if estimator != "top_k":
        problems += [
            f"objective.{key}: it belongs to estimator top_k, and objective.estimator is {estimator}; "
            f"set objective.estimator=top_k or leave objective.{key} out"
            for key in TOP_K
            if key in given and key not in objective.row.settings
        ]
    if estimator == "top_k" and values.get("tail") == "renormalize" and objective.k < 2:
        problems.append(
            "objective.k: 1: renormalised, one token has probability 1 under both models; set it to 2 or more"
        )
    form, schedule = values.get("reference_kl_form"), values.get("reference_kl_schedule")
    if not values.get("reference_kl"):
        problems += [
            f"objective.{key}: it does nothing while objective.reference_kl is 0; set objective.reference_kl, e.g. to 0.01"
            for key in ("reference_kl_form", "reference_kl_schedule", "reference_kl_target")
            if key in given
        ]
    elif form == "k1_reward" and estimator != "sampled":
        problems.append(
            f"objective.reference_kl_form: k1_reward needs a reward to be in, and objective.estimator is {estimator}; "
            "full and k2_loss work with every estimator"
        )
    if schedule == "adaptive" and not values.get("reference_kl_target"):
        problems.append(
            "objective.reference_kl_schedule: adaptive needs objective.reference_kl_target, in nats a token"
        )
    if schedule != "adaptive" and values.get("reference_kl_target"):
        problems.append(
            f"objective.reference_kl_target: only schedule adaptive steers to it, and objective.reference_kl_schedule is "
            f"{schedule}; set objective.reference_kl_schedule=adaptive"
        )
    if "golden_schedule" in given and not values.get("golden"):
        problems.append("objective.golden_schedule: it does nothing while objective.golden is 0")
    return problems


def _in_force(values: Mapping[str, Value], keys: tuple[str, ...]) -> list[str]:
    """Which of these settings do something."""
    neutral = ("none", "zero", 0.0, float("inf"))
    return [key for key in keys if key in values and values[key] not in neutral]


def _needs_sampled(key: str, value: Value, estimator: str) -> str:
    reason = (
        f"the exact divergence of a position ({estimator}) says nothing of the positions after it"
        if key == "discount"
        else f"it shapes the reward of a sampled token, and estimator {estimator} has none"
    )
    return f"objective.{key}: {value if isinstance(value, str) else f'{value:g}'}: {reason}; set objective.estimator=sampled"

"""Whether verl has our losses: it passes over a plug-in that cannot be imported without a word."""

import importlib
import os
from importlib.metadata import entry_points, version

from poweropd.errors import ConfigError

PLUGIN = "poweropd.integrations.verl.losses"
TESTED = "0.9.1"


def check() -> list[str]:
    """The loss modes that a process which imports verl has from us.

    Raises:
        ConfigError: verl is not there or another one, or does not load the plug-in; says why.
    """
    try:
        from verl.trainer.distillation.losses import DISTILLATION_LOSS_REGISTRY
    except ImportError as error:
        raise ConfigError(
            f"verl {TESTED} is needed here, and cannot be imported: {error}; pip install 'poweropd[verl]'"
        ) from error
    found = version("verl")
    if found != TESTED:
        raise ConfigError(f"the plug-in is written for verl {TESTED}, this is {found}; pip install verl=={TESTED}")
    names = [name for name in DISTILLATION_LOSS_REGISTRY if name.partition("_")[0] == "poweropd"]
    if not names:
        raise ConfigError(f"verl {found} did not load our losses: {_why_not()}")
    return names


def _why_not() -> str:
    if PLUGIN not in {point.value for point in entry_points(group="verl.plugins")}:
        return "poweropd is not installed as a package here; pip install poweropd"
    policy = os.environ.get("VERL_USE_EXTERNAL_PLUGINS", "auto")
    try:
        importlib.import_module(PLUGIN)
    except Exception as error:  # whatever verl passed over
        return f"{type(error).__name__}: {error}"
    return f"VERL_USE_EXTERNAL_PLUGINS is {policy!r}; unset it, or name poweropd in it"

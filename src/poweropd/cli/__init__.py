"""The `poweropd` command. Heavy imports happen inside the verbs, so that --help is instant."""

import warnings

from poweropd.cli import training, measuring, planning, serving, objectives  # isort: skip  (--help shows the verbs in this order)
from poweropd.cli.shared import app, in_one_line

__all__ = ["app", "main", "measuring", "objectives", "planning", "serving", "training"]


def main() -> None:
    warnings.formatwarning = in_one_line  # type: ignore[assignment]
    app()

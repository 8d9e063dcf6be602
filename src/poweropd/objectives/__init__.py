"""Objectives of on-policy distillation: pure functions of tensors. Imports torch, and of this package `cpu` alone."""

from poweropd.objectives.bregman import from_derivative
from poweropd.objectives.build import STABILITY, build, row_of, settings_of
from poweropd.objectives.csiszar import divergence_of, from_generator
from poweropd.objectives.divergences import Divergence
from poweropd.objectives.objective import Objective
from poweropd.objectives.row import Needs, Row
from poweropd.objectives.settings import Choice, Number
from poweropd.objectives.table import OBJECTIVES

__all__ = [
    "OBJECTIVES", "STABILITY", "Choice", "Divergence", "Needs", "Number", "Objective", "Row", "build", "divergence_of",
    "from_derivative", "from_generator", "row_of", "settings_of",
]  # fmt: skip

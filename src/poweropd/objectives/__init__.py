"""Objectives of on-policy distillation: pure functions of tensors. Imports torch and nothing else of this package."""

from poweropd.objectives.shaping import RewardStatistics
from poweropd.objectives.table import OBJECTIVES, Objective, Row, Setting, build

__all__ = ["OBJECTIVES", "Objective", "RewardStatistics", "Row", "Setting", "build"]

"""Objectives of on-policy distillation: pure functions of tensors. Imports torch and nothing else of this package."""

from poweropd.objectives.shaping import RewardStatistics
from poweropd.objectives.table import OBJECTIVES, Needs, Objective, Row, Setting, build

__all__ = ["OBJECTIVES", "Needs", "Objective", "RewardStatistics", "Row", "Setting", "build"]

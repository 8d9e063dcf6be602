"""The sections of a recipe: every setting, its default, its range and its meaning, in one place."""

from poweropd.sections.data import DataConfig, EvaluationConfig, TrainingDataConfig
from poweropd.sections.models import LoRAConfig, StudentConfig, TeacherConfig
from poweropd.sections.rollout import RolloutConfig, SamplingConfig, VLLMConfig
from poweropd.sections.section import Section
from poweropd.sections.training import (
    CheckpointConfig,
    GuardConfig,
    LogConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
)

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "EvaluationConfig",
    "GuardConfig",
    "LoRAConfig",
    "LogConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "RolloutConfig",
    "SamplingConfig",
    "Section",
    "StudentConfig",
    "TeacherConfig",
    "TrainConfig",
    "TrainingDataConfig",
    "VLLMConfig",
]

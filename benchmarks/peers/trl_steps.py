"""Whole training steps of real TRL trainers, one at a time, when the referee asks.

The trainers run as they are shipped, on CPU and in fp32, without activation checkpointing; a callback holds each step until
it is asked for. Start-up, data loading and logging are outside of a turn. Rollouts are those of `model.generate`.
"""

import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, TrainerCallback
from trl import DistillationConfig, DistillationTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.experimental.iw_opd import IWOPDConfig, IWOPDTrainer

from suite.shapes import SHAPES, build, questions, tokenizer
from suite.turns import Turns


def distillation(new_tokens: int, common: dict[str, Any]) -> DistillationConfig:
    """Full-vocabulary reverse KL."""
    return DistillationConfig(**common, beta=1.0, max_completion_length=new_tokens, shuffle_dataset=False)


def iw_opd(new_tokens: int, common: dict[str, Any]) -> IWOPDConfig:
    """The sampled log-ratio: at gamma 0 every position has weight 1."""
    return IWOPDConfig(**common, iw_opd_gamma=0.0, top_p=1.0, max_completion_length=new_tokens)


def gkd(new_tokens: int, common: dict[str, Any]) -> GKDConfig:
    """Full-vocabulary reverse KL, on the student's own samples alone."""
    return GKDConfig(**common, beta=1.0, lmbda=1.0, temperature=1.0, max_new_tokens=new_tokens)


TRAINERS: dict[str, tuple[type, Callable[[int, dict[str, Any]], Any], str]] = {
    "DistillationTrainer": (DistillationTrainer, distillation, "prompt"),
    "IWOPDTrainer": (IWOPDTrainer, iw_opd, "messages"),
    "GKDTrainer": (GKDTrainer, gkd, "messages"),
}
"""The trainer, its configuration, and the column in which it expects a prompt."""


class Generation:
    """Counts and times the student's rollouts."""

    def __init__(self, model: PreTrainedModel, end_id: int) -> None:
        self._generate: Any = model.generate
        self._end_id = end_id
        model.generate = self  # type: ignore[assignment]
        self.forget()

    def forget(self) -> None:
        self.tokens, self.wall, self.cpu = 0, 0.0, 0.0

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        made = self._generate(*arguments, **named)
        self.wall += time.perf_counter() - wall
        self.cpu += time.process_time() - cpu
        sequences = made if isinstance(made, torch.Tensor) else made.sequences
        responses = sequences[:, named["input_ids"].shape[1] :]
        after_end = (responses == self._end_id).cumsum(1) - (responses == self._end_id).long()
        self.tokens += int((after_end == 0).sum())
        return made


class Asked(TrainerCallback):
    """Each step waits for its turn."""

    def __init__(self, turns: Turns, generation: Generation) -> None:
        self._turns, self._generation = turns, generation

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._generation.forget()
        self._turns.begin()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        made = self._generation
        self._turns.end(tokens=made.tokens, rollout={"wall": made.wall, "cpu": made.cpu})


def steps(
    turns: Turns, *, shape: str, trainer: str, prompts: int, micro_batch: int, new_tokens: int, ends: bool, lr: float
) -> None:
    """Training steps of `prompts` prompts each, `micro_batch` of them in one forward and backward pass."""
    make, configure, column = TRAINERS[trainer]
    pair = SHAPES[shape]
    student, teacher = build(pair, "student"), build(pair, "teacher")
    with TemporaryDirectory() as folder:
        tokens = tokenizer(ends=ends)
        tokens.save_pretrained(Path(folder) / "tokenizer")
        for model in (student, teacher):
            model.config._name_or_path = str(Path(folder) / "tokenizer")
            model.generation_config.eos_token_id = tokens.eos_token_id
        common = {
            "output_dir": folder,
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "per_device_train_batch_size": micro_batch,
            "gradient_accumulation_steps": prompts // micro_batch,
            "max_steps": turns.count,
            "learning_rate": lr,
            "lr_scheduler_type": "constant",
            "logging_steps": 10**9,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }
        asked = questions(prompts * (turns.count + 1), seed=0)
        rows = [[{"role": "user", "content": question}] for question in asked]
        if column == "messages":  # wants an answer too: its on-policy step ignores it, but for the count of its tokens
            rows = [[*row, {"role": "assistant", "content": "0"}] for row in rows]
        running = make(
            model=student,
            teacher_model=teacher,
            args=configure(new_tokens, common),
            train_dataset=Dataset.from_dict({column: rows}),
            processing_class=tokens,
        )
        running.add_callback(Asked(turns, Generation(student, tokens.eos_token_id)))
        running.train()

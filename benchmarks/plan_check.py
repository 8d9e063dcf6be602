"""Predicted against measured peak memory of training runs: `python benchmarks/plan_check.py`.

Every case is a real `poweropd train` of two steps in a process of its own; measured is its peak resident memory as the
kernel counts it, predicted is what `poweropd plan --gpu cpu` says of the same recipe. Models have random weights, which memory
does not depend on, and a vocabulary as large as those of real models; they and the runs lie in a temporary folder.

`--only NAME` runs some of the cases. Prints markdown, and writes benchmarks/results/plan-<machine>.json when all were run.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from poweropd.config import load_recipe
from poweropd.models import resolve


ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
RECIPE = ROOT / "recipes" / "quickstart.yaml"
GIB = 2**30
STEPS = 2  # AdamW has its moments from the first on


@dataclass(frozen=True)
class Model:
    """Sizes of a model with random weights."""

    kind: type[PreTrainedConfig]
    vocabulary: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int

    def config(self) -> PreTrainedConfig:
        return self.kind(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            intermediate_size=self.intermediate,
            tie_word_embeddings=True,
            max_position_embeddings=4096,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
            **({"head_dim": 64} if self.kind is Qwen3Config else {}),
        )

    def save(self, folder: Path) -> None:
        """A folder with random weights, and a tokenizer that knows as many tokens."""
        tokenizer = AutoTokenizer.from_pretrained(resolve("quickstart:student"))
        tokenizer.add_tokens([f"<{number}>" for number in range(self.vocabulary - len(tokenizer))])
        config = self.config()
        config.eos_token_id = tokenizer.eos_token_id
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


SMALL = Model(Qwen3Config, 32_000, 512, 8, 8, 4, 1536)
TEACHER = Model(Qwen3Config, 32_000, 768, 12, 12, 4, 2304)
LLAMA = Model(LlamaConfig, 32_000, 512, 8, 8, 4, 1536)
WIDE = Model(Qwen2Config, 151_936, 896, 6, 14, 2, 4864)  # Qwen2.5-0.5B with a quarter of its layers


@dataclass(frozen=True)
class Case:
    """A run: its models, embedded ones where None, and its settings."""

    name: str
    student: Model | None
    teacher: Model | None
    sets: tuple[str, ...]


def _sizes(prompts: int, new: int, micro: int) -> tuple[str, ...]:
    return (
        f"train.prompts_per_step={prompts}",
        f"sampling.max_new_tokens={new}",
        f"train.tokens_per_micro_batch={micro}",
        f"teacher.tokens_per_batch={micro}",
    )


CASES = (
    Case("quickstart", None, None, ()),
    Case("sampled", SMALL, TEACHER, _sizes(24, 96, 4096)),
    Case("sampled, checkpointing", SMALL, TEACHER, (*_sizes(24, 96, 4096), "student.gradient_checkpointing=true")),
    Case("full vocabulary", SMALL, TEACHER, (*_sizes(24, 96, 4096), "objective={name: reverse_kl}")),
    Case("longer answers", SMALL, TEACHER, _sizes(8, 480, 4096)),
    Case("Llama", LLAMA, LLAMA, _sizes(24, 96, 4096)),
    Case("wide vocabulary", WIDE, WIDE, _sizes(8, 32, 512)),
    Case("wide vocabulary, full", WIDE, WIDE, (*_sizes(8, 32, 512), "objective={name: reverse_kl}")),
)


@dataclass(frozen=True)
class Result:
    """GiB."""

    name: str
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


def check(case: Case, folder: Path) -> Result:
    """Predict, then run."""
    sets = [*case.sets, f"train.steps={STEPS}", "train.threads=1", "evaluation.data=null"]
    for role, model in (("student", case.student), ("teacher", case.teacher)):
        if model is not None:
            place = folder / f"{model.kind.model_type}-{model.vocabulary}-{model.hidden}"
            if not place.exists():
                model.save(place)
            sets.append(f"{role}.model={place}")
    predicted = memory(load_recipe(RECIPE, sets), machine("cpu")).peak
    return Result(case.name, predicted / GIB, _peak_of_run(sets, folder / "run") / GIB)


def _peak_of_run(sets: Sequence[str], out: Path) -> int:
    """Bytes."""
    options = [option for setting in sets for option in ("--set", setting)]
    command = [sys.executable, "-m", "poweropd", "train", str(RECIPE), "--out", str(out), *options]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=said, stderr=said)
        _, status, used = os.wait4(process.pid, 0)
        if status:
            said.seek(0)
            raise RuntimeError(said.read().decode())
    subprocess.run(["rm", "-r", str(out)], check=True)
    return used.ru_maxrss * 1024

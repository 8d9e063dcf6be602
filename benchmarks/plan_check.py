"""Predicted against measured peak memory of training runs: `python benchmarks/plan_check.py`.

Every case is a real `poweropd train` of two steps in a process of its own; measured is its peak resident memory as the
kernel counts it, predicted is what `poweropd plan --gpu cpu` says of the same recipe. Models have random weights, which memory
does not depend on, and a vocabulary as large as those of real models; they and the runs lie in a temporary folder.

`--only NAME` runs some of the cases. Prints markdown, and writes benchmarks/results/plan-memory.json when all were run.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from poweropd.config import load_recipe
from poweropd.models import no_progress_bars, resolve
from poweropd.plan.load import Load
from poweropd.plan.machines import machine
from poweropd.plan.memory import memory

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
RECIPE = ROOT / "recipes" / "quickstart.yaml"
GIB = 2**30
STEPS = 2  # AdamW has its moments from the first on
PROMPT = 36  # tokens of the quickstart's prompts, on average


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
        settings: dict[str, Any] = {
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "intermediate_size": self.intermediate,
            "tie_word_embeddings": True,
            "max_position_embeddings": 4096,
            "bos_token_id": None,
            "eos_token_id": None,
        }
        if self.kind is Qwen3Config:
            settings["head_dim"] = self.hidden // self.heads
        return self.kind(**settings)

    def save(self, folder: Path) -> None:
        """A folder with random weights, and a tokenizer that knows as many tokens."""
        tokenizer = AutoTokenizer.from_pretrained(resolve("quickstart:student"))
        tokenizer.add_tokens([f"<{number}>" for number in range(self.vocabulary - len(tokenizer))])
        config = self.config()
        config.eos_token_id = tokenizer.eos_token_id
        with no_progress_bars():
            AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


SMALL = Model(Qwen3Config, 32_000, 512, 8, 8, 4, 1536)
TEACHER = Model(Qwen3Config, 32_000, 768, 12, 12, 4, 2304)
LLAMA = Model(LlamaConfig, 32_000, 512, 8, 8, 4, 1536)
WIDE = Model(Qwen2Config, 151_936, 896, 6, 14, 2, 4864)  # Qwen2.5-0.5B with a quarter of its layers


@dataclass(frozen=True)
class Case:
    """A run: its models, embedded ones where None, and its settings.

    Attributes:
        response: how long answers are on average, where most of them end before they must.
    """

    name: str
    student: Model | None
    teacher: Model | None
    sets: tuple[str, ...]
    response: int | None = None


def _sizes(prompts: int, new: int, micro: int) -> tuple[str, ...]:
    return (
        f"train.prompts_per_step={prompts}",
        f"sampling.max_new_tokens={new}",
        f"train.tokens_per_micro_batch={micro}",
        f"teacher.tokens_per_batch={micro}",
    )


CASES = (
    Case("quickstart", None, None, (), response=66),
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
    load = Load.of(load_recipe(RECIPE, sets), machine("cpu"), prompt=PROMPT, response=case.response)
    return Result(case.name, memory(load).peak / GIB, peak_of_run(sets, folder / "run") / GIB)


def peak_of_run(sets: Sequence[str], out: Path) -> int:
    """Bytes that a run in a process of its own held at most."""
    options = [option for setting in sets for option in ("--set", setting)]
    command = [sys.executable, "-m", "poweropd", "train", str(RECIPE), "--out", str(out), *options]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=said, stderr=said)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise RuntimeError(said.read().decode())
    shutil.rmtree(out)
    return used.ru_maxrss * 1024


def as_markdown(results: Sequence[Result]) -> str:
    lines = ["| run | predicted GiB | measured GiB | predicted over measured |", "|---|---|---|---|"]
    lines += [f"| {each.name} | {each.predicted:.2f} | {each.measured:.2f} | {each.error:+.1%} |" for each in results]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="cases whose name has this in it; nothing is written")
    only = parser.parse_args().only
    with tempfile.TemporaryDirectory() as folder:
        results = [check(case, Path(folder)) for case in CASES if (only or "") in case.name]
    print(as_markdown(results))
    if only is None:
        facts = {"machine": machine_facts(), "command": "python benchmarks/plan_check.py"}
        text = json.dumps({**facts, "results": [asdict(each) for each in results]}, indent=1)
        (RESULTS / "plan-memory.json").write_text(f"{text}\n")


def machine_facts() -> str:
    """In a line."""
    gib = machine("cpu").memory / GIB
    return (
        f"{os.cpu_count()} cores, {gib:.1f} GiB, {platform.system()} {platform.machine()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}, {date.today()}"
    )


if __name__ == "__main__":
    main()

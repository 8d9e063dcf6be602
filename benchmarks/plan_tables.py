"""The tables of docs/scaling.md, from the model of `poweropd plan`: `python benchmarks/plan_tables.py`.

Sizes are those of the published configs of Qwen3; nothing is downloaded. Measured figures come from
benchmarks/results/plan-memory.json, which `python benchmarks/plan_check.py` writes.
"""

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from transformers import Qwen3Config

from poweropd.config import load_recipe
from poweropd.plan.load import Load
from poweropd.plan.machines import GIB, MACHINES, machine
from poweropd.plan.memory import memory
from poweropd.plan.timing import seconds, step_time

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "scaling.md"
RESULTS = Path(__file__).parent / "results" / "plan-memory.json"
RECIPE = ROOT / "recipes" / "paper" / "_common.yaml"
VOCABULARY = 151_936
# Hidden size, MLP, layers, heads, heads of keys and values, whether the LM head is the embedding: the Hub's config.json.
QWEN3 = {
    "0.6B": (1024, 3072, 28, 16, 8, True),
    "1.7B": (2048, 6144, 28, 16, 8, True),
    "4B": (2560, 9728, 36, 32, 8, True),
    "8B": (4096, 12288, 36, 32, 8, False),
    "14B": (5120, 17408, 40, 40, 8, False),
    "32B": (5120, 25600, 64, 64, 8, False),
}


FOLDER = tempfile.TemporaryDirectory()


@cache
def config_of(size: str) -> str:
    """A folder with the config of a Qwen3 model, and nothing else."""
    hidden, mlp, layers, heads, kv_heads, tied = QWEN3[size]
    folder = Path(FOLDER.name) / f"Qwen3-{size}"
    Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=128,
        tie_word_embeddings=tied,
    ).save_pretrained(folder)
    return str(folder)


def load(student: str, teacher: str, gpu: str, *sets: str, gpus: int = 1, response: int = 1024) -> Load:
    """The paper's recipe with these models and settings."""
    models = [f"student.model={config_of(student)}", f"teacher.model={config_of(teacher)}"]
    recipe = load_recipe(RECIPE, [*models, f"sampling.max_new_tokens={response}", *sets])
    return Load.of(recipe, machine(gpu), gpus=gpus, prompt=128)


def phases(plan: Load) -> dict[str, float]:
    return {phase.name: phase.seconds for phase in step_time(plan)}


def table(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    names = list(headings)
    lines = ["|" + "---|" * len(names), *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join([f"| {' | '.join(names)} |", *lines])


PHASES = "rollout", "teacher scores", "update"
TIMES = ("rollout s", "teacher s", "update s")


def told(plan: Load) -> list[str]:
    """Peak memory, the phases and the step."""
    found = phases(plan)
    parts = [f"{found[name]:.3g}" for name in PHASES]
    return [
        f"{memory(plan).peak / GIB:.0f}",
        *parts,
        f"{sum(found.values()):.3g}",
        max(found, key=lambda name: found[name]),
    ]


def pairs() -> str:
    chosen = (("0.6B", "4B"), ("0.6B", "32B"), ("1.7B", "8B"), ("4B", "8B"), ("4B", "32B"), ("8B", "32B"))
    rows = ([f"{student} from {teacher}", *told(load(student, teacher, "b200"))] for student, teacher in chosen)
    return table(["student, teacher", "GiB", *TIMES, "step s", "longest"], rows)


def lengths() -> str:
    rows = (
        [f"{length:,}", *told(load("1.7B", "8B", "b200", response=length))]
        for length in (256, 1024, 4096, 16_384, 32_768)
    )
    return table(["response tokens", "GiB", *TIMES, "step s", "longest"], rows)


def batches() -> str:
    def row(rows: int) -> list[str]:
        sets = f"train.prompts_per_step={rows}", f"rollout.sequences_per_batch={rows}"
        plan = load("1.7B", "8B", "b200", *sets)
        tokens = plan.responses / phases(plan)["rollout"]
        return [f"{rows}", *told(plan), f"{tokens:,.0f}"]

    return table(
        ["sequences a step", "GiB", *TIMES, "step s", "longest", "rollout tokens/s"], map(row, (1, 8, 32, 128, 512))
    )


def gpu_counts() -> str:
    def row(gpus: int) -> list[str]:
        sets = "train.prompts_per_step=4096", "rollout.sequences_per_batch=128"
        plan = load("1.7B", "8B", "h200", *sets, gpus=gpus)
        found = phases(plan)
        step = sum(found.values())
        shares = [f"{found.get(name, 0) / step:.0%}" for name in (*PHASES, "communication")]
        return [
            f"{gpus:,}",
            f"{plan.sequences:,}",
            f"{step:.3g}",
            *shares,
            f"{4096 * plan.response / step / gpus:,.0f}",
        ]

    headings = ["GPUs", "sequences each", "step s", "rollout", "teacher", "update", "communication", "tokens/s a GPU"]
    return table(headings, map(row, (1, 8, 64, 512, 1024)))


def gpu_kinds() -> str:
    def row(name: str) -> list[str]:
        plan = load("0.6B", "4B", name)
        needed = memory(plan)
        return [name, f"{needed.room / GIB:.0f}", "yes" if needed.fits else "no", *told(plan)]

    return table(["GPU", "GiB for a run", "fits", "GiB", *TIMES, "step s", "longest"], map(row, MACHINES))


def paper() -> str:
    rows = []
    for name, objective in (("PowerOPD", "{name: power, alpha: 1}"), ("full vocabulary", "{name: reverse_kl}")):
        sets = f"objective={objective}", "student.gradient_checkpointing=false"
        eight = load("0.6B", "4B", "h200", *sets, "train.prompts_per_step=8")
        times = [f"{seconds(step_time(load('0.6B', '4B', gpu, *sets))):.1f}" for gpu in ("a100-80", "h100", "h200")]
        rows.append([name, *times, f"{memory(eight).peak / GIB:.1f}"])
    return table(["objective", "a100-80 s", "h100 s", "h200 s", "GiB at batch 8"], rows)


def thousand() -> str:
    gpus, sequences = 1024, 8192
    sets = f"train.prompts_per_step={sequences}", "rollout.sequences_per_batch=64"
    found = phases(load("8B", "32B", "h200", *sets, response=8192))
    work = {name: found[name] for name in PHASES}
    whole = sum(work.values())
    rows = [[name, f"{part:,.0f}", f"{part / whole:.0%}", f"{gpus * part / whole:.0f}"] for name, part in work.items()]
    rows.append(["all at once", f"{whole:,.0f}", "100%", f"{gpus:,}, {whole / gpus:.0f} s a step"])
    return table(["phase", "GPU-seconds a step", "share", "GPUs of 1,024"], rows)


def measured() -> str:
    found = json.loads(RESULTS.read_text())
    rows = (
        [
            each["name"],
            f"{each['predicted']:.2f}",
            f"{each['measured']:.2f}",
            f"{each['predicted'] / each['measured'] - 1:+.1%}",
        ]
        for each in found["results"]
    )
    return f"{found['machine']}\n\n{table(['run', 'predicted GiB', 'measured GiB', 'difference'], rows)}"


TABLES: dict[str, Callable[[], str]] = {
    each.__name__: each for each in (measured, pairs, lengths, batches, gpu_counts, gpu_kinds, paper, thousand)
}


def filled(text: str) -> str:
    """The text with every table between its markers made anew."""
    pattern = r"<!-- table: (?P<name>\w+) -->\n.*?<!-- end -->"
    return re.sub(
        pattern, lambda at: f"<!-- table: {at['name']} -->\n{TABLES[at['name']]()}\n<!-- end -->", text, flags=re.DOTALL
    )


if __name__ == "__main__":
    DOCUMENT.write_text(filled(DOCUMENT.read_text()))

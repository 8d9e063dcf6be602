"""The table of benchmarks: where each comes from, how it is asked, and how many problems it must have."""

from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from poweropd.errors import ConfigError
from poweropd.evaluation.summary import PAPER_ORDER
from poweropd.prompts import read_rows, reference_answer
from poweropd.sections import DataConfig

BOXED = "{prompt}\nPlease reason step by step, and put your final answer within \\boxed{}."


@dataclass(frozen=True)
class Benchmark:
    """One set of problems with known answers.

    Attributes:
        title: what tables call it.
        path, subset, split: on the Hub.
        prompt, answer: its columns there. A list of answers counts as all of them, in any order.
        count: problems it must have.
        template: the user message.
        version: raised whenever the same answers could be scored otherwise than before.
    """

    name: str
    title: str
    path: str
    prompt: str
    answer: str
    count: int
    subset: str | None = None
    split: str = "test"
    template: str = BOXED
    version: int = 1

    def data(self, folder: Path | None = None, **asked: Any) -> DataConfig:
        """Where its rows are read: `<name>.jsonl` (or with `_<split>` or `_<count>` after the name; columns `problem` and
        `answer`) in `folder` where there is one, else the Hub.

        Args:
            asked: further settings of `DataConfig`, such as `chat` and `limit`.

        Raises:
            ConfigError: there is no such folder.
        """
        asked = {"template": self.template, "expected_rows": self.count, **asked}
        if folder is not None and not folder.is_dir():
            raise ConfigError(
                f"there is no folder {folder}; give one with benchmarks as <name>.jsonl, or none for the Hub"
            )
        for ending in ("", f"_{self.split}", f"_{self.count}"):
            if folder is not None and (path := folder / f"{self.name}{ending}.jsonl").is_file():
                return DataConfig(source="jsonl", path=str(path), **asked)
        return DataConfig(
            source="hub", path=self.path, subset=self.subset, split=self.split, prompt=self.prompt, answer=self.answer, **asked
        )  # fmt: skip


BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark("gsm8k", "GSM8K", "openai/gsm8k", "question", "answer", 1319, subset="main"),
        Benchmark("math500", "MATH-500", "HuggingFaceH4/MATH-500", "problem", "answer", 500),
        Benchmark("amc23", "AMC23", "math-ai/amc23", "question", "answer", 40),
        Benchmark("aime24", "AIME24", "HuggingFaceH4/aime_2024", "problem", "answer", 30, split="train"),
        Benchmark("aime25", "AIME25", "math-ai/aime25", "problem", "answer", 30),
        Benchmark("minerva_math", "Minerva", "math-ai/minervamath", "question", "answer", 272),
        Benchmark(
            "olympiadbench", "Olympiad", "Hothan/OlympiadBench", "question", "final_answer", 674,
            subset="OE_TO_maths_en_COMP", split="train",
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Preset:
    """Settings of a published evaluation."""

    benchmarks: tuple[str, ...]
    samples: int
    max_new_tokens: int
    temperature: float


PRESETS = {"paper": Preset(PAPER_ORDER, samples=8, max_new_tokens=4096, temperature=0.6)}


def benchmark(name: str) -> Benchmark:
    """A benchmark by name.

    Raises:
        ConfigError: there is none of that name; the nearest is named.
    """
    if name in BENCHMARKS:
        return BENCHMARKS[name]
    plain = name.lower().replace("-", "").replace("_", "").replace(" ", "")
    by_plain = {known.replace("_", ""): known for known in BENCHMARKS}
    near = [by_plain[match] for match in get_close_matches(plain, by_plain, n=1, cutoff=0.5)]
    hint = f"did you mean {near[0]}? There are" if near else "there are"
    raise ConfigError(
        f"unknown benchmark {name!r}: {hint} {', '.join(BENCHMARKS)}; other problems are given as a JSONL file"
    )


def benchmark_rows(name: str, folder: Path | None = None) -> list[dict[str, str]]:
    """Every problem of a benchmark as `id`, `problem` and `answer`.

    Raises:
        ConfigError: unknown name, unreadable source, or another number of problems than the benchmark has.
    """
    data = benchmark(name).data(folder)
    rows = read_rows(data, key=name)
    return [
        {"id": str(row.get("id", place)), "problem": str(row[data.prompt]), "answer": reference_answer(row[str(data.answer)])}
        for place, row in enumerate(rows)
    ]  # fmt: skip

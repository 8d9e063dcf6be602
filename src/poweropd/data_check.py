"""`poweropd data check`: which training problems are problems of a benchmark too."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from poweropd.config import Recipe, load_recipe
from poweropd.errors import ConfigError
from poweropd.evaluation.benchmarks import benchmark_rows
from poweropd.overlap import Overlap, Problem, overlaps
from poweropd.prompts import read_rows, reference_answer
from poweropd.sections import DataConfig

SHOWN = 10  # pairs on the screen; all of them go to --out
RECIPES = (".yaml", ".yml")


@dataclass(frozen=True)
class Finding:
    """The overlaps of the training data with one benchmark of `problems` problems."""

    benchmark: str
    problems: int
    overlaps: list[Overlap]

    def count(self, kind: str) -> int:
        return sum(overlap.kind == kind for overlap in self.overlaps)

    @property
    def hit(self) -> int:
        """Problems of the benchmark that overlap."""
        return len({overlap.benchmark_place for overlap in self.overlaps})

    @property
    def rows(self) -> int:
        """Training problems that overlap."""
        return len({overlap.training_place for overlap in self.overlaps})


def check(
    train: Path,
    console: Console,
    *,
    against: Sequence[Path] = (),
    benchmarks: Sequence[str] = (),
    folder: Path | None = None,
    prompt: str = "problem",
    against_prompt: str = "problem",
    out: Path | None = None,
    clean: Path | None = None,
) -> bool:
    """Print the overlaps of a training set with benchmarks; returns whether there are any.

    Args:
        train: JSONL or Parquet; or a recipe, of which data and evaluation are compared.
        against: files with problems, JSONL or Parquet.
        benchmarks: names of the table of benchmarks; a recipe's own are compared too.
        folder: where benchmarks lie that need not come from the Hub.
        prompt, against_prompt: columns with the question, of `train` and of `against`; a recipe names its own.
        out: where all pairs are written, one JSON object a line.
        clean: where the rows of `train` that do not overlap are written, as they are.

    Raises:
        ConfigError: something cannot be read, there is nothing to compare with, or a file would be written over.
    """
    for path in filter(None, (out, clean)):
        if not path.parent.is_dir():
            raise ConfigError(f"cannot write {path}: there is no folder {path.parent}")
        if path.exists() or out == clean:
            raise ConfigError(f"{path} is there already or named twice, and is never written over; give another name")
    recipe = load_recipe(train) if train.suffix in RECIPES else None
    if recipe is not None and clean is not None:
        raise ConfigError(f"--clean copies rows of one file, and {train} is a recipe; give its data file in its place")
    sets = {name: _benchmark(name, folder) for name in benchmarks}
    for path in against:
        name = str(path) if path.stem in sets else path.stem
        sets[name] = read_problems(_file(path, against_prompt), key="--against")
    if recipe is not None:
        asked = recipe.evaluation
        if asked.data is not None:
            sets["evaluation.data"] = read_problems(asked.data, asked.seed, "evaluation.data")
        sets |= {
            name: _benchmark(name, folder or (Path(asked.folder) if asked.folder else None))
            for name in asked.benchmarks
        }
    if not sets:
        raise ConfigError("nothing to compare with: give --against FILE or --benchmark NAME, for example math500")
    training = _of_recipe(recipe) if recipe else read_problems(_file(train, prompt), key="train")
    findings = _compare(training, sets)
    _show(findings, len(training), console)
    if out is not None:
        lines = (json.dumps(_record(name, pair), ensure_ascii=False) + "\n" for name, pair in _pairs(findings))
        out.write_text("".join(lines), encoding="utf-8")
        console.print(f"pairs    {out}", markup=False)
    if clean is not None:
        dropped = {overlap.training_place for finding in findings for overlap in finding.overlaps}
        (_clean_parquet if train.suffix == ".parquet" else _clean_jsonl)(train, clean, dropped)
        console.print(f"clean    {clean}, {len(training) - len(dropped)} rows", markup=False)
    return any(finding.overlaps for finding in findings)


def read_problems(config: DataConfig, seed: int = 0, key: str = "data") -> list[Problem]:
    """The problems of a data set; those of no answer column have no answer.

    Raises:
        ConfigError: it cannot be read, is empty, or a row lacks the question.
    """
    problems = []
    for place, row in enumerate(islice(read_rows(config, seed=seed, key=key), config.limit)):
        if row.get(config.prompt) is None:
            raise ConfigError(
                f"{key}: row {place} of {config.path} has no column {config.prompt!r}; it has {', '.join(map(repr, row))}"
            )
        answer = row.get(config.answer) if config.answer else None
        known = None if answer is None else reference_answer(answer)
        problems.append(Problem(str(row.get("id", place)), str(row[config.prompt]), known))
    if not problems:
        raise ConfigError(f"{key}: no problems in {config.path}")
    return problems


def _file(path: Path, prompt: str) -> DataConfig:
    return DataConfig(source="parquet" if path.suffix == ".parquet" else "jsonl", path=str(path), prompt=prompt)


def _benchmark(name: str, folder: Path | None) -> list[Problem]:
    return [Problem(row["id"], row["problem"], row["answer"]) for row in benchmark_rows(name, folder)]


def _of_recipe(recipe: Recipe) -> list[Problem]:
    sections = recipe.data_sections.items()
    return [problem for key, section in sections for problem in read_problems(section, recipe.train.seed, key)]


def _compare(training: Sequence[Problem], sets: Mapping[str, Sequence[Problem]]) -> list[Finding]:
    """All sets at once: normalising the training problems is most of the work."""
    set_of = [name for name, problems in sets.items() for _ in problems]
    pairs = overlaps(training, [problem for problems in sets.values() for problem in problems])
    return [
        Finding(name, len(problems), [pair for pair in pairs if set_of[pair.benchmark_place] == name])
        for name, problems in sets.items()
    ]


def _pairs(findings: Sequence[Finding]) -> list[tuple[str, Overlap]]:
    """All pairs, the surest first."""
    pairs = [(finding.benchmark, overlap) for finding in findings for overlap in finding.overlaps]
    return sorted(pairs, key=lambda pair: (pair[1].kind, -pair[1].of_benchmark))


def _show(findings: Sequence[Finding], rows: int, console: Console) -> None:
    table = Table(
        Column("benchmark", overflow="fold"), "problems", "hit", "exact pairs", "near pairs", f"of {rows} rows"
    )
    for finding in findings:
        counts = (finding.problems, finding.hit, finding.count("exact"), finding.count("near"), finding.rows)
        table.add_row(finding.benchmark, *map(str, counts))
    console.print(table)
    pairs = _pairs(findings)
    answers = {True: "same answer", False: "other answer", None: "answer not known"}
    verbs = {"exact": "is", "near": "is like"}
    for name, pair in pairs[:SHOWN]:
        shares = f"{pair.of_benchmark:.2f} of it, {pair.of_training:.2f} of the training problem"
        line = f"{pair.kind:<5}  {pair.training.id}  {verbs[pair.kind]}  {pair.benchmark.id} of {name}: {shares}, {answers[pair.same_answer]}"
        console.print(line, markup=False)
    if len(pairs) > SHOWN:
        console.print(f"the first {SHOWN} of {len(pairs)} pairs; --out FILE has all, with their texts", markup=False)


def _record(name: str, pair: Overlap) -> dict[str, Any]:
    return {
        "training_id": pair.training.id,
        "benchmark": name,
        "benchmark_id": pair.benchmark.id,
        "kind": pair.kind,
        "of_benchmark": round(pair.of_benchmark, 4),
        "of_training": round(pair.of_training, 4),
        "same_answer": pair.same_answer,
        "training_problem": pair.training.text,
        "benchmark_problem": pair.benchmark.text,
    }


def _clean_jsonl(source: Path, target: Path, dropped: set[int]) -> None:
    with source.open("rb") as lines, target.open("wb") as kept:
        rows = (line for line in lines if line.strip())
        kept.writelines(line for place, line in enumerate(rows) if place not in dropped)


def _clean_parquet(source: Path, target: Path, dropped: set[int]) -> None:
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(source)
    pyarrow.parquet.write_table(table.take([row for row in range(len(table)) if row not in dropped]), target)

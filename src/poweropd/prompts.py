"""A data set to prompts, in an order that is a pure function of seed and step."""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from poweropd.errors import ConfigError
from poweropd.sections import DataConfig
from poweropd.types import Prompt

TOKENISED_TOGETHER = 1_000  # rows


def load_prompts(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    end_id: int,
    max_prompt_tokens: int,
    seed: int = 0,
    key: str = "data",
) -> list[Prompt]:
    """Every prompt of a data set, tokenised.

    Args:
        tokenizer: whose chat template is applied.
        end_id: the token that ends a golden answer.
        max_prompt_tokens: what the models' context leaves for a prompt.
        seed: of generated problems.
        key: the recipe's name of this data set, for messages.

    Raises:
        ConfigError: no rows, a row without the named column, a prompt that is too long, an unreadable file.
    """
    if config.chat and not tokenizer.chat_template:
        raise ConfigError(f"{key}.chat: the tokenizer has no chat template; set {key}.chat=false for plain prompts")
    if max_prompt_tokens < 1:
        raise ConfigError(
            f"{key}: max_new_tokens is {1 - max_prompt_tokens} too large to leave the models' context room for a prompt"
        )
    limit = min(max_prompt_tokens, config.max_prompt_tokens or max_prompt_tokens)
    prompts: list[Prompt] = []
    overlong: list[Prompt] = []
    rows = islice(iter(read_rows(config, seed=seed, key=key)), config.limit)
    for place in count(step=TOKENISED_TOGETHER):
        some = [_Row(row, place + at, config, key) for at, row in enumerate(islice(rows, TOKENISED_TOGETHER))]
        if not some:
            break
        for prompt in _prompts(some, config, tokenizer, end_id):
            (prompts if len(prompt.prompt_ids) <= limit else overlong).append(prompt)
    if overlong and config.overlong == "error":
        longest = max(overlong, key=lambda prompt: len(prompt.prompt_ids))
        raise ConfigError(
            f"{key}: {len(overlong)} prompts are longer than {limit} tokens, the longest is {longest.id} with "
            f"{len(longest.prompt_ids)}. Leave them out (in a recipe: {key}.overlong=drop), or lower max_new_tokens"
        )
    if not prompts:
        raise ConfigError(
            f"{key}: no prompts in {config.path or 'the generator'}{' (all overlong)' if overlong else ''}"
        )
    return prompts


class _Row:
    """A row of a data set, by the names that the recipe gives its columns."""

    def __init__(self, row: dict[str, Any], index: int, config: DataConfig, key: str) -> None:
        self._row, self._place, self._config = row, f"{key}: row {index}", config
        self.id = str(index if row.get("id") is None else row["id"])
        self.question = self._column(config.prompt)
        if not isinstance(self.question, str):
            raise ConfigError(
                f"{self._place} has a {type(self.question).__name__} in column {config.prompt!r}; text is needed"
            )
        self.answer = _answer(self._column(config.answer), self._place) if config.answer else None
        self.golden = str(self._column(config.golden)) if config.golden else None

    def _column(self, name: str) -> Any:
        if name not in self._row:
            raise ConfigError(f"{self._place} has no column {name!r}; it has {', '.join(map(repr, self._row))}")
        if self._row[name] is None:
            raise ConfigError(f"{self._place} has nothing in column {name!r}; leave it out")
        return self._row[name]

    def text(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """What the student is asked."""
        text = self._config.template.replace("{prompt}", self.question)
        if not self._config.chat:
            return text
        system = [{"role": "system", "content": self._config.system}] if self._config.system else []
        enabled = self._config.enable_thinking
        thinking: dict[str, Any] = {} if enabled is None else {"enable_thinking": enabled}
        messages = [*system, {"role": "user", "content": text}]
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **thinking))


def _prompts(
    rows: Sequence[_Row], config: DataConfig, tokenizer: PreTrainedTokenizerBase, end_id: int
) -> Iterator[Prompt]:
    """Rows together: tokenisers take many texts in a fraction of the time of one by one."""
    asked = tokenizer([row.text(tokenizer) for row in rows], add_special_tokens=not config.chat)["input_ids"]
    golden: list[tuple[int, ...] | None] = [None] * len(rows)
    if config.golden:
        solutions = tokenizer([row.golden for row in rows], add_special_tokens=False)["input_ids"]
        golden = [(*ids, end_id) for ids in solutions]
    for row, ids, golden_ids in zip(rows, asked, golden, strict=True):
        yield Prompt(id=row.id, prompt_ids=tuple(ids), text=row.question, answer=row.answer, golden_ids=golden_ids)


def _answer(value: Any, place: str) -> str:
    several = value if isinstance(value, list) else [value]
    if not all(isinstance(each, str) or (type(each) in (int, float) and math.isfinite(each)) for each in several):
        raise ConfigError(f"{place} has {value!r} for an answer; text, a number or a list of them is needed")
    return reference_answer(value)


def reference_answer(value: Any) -> str:
    """The answer itself: GSM8K writes it after `####`, behind the worked solution; OlympiadBench has lists of answers."""
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text.rpartition("####")[2].strip()


def read_rows(config: DataConfig, *, seed: int = 0, key: str = "data") -> Iterable[dict[str, Any]]:
    """The rows of a data set, as they stand in its source.

    Raises:
        ConfigError: it cannot be read, or has another number of rows than expected.
    """
    rows = _rows(config, seed, key)
    if config.expected_rows is None:
        return rows
    every = list(rows)
    if len(every) != config.expected_rows:
        raise ConfigError(
            f"{key}: {config.path} has {len(every)} rows, and {config.expected_rows} are expected; use the complete set, "
            f"or limit to ask fewer"
        )
    return every


def _rows(config: DataConfig, seed: int, key: str) -> Iterable[dict[str, Any]]:
    if config.source == "reasoning_gym":
        return _generated_rows(config, seed)
    if config.source == "hub":
        return _hub_rows(config, key)
    path = Path(str(config.path))
    if not path.is_file():
        raise ConfigError(f"{key}.path: there is no file {config.path!r}")
    return _jsonl_rows(path, key) if config.source == "jsonl" else _parquet_rows(path, key)


def _generated_rows(config: DataConfig, seed: int) -> Iterator[dict[str, Any]]:
    from poweropd.tasks import STEPS, problems, worked_solution

    try:
        # Held-out problems are asked once each; training may meet one again, as with any finite data set.
        stream = problems(config.families, split=config.split, seed=seed, distinct=config.split == "held_out")  # type: ignore[arg-type]
        for problem in stream:
            metadata = problem["metadata"]
            family = metadata["source_dataset"]
            yield {
                "id": f"{family}-{metadata['source_index']}",
                config.prompt: problem["question"],
                "answer": problem["answer"],
                "golden": worked_solution(problem) if family in STEPS else None,
            }
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _jsonl_rows(path: Path, key: str) -> Iterator[dict[str, Any]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                if rb"\ud" in line.lower():
                    json.dumps(row, ensure_ascii=False).encode()  # half of a surrogate pair is no text
            except ValueError as error:  # not JSON, or not even text
                raise ConfigError(f"{key}.path: {path} line {number} is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise ConfigError(f"{key}.path: {path} line {number} is a {type(row).__name__}; an object is needed")
            yield row


def _parquet_rows(path: Path, key: str) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(f"{key}.path: {path} cannot be read as Parquet: {' '.join(str(error).split())}") from None


def _hub_rows(config: DataConfig, key: str) -> Iterator[dict[str, Any]]:
    import datasets

    try:
        yield from datasets.load_dataset(config.path, name=config.subset, split=config.split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ConfigError(f"{key}.path: Hub data set {config.path!r}: {' '.join(str(error).split())[:200]}") from None


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """A hash of every prompt's tokens and answer, in order."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(repr((prompt.id, prompt.prompt_ids, prompt.answer, prompt.golden_ids)).encode())
    return digest.hexdigest()


class PromptStream:
    """Prompts for each optimizer step: every epoch a fresh permutation, no state to save."""

    def __init__(self, prompts: Sequence[Prompt], *, seed: int) -> None:
        self._prompts = prompts
        self._seed = seed
        self._epoch = -1
        self._order: list[int] = []

    def __len__(self) -> int:
        return len(self._prompts)

    @property
    def prompts(self) -> Sequence[Prompt]:
        """Every prompt, as the data set has them."""
        return self._prompts

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(len(prompt.prompt_ids) for prompt in self._prompts)

    def take(self, step: int, count: int) -> list[Prompt]:
        """The `count` prompts of optimizer step `step`, counted from 0."""
        return [self._prompts[self._at(position)] for position in range(step * count, (step + 1) * count)]

    def _at(self, position: int) -> int:
        epoch, place = divmod(position, len(self._prompts))
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            self._order = torch.randperm(len(self._prompts), generator=generator).tolist()
            self._epoch = epoch
        return self._order[place]

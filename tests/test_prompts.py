"""Data sets to prompts: every source, every complaint, an order that is a pure function of seed and step."""

import json
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from transformers import PreTrainedTokenizerBase

from conftest import END, RECIPE
from poweropd.config import load_recipe
from poweropd.errors import ConfigError
from poweropd.prompts import PromptStream, load_prompts
from poweropd.sections import DataConfig
from poweropd.types import Prompt

ROWS = [{"problem": f"What is {n} + 1?", "answer": str(n + 1), "solution": f"{n} + 1 = {n + 1}"} for n in range(5)]


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def load(tokenizer: PreTrainedTokenizerBase, max_tokens: int = 200, **settings: object) -> list[Prompt]:
    return load_prompts(DataConfig(**settings), tokenizer, end_id=END, max_prompt_tokens=max_tokens)


def test_jsonl_with_chat_template(tokenizer: PreTrainedTokenizerBase, jsonl: Path) -> None:
    prompts = load(
        tokenizer,
        source="jsonl",
        path=str(jsonl),
        golden="solution",
        template="{prompt} Use \\boxed{}.",
        system="Be brief.",
    )
    assert len(prompts) == 5
    assert tokenizer.decode(prompts[2].prompt_ids) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is 2 + 1? Use \\boxed{}.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert prompts[2].text == "What is 2 + 1?"
    assert prompts[2].answer == "3"
    assert prompts[2].golden_ids is not None
    assert tokenizer.decode(prompts[2].golden_ids) == "2 + 1 = 3<|endoftext|>"


def test_the_reference_of_gsm8k_stands_after_its_solution(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = tmp_path / "gsm8k.jsonl"
    path.write_text(json.dumps({"question": "q", "answer": "48/2 = 24\n#### 72"}) + "\n")
    assert load(tokenizer, source="jsonl", path=str(path), prompt="question")[0].answer == "72"


def test_parquet_equals_jsonl(tokenizer: PreTrainedTokenizerBase, jsonl: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    assert load(tokenizer, source="parquet", path=str(path)) == load(tokenizer, source="jsonl", path=str(jsonl))


def test_hub_data_sets(tokenizer: PreTrainedTokenizerBase, jsonl: Path, tmp_path: Path) -> None:
    """The library behind the Hub source reads a local folder by the same call; an id it cannot find is one line."""
    folder = tmp_path / "dataset"
    folder.mkdir()
    jsonl.rename(folder / "train.jsonl")
    prompts = load(tokenizer, source="hub", path=str(folder), split="train", limit=3)
    assert [prompt.answer for prompt in prompts] == ["1", "2", "3"]
    for path, split in (("no/such-data-set", "train"), (str(folder), "validation")):
        with pytest.raises(ConfigError, match=r"data\.path: Hub data set") as error:
            load(tokenizer, source="hub", path=path, split=split)
        assert "\n" not in str(error.value)


def test_bare_text(tokenizer: PreTrainedTokenizerBase, jsonl: Path) -> None:
    prompts = load(tokenizer, source="jsonl", path=str(jsonl), chat=False, template="Q: {prompt}\nA:", limit=1)
    assert [tokenizer.decode(p.prompt_ids) for p in prompts] == ["Q: What is 0 + 1?\nA:"]


def test_thinking_mode_reaches_the_template(tokenizer: PreTrainedTokenizerBase, jsonl: Path) -> None:
    original = tokenizer.chat_template
    tokenizer.chat_template = "{{ messages[0]['content'] }} {{ 'thinks' if enable_thinking else 'answers' }}"
    try:
        texts = {
            mode: tokenizer.decode(load(tokenizer, source="jsonl", path=str(jsonl), enable_thinking=mode)[0].prompt_ids)
            for mode in (True, False, None)
        }
    finally:
        tokenizer.chat_template = original
    assert texts[True].endswith("thinks")
    assert texts[False].endswith("answers")
    assert texts[None].endswith("answers")


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        ("", {}, "no prompts in"),
        ('{"problem": "x"}\n', {}, r"row 0 has no column 'answer'; it has 'problem'"),
        ('{"question": "x", "answer": "y"}\n', {}, r"row 0 has no column 'problem'; it has 'question', 'answer'"),
        ('{"problem": "x", "answer": "y"}\n{"problem"\n', {}, "line 2 is not JSON"),
        ("[1]\n", {}, "line 1 is a list; an object is needed"),
        ('{"problem": "x", "answer": "y"}\n', {"golden": "solution"}, "row 0 has no column 'solution'"),
    ],
)
def test_bad_files(tokenizer: PreTrainedTokenizerBase, tmp_path: Path, text: str, settings: dict, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        load(tokenizer, source="jsonl", path=str(path), **settings)
    assert "\n" not in str(error.value)


def test_missing_and_broken_files(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no file"):
        load(tokenizer, source="jsonl", path=str(tmp_path / "absent.jsonl"))
    binary = tmp_path / "binary.jsonl"
    binary.write_bytes(b"\xff\xfe\x00\x01\n")
    with pytest.raises(ConfigError, match="line 1 is not JSON"):
        load(tokenizer, source="jsonl", path=str(binary))
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 nonsense")
    with pytest.raises(ConfigError, match="cannot be read as Parquet"):
        load(tokenizer, source="parquet", path=str(broken))


def test_overlong_prompts_are_refused_or_dropped(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps({"problem": "7 " * n, "answer": "1"}) + "\n" for n in (3, 100, 4)))
    with pytest.raises(
        ConfigError, match=r"1 prompts are longer than 60 tokens, the longest is 1 with \d+.*overlong=drop"
    ):
        load(tokenizer, 60, source="jsonl", path=str(path))
    assert len(load(tokenizer, 60, source="jsonl", path=str(path), overlong="drop")) == 2
    with pytest.raises(ConfigError, match="all overlong"):
        load(tokenizer, 3, source="jsonl", path=str(path), overlong="drop")


def test_generated_problems_are_the_same_for_a_seed(tokenizer: PreTrainedTokenizerBase) -> None:
    config = load_recipe(RECIPE).data.model_copy(update={"limit": 60})
    one, same = (load_prompts(config, tokenizer, end_id=END, max_prompt_tokens=200, seed=3) for _ in range(2))
    other = load_prompts(config, tokenizer, end_id=END, max_prompt_tokens=200, seed=4)
    assert one == same
    assert one != other


@pytest.mark.parametrize("families", [{"no_such_family": {}}, {"gcd": {"min_valu": 2}}])
def test_unknown_generators_and_settings_are_refused(tokenizer: PreTrainedTokenizerBase, families: dict) -> None:
    with pytest.raises(ConfigError, match=r"data\.families\."):
        load(tokenizer, source="reasoning_gym", families=families, limit=1, prompt="question")


def prompts(count: int) -> list[Prompt]:
    return [Prompt(str(index), (index,)) for index in range(count)]


def test_every_epoch_is_a_permutation() -> None:
    stream = PromptStream(prompts(10), seed=0)
    taken = [prompt.id for step in range(6) for prompt in stream.take(step, 5)]
    epochs = [taken[start : start + 10] for start in (0, 10, 20)]
    assert all(sorted(epoch) == sorted(map(str, range(10))) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_a_step_does_not_depend_on_the_steps_before_it() -> None:
    in_order = [PromptStream(prompts(7), seed=1).take(step, 4) for step in range(8)]
    stream = PromptStream(prompts(7), seed=1)
    for step in (5, 0, 7, 3):
        assert stream.take(step, 4) == in_order[step]
    assert PromptStream(prompts(7), seed=2).take(0, 4) != in_order[0]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('{"problem": ["a"], "answer": "1"}', "row 0 has a list in column 'problem'; text is needed"),
        ('{"problem": "a", "answer": null}', "row 0 has nothing in column 'answer'"),
        ('{"problem": "a", "answer": true}', "row 0 has True for an answer"),
        ('{"problem": "a", "answer": {"x": 1}}', "for an answer; text, a number or a list of them is needed"),
        ('{"problem": "a", "answer": NaN}', "row 0 has nan for an answer"),
        ('{"problem": "a \\ud800", "answer": "1"}', "line 1 is not JSON"),
    ],
)
def test_rows_that_are_no_problems_are_refused(
    row: str, said: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(row + "\n")
    config = DataConfig(source="jsonl", path=str(path), chat=False)
    with pytest.raises(ConfigError, match=re.escape(said)):
        load_prompts(config, tokenizer, end_id=0, max_prompt_tokens=64)


def test_answers_may_be_numbers_and_lists_and_ids_may_be_missing(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"problem": "a", "answer": 7, "id": null}\n{"problem": "b", "answer": ["1", 2.5], "id": null}\n')
    config = DataConfig(source="jsonl", path=str(path), chat=False)
    prompts = load_prompts(config, tokenizer, end_id=0, max_prompt_tokens=64)
    assert [(prompt.id, prompt.answer) for prompt in prompts] == [("0", "7"), ("1", "1, 2.5")]

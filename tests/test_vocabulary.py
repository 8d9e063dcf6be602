"""What two models must share, and how end tokens are settled."""

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from conftest import make_model
from poweropd.errors import ModelError
from poweropd.vocabulary import EndTokens, end_token_ids, real_vocab_size, shared_vocab_size


def make_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(words)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token=words[0])))


def test_heads_padded_differently_share_the_real_tokens() -> None:
    """Qwen2.5 in small: one tokenizer, heads of 151,936 and 152,064 rows."""
    one, other = make_tokenizer(["a", "b", "c", "d"]), make_tokenizer(["a", "b", "c", "d"])
    assert real_vocab_size(one, 16) == 4
    assert shared_vocab_size(one, other, 8, 16) == 4


def test_extra_tokens_of_one_side_are_left_out() -> None:
    assert shared_vocab_size(make_tokenizer(["a", "b"]), make_tokenizer(["a", "b", "<think>"]), 8, 8) == 2


def test_a_head_smaller_than_its_tokenizer_bounds_the_vocabulary() -> None:
    assert shared_vocab_size(make_tokenizer(["a", "b", "c"]), make_tokenizer(["a", "b", "c"]), 2, 8) == 2


def test_different_tokenizers_are_refused() -> None:
    with pytest.raises(ModelError, match=r"different tokenizers: 2 of 3 ids differ, first id 1 \('b' and 'c'\)"):
        shared_vocab_size(make_tokenizer(["a", "b", "c"]), make_tokenizer(["a", "c", "b"]), 8, 8)


def test_end_tokens_come_from_generation_config_config_and_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    model = make_model()
    model.generation_config.eos_token_id = [5, 6]
    model.config.eos_token_id = 6
    assert end_token_ids(model, tokenizer) == (5, 6, tokenizer.eos_token_id)


@pytest.mark.parametrize(
    ("student", "teacher", "policy", "merged", "masked"),
    [
        ((0,), (2,), "map", (0, 2), ()),
        ((0,), (2, 0), "map", (0, 2), ()),
        ((0, 2), (2, 0), "map", (), ()),
        ((0,), (0,), "map", (), ()),
        ((0,), (2,), "mask", (), (0, 2)),
        ((0,), (2,), "keep", (), ()),
    ],
)
def test_policies(student: tuple, teacher: tuple, policy: str, merged: tuple, masked: tuple) -> None:
    ends = EndTokens(student, {"teacher": teacher}, policy)  # type: ignore[arg-type]
    assert ends.differ == (set(student) != set(teacher))
    assert set(ends.stop_ids) == {*student, *teacher}
    assert ends.merged_ids == merged
    assert ends.masked_ids == masked

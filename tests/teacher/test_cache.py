"""Scores on disk: found again by whoever asks the same, and never wrong."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from conftest import CHAT_END, END, make_model, make_rollouts
from poweropd.errors import RunError
from poweropd.objectives import Needs
from poweropd.teacher.cache import CachedTeacher
from poweropd.teacher.hf import HFTeacher
from poweropd.types import Rollout, TeacherScores

LENGTHS = [(3, 5), (9, 2), (1, 20)]


class Counting(HFTeacher):
    """Counts what it is asked."""

    asked = 0

    def score(self, rollouts: Sequence[Rollout], *, needs: Needs, k: int = 0) -> list[TeacherScores]:
        self.asked += len(rollouts)
        return super().score(rollouts, needs=needs, k=k)


def cached(folder: Path, fingerprint: str = "a", ends: tuple[int, ...] = ()) -> tuple[CachedTeacher, Counting]:
    teacher = Counting(make_model(), vocab_size=512, end_ids=ends)
    return CachedTeacher(teacher, folder, fingerprint=fingerprint, vocab_size=512, end_ids=ends), teacher


def same(one: list[TeacherScores], other: list[TeacherScores]) -> bool:
    names = ("logprobs", "entropies", "top1_ids", "top_ids", "top_logprobs")
    columns = [(getattr(a, name), getattr(b, name)) for a, b in zip(one, other, strict=True) for name in names]
    return all((a is None and b is None) or torch.equal(a, b) for a, b in columns)


@pytest.mark.parametrize("needs", ["sampled", "top_k"])
def test_what_was_asked_once_is_not_asked_again(needs: Needs, tmp_path: Path) -> None:
    rollouts = make_rollouts(LENGTHS)
    first, asked = cached(tmp_path)
    scores = first.score(rollouts[:2], needs=needs, k=3)
    scores += first.score(rollouts, needs=needs, k=3)[2:]
    assert asked.asked == 3
    later, untouched = cached(tmp_path)
    assert same(later.score(rollouts[::-1], needs=needs, k=3)[::-1], scores)
    assert untouched.asked == 0
    assert same(scores, HFTeacher(make_model(), vocab_size=512).score(rollouts, needs=needs, k=3))


def test_every_other_question_is_another_one(tmp_path: Path) -> None:
    (rollout,) = make_rollouts([(4, 6)])
    cached(tmp_path)[0].score([rollout], needs="top_k", k=3)
    ids = rollout.prompt.prompt_ids + rollout.response_ids
    moved = Rollout(type(rollout.prompt)("p", ids[:5]), ids[5:], (0.0,) * 5, "stop")  # the same tokens, split otherwise
    questions = [
        (cached(tmp_path), rollout, "sampled", 0),
        (cached(tmp_path), rollout, "top_k", 4),
        (cached(tmp_path), moved, "top_k", 3),
        (cached(tmp_path, "b"), rollout, "top_k", 3),
        (cached(tmp_path, ends=(END, CHAT_END)), rollout, "top_k", 3),
    ]
    for (teacher, counting), asked, needs, k in questions:
        (scores,) = teacher.score([asked], needs=needs, k=k)
        assert counting.asked == 1
        assert len(scores.logprobs) == len(asked)


@pytest.mark.parametrize("damage", ["cut short", "empty", "garbage", "another length", "too few columns"])
def test_a_damaged_entry_is_asked_for_again_and_mended(damage: str, tmp_path: Path) -> None:
    rollouts = make_rollouts([(4, 6)])
    expected = cached(tmp_path)[0].score(rollouts, needs="top_k", k=3)
    (path,) = tmp_path.rglob("*.safetensors")
    whole = path.read_bytes()
    other, fewer = make_rollouts([(4, 7)]), tmp_path / "other"
    if damage == "another length":
        cached(fewer)[0].score(other, needs="top_k", k=3)
    elif damage == "too few columns":
        cached(fewer)[0].score(rollouts, needs="sampled")
    replaced = next(fewer.rglob("*.safetensors"), None)
    contents = {"cut short": whole[:-5], "empty": b"", "garbage": b"\xff" * 200}
    path.write_bytes(contents[damage] if replaced is None else replaced.read_bytes())
    teacher, counting = cached(tmp_path)
    assert same(teacher.score(rollouts, needs="top_k", k=3), expected)
    assert counting.asked == 1
    assert path.read_bytes() == whole


def test_many_writers_leave_whole_files_alone(tmp_path: Path) -> None:
    rollouts = make_rollouts([(4, 6)] * 20)
    teachers = [cached(tmp_path)[0] for _ in range(4)]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda teacher: teacher.score(rollouts, needs="sampled"), teachers))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 20
    assert {path.suffix for path in files} == {".safetensors"}
    later, counting = cached(tmp_path)
    kept = later.score(rollouts, needs="sampled")
    assert counting.asked == 0
    for scores in found:  # of batches that fell otherwise, so not bit for bit
        for one, other in zip(scores, kept, strict=True):
            torch.testing.assert_close(one.logprobs, other.logprobs)


def test_what_is_not_kept(tmp_path: Path) -> None:
    teacher, _ = cached(tmp_path)
    assert teacher.provides == {"nothing", "sampled", "top_k"}
    with pytest.raises(ValueError, match="does not keep what 'full' needs"):
        teacher.score(make_rollouts(LENGTHS), needs="full")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    place = tmp_path / "file"
    place.write_text("no folder")
    with pytest.raises(RunError, match=r"cannot write to the cache of scores .*file: Not a directory; make room"):
        cached(place)[0].score(make_rollouts(LENGTHS), needs="sampled")

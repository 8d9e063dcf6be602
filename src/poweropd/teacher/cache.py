"""Scores kept on disk: the same teacher asked for the same text answers from a file."""

import hashlib
import json
import tempfile
from array import array
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from poweropd.errors import RunError
from poweropd.objectives import Needs
from poweropd.teacher.scorer import TeacherScorer
from poweropd.types import Rollout, TeacherScores

FORMAT = 1
COLUMNS = ("logprobs", "entropies", "top_ids", "top_logprobs", "top1_ids")


class CachedTeacher:
    """Asks a teacher for what no file tells, and writes it down; several processes may share a folder.

    Numbers of single tokens are kept, a dozen bytes each. Whole distributions are not: their hidden states take thousands
    of bytes a token, and a forward pass is as fast as reading them.

    Args:
        fingerprint: of the teacher's weights; other weights have other scores.
        vocab_size, end_ids: which the teacher was made with.
    """

    def __init__(
        self, teacher: TeacherScorer, folder: Path, *, fingerprint: str, vocab_size: int, end_ids: tuple[int, ...]
    ) -> None:
        self.provides: frozenset[Needs] = teacher.provides - {"full"}
        self._teacher = teacher
        self._folder = folder
        self._speaker = [FORMAT, fingerprint, vocab_size, *end_ids]

    def score(self, rollouts: Sequence[Rollout], *, needs: Needs, k: int = 0) -> list[TeacherScores]:
        """As of every teacher.

        Raises:
            RunError: the folder cannot be written to.
        """
        if needs not in self.provides:
            raise ValueError(f"a cache does not keep what {needs!r} needs")
        if needs == "nothing":
            return [TeacherScores()] * len(rollouts)
        k = k if needs == "top_k" else 0
        paths = [self._path(rollout, needs, k) for rollout in rollouts]
        found = [_read(path, len(rollout), needs) for path, rollout in zip(paths, rollouts, strict=True)]
        missing = [place for place, scores in enumerate(found) if scores is None]
        if missing:
            asked = self._teacher.score([rollouts[place] for place in missing], needs=needs, k=k)
            for place, scores in zip(missing, asked, strict=True):
                _write(paths[place], scores)
                found[place] = scores
        return [scores for scores in found if scores is not None]

    def _path(self, rollout: Rollout, needs: Needs, k: int) -> Path:
        question = [*self._speaker, needs, k, len(rollout.prompt.prompt_ids)]
        digest = hashlib.blake2b(json.dumps(question).encode(), digest_size=16)
        digest.update(array("q", (*rollout.prompt.prompt_ids, *rollout.response_ids)).tobytes())
        name = digest.hexdigest()
        return self._folder / name[:2] / f"{name[2:]}.safetensors"


def _read(path: Path, tokens: int, needs: Needs) -> TeacherScores | None:
    """None if there is no such file that can be read, or it is damaged."""
    try:
        scores = TeacherScores(**load(path.read_bytes()))  # type: ignore[arg-type]
    except (OSError, SafetensorError, TypeError):
        return None
    columns = [column for name in COLUMNS if (column := getattr(scores, name)) is not None]
    whole = scores.logprobs is not None and (needs != "top_k" or scores.top_logprobs is not None)
    return scores if whole and all(len(column) == tokens for column in columns) else None


def _write(path: Path, scores: TeacherScores) -> None:
    """Beside its place first, then renamed: whoever reads finds all of it or nothing."""
    columns: dict[str, torch.Tensor] = {
        name: column.contiguous() for name in COLUMNS if (column := getattr(scores, name)) is not None
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            try:
                file.write(save(columns))
                file.close()
                Path(file.name).replace(path)
            except BaseException:
                Path(file.name).unlink()
                raise
    except OSError as error:
        raise RunError(
            f"cannot write to the cache of scores {path.parents[1]}: {error.strerror or error}; make room, or choose another "
            "teacher.cache"
        ) from error

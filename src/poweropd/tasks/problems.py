"""Problems from `reasoning-gym` generators, with train and held-out problems disjoint by construction."""

import re
import zlib
from collections.abc import Iterator, Mapping
from itertools import count
from typing import Any, Literal

Problem = dict[str, Any]  # one reasoning-gym item: question, answer, metadata
Split = Literal["train", "held_out"]
HELD_OUT_SHARE = 8  # one problem in this many is held out
EXHAUSTED_AFTER = 5_000  # draws from every family without a new problem


def split_of(family: str, question: str) -> Split:
    """The side of the split that a problem belongs to, a pure function of the numbers in it.

    Two wordings of one problem, or the same numbers in another order, fall on one side. crc32, not `hash`: the
    latter is salted per process.
    """
    key = family + ":" + ",".join(sorted(re.findall(r"\d+", question)))
    return "held_out" if zlib.crc32(key.encode()) % HELD_OUT_SHARE == 0 else "train"


def problems(
    families: Mapping[str, Mapping[str, Any]], *, split: Split, seed: int, distinct: bool = False
) -> Iterator[Problem]:
    """Endless reasoning-gym items (`question`, `answer`, `metadata`), the families in turn.

    Args:
        families: generator name -> its reasoning-gym settings.
        split: which side of `split_of` to give.
        seed: seed of the generators.
        distinct: give no question twice; the stream ends when the families have no new one.

    Raises:
        ValueError: no generator of that name, or a setting it refuses.
    """
    import reasoning_gym  # takes a second to import

    streams = []
    for name, settings in families.items():
        options = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
        try:
            streams.append(reasoning_gym.create_dataset(name, seed=seed, size=2**31, **options))
        except (ValueError, TypeError, AssertionError) as error:
            raise ValueError(f"data.families.{name}: {error}") from error
    seen: set[str] = set()
    last_new = 0
    for index in count():
        if index - last_new > EXHAUSTED_AFTER:
            return
        for family, stream in zip(families, streams, strict=True):
            problem = stream[index]
            question = problem["question"]
            if split_of(family, question) != split or not _answerable(problem) or (distinct and question in seen):
                continue
            if distinct:
                seen.add(question)
            last_new = index
            yield problem


def _answerable(problem: Problem) -> bool:
    """Whether the question determines the answer: `simple_equations` sometimes asks for x in `0 = 0`."""
    metadata = problem["metadata"]
    return "equation" not in metadata or metadata["variable"] in metadata["equation"]

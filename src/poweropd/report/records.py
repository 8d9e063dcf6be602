"""The door of a report: which records of a run's files can be read, so that nothing behind it has to ask again."""

from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any, TypeGuard

Record = dict[str, Any]
LARGEST = 1e100  # the size of a number whose sums and squares are still numbers
MANIFEST = {"status": str, "started": str, "python": str, "git_commit": str, "gradient_of": str,
            "machine": dict, "versions": dict}  # fmt: skip


def is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


def is_record(log: str, value: Any) -> TypeGuard[Record]:
    """Whether a line of a log can be read. A metric that is no number is a gap in its curve alone."""
    return isinstance(value, dict) and is_number(value.get("step")) and FITS[log](value)


def is_summary(summary: Record) -> bool:
    k, problems, correct = summary.get("samples"), summary.get("problems"), summary.get("correct") or {}
    return (
        _is_count(k)
        and k > 0
        and _is_count(problems)
        and problems > 0
        and is_number(summary.get(f"avg_at_{k}"))
        and all(value is None or _are_numbers(value, 2) for value in _values(summary.get("intervals")))
        and all(_is_count(count) for count in _values(summary.get("status")))
        and all(_is_count(count) and count <= k for count in _values(correct))
    )


def histogram(record: Record, name: str) -> tuple[list[float], list[int]] | None:
    """Edges and counts of a line of distributions.jsonl; None where it has none, or an empty one."""
    value = record.get(name)
    return (value["edges"], value["counts"]) if value and sum(value["counts"]) > 0 else None


def _values(section: Any) -> Iterable[Any]:
    """Of a section that may be missing; one that is none has a value that fits nowhere."""
    return section.values() if isinstance(section, dict) else [] if section is None else ["no section"]


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST


def _are_numbers(value: Any, length: int | None = None) -> bool:
    """NaN and infinities are none that count, but can be read."""
    return (
        isinstance(value, list)
        and length in (None, len(value))
        and all(isinstance(item, float) or is_number(item) for item in value)
    )


def _is_rollout(record: Record) -> bool:
    texts = record.get("tokens")
    columns = [record.get(key) or [] for key in ("weights", "student_logprobs", "teacher_logprobs")]
    return (
        isinstance(texts, list)
        and all(isinstance(text, str) for text in [*texts, record.get("prompt"), record.get("finish_reason")])
        and "id" in record
        and all(
            isinstance(column, list) and _are_numbers([item for item in column if item is not None])
            for column in columns
        )
    )


def _is_bin(record: Record) -> bool:
    return (
        all(_is_count(record.get(key)) for key in ("first", "last", "tokens"))
        and record["first"] <= record["last"]
        and record["tokens"] > 0
        and all(map(is_number, record.values()))
    )


def _is_distribution(record: Record) -> bool:
    histograms = (record.get(name) for name in ("reward", "divergence", "log_ratio"))
    return all(value is None or _is_histogram(value) for value in histograms) and _is_plane(record.get("plane"))


def _is_histogram(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("counts"), list):
        return False
    edges, counts = value.get("edges"), value["counts"]
    return not counts or (_rise(edges) and len(edges) == len(counts) + 1 and all(map(_is_count, counts)))


def _rise(edges: Any) -> TypeGuard[list[float]]:
    return (
        isinstance(edges, list)
        and all(map(is_number, edges))
        and all(lower < upper for lower, upper in pairwise(edges))
    )


def _is_plane(value: Any) -> bool:
    if value is None:
        return True
    if not isinstance(value, dict) or not _rise(value.get("edges")) or not isinstance(value.get("cells"), list):
        return False
    size = len(value["edges"]) - 1
    return all(
        isinstance(cell, list)
        and len(cell) == 4
        and all(map(_is_count, cell[:3]))
        and max(cell[:2]) < size
        and is_number(cell[3])
        for cell in value["cells"]
    )


FITS: dict[str, Callable[[Record], bool]] = {
    "metrics": lambda _: True,
    "positions": _is_bin,
    "distributions": _is_distribution,
    "rollouts": _is_rollout,
}

"""The files of one evaluation: begun, broken off, gone on with, finished, found again."""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TextIO

from poweropd.errors import RunError
from poweropd.locking import locked

OF_SAMPLES = {"id", "sample", "reference", "response", "length", "finish_reason", "repetitive"}
FINGERPRINTS = {"model": "the weights", "problems": "the problems"}  # settings that are hashes, and what they are of


class Record:
    """`<name>.jsonl` grows by one line a sample; `<name>.json` has the settings, and at the end the results.

    Args:
        folder: made if it is not there.
        name: of the benchmark.
        settings: everything that the samples depend on.
        grading: what their grades depend on beside.
        cache: a folder where finished evaluations lie by their settings.
    """

    def __init__(
        self, folder: Path, name: str, settings: Mapping[str, Any], grading: str, cache: Path | None = None
    ) -> None:
        self.settings = settings
        self.grading = grading
        self.identity = _hash(settings)
        self._folder = folder
        self._results, self._samples = folder / f"{name}.json", folder / f"{name}.jsonl"
        self._cached = None if cache is None else cache / f"{name}-{_hash([settings, grading])}"
        self._lock_path = folder / f".{name}.lock"
        self._lock: TextIO | None = None

    def __enter__(self) -> Self:
        """Take the place.

        Raises:
            RunError: another process is at work here, or nothing can be written.
        """
        with _writing(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
        self._lock = locked(self._lock_path, str(self._results))
        return self

    def __exit__(self, *_: object) -> None:
        assert self._lock is not None
        self._lock_path.unlink(missing_ok=True)
        self._lock.close()

    def known(self) -> dict[str, Any] | None:
        """The summary, if this evaluation is finished and graded in this way, here or in the cache.

        Raises:
            RunError: another evaluation lies here.
        """
        here = read_summary(self._results)
        if here is not None and here.get("identity") != self.identity:
            raise RunError(
                f"{self._results} is another evaluation, which is never written over: {self._differences(here)}. Use "
                "another --out, or the same settings to go on with it"
            )
        if here is not None and here["finished"] and here["grading"] == self.grading:
            return here
        if self._cached is not None and self._cached.with_suffix(".json").is_file():
            with _writing(self._folder):
                for path in (self._samples, self._results):
                    shutil.copyfile(self._cached.with_suffix(path.suffix), path)
            return read_summary(self._results)
        return None

    def _differences(self, other: Mapping[str, Any]) -> str:
        return differences(other.get("settings") or {}, self.settings) or "its file has no settings"

    def make_room(self) -> None:
        """Remove another evaluation that lies here."""
        try:
            here = read_summary(self._results)
        except RunError:
            here = {}
        if here is not None and here.get("identity") != self.identity:
            self._results.unlink()
            self._samples.unlink(missing_ok=True)

    def begin(self, samples_per_problem: int) -> list[dict[str, Any]]:
        """The samples that are there already, of the problems that have all of theirs."""
        self._write({"identity": self.identity, "finished": False, "settings": self.settings, "grading": self.grading})
        by_problem: dict[str, dict[int, dict[str, Any]]] = {}
        for sample in _samples(self._samples):
            by_problem.setdefault(sample["id"], {})[sample["sample"]] = sample
        return [sample for rows in by_problem.values() if len(rows) == samples_per_problem for sample in rows.values()]

    def rewrite(self, samples: Sequence[Mapping[str, Any]]) -> None:
        """Let these samples be all that are there."""
        partial = self._samples.with_suffix(".jsonl.partial")
        with _writing(self._folder):
            partial.write_text("".join(map(_line, samples)), encoding="utf-8")
            partial.replace(self._samples)

    def append(self, samples: Sequence[Mapping[str, Any]]) -> None:
        with _writing(self._folder), self._samples.open("a", encoding="utf-8") as file:
            file.writelines(map(_line, samples))

    def finish(self, results: Mapping[str, Any]) -> dict[str, Any]:
        """Write the results, here and into the cache; returns the whole summary."""
        summary = {
            "identity": self.identity,
            "finished": True,
            **results,
            "settings": self.settings,
            "grading": self.grading,
        }
        self._write(summary)
        if self._cached is not None:
            with _writing(self._cached.parent):
                self._cached.parent.mkdir(parents=True, exist_ok=True)
                for path in (self._samples, self._results):  # the summary last: where it is, the samples are
                    shutil.copyfile(path, partial := self._cached.with_suffix(f"{path.suffix}.partial"))
                    partial.replace(self._cached.with_suffix(path.suffix))
        return summary

    def _write(self, value: Mapping[str, Any]) -> None:
        partial = self._results.with_suffix(".json.partial")
        with _writing(self._folder):
            partial.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            partial.replace(self._results)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Raises RunError where something cannot be written."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"cannot write into {folder}: {error.strerror or error}. What is there is kept; make room, or use another --out"
        ) from error


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """The settings in which two evaluations differ: `seed 0 there, 3 here; the problems differ`."""
    told = [
        f"{FINGERPRINTS[key]} differ" if key in FINGERPRINTS else f"{key} {theirs.get(key)} there, {value} here"
        for key, value in ours.items()
        if theirs.get(key) != value
    ]
    return "; ".join(told)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def read_summary(path: Path) -> dict[str, Any] | None:
    """The summary in a file, also of an evaluation that is not finished; None where there is none.

    Raises:
        RunError: it is no summary.
    """
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        value = None
    if not _is_summary(value):
        raise RunError(f"{path} is no summary of an evaluation, or damaged. Remove it, or use another --out")
    return value


def _is_summary(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("settings"), dict) or "grading" not in value:
        return False
    if value.get("finished") is not True:
        return value.get("finished") is False
    k, correct, intervals = (value.get(key) for key in ("samples", "correct", "intervals"))
    return (
        isinstance(k, int)
        and isinstance(correct, dict)
        and isinstance(intervals, dict)
        and len(correct) == value.get("problems")
        and all(isinstance(count, int) and 0 <= count <= k for count in correct.values())
        and {f"avg_at_{k}", "mean_length"} <= intervals.keys() <= value.keys()
    )


def read_summaries(folder: Path) -> dict[str, dict[str, Any]]:
    """The finished evaluations in a folder by benchmark.

    Raises:
        RunError: there is no such folder, or none in it.
    """
    if not folder.is_dir():
        raise RunError(f"there is no folder {folder}. Give the --out of an earlier `poweropd evaluate`")
    found = {path.stem: summary for path in sorted(folder.glob("*.json")) if (summary := read_summary(path))}
    finished = {name: summary for name, summary in found.items() if summary["finished"]}
    if not finished:
        below = sorted(entry for entry in folder.iterdir() if entry.is_dir() and any(entry.glob("*.json")))
        hint = f"perhaps you mean {below[-1]}" if below else "give the --out of an earlier `poweropd evaluate`"
        raise RunError(f"{folder} holds no finished evaluation; {hint}")
    return finished


def same_problems(mine: Path, theirs: Path, name: str) -> set[str]:
    """The ids under which two finished evaluations asked the same problem, to the letter."""
    texts = [
        {sample["id"]: sample.get("problem") for sample in _samples(folder / f"{name}.jsonl")}
        for folder in (mine, theirs)
    ]
    return {problem for problem, text in texts[0].items() if problem in texts[1] and texts[1][problem] == text}


def _line(sample: Mapping[str, Any]) -> str:
    return json.dumps(sample, ensure_ascii=False) + "\n"


def _samples(path: Path) -> list[dict[str, Any]]:
    """Every whole line; the last one may have been cut off when the evaluation was killed."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):  # texts may hold other line separators
        try:
            sample = json.loads(line)
        except ValueError:
            continue
        if isinstance(sample, dict) and sample.keys() >= OF_SAMPLES:
            found.append(sample)
    return found

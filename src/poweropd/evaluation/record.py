"""The files of one evaluation: begun, broken off, gone on with, finished, found again."""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from poweropd.errors import RunError

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
            self._folder.mkdir(parents=True, exist_ok=True)
            for path in (self._samples, self._results):
                shutil.copyfile(self._cached.with_suffix(path.suffix), path)
            return read_summary(self._results)
        return None

    def _differences(self, other: Mapping[str, Any]) -> str:
        theirs = other.get("settings") or {}
        changed = [key for key in self.settings if theirs.get(key) != self.settings[key]]
        told = [
            f"{FINGERPRINTS[key]} differ" if key in FINGERPRINTS else f"{key} {theirs.get(key)} there, {self.settings[key]} here"
            for key in changed
        ]  # fmt: skip
        return "; ".join(told) or "its file has no settings"

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
        self._folder.mkdir(parents=True, exist_ok=True)
        self._write({"identity": self.identity, "finished": False, "settings": self.settings, "grading": self.grading})
        by_problem: dict[str, list[dict[str, Any]]] = {}
        for sample in _lines(self._samples):
            by_problem.setdefault(sample["id"], []).append(sample)
        return [sample for rows in by_problem.values() if len(rows) == samples_per_problem for sample in rows]

    def rewrite(self, samples: Sequence[Mapping[str, Any]]) -> None:
        """Let these samples be all that are there."""
        partial = self._samples.with_suffix(".jsonl.partial")
        partial.write_text("".join(map(_line, samples)), encoding="utf-8")
        partial.replace(self._samples)

    def append(self, samples: Sequence[Mapping[str, Any]]) -> None:
        with self._samples.open("a", encoding="utf-8") as file:
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
            self._cached.parent.mkdir(parents=True, exist_ok=True)
            for path in (self._samples, self._results):  # the summary last: where it is, the samples are
                shutil.copyfile(path, partial := self._cached.with_suffix(f"{path.suffix}.partial"))
                partial.replace(self._cached.with_suffix(path.suffix))
        return summary

    def _write(self, value: Mapping[str, Any]) -> None:
        partial = self._results.with_suffix(".json.partial")
        partial.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        partial.replace(self._results)


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
    except ValueError:
        value = None
    if not isinstance(value, dict) or "finished" not in value:
        raise RunError(f"{path} is no summary of an evaluation. Remove it, or use another --out")
    return value


def read_summaries(folder: Path) -> dict[str, dict[str, Any]]:
    """The finished evaluations in a folder by benchmark.

    Raises:
        RunError: there is none.
    """
    found = {path.stem: summary for path in sorted(folder.glob("*.json")) if (summary := read_summary(path))}
    finished = {name: summary for name, summary in found.items() if summary["finished"]}
    if not finished:
        raise RunError(f"{folder} holds no finished evaluation. Give the --out of an earlier `poweropd evaluate`")
    return finished


def _line(sample: Mapping[str, Any]) -> str:
    return json.dumps(sample, ensure_ascii=False) + "\n"


def _lines(path: Path) -> list[dict[str, Any]]:
    """Every whole line; the last one may have been cut off when the evaluation was killed."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found

"""The file of results: what was measured, with the machine that it was measured on, written after every turn."""

import json
import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "results"
PACKAGES = ("torch", "transformers", "numpy")


class Results:
    """One machine's results.

    The file holds `machine`, and for each contest its `setting` and for each contestant the list of its `turns`, or why it
    `failed`.
    """

    def __init__(self, path: Path, machine: dict[str, Any], *, keep: bool) -> None:
        self.path, self._machine = path, machine
        old = json.loads(path.read_text()) if keep and path.is_file() else {}
        self.data: dict[str, Any] = {"machine": old.get("machine", machine), "contests": old.get("contests", {})}

    def is_done(self, contest: str) -> bool:
        return bool(self.data["contests"].get(contest, {}).get("done"))

    def open(self, contest: str, setting: dict[str, Any]) -> dict[str, Any]:
        """Begin a contest anew: its turns are compared with each other, so those of an earlier try are dropped."""
        now = datetime.now(UTC).date().isoformat()
        entry = {"date": now, "load": round(os.getloadavg()[0], 1), **setting, "turns": {}, "failed": {}, "done": False}
        self.data["machine"], self.data["contests"][contest] = self._machine, entry
        return entry

    def save(self) -> None:
        """Whole or not at all."""
        self.path.parent.mkdir(exist_ok=True)
        beside = self.path.with_suffix(".tmp")
        beside.write_text(json.dumps(self.data, indent=1, sort_keys=True) + "\n")
        beside.replace(self.path)


def machine(threads: int, peers: Path | None) -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "name": slug(cpu(), cores()),
        "cpu": cpu(),
        "cores": cores(),
        "threads": threads,
        "memory_gib": round(_memory() / 2**30, 1),
        "python": platform.python_version(),
        "system": platform.system(),
        **{package: version(package) for package in PACKAGES},
        "trl": _version_there(peers, "trl") if peers else None,
    }


def slug(name: str, count: int) -> str:
    """A readable name: "Intel(R) Xeon(R) Processor", 2 -> intel-xeon-2-cores."""
    bare = re.sub(r"\((r|tm|c)\)|@.*|\b(cpu|processor|with|\d+-core)\b", " ", name.lower())
    words = re.findall(r"[a-z0-9]+", bare)
    return "-".join([*words, str(count), "cores"])


def cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_memory() -> int:
    """Bytes that a process could take now; where the system does not tell, all there are."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return _memory()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _version_there(python: Path, package: str) -> str:
    code = f"from importlib.metadata import version; print(version({package!r}))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()

"""Checkpoints that exist complete or not at all, and are checked before they are used."""

import hashlib
import json
import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from poweropd.errors import RunError

MANIFEST, STATE, META = "manifest.json", "state.pt", "meta.json"


def save(root: Path, step: int, state: Mapping[str, Any], meta: Mapping[str, Any], *, keep: int) -> Path:
    """Write `root/step-<step>`: beside it first, synced, with hashes of every file in a manifest, then renamed.

    Args:
        state: tensors and plain values for `torch.save`.
        meta: JSON values that people may want to read.
        keep: how many of the newest checkpoints stay.

    Raises:
        OSError: it could not be written; nothing of it is left, and the older checkpoints are untouched.
    """
    root.mkdir(parents=True, exist_ok=True)
    final, partial = root / f"step-{step:06d}", root / f".step-{step:06d}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        # torch.save hides the reason of a failed write in a RuntimeError; a file object of ours keeps the OSError.
        with (partial / STATE).open("wb") as file:
            _save_to(file, dict(state))
        (partial / META).write_text(json.dumps(dict(meta), indent=2) + "\n", encoding="utf-8")
        files = {name: _sha256(partial / name) for name in (STATE, META)}
        (partial / MANIFEST).write_text(json.dumps({"sha256": files}, indent=2) + "\n", encoding="utf-8")
        for name in (STATE, META, MANIFEST):
            _sync(partial / name)
        shutil.rmtree(final, ignore_errors=True)  # a step that is taken again after a resume
        partial.rename(final)
        _sync(root)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for old in steps(root)[:-keep]:
        shutil.rmtree(root / f"step-{old:06d}")
    return final


def _save_to(file: Any, state: dict[str, Any]) -> None:
    failures: list[OSError] = []

    class Writer:
        def write(self, data: Any) -> int:
            try:
                return int(file.write(data))
            except OSError as error:
                failures.append(error)
                raise

        def flush(self) -> None:
            file.flush()

    try:
        torch.save(state, Writer())  # type: ignore[arg-type]
    except (OSError, RuntimeError):
        if failures:
            raise failures[0] from None
        raise


def steps(root: Path) -> list[int]:
    """Steps of all checkpoints, oldest first, complete by construction."""
    return sorted(int(path.name.removeprefix("step-")) for path in root.glob("step-*"))


def newest_step(root: Path) -> int | None:
    """The step of the newest checkpoint, None if there is none."""
    return max(steps(root), default=None)


def load_latest(root: Path) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """State and meta of the newest checkpoint; None if there is no checkpoint.

    Raises:
        RunError: the newest is damaged; names it, the reason and the newest good one.
    """
    saved = steps(root)
    if not saved:
        return None
    newest = root / f"step-{saved[-1]:06d}"
    problem = damage(newest)
    if problem is not None:
        good = next(
            (root / f"step-{s:06d}" for s in reversed(saved[:-1]) if damage(root / f"step-{s:06d}") is None), None
        )
        remedy = f"the last good one is {good.name}" if good else "no good one is left, so the run would start again"
        raise RunError(f"checkpoint {newest} is damaged: {problem}. Remove it to go on; {remedy}")
    state = torch.load(newest / STATE, map_location="cpu", weights_only=True)
    return state, json.loads((newest / META).read_text(encoding="utf-8"))


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, None if nothing is."""
    try:
        expected = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["sha256"]
        for name, digest in expected.items():
            if _sha256(folder / name) != digest:
                return f"{name} does not match its hash"
    except (OSError, ValueError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def random_states() -> dict[str, Any]:
    """Of every library. Training draws nothing from them, but a model or an objective of the user's may."""
    state = np.random.get_state(legacy=False)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": {**state, "state": {**state["state"], "key": state["state"]["key"].tolist()}},
    }


def set_random_states(states: Mapping[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    inner = states["numpy"]["state"]
    np.random.set_state({**states["numpy"], "state": {**inner, "key": np.array(inner["key"], dtype=np.uint32)}})

"""Checkpoints that exist complete or not at all, and are checked before they are used."""

import hashlib
import json
import os
import random
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.checkpoint.state_dict_saver import save as save_shards

from poweropd.distributed import ALONE, World
from poweropd.errors import RunError

MANIFEST, STATE, META, SHARDS = "manifest.json", "state.pt", "meta.json", "shards"


def save(
    root: Path,
    step: int,
    state: Mapping[str, Any],
    meta: Mapping[str, Any],
    *,
    keep: int,
    shards: Mapping[str, Tensor] | None = None,
    world: World = ALONE,
) -> Path:
    """Write `root/step-<step>`: beside it first, synced, with hashes of every file in a manifest, then renamed.

    Args:
        state: tensors and plain values for `torch.save`.
        meta: JSON values that people may want to read.
        keep: how many of the newest checkpoints stay.
        shards: tensors of which every rank writes what it holds.
        world: the ranks, which all call; all but the shards is written by the first.

    Raises:
        OSError: it could not be written; nothing of it is left, and the older checkpoints are untouched.
    """
    final, partial = _folder(root, step), root / f".step-{step:06d}.partial"

    def begin() -> None:
        root.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()

    def complete() -> None:
        # torch.save hides the reason of a failed write in a RuntimeError; a file object of ours keeps the OSError.
        with (partial / STATE).open("wb") as file:
            _save_to(file, dict(state))
        (partial / META).write_text(json.dumps(dict(meta), indent=2) + "\n", encoding="utf-8")
        files = {name: _sha256(partial / name) for name in (STATE, META)} | of_shards
        (partial / MANIFEST).write_text(json.dumps({"sha256": files}, indent=2) + "\n", encoding="utf-8")
        for name in (STATE, META, MANIFEST):
            _sync(partial / name)
        shutil.rmtree(final, ignore_errors=True)  # a step that is taken again after a resume
        partial.rename(final)
        _sync(root)
        for old in steps(root)[:-keep]:
            shutil.rmtree(_folder(root, old))

    try:
        world.on_main(begin)
        of_shards = {} if shards is None else _save_shards(partial / SHARDS, shards, world)
        world.on_main(complete)
    except BaseException:
        if world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


def _save_shards(folder: Path, shards: Mapping[str, Tensor], world: World) -> dict[str, str]:
    """The hashes of the files, which their writers have taken."""
    try:
        save_shards(dict(shards), checkpoint_id=folder)
    except CheckpointException as error:
        raise _reason(error) from None

    def own_hashes() -> dict[str, str]:
        own = [*folder.glob(f"__{world.rank}_*"), *(folder.glob(".metadata") if world.is_main else ())]
        return {f"{SHARDS}/{path.name}": _sha256(path) for path in own}

    return {name: digest for hashes in world.each(own_hashes) for name, digest in hashes.items()}


def shapes_of_shards(root: Path, step: int) -> dict[str, torch.Size]:
    """The shapes of the whole tensors of which a checkpoint has shards, by name."""
    known = FileSystemReader(_folder(root, step) / SHARDS).read_metadata().state_dict_metadata
    return {name: value.size for name, value in known.items() if isinstance(value, TensorStorageMetadata)}


def read_shards(root: Path, step: int, shards: Mapping[str, Tensor]) -> None:
    """Read them into tensors of these names and shapes, which may lie otherwise on ranks, or on one."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is")  # a process that is alone is fine
            load_shards(dict(shards), checkpoint_id=_folder(root, step) / SHARDS)
    except CheckpointException as error:
        raise _reason(error) from None


def _reason(error: CheckpointException) -> BaseException:
    """What went wrong on the first rank that failed."""
    return next(iter(error.failures.values()))[0]


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


def load_latest(root: Path, world: World = ALONE) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """State and meta of the newest checkpoint; None if there is no checkpoint.

    Raises:
        RunError: the newest is damaged; names it, the reason and the newest good one.
    """
    step = world.on_main(lambda: _newest_good(root))
    if step is None:
        return None
    folder = _folder(root, step)
    state = torch.load(folder / STATE, map_location="cpu", weights_only=True)
    return state, json.loads((folder / META).read_text(encoding="utf-8"))


def _newest_good(root: Path) -> int | None:
    saved = steps(root)
    if not saved:
        return None
    newest = _folder(root, saved[-1])
    problem = damage(newest)
    if problem is not None:
        good = next((_folder(root, step) for step in reversed(saved[:-1]) if damage(_folder(root, step)) is None), None)
        remedy = f"the last good one is {good.name}" if good else "no good one is left, so the run would start again"
        raise RunError(f"checkpoint {newest} is damaged: {problem}. Remove it to go on; {remedy}")
    return saved[-1]


def _folder(root: Path, step: int) -> Path:
    return root / f"step-{step:06d}"


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

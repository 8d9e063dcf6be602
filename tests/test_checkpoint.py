"""Checkpoints appear complete or not at all; a damaged one is named and the last good one offered."""

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from poweropd import checkpoint
from poweropd.errors import RunError


def save(root: Path, step: int, keep: int = 9, size: int = 10) -> Path:
    state = {"weights": torch.full((size,), float(step)), "random": checkpoint.random_states()}
    return checkpoint.save(root, step, state, {"step": step}, keep=keep)


def test_round_trip(tmp_path: Path) -> None:
    save(tmp_path, 3)
    save(tmp_path, 12)
    loaded = checkpoint.load_latest(tmp_path)
    assert loaded is not None
    state, meta = loaded
    assert meta == {"step": 12}
    assert torch.equal(state["weights"], torch.full((10,), 12.0))
    assert checkpoint.load_latest(tmp_path / "elsewhere") is None


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep=2)
    assert checkpoint.steps(tmp_path) == [3, 4]


def test_a_step_may_be_saved_again(tmp_path: Path) -> None:
    save(tmp_path, 5)
    save(tmp_path, 5)
    assert checkpoint.steps(tmp_path) == [5]


@pytest.mark.parametrize("name", ["state.pt", "meta.json", "manifest.json"])
@pytest.mark.parametrize("harm", ["cut", "flip", "remove"])
def test_damage_is_named_and_the_last_good_one_offered(tmp_path: Path, name: str, harm: str) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2) / name
    content = bytearray(path.read_bytes())
    if harm == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif harm == "flip":
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content)
    else:
        path.unlink()
    with pytest.raises(
        RunError, match=r"step-000002 is damaged: .* Remove it to go on; the last good one is step-000001"
    ):
        checkpoint.load_latest(tmp_path)


def test_partial_folders_are_never_taken_for_checkpoints(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / ".step-000002.partial").mkdir()
    assert checkpoint.steps(tmp_path) == [1]


FULL_DISK = """
import resource, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_checkpoint import save
save(Path({root!r}), 1)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))  # a file that grows beyond it fails, as on a full disk
try:
    save(Path({root!r}), 2, size=1_000_000)
except OSError as error:
    print(type(error).__name__, error.errno)
"""


def test_a_failed_write_leaves_the_older_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    code = FULL_DISK.format(tests=str(Path(__file__).parent), root=str(tmp_path))
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert got.stdout.startswith("OSError")
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    loaded = checkpoint.load_latest(tmp_path)
    assert loaded is not None
    assert loaded[1] == {"step": 1}


def test_random_states_are_restored(tmp_path: Path) -> None:
    def draw() -> tuple:
        return torch.rand(3).tolist(), random.random(), np.random.random(3).tolist()

    save(tmp_path, 1)
    first = draw()
    loaded = checkpoint.load_latest(tmp_path)
    assert loaded is not None
    checkpoint.set_random_states(loaded[0]["random"])
    assert draw() == first

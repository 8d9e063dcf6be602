"""One process at a time."""

import fcntl
from pathlib import Path
from typing import TextIO

from poweropd.errors import RunError


def locked(path: Path, what: str) -> TextIO:
    """An open file that no other process can lock until it is closed, or until this process ends.

    Args:
        what: it stands for, for the message.

    Raises:
        RunError: another process has it, or it cannot be made.
    """
    try:
        file = path.open("a", encoding="utf-8")
    except OSError as error:
        raise RunError(f"cannot write into {path.parent}: {error.strerror or error}. Use another --out") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise RunError(f"{what} is in use by another process. Wait for it, or use another --out") from None
    return file

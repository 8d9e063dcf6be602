"""What a failure mode is."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Pathology:
    """Something that went wrong in a run: since which step, what was seen, and what to try."""

    name: str
    run: str
    step: int
    what: str
    try_: str
    severity: Literal["note", "warn"]

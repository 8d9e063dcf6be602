"""The program of the grading process: JSON lines `[answer, reference]` in, one grade status a line out.

It runs alone because a hostile answer may make symbolic algebra hang, crash or eat memory. Its parent holds the clock.
"""

import contextlib
import json
import logging
import sys

import math_verify

MEMORY_LIMIT = 4 * 2**30  # bytes of address space
READY = "ready"


def compare(answer: str, reference: str) -> str:
    """`correct`, `wrong` or `unparsable`, by math-verify without its own signal-based timeouts."""
    gold, given = (math_verify.parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in (reference, answer))
    if not gold or not given:
        return "unparsable"
    return "correct" if math_verify.verify(gold, given, timeout_seconds=None) else "wrong"


def main() -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource  # not on Windows

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    logging.disable(logging.CRITICAL)
    print(READY, flush=True)
    for line in sys.stdin:
        print(compare(*json.loads(line)), flush=True)


if __name__ == "__main__":
    main()

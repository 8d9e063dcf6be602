"""Questions to a vLLM server, and its version."""

import json
import re
from collections.abc import Callable
from typing import Any, TypeVar

from poweropd.teacher.http import Connection, UnusableAnswerError

Answer = TypeVar("Answer")

MINIMUM_VERSION = (0, 32)
MOST_NAMED_IDS = 128  # whose log-probabilities a request may ask for


def version_problem(version: str) -> str | None:
    """What is wrong with a version of vLLM, if something is."""
    parts = version.split(".")[:2]
    if all(part.isdigit() for part in parts) and tuple(map(int, parts)) >= MINIMUM_VERSION:
        return None
    return f"vLLM {'.'.join(map(str, MINIMUM_VERSION))} or newer is needed, this is {version}; install a newer one"


def message_of(told: str) -> str:
    """The message in the beginning of an answer that is an error."""
    found = re.search(r'"message":\s*"([^"]*)', told)
    return found.group(1) if found else told


class VLLMConnection(Connection):
    """To a vLLM server."""

    def ask_json(self, method: str, path: str, pick: Callable[[Any], Answer], question: Any = None) -> Answer:
        """What `pick` takes from a JSON answer; see `ask`."""

        def read(body: bytes) -> Answer:
            try:
                return pick(json.loads(body))
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise UnusableAnswerError(f"its answer is not what was asked for ({type(error).__name__})") from None

        body = None if question is None else json.dumps(question).encode()
        return self.ask(method, path, read, body, {"Content-Type": "application/json"})

    def _may_pass(self, status: int, told: str) -> bool:
        return super()._may_pass(status, told) and "collective_rpc method failed" not in told

    def _refusal(self, status: int, told: str) -> str:
        return super()._refusal(status, message_of(told))

    def check_version(self) -> None:
        """Raises `error` for a vLLM that lacks what is used here."""
        if problem := version_problem(self.ask_json("GET", "/version", lambda told: str(told["version"]))):
            raise self.error(f"{self.peer} at {self.url}: {problem}")

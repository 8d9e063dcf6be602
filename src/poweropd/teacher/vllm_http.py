"""Questions to a vLLM server, and its version."""

import json
import re
from collections.abc import Callable
from pathlib import PurePath
from typing import Any, TypeVar

from poweropd.errors import UserError
from poweropd.models import resolve
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
            raise self.refused(problem)

    def served(self, model: str, key: str) -> tuple[str, int]:
        """The name under which the server has a model, and the longest text that it takes.

        Args:
            model: Hub id or folder; one of the same last name will do, for folders differ from machine to machine.
            key: of the recipe, that names it.

        Raises:
            UserError: `error`: it has another one.
        """
        models = self.ask_json("GET", "/v1/models", lambda told: list(told["data"]))
        name = PurePath(resolve(model)).name
        for one in models:
            if name in {PurePath(str(one.get(given))).name for given in ("id", "root")}:
                return one["id"], int(one["max_model_len"])
        others = ", ".join(str(one.get("id")) for one in models)
        raise self.refused(
            f"it serves {others}, and {key} is {model}; serve that one, or name it by --served-model-name"
        )

    def refused(self, problem: str) -> UserError:
        """The error that says so."""
        return self.error(f"{self.peer} at {self.url} cannot be used: {problem}")

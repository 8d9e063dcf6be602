"""Requests to a teacher on another machine: repeated until they are answered, or a deadline has passed."""

import os
import ssl
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection, IncompleteRead
from random import Random
from typing import ClassVar, TypeVar
from urllib.parse import urlsplit

from poweropd.errors import ConfigError, TeacherError, UserError

Answer = TypeVar("Answer")

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 10.0  # seconds between attempts; they double, and jitter keeps many clients apart
CHUNK = 1 << 20
TOO_MANY_REQUESTS = 429  # a busy server, unlike the other 4xx


class UnusableAnswerError(Exception):
    """An answer that may be right when it is asked for again."""


def token_from(variable: str | None, setting: str) -> str | None:
    """The token that an environment variable holds; None where none is named.

    Args:
        setting: what named the variable, for the message.

    Raises:
        ConfigError: it is not set, or holds what no header can carry.
    """
    if variable is None:
        return None
    token = os.environ.get(variable, "")
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        wrong = "is not set" if not token else "holds spaces or other than printable ASCII characters"
        raise ConfigError(f"{setting}: the environment variable {variable} {wrong}; put the server's token into it")
    return token


class Connection:
    """A connection to one server, kept open between requests; for one thread at a time.

    Connections that break, silence, 5xx and damaged answers are tried again, with exponential backoff and jitter.

    Attributes:
        peer, section, error: what messages call the server and the recipe's section that speaks of it, and what is raised.

    Args:
        url: `http://host:port` or `https://host:port`, with or without a path before those of the requests.
        token: sent as the bearer token.
        timeout_s: longest silence of the server, in seconds, before an attempt is given up.
        deadline_s: longest time a request may take with all its attempts, in seconds.

    Raises:
        ConfigError: it is no such URL.
    """

    peer: ClassVar[str] = "the teacher"
    section: ClassVar[str] = "teacher"
    error: ClassVar[type[UserError]] = TeacherError

    def __init__(self, url: str, *, token: str | None = None, timeout_s: float, deadline_s: float) -> None:
        self.url = url.rstrip("/")
        self._token = token
        self._timeout_s, self._deadline_s = timeout_s, deadline_s
        host, port, secure, self._prefix = _parts(self.url)
        self._random = Random()  # its own: retries must not move the generator that a run is resumed with
        self._http = (HTTPSConnection if secure else HTTPConnection)(host, port)

    def get(self, path: str) -> bytes:
        """The body of an answer; see `ask`."""
        return self.ask("GET", path, bytes)

    def post(self, path: str, body: bytes, headers: Mapping[str, str] | None = None) -> bytes:
        """The same for a request with a body."""
        return self.ask("POST", path, bytes, body, headers)

    def ask(
        self,
        method: str,
        path: str,
        read: Callable[[bytes], Answer],
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """What `read` makes of the answer's body; it raises `UnusableAnswerError` for one that is to be asked for again.

        Raises:
            TeacherError, or `error`: the server refuses (4xx), or the deadline has passed without an answer.
        """
        started, pause, attempts, reason = time.monotonic(), FIRST_PAUSE, 0, ""
        end = started + self._deadline_s
        while True:
            attempts += 1
            try:
                return read(self._attempt(method, path, body, headers or {}, end))
            except ssl.SSLCertVerificationError as error:
                raise self.error(f"the certificate of {self.url} is not trusted: {error.verify_message}") from None
            except (OSError, HTTPException, UnusableAnswerError) as error:
                self.close()
                cut_short = isinstance(error, TimeoutError) and time.monotonic() >= end
                if not (cut_short and reason):  # the deadline tells less than what went wrong before it
                    reason = _reason(error)
            passed, wait = time.monotonic() - started, pause * self._random.uniform(0.5, 1.0)
            if passed + wait > self._deadline_s:
                raise self.error(
                    f"{self.peer} at {self.url} gave no usable answer to {path} in {passed:.0f} s, {attempts} "
                    f"attempt{'s' if attempts > 1 else ''}, the last: {reason}. Look after it, or raise deadline_s "
                    f"({self._deadline_s:g})"
                )
            time.sleep(wait)
            pause = min(2 * pause, LONGEST_PAUSE)

    def close(self) -> None:
        self._http.close()

    def _attempt(self, method: str, path: str, body: bytes | None, headers: Mapping[str, str], end: float) -> bytes:
        self._http.timeout = max(0.001, min(self._timeout_s, end - time.monotonic()))
        if self._http.sock is not None:
            self._http.sock.settimeout(self._http.timeout)
        authorization = {} if self._token is None else {"Authorization": f"Bearer {self._token}"}
        with suppress(BrokenPipeError):  # a server that refuses a body need not read it; its answer is there
            self._http.request(method, self._prefix + path, body, {**headers, **authorization})
        response = self._http.getresponse()
        found = _read(response, end)
        if response.status == 200:
            return found
        told = _first_line(found) or response.reason
        if self._may_pass(response.status, told):
            raise UnusableAnswerError(f"status {response.status} {told}")
        self.close()
        raise self.error(self._refusal(response.status, told))

    def _may_pass(self, status: int, told: str) -> bool:
        """Whether a request that failed is worth another attempt."""
        return status >= 500 or status == TOO_MANY_REQUESTS

    def _refusal(self, status: int, told: str) -> str:
        advice = {
            401: f"Set {self.section}.token_env to the environment variable that holds its token",
            403: f"Set {self.section}.token_env to the environment variable that holds the right token",
            404: f"Check {self.section}.url and {self.section}.engine",
            413: "Set a lower teacher.tokens_per_batch",
        }.get(status, f"Check {self.section}.url and {self.section}.engine")
        return f"{self.peer} at {self.url} refuses: {status} {told.rstrip('.')}. {advice}"


def _parts(url: str) -> tuple[str, int, bool, str]:
    """Host, port, whether it is https, and the path before that of every request."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"{url!r} is no URL: {error}; give one such as http://127.0.0.1:8100") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment or parts.username:
        raise ConfigError(f"{url!r} is no URL of a server; give one such as http://127.0.0.1:8100")
    secure = parts.scheme == "https"
    return parts.hostname, port or (443 if secure else 80), secure, parts.path


def _read(response: HTTPResponse, end: float) -> bytes:
    parts = []
    while part := response.read1(CHUNK):
        parts.append(part)
        if time.monotonic() > end:
            raise TimeoutError("it was still answering")
    if response.length:
        raise IncompleteRead(b"", response.length)
    response.close()  # of the answer alone: now the connection takes the next request
    return b"".join(parts)


def _first_line(body: bytes) -> str:
    lines = body[:400].decode(errors="replace").strip().splitlines()
    return lines[0][:200] if lines else ""


def _reason(error: Exception) -> str:
    if isinstance(error, IncompleteRead):
        return f"the answer ended {error.expected} bytes early"
    if isinstance(error, TimeoutError):
        return "timed out, it was silent for timeout_s" if str(error) == "timed out" else str(error)
    text = getattr(error, "strerror", None) or str(error)
    return str(text).lower() if isinstance(error, OSError) else str(text) or type(error).__name__

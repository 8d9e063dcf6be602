"""`poweropd serve-teacher`: a teacher behind HTTP.

`GET /info`, `GET /head?vocab_size=V` and `POST /score` are for trainers, see `wire`; `GET /metrics` is for Prometheus and
`GET /health` for whoever restarts servers. All but `/health` want the bearer token, if there is one.
"""

import hmac
import ipaddress
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import AF_INET, AF_INET6
from socketserver import TCPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from poweropd.errors import ConfigError
from poweropd.teacher.service import TeacherService

LARGEST_REQUEST = 64 << 20  # bytes; a question has 4 a token
IDLE_S = 600  # a connection that says nothing for so long is closed; a trainer opens another
BINARY, TEXT, JSON = "application/octet-stream", "text/plain; charset=utf-8", "application/json"


class TeacherServer(ThreadingHTTPServer):
    """Has its port as soon as it is made, and answers in `serve`: a model is not loaded in vain.

    Args:
        host, port: what to listen on; port 0 takes any that is free.
        token: what every request must bear; None lets everyone in, which is for loopback alone.

    Raises:
        ConfigError: the port cannot be had, or others could reach a teacher without a token.
    """

    daemon_threads = True
    service: TeacherService

    def __init__(self, host: str, port: int, token: str | None) -> None:
        if token is None and not is_loopback(host):
            raise ConfigError(
                f"--host {host} lets other machines in, and there is no token; put a secret into an environment variable and "
                "name it by --token-env"
            )
        self.address_family = AF_INET6 if ":" in host else AF_INET
        self.token = token
        self.requests: Counter[tuple[str, int]] = Counter()
        super().__init__((host, port), _Handler, bind_and_activate=False)
        with self._refused_in_one_line():
            TCPServer.server_bind(self)  # HTTPServer's own asks a name server who we are

    def serve(self, service: TeacherService) -> None:
        """Answer until `shutdown`, or until the user interrupts.

        Raises:
            ConfigError: another server has taken the port since.
        """
        self.service = service
        with self._refused_in_one_line():
            self.server_activate()
        self.serve_forever(poll_interval=0.1)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone away is no error of ours."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    @contextmanager
    def _refused_in_one_line(self) -> Iterator[None]:
        try:
            yield
        except (OSError, OverflowError) as error:
            self.server_close()
            host, port = self.server_address[:2]
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"cannot listen on port {port} of {host!s}: {reason}; choose another --port") from None

    @property
    def url(self) -> str:
        host, port = self.server_address[:2]
        return f"http://{f'[{host!s}]' if self.address_family == AF_INET6 else host!s}:{port}"

    def metrics(self) -> str:
        """Counters in the text format of Prometheus."""
        lines = ["# TYPE poweropd_teacher_requests_total counter"]
        for (path, status), number in sorted(self.requests.items()):
            lines.append(f'poweropd_teacher_requests_total{{path="{path}",status="{status}"}} {number}')
        for name, value in (("tokens", self.service.tokens), ("seconds", self.service.seconds)):
            lines += [f"# TYPE poweropd_teacher_{name}_total counter", f"poweropd_teacher_{name}_total {value}"]
        return "\n".join(lines) + "\n"


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = IDLE_S
    disable_nagle_algorithm = True  # else an answer's body waits for its header to be acknowledged
    server: TeacherServer

    def do_GET(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing: /metrics counts requests, and errors go to whoever asked."""

    def _answer(self, method: str) -> None:
        path, query = urlsplit(self.path)[2:4]
        known = {("GET", "/health"), ("GET", "/info"), ("GET", "/head"), ("GET", "/metrics"), ("POST", "/score")}
        if (method, path) not in known:
            self._refuse("unknown", 404, f"there is no {method} {path[:80]} here; this is `poweropd serve-teacher`")
        elif path != "/health" and not self._authorized():
            self._refuse(path, 401, "a bearer token is needed, and this is not it")
        elif path == "/health":
            self._send(path, b"ok\n", TEXT)
        elif path == "/info":
            self._send(path, self.server.service.info.to_json(), JSON)
        elif path == "/metrics":
            self._send(path, self.server.metrics().encode(), TEXT)
        elif path == "/head":
            self._head(query)
        else:
            self._score()

    def _authorized(self) -> bool:
        if self.server.token is None:
            return True
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        return hmac.compare_digest(given.encode(), self.server.token.encode())

    def _head(self, query: str) -> None:
        try:
            body = self.server.service.head(int(parse_qs(query)["vocab_size"][0]))
        except (KeyError, ValueError) as error:
            self._refuse("/head", 400, f"give vocab_size: {error}")
            return
        self._send("/head", body, BINARY)

    def _score(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            self._refuse("/score", 411, "a Content-Length is needed")
            return
        if int(length) > LARGEST_REQUEST:
            self._refuse("/score", 413, f"{length} bytes; at most {LARGEST_REQUEST} are taken")
            return
        body = self.rfile.read(int(length))
        try:
            answer = self.server.service.answer(body)
        except ValueError as error:
            self._send("/score", f"{error}\n".encode(), TEXT, 400)
        except RuntimeError as error:  # want of memory, above all: the trainer asks again
            self._send("/score", f"{str(error).splitlines()[0]}\n".encode(), TEXT, 500)
        else:
            self._send("/score", answer, BINARY)

    def _refuse(self, path: str, status: int, text: str) -> None:
        """Answer a request whose body is not wanted. It is read all the same, as far as is reasonable: a connection that
        is closed on unread bytes is reset, and the answer lost."""
        self.close_connection = True
        self._send(path, f"{text}\n".encode(), TEXT, status)
        length = self.headers.get("Content-Length", "")
        left = min(int(length), LARGEST_REQUEST) if length.isdecimal() else 0
        while left > 0 and (part := self.rfile.read1(min(left, 1 << 16))):
            left -= len(part)

    def _send(self, path: str, body: bytes, kind: str, status: int = 200) -> None:
        self.server.requests[path, status] += 1
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

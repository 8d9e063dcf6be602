"""Requests against a real server that misbehaves as it is told."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from poweropd.errors import ConfigError, TeacherError
from poweropd.teacher.http import Connection, UnusableAnswerError

Fault = Callable[[BaseHTTPRequestHandler], None]


def answer(body: bytes = b"fine", status: int = 200, *, declared: int | None = None) -> Fault:
    def reply(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body) if declared is None else declared))
        handler.end_headers()
        handler.wfile.write(body)
        handler.close_connection = declared is not None

    return reply


def hang_up(handler: BaseHTTPRequestHandler) -> None:
    handler.close_connection = True


def garbage(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"\x00\x01 no HTTP at all\r\n\r\n")
    handler.close_connection = True


def drip(handler: BaseHTTPRequestHandler) -> None:
    """Byte after byte, never silent for long and never done."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000000")
    handler.end_headers()
    for _ in range(200):
        try:
            handler.wfile.write(b".")
        except OSError:
            return
        time.sleep(0.01)


@contextmanager
def server(*behaviours: Fault) -> Iterator[tuple[str, list[tuple[str, bytes, dict[str, str]]]]]:
    """A server that answers by each behaviour in turn, then by the last; its URL, and the requests it has seen."""
    left, seen = list(behaviours), []
    quiet = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            seen.append((self.path, self.rfile.read(int(self.headers.get("Content-Length", 0))), dict(self.headers)))
            (left.pop(0) if len(left) > 1 else left[0])(self)

        do_POST = do_GET  # noqa: N815

        def handle(self) -> None:
            with suppress(ConnectionResetError):  # of a client that has given up
                super().handle()

        def log_message(self, *_: object) -> None:
            pass

    served = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.silence = quiet
    thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{served.server_port}", seen
    finally:
        quiet.set()
        served.shutdown()
        served.server_close()
        thread.join()


def silent(handler: BaseHTTPRequestHandler) -> None:
    handler.server.silence.wait(5)
    handler.close_connection = True


def connect(url: str, timeout_s: float = 5, deadline_s: float = 10, token: str | None = None) -> Connection:
    return Connection(url, token=token, timeout_s=timeout_s, deadline_s=deadline_s)


def test_one_connection_carries_many_requests() -> None:
    with server(answer()) as (url, seen):
        connection = connect(url + "/prefix/", token="secret")
        assert connection.get("/info") == b"fine"
        own = connection._http.sock
        assert connection.post("/score", b"body", {"X-Kind": "test"}) == b"fine"
        assert connection._http.sock is own
        connection.close()
    (path, _, first), (other_path, body, second) = seen
    assert (path, other_path, body) == ("/prefix/info", "/prefix/score", b"body")
    assert first["Authorization"] == second["Authorization"] == "Bearer secret"
    assert second["X-Kind"] == "test"


@pytest.mark.parametrize(
    "fault",
    [hang_up, garbage, silent, answer(b"half", declared=8), answer(b"busy", 503), answer(b"slow down", 429)],
    ids=["hangs up", "garbage", "silent", "dies mid-answer", "503", "429"],
)
def test_a_fault_that_passes_is_survived(fault: Fault) -> None:
    with server(fault, fault, answer(b"at last")) as (url, seen):
        assert connect(url, timeout_s=0.1).post("/score", b"x" * 100_000) == b"at last"
        assert len(seen) == 3


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (hang_up, "remote end closed connection"),
        (silent, "timed out"),
        (drip, "it was still answering"),
        (answer(b"half", declared=8), "the answer ended 4 bytes early"),
        (answer(b"out of memory\nand more", 500), "status 500 out of memory"),
    ],
    ids=["hangs up", "silent", "drips", "dies mid-answer", "500"],
)
def test_after_the_deadline_there_is_one_line(fault: Fault, reason: str) -> None:
    with server(fault) as (url, _):
        started = time.monotonic()
        with pytest.raises(TeacherError) as error:
            connect(url, timeout_s=0.1, deadline_s=0.5).get("/score")
        assert time.monotonic() - started < 3
    told = str(error.value)
    assert told.startswith(f"the teacher at {url} gave no usable answer to /score in ")
    assert reason in told.lower()
    assert told.endswith("Look after it, or raise deadline_s (0.5)")
    assert "\n" not in told


@pytest.mark.parametrize(
    ("status", "advice"),
    [(401, "teacher.token_env"), (403, "the right token"), (404, "teacher.url"), (413, "teacher.tokens_per_batch")],
)
def test_a_refusal_is_final(status: int, advice: str) -> None:
    with server(answer(b"no such luck.", status)) as (url, seen):
        with pytest.raises(TeacherError, match=f"refuses: {status} no such luck\\. .*{advice}"):
            connect(url).get("/info")
        assert len(seen) == 1


def test_a_refused_body_is_a_refusal_and_no_broken_pipe() -> None:
    def refuse(sock: socket.socket) -> None:
        own, _ = sock.accept()
        own.recv(1000)
        own.sendall(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n")
        own.shutdown(socket.SHUT_WR)
        while own.recv(1 << 20):
            pass
        own.close()

    with socket.create_server(("127.0.0.1", 0)) as sock:
        thread = threading.Thread(target=refuse, args=(sock,))
        thread.start()
        with pytest.raises(TeacherError, match="refuses: 413 Too Large"):
            connect(f"http://127.0.0.1:{sock.getsockname()[1]}").post("/score", b"x" * 10_000_000)
        thread.join()


def test_a_server_that_is_not_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    with pytest.raises(TeacherError, match="attempts, the last: connection refused"):
        connect(f"http://127.0.0.1:{port}", deadline_s=0.3).get("/info")


def test_an_answer_that_cannot_be_read_is_asked_for_again() -> None:
    def read(body: bytes) -> str:
        if body == b"half":
            raise UnusableAnswerError("too few tokens")
        return body.decode()

    with server(answer(b"half"), answer(b"whole")) as (url, seen):
        assert connect(url).ask("GET", "/score", read) == "whole"
        assert len(seen) == 2
    with server(answer(b"half")) as (url, _), pytest.raises(TeacherError, match="the last: too few tokens"):
        connect(url, deadline_s=0.2).ask("GET", "/score", read)


@pytest.mark.parametrize("url", ["127.0.0.1:8100", "ftp://host", "http://", "http://host:port", "http://host?x=1"])
def test_no_url(url: str) -> None:
    with pytest.raises(ConfigError, match=r"such as http://127\.0\.0\.1:8100"):
        connect(url)

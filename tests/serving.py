"""Teachers behind real servers on this machine."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from poweropd.models import load_tokenizer
from poweropd.teacher.client import ServedTeacher
from poweropd.teacher.http import Connection
from poweropd.teacher.server import TeacherServer
from poweropd.teacher.service import TeacherService


@cache
def embedded_tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer("quickstart:teacher")


@contextmanager
def serving(
    model: PreTrainedModel, token: str | None = None, port: int = 0, tokens_per_batch: int = 16384
) -> Iterator[TeacherServer]:
    """A server of this model, in a thread."""
    service = TeacherService(model, embedded_tokenizer(), name="served model", tokens_per_batch=tokens_per_batch)
    with TeacherServer("127.0.0.1", port, token) as server:
        server.server_activate()  # before the first request, whenever the thread begins
        server.service = service
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def connect(url: str, token: str | None = None, deadline_s: float = 10) -> Connection:
    return Connection(url, token=token, timeout_s=5, deadline_s=deadline_s)


def served(server: TeacherServer, **settings: object) -> ServedTeacher:
    return ServedTeacher(connect(server.url, server.token), vocab_size=512, **settings)

"""A real vLLM server, as a process on this machine."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

ENVIRONMENT = {
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
START_SECONDS = 180.0


class VLLMProcess:
    """Started, killed and started again on one port."""

    def __init__(self, model: str | Path, log: Path, *settings: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._log = log
        self._command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--host", "127.0.0.1",
            "--port", str(port), "--enforce-eager", "--dtype", "float32", *settings,
        ]  # fmt: skip

    def start(self) -> None:
        """Without waiting until it answers."""
        self._process = subprocess.Popen(
            self._command,
            env=os.environ | ENVIRONMENT,
            stdout=self._log.open("a"),
            stderr=subprocess.STDOUT,
            start_new_session=True,  # it has processes of its own, which are to end with it
        )

    def wait(self) -> None:
        end = time.monotonic() + START_SECONDS
        while True:
            with suppress(URLError, OSError), urlopen(f"{self.url}/health", timeout=5):
                return
            if self._process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the server did not start:\n{self._log.read_text()[-3000:]}")
            time.sleep(0.2)

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@contextmanager
def vllm_process(model: str | Path, log: Path, *settings: str) -> Iterator[VLLMProcess]:
    process = VLLMProcess(model, log, *settings)
    process.start()
    try:
        process.wait()
        yield process
    finally:
        process.kill()

"""Ctrl-C and SIGTERM, taken at a moment of our choosing."""

import signal
from collections.abc import Callable
from types import FrameType


class StopRequest:
    """Within this context, the first signal only sets `requested`; the second raises KeyboardInterrupt at once.

    Args:
        on_request: called at the first signal.
    """

    _SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, on_request: Callable[[], None]) -> None:
        self.requested = False
        self._on_request = on_request
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        try:
            self._previous = {number: signal.signal(number, self._receive) for number in self._SIGNALS}
        except ValueError:  # not the main thread: whoever called us handles signals
            self._previous = {}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        self._on_request()

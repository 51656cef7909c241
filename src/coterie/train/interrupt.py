"""Ctrl-C that finishes the step."""

import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any


class FinishOnInterrupt:
    """While inside, the first Ctrl-C only sets `requested`; a second one raises KeyboardInterrupt.

    Outside the main thread, where Python allows no signal handlers, it does nothing. The previous handler
    is back afterwards.

    >>> with FinishOnInterrupt() as interrupt:
    ...     interrupt.requested
    False
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: Any = None
        self._installed = False

    def __enter__(self) -> "FinishOnInterrupt":
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._on_signal)
            self._installed = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, self._previous)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        print("\nfinishing this step and saving; Ctrl-C again stops at once", file=sys.stderr)

"""Handle SIGINT (Ctrl-C) and SIGTERM during a training run."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

_HANDLED = (signal.SIGINT, signal.SIGTERM)
# torchrun forwards to each process a signal that the terminal has already sent to all of them.
_SAME_SIGNAL_SECONDS = 2.0


class RunInterrupted(KeyboardInterrupt):
    """A signal interrupted a training run.

    The signal is SIGINT or SIGTERM. The message says what was saved. This is a `KeyboardInterrupt`,
    which ``except Exception`` does not catch.

    Attributes:
        signal: The signal.
        checkpoint: The checkpoint of the last step, or None if the run completed no step.
    """

    def __init__(
        self, message: str, number: signal.Signals, checkpoint: Path | None = None
    ) -> None:
        super().__init__(message)
        self.signal = number
        self.checkpoint = checkpoint


class StopSignalHandler:
    """Handles SIGINT and SIGTERM, so that a training run can stop cleanly.

    The handler is a context manager. Until `defer_first_signal` is called, a signal raises
    `RunInterrupted` immediately. Once `defer_first_signal` has been called, the first signal only
    sets `received`, so that the run can end after its current step. The next signal has the effect
    that it had before the ``with`` block: by default, SIGINT raises `KeyboardInterrupt` and SIGTERM
    ends the process.

    Only the main thread can handle signals, so the block does nothing in another thread. A handler
    that the program installed itself stays in place.

    Args:
        processes: Number of processes that train together.
        on_message: Function that is called with a message at the first signal after
            `defer_first_signal`.
    """

    def __init__(
        self, processes: int = 1, on_message: Callable[[str], object] | None = None
    ) -> None:
        self.received: signal.Signals | None = None
        self._repeats = _SAME_SIGNAL_SECONDS if processes > 1 else 0.0
        self._on_message = on_message
        self._deferred = False
        self._received_at = 0.0
        self._before: dict[signal.Signals, Any] = {}
        self._pid = os.getpid()

    def __enter__(self) -> StopSignalHandler:
        if threading.current_thread() is threading.main_thread():
            for number in _HANDLED:
                before = signal.getsignal(number)
                if before in (signal.SIG_DFL, signal.default_int_handler):
                    signal.signal(number, self._handle)
                    self._before[number] = before
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def defer_first_signal(self) -> None:
        """Defer the first signal, so that the current step can finish.

        After this call, the first signal only sets `received`. A second signal has the effect that
        it had before the ``with`` block: by default, SIGINT raises `KeyboardInterrupt` and SIGTERM
        ends the process.
        """
        self._deferred = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a forked process, which does not train
            self._restore()
            signal.raise_signal(number)
        elif self.received is None:
            self.received, self._received_at = signal.Signals(number), time.monotonic()
            name = self.received.name
            if not self._deferred:
                self._restore()
                raise RunInterrupted(
                    f"interrupted by {name} before the first step; nothing was trained",
                    self.received,
                )
            if self._on_message is not None:
                # Python raises RuntimeError for a write within a write that the signal interrupted.
                # The output may also be a file on a full disk.
                with contextlib.suppress(RuntimeError, OSError):
                    self._on_message(
                        f"{name}: the run will save its adapters and a checkpoint after this step, "
                        "and then end; a second signal ends it immediately"
                    )
        elif time.monotonic() - self._received_at >= self._repeats:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        while self._before:
            number, before = self._before.popitem()
            if signal.getsignal(number) == self._handle:
                signal.signal(number, before)

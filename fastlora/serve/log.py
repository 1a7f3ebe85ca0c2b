"""Log lines of a server: one line for a message, no line that a client wrote, and no flood."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable

SECONDS = 60.0  # in which the same message makes one line
MOST_MESSAGES = 200  # different ones in this time
MOST_LETTERS = 1000  # of a line
_BREAKS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class LogLines(logging.Formatter):
    """Makes one line of a message by escaping control characters, and indents the traceback.

    A name in a message or in an exception's text therefore cannot begin a line of its own.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Returns the lines of a record."""
        lines = [f"fastlora: {_line(record.getMessage().rstrip())}"]
        repeats = getattr(record, "repeats", 0)
        if repeats:
            lines[0] += f" ({repeats} more in the last minute)"
        if record.exc_info:
            below = self.formatException(record.exc_info)
            lines += [f"    {_line(part)}" for part in below.split("\n")]
        return "\n".join(lines)


class OncePerMinute(logging.Filter):
    """Passes the same message once a minute; the next line says how often it was repeated.

    It also passes at most `MOST_MESSAGES` different messages a minute.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock, self._since = clock, clock()
        self._counts: dict[str, int] = {}
        self._before: dict[str, int] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Returns whether a record is passed; sets ``record.repeats``."""
        now, text = self._clock(), record.getMessage()[:MOST_LETTERS]
        if now - self._since >= SECONDS:
            is_next = now - self._since < 2 * SECONDS
            self._before, self._counts = self._counts if is_next else {}, {}
            self._since = now
        count = self._counts.get(text, 0)
        if not count and len(self._counts) >= MOST_MESSAGES:
            return False
        self._counts[text] = count + 1
        record.repeats = max(0, self._before.get(text, 0) - 1)
        return not count


def log_to_stderr() -> None:
    """Makes warnings and errors of the whole process lines on stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(LogLines())
    handler.addFilter(OncePerMinute())
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    logging.captureWarnings(True)


def _line(text: str) -> str:
    short = text if len(text) <= MOST_LETTERS else f"{text[:MOST_LETTERS]}..."
    return _BREAKS.sub(lambda found: repr(found.group())[1:-1], short)

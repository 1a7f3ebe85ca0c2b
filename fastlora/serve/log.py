"""Logging for a server: one line per message, no forged lines, and a limited number of lines."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable

SECONDS = 60.0  # minimum length of a period in which the same message is logged once
MAX_MESSAGES = 200  # maximum number of different messages in this period
MAX_LINE_CHARS = 1000  # maximum number of characters in a line
_BREAKS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class OneLineMessageFormatter(logging.Formatter):
    """A logging formatter that puts each message on one line.

    Line breaks in a message are escaped. The lines of a traceback follow, indented. A name in a
    message or in the text of an exception therefore cannot start a new line.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Format a log record as text.

        The message is put on one line, and long lines are truncated. If the record has a traceback,
        the lines of the traceback follow, indented.
        """
        lines = [f"fastlora: {_line(record.getMessage().rstrip())}"]
        repeats = getattr(record, "repeats", 0)
        if repeats:
            lines[0] += f" ({repeats} more in the last minute)"
        if record.exc_info:
            below = self.formatException(record.exc_info)
            lines += [f"    {_line(part)}" for part in below.split("\n")]
        return "\n".join(lines)


class OncePerMinuteFilter(logging.Filter):
    """A logging filter that lets each message through once per period.

    A period lasts at least a minute. The next one starts with the first message after that, so the
    same message may pass twice within a minute. The line in the next period says how often the
    message was repeated. The filter lets at most `MAX_MESSAGES` different messages through per
    period.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock, self._since = clock, clock()
        self._counts: dict[str, int] = {}
        self._before: dict[str, int] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a record passes the filter.

        Sets ``record.repeats``.
        """
        now, text = self._clock(), record.getMessage()[:MAX_LINE_CHARS]
        if now - self._since >= SECONDS:
            is_next = now - self._since < 2 * SECONDS
            self._before, self._counts = self._counts if is_next else {}, {}
            self._since = now
        count = self._counts.get(text, 0)
        if not count and len(self._counts) >= MAX_MESSAGES:
            return False
        self._counts[text] = count + 1
        record.repeats = max(0, self._before.get(text, 0) - 1)
        return not count


def log_warnings_to_stderr() -> None:
    """Set up logging so that warnings are written to stderr.

    Python warnings and log messages of level WARNING or higher are written. The function configures
    the root logger, so it affects the whole process.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(OneLineMessageFormatter())
    handler.addFilter(OncePerMinuteFilter())
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    logging.captureWarnings(True)


def _line(text: str) -> str:
    short = text if len(text) <= MAX_LINE_CHARS else f"{text[:MAX_LINE_CHARS]}..."
    return _BREAKS.sub(lambda found: repr(found.group())[1:-1], short)

"""What a server writes on stderr: whose lines they are, and how many."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastlora.serve import log
from fastlora.serve.adapters import ServedAdapters

EVIL = "evil\nfastlora: key accepted for tenantA\r\x1b[2K\x85\u2028"


@pytest.fixture
def written() -> Iterator[tuple[logging.Logger, Callable[[], list[str]], list[float]]]:
    """A logger with the server's handler, the lines that it has written, and its clock."""
    stream, now = io.StringIO(), [0.0]
    handler = logging.StreamHandler(stream)
    handler.setFormatter(log.OneLineMessageFormatter())
    handler.addFilter(log.OncePerMinuteFilter(lambda: now[0]))
    logger = logging.getLogger("tests.serve.log")
    logger.addHandler(handler)
    logger.propagate = False
    yield logger, lambda: stream.getvalue().splitlines(), now
    logger.removeHandler(handler)


def test_no_name_begins_a_line(
    written: tuple[logging.Logger, Callable[[], list[str]], list[float]],
) -> None:
    """E11: neither as a part of a message, nor in the text of an exception under a traceback."""
    logger, lines, _ = written
    logger.warning("adapter %s cannot be used", EVIL)
    try:
        raise ValueError(EVIL)
    except ValueError:
        logger.exception("Exception in ASGI application\n")
    own = [line for line in lines() if line.startswith("fastlora: ")]
    assert own == [
        r"fastlora: adapter evil\nfastlora: key accepted for tenantA\r\x1b[2K\x85\u2028 cannot "
        "be used",
        "fastlora: Exception in ASGI application",
    ]
    assert all(line.startswith("    ") for line in lines() if line not in own)
    assert len(lines()) > 4
    assert "\x1b" not in "".join(lines())


def test_the_same_message_is_one_line_a_minute(
    written: tuple[logging.Logger, Callable[[], list[str]], list[float]],
) -> None:
    """E1: an error for each of thousands of connections filled the disk."""
    logger, lines, now = written
    for _ in range(1000):
        logger.error("socket.accept() out of system resource")
        logger.error("another one")
        now[0] += 0.05
    assert [line.split(": ")[1] for line in lines()] == [
        "socket.accept() out of system resource",
        "another one",
    ]
    now[0] = 61.0
    logger.error("socket.accept() out of system resource")
    assert lines()[2].endswith("out of system resource (999 more in the last minute)")
    now[0] = 500.0
    logger.error("socket.accept() out of system resource")
    assert lines()[3].endswith("out of system resource")


def test_different_messages_and_long_ones_are_bounded(
    written: tuple[logging.Logger, Callable[[], list[str]], list[float]],
) -> None:
    """E1, E11: clients that vary what they send write no more than a few lines."""
    logger, lines, now = written
    for number in range(10_000):
        logger.warning("adapter %r cannot be used", f"{number}{'x' * 5000}")
    assert len(lines()) == log.MAX_MESSAGES
    assert max(map(len, lines())) < log.MAX_LINE_CHARS + 50
    now[0] = 61.0
    logger.warning("the next minute")
    assert lines()[-1] == "fastlora: the next minute"


def test_a_folder_is_quoted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """E11: a folder that another tenant names, here one that is no adapter's name."""
    folder = tmp_path / EVIL
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    ServedAdapters(SimpleNamespace(), tmp_path, ()).sync_with_folder()  # type: ignore[arg-type]
    assert [record.getMessage().count("\n") for record in caplog.records] == [0]
    assert repr(str(folder)) in caplog.text


def test_a_rejected_folder_is_named_again_when_it_returns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each folder that cannot be served is named once, for as long as it is there."""
    folder = tmp_path / "adapters" / "-x"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    adapters = ServedAdapters(SimpleNamespace(), folder.parent, ())  # type: ignore[arg-type]
    named = []
    for change in (None, None, (folder, tmp_path / "away"), (tmp_path / "away", folder)):
        if change is not None:
            change[0].rename(change[1])
        adapters.sync_with_folder()
        named.append(len(caplog.records))
    assert named == [1, 1, 1, 2]


def test_the_program_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """E11: for the root logger, and so for uvicorn, asyncio and Python's warnings."""
    root, stream = logging.getLogger(), io.StringIO()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(sys, "stderr", stream)
    log.log_warnings_to_stderr()
    try:
        logging.getLogger("uvicorn.error").warning("from %s", EVIL)
        logging.getLogger("py.warnings").warning("file.py:1: UserWarning: text\n  code\n")
    finally:
        logging.captureWarnings(False)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[1] == r"fastlora: file.py:1: UserWarning: text\n  code"

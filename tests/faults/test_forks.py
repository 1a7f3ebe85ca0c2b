"""`forks` reports how tests end in a fork, whatever they do to its process."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.faults.forks import Forks, forks


@pytest.fixture(scope="module")
def forking() -> Iterator[Forks]:
    with forks({"FORKED": "yes"}, imports=("pytest",)) as found:
        yield found


def _run(forking: Forks, folder: Path, body: str, limit: float = 60) -> tuple[int | None, str]:
    text = f"import os, signal, subprocess, sys\n\ndef test_it():\n    {body}\n"
    (folder / "test_it.py").write_text(text)
    return forking.pytest(folder, ("-q", "-p", "no:cacheprovider"), limit)


@pytest.mark.parametrize(
    ("body", "expected", "said"),
    [
        ("assert os.environ['FORKED'] == 'yes'", 0, "1 passed"),
        ("assert os.getpid() == 0", 1, "FAILED test_it.py::test_it"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", -signal.SIGSEGV, ""),
        ("os._exit(7)", 7, ""),
    ],
)
def test_a_run_ends_as_pytest_does(
    forking: Forks, tmp_path: Path, body: str, expected: int, said: str
) -> None:
    code, output = _run(forking, tmp_path, body)
    assert code == expected, output
    assert said in output


def test_each_run_imports_from_its_own_folder(forking: Forks, tmp_path: Path) -> None:
    for name in ("first", "second"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "fastlora.py").write_text(f"NAME = {name!r}")
        started = "subprocess.check_output([sys.executable, '-c', program], text=True)"
        body = (
            "import fastlora; program = 'import fastlora; print(fastlora.NAME)'; "
            f"assert [fastlora.NAME, {started}] == [{name!r}, {name!r} + chr(10)]"
        )
        code, output = _run(forking, folder, body)
        assert code == 0, output


def test_the_limit_ends_what_a_run_has_started(forking: Forks, tmp_path: Path) -> None:
    body = "open('pid', 'w').write(str(subprocess.Popen(['sleep', '60']).pid)); signal.pause()"
    code, _ = _run(forking, tmp_path, body, limit=3)
    assert code is None
    _ends(int((tmp_path / "pid").read_text()))


def test_the_end_of_the_block_ends_its_runs(tmp_path: Path) -> None:
    body = (
        "open('pid.new', 'w').write(str(os.getpid())); os.rename('pid.new', 'pid'); signal.pause()"
    )
    with ThreadPoolExecutor(1) as threads:
        with forks({}, imports=("pytest",)) as found:
            run = threads.submit(_run, found, tmp_path, body)
            while not (tmp_path / "pid").exists():
                time.sleep(0.05)
        assert isinstance(run.exception(timeout=10), EOFError)
    _ends(int((tmp_path / "pid").read_text()))


def _ends(pid: int) -> None:
    """Waits for the end of a process that was killed."""
    deadline = time.monotonic() + 10
    while _runs(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    """Whether a process runs; one that has ended may still wait for its parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False

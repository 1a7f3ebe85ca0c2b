"""A run's log: a JSON object a line, for each step and each evaluation."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastlora.model.tensor_file import partial_path
from fastlora.train.prepare import TrainError

LOG_NAME = "log.jsonl"


class RunLog:
    """Appends to ``log.jsonl`` in a run's folder.

    Args:
        folder: The run's; made if need be.
        step: The step that the run begins behind: later entries are of a run that was killed, and
            go.

    Raises:
        TrainError: Here and in every call, where it cannot be written.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self.path = folder / LOG_NAME
        partial = partial_path(self.path)
        with self._typed():
            folder.mkdir(parents=True, exist_ok=True)
            try:
                kept = [line for line in _lines(self.path) if _step_of(line) <= step]
                partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
                os.replace(partial, self.path)
            finally:
                partial.unlink(missing_ok=True)
            self._file = self.path.open("a", buffering=1, encoding="utf-8")  # whole lines

    def write(self, entry: dict[str, Any]) -> None:
        """Adds an entry, which has a ``step``; JSON has null for numbers that are not finite."""
        with self._typed():
            self._file.write(json.dumps(_finite(entry), allow_nan=False) + "\n")

    def close(self) -> None:
        """Ends the log. A failure here is that of a write before, which was raised."""
        with contextlib.suppress(OSError):
            self._file.close()

    @contextlib.contextmanager
    def _typed(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise TrainError(f"{self.path}: could not be written ({error})") from error


def _finite(value: Any) -> Any:
    """Returns an entry with None for every number that is not finite."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        return []
    # The last line of a killed run may be torn; it is of no step then.
    return path.read_text(encoding="utf-8", errors="replace").splitlines()


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")

"""A run's log: a JSON object a line, for each step and each evaluation."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

LOG_NAME = "log.jsonl"


class RunLog:
    """Appends to ``log.jsonl`` in a run's folder.

    Args:
        folder: The run's; made if need be.
        step: The step that the run begins behind: later entries are of a run that was killed, and
            go.
    """

    def __init__(self, folder: Path, step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / LOG_NAME
        kept = [line for line in _lines(self.path) if _step_of(line) <= step]
        partial = self.path.with_name(f".{LOG_NAME}.tmp")
        partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        os.replace(partial, self.path)
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, entry: dict[str, Any]) -> None:
        """Adds an entry, which has a ``step``."""
        self._file.write(json.dumps(entry) + "\n")

    def flush(self) -> None:
        """Hands what was written to the system."""
        self._file.flush()

    def close(self) -> None:
        """Ends the log."""
        self._file.close()


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

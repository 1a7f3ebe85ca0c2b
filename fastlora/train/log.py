"""What a run writes about itself: a log line by line, and at the end its losses as a table and as a
picture.
"""

from __future__ import annotations

import contextlib
import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastlora.model.replace_files import replacing
from fastlora.train.processes import TrainError

LOG, TABLE, PICTURE = "log.jsonl", "losses.csv", "losses.png"


class RunLog:
    """Appends to ``log.jsonl`` in a run's folder: a JSON object a line, by step or evaluation.

    Entries behind ``step``, from which the run goes on, are of one that was killed, and go. With
    ``evaluates``, so do evaluations and answers after ``step``, which the run repeats. Raises
    `TrainError`, here and in every call, where the file cannot be written.

    Attributes:
        was_evaluated: Whether the log has an evaluation, or answers, after ``step``.
    """

    def __init__(self, folder: Path, step: int, *, evaluates: bool = False) -> None:
        self.path = folder / LOG
        with typed(self.path):
            folder.mkdir(parents=True, exist_ok=True)
            lines: list[str] = []
            if self.path.is_file():
                # The last line of a killed run may be torn; it is of no step then.
                lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
            kept = [line for line in lines if _step_of(line) <= step]
            last = [line for line in kept if _step_of(line) == step and _is_evaluation(line)]
            if evaluates:
                kept = [line for line in kept if line not in last]
            self.was_evaluated = bool(last) and not evaluates
            with replacing(self.path) as partial:
                partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
            self._file = self.path.open("a", buffering=1, encoding="utf-8")  # whole lines

    def write(self, entry: dict[str, Any]) -> None:
        """Adds an entry, which has a ``step``; JSON has null for numbers that are not finite."""
        with typed(self.path):
            self._file.write(json.dumps(_finite(entry), allow_nan=False) + "\n")

    def close(self) -> None:
        """Ends the log. A failure here is that of a write before, which was raised."""
        with contextlib.suppress(OSError):
            self._file.close()


class LoggedLoss(NamedTuple):
    """A loss in the log; None where a number was not finite or is not there."""

    step: int
    adapter: str
    kind: str
    loss: float | None
    grad_norm: float | None


def read_losses(folder: Path) -> list[LoggedLoss]:
    """Returns every loss in a run's log, in the order of the steps."""
    path = folder / LOG
    with typed(path):
        lines = path.read_text(encoding="utf-8").splitlines()
    found = []
    for entry in map(json.loads, lines):
        for kind, key in (("training", "loss"), ("evaluation", "eval_loss")):
            for name, value in entry.get(key, {}).items():
                norm = entry.get("grad_norm", {}).get(name)
                found.append(LoggedLoss(entry["step"], name, kind, value, norm))
    return found


def mean_losses(losses: Sequence[LoggedLoss]) -> dict[str, float]:
    """Returns the mean over its steps of each adapter's training loss."""
    found: dict[str, list[float]] = {}
    for entry in losses:
        if entry.kind == "training" and entry.loss is not None:
            found.setdefault(entry.adapter, []).append(entry.loss)
    return {name: math.fsum(values) / len(values) for name, values in found.items()}


def write_table(folder: Path, losses: Sequence[LoggedLoss]) -> Path:
    """Writes the losses as CSV, and returns the file."""
    path = folder / TABLE
    with typed(path), replacing(path) as partial, partial.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(LoggedLoss._fields)
        writer.writerows(losses)
    return path


def write_picture(folder: Path, losses: Sequence[LoggedLoss]) -> Path | None:
    """Draws each adapter's losses over the steps, and returns the file; None without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(7, 4))
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, name in enumerate(dict.fromkeys(entry.adapter for entry in losses)):
        for kind, style in (("training", "-"), ("evaluation", "o--")):
            own = [entry for entry in losses if (entry.adapter, entry.kind) == (name, kind)]
            points = {entry.step: entry.loss for entry in own if entry.loss is not None}
            if points:
                label = name if kind == "training" else f"{name}, evaluation"
                color = f"C{number % 10}"
                axes.plot([*points], [*points.values()], style, color=color, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    if axes.lines:
        axes.legend()
    path = folder / PICTURE
    with typed(path), replacing(path) as partial:
        canvas.print_png(str(partial))
    return path


@contextlib.contextmanager
def typed(what: Path | str) -> Iterator[None]:
    """Makes an `OSError` of writing a file, or something else, a `TrainError` that names it."""
    try:
        yield
    except OSError as error:
        raise TrainError(f"{what}: could not be written ({error})") from error


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns a log entry as trackers take it: ``{"loss/ship": 1.5}``; lists are left out."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float, str)):
            found[f"{prefix}{key}"] = value
    return found


def _finite(value: Any) -> Any:
    """Returns an entry with None for every number that is not finite."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_evaluation(line: str) -> bool:
    return not {"eval_loss", "answers"}.isdisjoint(json.loads(line))


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")

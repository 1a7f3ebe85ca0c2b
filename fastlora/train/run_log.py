"""Files that record a training run: the log, a table of its losses, and a plot of them.

The log is written line by line during the run. The table and the plot are written at its end.
"""

from __future__ import annotations

import contextlib
import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastlora.model.atomic_files import atomic_replace_file
from fastlora.train.processes import TrainError

LOG, TABLE, PICTURE = "log.jsonl", "losses.csv", "losses.png"
_SMOOTHED_FROM = 10  # with fewer points, a smoothed line shows nothing more


class RunLogFile:
    """The log file of a training run.

    It is the file ``log.jsonl`` in the run's folder, to which entries are appended, with one JSON
    object per line. Opening the log removes all entries after ``step``, because an earlier run
    wrote them before it was killed. It also removes the evaluations and answers logged at ``step``
    if the run repeats them.

    Args:
        folder: The output folder of the run.
        step: The step at which the run starts or resumes.
        evaluates: Whether the run repeats the evaluation at ``step``.
        last_key: Key of the entry that ends an evaluation, ``"eval_loss"`` or ``"answers"``. An
            evaluation at ``step`` without this entry is incomplete, and the run repeats it. With
            None, no evaluation is due at ``step``.

    Attributes:
        was_evaluated: Whether the log has an evaluation or answers at ``step`` that the run does
            not repeat.

    Raises:
        TrainError: The file cannot be written. `write` raises it too.
    """

    def __init__(
        self, folder: Path, step: int, *, evaluates: bool = False, last_key: str | None = None
    ) -> None:
        self.path = folder / LOG
        with os_error_as_train_error(self.path):
            folder.mkdir(parents=True, exist_ok=True)
            lines: list[str] = []
            if self.path.is_file():
                # A killed run may leave an incomplete last line, for which `_step_of` returns
                # infinity.
                lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
            remaining = [line for line in lines if _step_of(line) <= step]
            last = [line for line in remaining if _step_of(line) == step and _is_evaluation(line)]
            self.was_evaluated = not evaluates and any(
                last_key is None or last_key in json.loads(line) for line in last
            )
            if not self.was_evaluated:
                remaining = [line for line in remaining if line not in last]
            with atomic_replace_file(self.path) as partial:
                partial.write_text("".join(f"{line}\n" for line in remaining), encoding="utf-8")
            self._file = self.path.open("a", buffering=1, encoding="utf-8")  # line-buffered

    def write(self, entry: dict[str, Any]) -> None:
        """Append an entry to the log.

        The entry has the key ``"step"``. Non-finite numbers are written as null.
        """
        with os_error_as_train_error(self.path):
            self._file.write(
                json.dumps(_replace_non_finite_with_none(entry), allow_nan=False) + "\n"
            )

    def close(self) -> None:
        """Close the log file.

        An `OSError` is ignored, because `write` has already raised it.
        """
        with contextlib.suppress(OSError):
            self._file.close()


class LoggedLoss(NamedTuple):
    """A loss that was read from the log of a training run.

    The loss is the training loss or the evaluation loss of an adapter at a step. A number that was
    not finite or was not logged is None.
    """

    step: int
    adapter: str
    kind: str
    loss: float | None
    grad_norm: float | None


def read_logged_losses(folder: Path) -> list[LoggedLoss]:
    """Read the losses of a run from the log in ``folder``.

    These are all training and evaluation losses, in the order of the steps.
    """
    path = folder / LOG
    with os_error_as_train_error(path, "read"):
        lines = path.read_text(encoding="utf-8").splitlines()
    found = []
    for entry in map(json.loads, lines):
        for kind, key in (("training", "loss"), ("evaluation", "eval_loss")):
            for name, value in entry.get(key, {}).items():
                norm = entry.get("grad_norm", {}).get(name)
                found.append(LoggedLoss(entry["step"], name, kind, value, norm))
    return found


def mean_training_loss_by_adapter(losses: Sequence[LoggedLoss]) -> dict[str, float]:
    """Return the mean training loss of each adapter.

    The result is a dict that maps adapter names to mean losses. Losses that are not finite are
    ignored. Adapters without a finite loss are left out.
    """
    found: dict[str, list[float]] = {}
    for entry in losses:
        if entry.kind == "training" and entry.loss is not None:
            found.setdefault(entry.adapter, []).append(entry.loss)
    return {name: math.fsum(values) / len(values) for name, values in found.items()}


def write_loss_table(folder: Path, losses: Sequence[LoggedLoss]) -> Path:
    """Write a table of the losses to a file in ``folder``, and return the file's path.

    The file is ``losses.csv``, in CSV format.
    """
    path = folder / TABLE
    with (
        os_error_as_train_error(path),
        atomic_replace_file(path) as partial,
        partial.open("w", newline="") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(LoggedLoss._fields)
        writer.writerows(losses)
    return path


def plot_losses(folder: Path, losses: Sequence[LoggedLoss]) -> Path | None:
    """Plot the logged losses to an image file in ``folder``, and return the file's path.

    The file is ``losses.png``. Returns None if matplotlib is not installed. Each adapter has its
    own lines. With 10 or more steps, the training losses are drawn as a thin line, and their
    moving average is drawn as a thick line. Evaluations are drawn as dots on a dashed line.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        return None
    names = list(dict.fromkeys(entry.adapter for entry in losses))
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, name in enumerate(names):
        color = f"C{number % 10}"
        steps, values = _finite_losses(losses, name, "training")
        if len(steps) >= _SMOOTHED_FROM:
            axes.plot(steps, values, color=color, alpha=0.3, linewidth=0.8)
            axes.plot(steps, _moving_average(values), color=color, linewidth=1.8, label=name)
        elif steps:
            axes.plot(steps, values, ".-", color=color, label=name)
        steps, values = _finite_losses(losses, name, "evaluation")
        if steps:
            axes.plot(steps, values, "o--", color=color, markersize=5, label=f"{name}, evaluation")
    axes.set_title(f"Loss per step: {folder.resolve().name}")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.margins(x=0.02)
        axes.legend(fontsize="small", ncols=1 + len(names) // 12)
    path = folder / PICTURE
    with os_error_as_train_error(path), atomic_replace_file(path) as partial:
        canvas.print_png(str(partial))
    return path


def _finite_losses(
    losses: Sequence[LoggedLoss], adapter_name: str, kind: str
) -> tuple[list[int], list[float]]:
    """Return the finite training or evaluation losses of an adapter.

    The result is a list of steps, and a list of the losses at these steps.
    """
    own = {e.step: e.loss for e in losses if (e.adapter, e.kind) == (adapter_name, kind)}
    points = {step: loss for step, loss in own.items() if loss is not None}
    return list(points), list(points.values())


def _moving_average(values: Sequence[float]) -> list[float]:
    """Return the moving average of a series of values.

    The window contains about a twentieth of the values, and is shorter at both ends. It is
    centered, so that the average does not lag behind the loss.
    """
    half = max(len(values) // 40, 2)
    windows = [values[max(at - half, 0) : at + half + 1] for at in range(len(values))]
    return [math.fsum(window) / len(window) for window in windows]


@contextlib.contextmanager
def os_error_as_train_error(what: Path | str, attempted: str = "written") -> Iterator[None]:
    """Convert an `OSError` raised in the ``with`` block to a `TrainError`.

    The message names ``what``, such as a file, and says that it could not be read or written:
    ``attempted`` is ``"read"`` or ``"written"``.
    """
    try:
        yield
    except OSError as error:
        raise TrainError(f"{what} could not be {attempted} ({error})") from error


def flatten_for_trackers(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten a log entry for trackers.

    The keys are joined, as in ``{"loss/ship": 1.5}``. Lists are dropped.
    """
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flatten_for_trackers(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float, str)):
            found[f"{prefix}{key}"] = value
    return found


def _replace_non_finite_with_none(value: Any) -> Any:
    """Replace NaNs and infinities in a nested value with None.

    The value is a log entry or a part of a log entry. Dicts and lists in the value are copied, so
    the original value remains unchanged.
    """
    if isinstance(value, dict):
        return {key: _replace_non_finite_with_none(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_replace_non_finite_with_none(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_evaluation(line: str) -> bool:
    return not {"eval_loss", "answers"}.isdisjoint(json.loads(line))


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")

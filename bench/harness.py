"""The measurement itself: checks against float64, timing, and the CSV.

On a GPU, each contender is captured in a CUDA graph that rotates through several sets of operands,
together larger than the L2 cache. The graphs of all contenders of a point are replayed in turn. On
a CPU, for dry runs, the same calls are timed with the clock.
"""

from __future__ import annotations

import csv
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastlora import testing
from fastlora.bench.contenders import Contender, Problem, Results
from fastlora.bench.measure import interleaved_seconds
from fastlora.bench.shapes import Point

# fmt: off
COLUMNS = (
    "card", "sms", "driver", "cuda", "torch", "triton", "commit",
    "dtype", "mode", "model", "layer", "M", "K", "N", "r", "adapters", "contender", "impl",
    "median_us", "p20_us", "p80_us", "floor_us", "ratio_to_base", "ratio_to_floor",
    "sets", "calls", "rounds", "copy_gb_s", "matmul_tflop_s", "status", "tests",
)
# fmt: on

MAX_SETS = 128
MAX_CALLS = 512
GRAPH_US = 2000.0  # a replay of this length makes its start-up cost negligible
MAX_ROUNDS, MIN_ROUNDS = 20, 5
POINT_US = 6e5  # time limit for the rounds of one point; at least MIN_ROUNDS run
DRY_ROUNDS = 2


class Timing(NamedTuple):
    """Microseconds per call: median, 20th percentile, and 80th percentile over the rounds."""

    median: float
    p20: float
    p80: float


class DeviceLostError(RuntimeError):
    """The GPU rejects all further work of this process, for example after an illegal address."""


# ------------------------------------------------------------------------------------- the checks


@contextmanager
def _poisoned_memory() -> Iterator[None]:
    """Fill the results of `torch.empty` with NaN, so that unwritten results are detected."""
    before = torch.are_deterministic_algorithms_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)


class Checker:
    """Compares contenders with the float64 results of one problem, before they are timed.

    Args:
        problem: The problem that the contenders solve.
        contenders: All contenders of one point.
        truths: The float64 results by kind.
        yardstick: For each kind, the name of the contender that sets the budget by its error in the
            tested dtype.
    """

    def __init__(
        self,
        problem: Problem,
        contenders: Sequence[Contender],
        truths: dict[str, Results],
        yardstick: dict[str, str],
    ) -> None:
        self.problem, self.truths, self.yardstick = problem, truths, yardstick
        by_name = {contender.name: contender for contender in contenders}
        kinds = {contender.kind for contender in contenders}
        self.same_dtype = {kind: self._results(by_name[yardstick[kind]]) for kind in kinds}

    def _results(self, contender: Contender) -> Results:
        before = self.problem.y.clone()
        with _poisoned_memory():
            results = tuple(result.clone() for result in contender.run(self.problem))
        self.problem.y.copy_(before)
        return results

    def fault(self, contender: Contender) -> str:
        """Return a description of a contender's wrong result, or "" if all results are correct."""
        kind = contender.kind
        results = self._results(contender)
        triples = zip(results, self.same_dtype[kind], self.truths[kind], strict=True)
        for index, (actual, same_dtype, truth) in enumerate(triples):
            if contender.name == self.yardstick[kind]:
                # At most four roundings of half an eps each. The budget is twice that, for GEMMs
                # that cuBLAS splits along K and sums in the result's dtype.
                error = ((actual.double() - truth).norm() / truth.norm()).item()
                budget = 4.0 * torch.finfo(self.problem.x.dtype).eps
            else:
                error = (actual.double() - truth).abs().max().item()
                budget = testing.error_budget(same_dtype, truth)
            if not error <= budget:  # also catches NaN
                return f"wrong: result {index} has error {error:.2e}, budget {budget:.2e}"
        return ""


# ------------------------------------------------------------------------------------- the timing


def time_plain(fn: Callable[[], Any], device: torch.device) -> Timing:
    """Time calls one by one. Each must be long enough to make launch overhead negligible."""
    for _ in range(3):
        fn()
    times = []
    if device.type != "cuda":
        for _ in range(DRY_ROUNDS):
            start = time.perf_counter()
            fn()
            times.append((time.perf_counter() - start) * 1e6)
        return summary(times)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(MAX_ROUNDS + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        fn()
        event.record()
    torch.cuda.synchronize()
    pairs = zip(events, events[1:], strict=False)
    return summary([start.elapsed_time(end) * 1e3 for start, end in pairs])


def summary(times: Sequence[float]) -> Timing:
    """Return the median, the 20th percentile, and the 80th percentile of at least two times."""
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return Timing(statistics.median(times), fifths[0], fifths[3])


def count_sets(point: Point, element: int, device: torch.device) -> int:
    """Return how many sets of operands exceed sixteen times the L2 cache (2 to `MAX_SETS`).

    If the sets are only twice as large as the cache, a cyclic walk still finds a fifth of its cache
    lines there, and more of the lines that a kernel marks to be evicted first.
    """
    if device.type != "cuda":
        return 2
    m, k, n, r = point.m, point.k, point.n, sum(point.ranks_of_adapters)
    one_set = element * (n * k + m * (k + n) + r * (k + n))
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(max(-(-16 * cache // one_set), 2), MAX_SETS)


def count_calls(sets: int, call_us: float) -> int:
    """Return the number of calls in one replay, a multiple of the number of sets."""
    wanted = min(MAX_CALLS, GRAPH_US / call_us)
    return sets * max(1, round(wanted / sets))


def _capture(contender: Contender, problems: Sequence[Problem], calls: int) -> torch.cuda.CUDAGraph:
    """Capture ``calls`` calls that rotate through the problems. Each problem runs once before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for problem in problems:
            contender.run(problem)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for index in range(calls):
            contender.run(problems[index % len(problems)])
    return graph


def _replay(graphs: dict[str, torch.cuda.CUDAGraph], calls: int) -> dict[str, list[float]]:
    """Replay the graphs in rotating order and return the times of one call of each."""
    names = list(graphs)
    times: dict[str, list[float]] = {name: [] for name in names}
    rounds, done = MAX_ROUNDS, -1  # round -1 is not counted
    while done < rounds:
        order = [names[(index + done) % len(names)] for index in range(len(names))]
        marks = {name: [torch.cuda.Event(enable_timing=True) for _ in "se"] for name in names}
        # Keeps the GPU busy while the host queues the next replays, so that no gap is timed.
        graphs[order[-1]].replay()
        for name in order:
            marks[name][0].record()
            graphs[name].replay()
            marks[name][1].record()
        torch.cuda.synchronize()
        elapsed = {name: start.elapsed_time(end) * 1e3 for name, (start, end) in marks.items()}
        if done < 0:
            rounds = min(max(int(POINT_US / sum(elapsed.values())), MIN_ROUNDS), MAX_ROUNDS)
        else:
            for name, microseconds in elapsed.items():
                times[name].append(microseconds / calls)
        done += 1
    return times


def time_contenders(
    contenders: Sequence[Contender],
    problems: Sequence[Problem],
    call_us: float,
    note: Callable[[str], None],
    outcome: dict[str, Any],
) -> tuple[int, int]:
    """Time contenders against each other in one process, in turns.

    Args:
        contenders: Contenders that have passed their check.
        problems: Sets of operands.
        call_us: Estimated duration of a call.
        note: Called with a contender's name before it has the device to itself.
        outcome: Receives by name a `Timing`, or a text that says why there is none.

    Returns:
        Number of calls in a replay, and number of rounds.

    Raises:
        DeviceLostError: The GPU rejects further work of this process.
    """
    device = problems[0].x.device
    if device.type != "cuda":
        sides = {c.name: lambda c=c: [c.run(problem) for problem in problems] for c in contenders}
        for name, seconds in interleaved_seconds(sides, DRY_ROUNDS).items():
            outcome[name] = summary([1e6 * each / len(problems) for each in seconds])
        return len(problems), DRY_ROUNDS
    calls = count_calls(len(problems), call_us)
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    for contender in contenders:
        note(contender.name)
        with guarded(device, contender.name, outcome):
            graph = _capture(contender, problems, calls)
            graph.replay()
            torch.cuda.synchronize()
            graphs[contender.name] = graph
    times = _replay(graphs, calls) if graphs else {}
    outcome.update({name: summary(t) for name, t in times.items()})
    return calls, len(next(iter(times.values()), []))


@contextmanager
def guarded(device: torch.device, name: str, outcome: dict[str, Any]) -> Iterator[None]:
    """Store an exception in ``outcome[name]``; raise `DeviceLostError` if the GPU is lost."""
    try:
        yield
        if device.type == "cuda":
            torch.cuda.synchronize()
    except Exception as error:
        outcome[name] = error_text(error)
        if is_lost(device):
            raise DeviceLostError(name) from error


def error_text(error: Exception) -> str:
    """Return an exception as one short line."""
    return f"error: {type(error).__name__}: {' '.join(str(error).split())[:160]}"


def is_lost(device: torch.device) -> bool:
    """Return whether the GPU rejects further work of this process."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device=device).add_(1.0).item()
    except RuntimeError:
        return True
    return False


# --------------------------------------------------------------------------------------- the file


class ResultFile:
    """The CSV. Each row is flushed when it is written."""

    def __init__(self, path: Path, resume: bool, common: dict[str, Any]) -> None:
        self.common = common
        self.rows: list[dict[str, str]] = []
        self._journal = path.with_suffix(".current")
        if resume and path.exists():
            with path.open(newline="") as file:
                self.rows = list(csv.DictReader(file))
        self._by_point: dict[tuple[str, ...], list[dict[str, str]]] = {}
        for row in self.rows:
            self._by_point.setdefault(_key_of(row), []).append(row)
        fresh = not self.rows
        self._file = path.open("w" if fresh else "a", newline="")
        self._writer = csv.DictWriter(self._file, COLUMNS, lineterminator="\n")
        if fresh:
            self._writer.writeheader()
            self._file.flush()

    def close(self) -> None:
        """Close the file, and record that this process has finished normally."""
        self._file.close()
        self._journal.unlink(missing_ok=True)

    def note(self, point: Point, contender: str) -> None:
        """Record the running contender on disk, for the next process after a crash or a hang."""
        self._journal.write_text(json.dumps([*point, contender]))

    def blame(self) -> tuple[Point, str] | None:
        """Return the point and contender that an earlier process was running if it died."""
        if not self.rows or not self._journal.exists():
            return None
        *point, contender = json.loads(self._journal.read_text())
        self._journal.unlink()
        return Point(*point), contender

    def write(self, row: dict[str, Any]) -> None:
        """Write one row. Missing columns are left empty."""
        row = {**self.common, **row}
        self._writer.writerow(row)
        self._file.flush()
        self.rows.append({column: str(row.get(column, "")) for column in COLUMNS})
        self._by_point.setdefault(_key_of(self.rows[-1]), []).append(self.rows[-1])

    def done(self, point: Point) -> dict[str, str]:
        """Return the status of each contender with a row for a point in the file."""
        return {row["contender"]: row["status"] for row in self.rows_of(point)}

    def rows_of(self, point: Point) -> list[dict[str, str]]:
        """Return the rows of a point in the file."""
        key = point.mode, point.model, point.layer, str(point.m)
        return self._by_point.get(
            (*key, point.ranks or str(point.r), str(point.adapters or "")), []
        )


def _key_of(row: dict[str, str]) -> tuple[str, ...]:
    """Return the columns that identify the point of a row."""
    return tuple(row[column] for column in ("mode", "model", "layer", "M", "r", "adapters"))

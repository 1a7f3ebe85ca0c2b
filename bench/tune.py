"""Measures which tiles and plans are the fastest on a GPU, and writes them as a table.

    python bench/tune.py --out FOLDER --tests pass [--seconds 600] [--near 1] [--dry-run] [--resume]

For each problem and each of its launches, candidates are timed in turn: base and LoRA together, in
one graph over rotated operands (`bench/harness.py`). The candidates are the config that
`configs.choose` returns today, the other shipped tiles, and variants of all these. A variant
changes one of tile sides, warps, stages, and splits by one step (``--near 2``: by two). Plans
follow after the tiles of their problem. A candidate that spills a register, crashes, hangs, or
computes a wrong result is named in ``tune.csv`` and excluded.

After each problem, ``<arch>.json`` is rewritten. The library reads this table from the folder that
``FASTLORA_MEASURED`` names, or from ``kernels/measured`` (`kernels/config_files.py`).

A first process watches a second one that measures. If the second process dies, the first starts
another one without the candidate that killed it. Candidates are first compiled and tried in a pool
of processes.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from typing import Any, NamedTuple
from unittest import mock

import torch

from fastlora.bench import linear, precompile, shapes
from fastlora.bench.contenders import Contender
from fastlora.bench.harness import error_text
from fastlora.bench.modes import MODES
from fastlora.bench.shapes import Point
from fastlora.kernels import config_files, config_tables, configs, launch, measurements
from fastlora.kernels.chips import Chip, ConfigRow, chip_of
from fastlora.kernels.config_files import FileRow
from fastlora.ops.layout import rank_to_multiple_of_16

TRY_SECONDS = 60.0  # for all candidates of a group: compiling each, and running it once
NO_ANSWER = "error: no answer"
STARTS = 20  # maximum number of processes, one after another


class Asked(NamedTuple):
    """The plan under which a launch runs, and the sizes with which its config is requested."""

    plan: str
    sizes: str


# The tuned launches by mode. A size is left out if a config is not always requested with it.
LAUNCHES = {
    "forward": {
        "lora_shrink": Asked("fused", "mkr"),
        "lora_linear": Asked("fused", "mnkr"),
        "lora_expand": Asked("split", "mnr"),
    },
    "train": {
        "lora_grad_b": Asked("split", "mnr"),
        "lora_grad_a": Asked("split", "mkr"),
        "lora_grad_x_add": Asked("split", "mnkr"),
        "lora_grad_x": Asked("fused", "mnkr"),
    },
    "mixed": {
        "mixed_lora_shrink": Asked("fused", "mkr"),
        "mixed_lora_linear": Asked("fused", "mnkr"),
        "mixed_lora_expand": Asked("split", "mnkr"),
    },
    "mixed_train": {
        "mixed_lora_train_shrink": Asked("split", "mkr"),
        "mixed_lora_train_linear": Asked("fused", "mnkr"),
        "mixed_lora_train_expand": Asked("split", "mnr"),
        "mixed_lora_grad_b": Asked("split", "r"),
        "mixed_lora_grad_a": Asked("split", "r"),
        "mixed_lora_grad_x_add": Asked("split", "mnkr"),
        "mixed_lora_grad_x": Asked("fused", "mnkr"),
    },
}
PLANS = {  # the launches with tuned plans, by mode
    mode: [name for name in launches if name in config_tables.PLANNED]
    for mode, launches in LAUNCHES.items()
}
FORCED = {"train": ("lora_linear", "lora_grad_x")}  # plans of a training step, else `PLANS`
TILE_ADAPTERS = 16  # in the mixed batches on which tiles are measured


def group_of(point: Point) -> tuple[str, bool]:
    """Return the launch of a group of candidates, and whether the candidates are plans."""
    _, name, *plan = point.layer.split(" ")
    return name, bool(plan)


def groups(problems: Sequence[Point]) -> list[Point]:
    """Return a point for each problem and launch, with the launch appended to the layer's name."""
    found = []
    for point in problems:
        names = list(LAUNCHES[point.mode]) if point.adapters in (0, TILE_ADAPTERS) else []
        names += [f"{name} plan" for name in PLANS[point.mode]]
        found += [point._replace(layer=f"{point.layer} {name}") for name in names]
    return found


def candidates(chip: Chip, dtype: torch.dtype, point: Point, near: int) -> list[FileRow]:
    """Return the candidates at a point of `groups`: today's choice, then its nearest variants."""
    name, is_plan = group_of(point)
    asked, kind = LAUNCHES[point.mode][name].sizes, "half" if dtype.itemsize == 2 else "ieee"
    r = rank_to_multiple_of_16(point.r) if point.adapters else point.r
    limits = {"max_m": point.m, "n": point.n, "k": point.k, "max_r": r}
    if is_plan:
        if point.adapters:
            limits["max_r"] = point.adapters * r
        sizes = {"m": point.m, "n": point.n, "k": point.k, "r": point.r}
        today = configs.plan_of(chip, name, dtype, **sizes, slots=max(1, point.adapters))
        plans = sorted(("fused", "split"), key=lambda plan: plan != today)
        return [FileRow(name, kind, ConfigRow(**limits, plan=plan)) for plan in plans]
    limits = {c: v for c, v in limits.items() if c.removeprefix("max_") in asked}
    sizes = {column.removeprefix("max_"): value for column, value in limits.items()}
    config = configs.choose(chip, name, dtype, **sizes)
    tile = {c: getattr(config, c) for c in ("block_m", "block_n", "block_k", "num_warps")}
    block_r, most = config.block_r, config_tables.max_splits(name)
    today = ConfigRow(
        **tile,
        num_stages=config.num_stages,
        blocks_r=(block_r,) if block_r else (),
        splits=config.splits if most > 1 else 0,
        **limits,
    )
    rows = [row for row in config_tables.candidates_of(chip.family)[name, kind] if row.num_warps]
    if not config_tables.cuts_rows(name):
        rows = [row for row in rows if row.block_m == today.block_m]
    own = {"blocks_r": today.blocks_r, "splits": today.splits, **limits}
    starts = [today, *(replace(row, **own) for row in rows)]
    found = list(starts)
    for _ in range(near):
        starts = [moved for row in starts for moved in _moved(row, config_tables.cuts_rows(name))]
        found += starts
    tallest = max(16, 1 << (point.m - 1).bit_length(), today.block_m)
    every = [row for row in dict.fromkeys(found) if row.block_m <= tallest]
    ones = (FileRow(name, kind, row) for row in every)
    return [one for one in ones if not measurements.fault_of(chip, one)]


def _moved(row: ConfigRow, with_rows: bool) -> Iterator[ConfigRow]:
    """Yield the row with one column at a time changed by a step."""
    for column in ("block_m", "block_n", "block_k", "num_warps", "splits"):
        value = getattr(row, column)
        if column != "block_m" or with_rows:
            yield from (replace(row, **{column: v}) for v in (value // 2, 2 * value) if v)
    yield from (replace(row, num_stages=n) for n in (row.num_stages - 1, row.num_stages + 1) if n)


def name_of(one: FileRow) -> str:
    """Return a candidate's name in ``tune.csv``."""
    row = one.row
    if row.plan:
        return row.plan
    block_r = row.blocks_r[0] if row.blocks_r else 0
    tile = f"{row.block_m}x{row.block_n}x{row.block_k}"
    return f"{tile} r{block_r} w{row.num_warps} s{row.num_stages} p{row.splits}"


def run_with(ones: Sequence[FileRow], problem: Any, mode: str) -> Any:
    """Solve a problem with candidate rows preceding the table, then restore the table."""
    arch = chip_of(problem.x.device).arch
    with mock.patch.dict(config_tables.MEASURED), mock.patch.object(launch, "_CAN_CACHE", False):
        measurements.put_first(arch, ones, "candidate")
        _forget()
        try:
            return MODES[mode].solve(problem)
        finally:
            _forget()


def forced(one: FileRow, point: Point) -> list[FileRow]:
    """Return the plans under which a candidate's launch runs, or a plan's companions."""
    plan = LAUNCHES[point.mode][one.launch].plan if not one.row.plan else "split"
    planned = FORCED.get(point.mode, PLANS[point.mode])
    return [FileRow(name, one.kind, ConfigRow(max_m=point.m, plan=plan)) for name in planned]


def _forget() -> None:
    configs.choose.cache_clear()
    configs.plan_of.cache_clear()


@functools.lru_cache(maxsize=1)
def _drawn(point: Point, dtype: torch.dtype, device: torch.device) -> Any:
    return MODES[point.mode].draw(point, dtype, device, "triton")


def tried(ones: Sequence[FileRow], point: Point, dtype: torch.dtype, device: torch.device) -> str:
    """Run a candidate once in a process of the pool; return a reason to exclude it, or ""."""
    torch.set_num_threads(1)
    try:
        with launch.record_calls() as launches:
            run_with(ones, _drawn(point._replace(layer=""), dtype, device), point.mode)
            if device.type == "cuda":
                torch.cuda.synchronize()
        compiled = [getattr(call, "compiled", None) for call in launches]
        spills = sum(getattr(kernel, "n_spills", 0) or 0 for kernel in compiled)
    except Exception as error:
        return error_text(error)
    return f"error: spills {spills} registers" if spills else ""


class Tuner(linear.Bench):
    """Measures candidates as the contenders of a point, and writes the table after each point."""

    hang_seconds = 120.0

    def __init__(self, args: argparse.Namespace) -> None:
        self.near, self.chip = args.near, chip_of(torch.device(args.device))
        self.groups = groups(shapes.tiny_tune_points() if args.dry_run else shapes.tune_points())
        self.table = args.out.with_name(f"{self.chip.arch}.json")
        self.pool: Any = None
        self.ones: dict[Point, dict[str, FileRow]] = {}
        super().__init__(args)

    def contenders_for(self, point: Point) -> Sequence[Contender]:
        """Return the base, the yardstick of the error budget, and the candidates."""
        every = MODES[point.mode].contenders(point, self.impl, self.device.type, self.dtype)
        others = [c for c in every if c.name in ("base", "peft", "segments")]
        if point not in self.ones:
            found = candidates(self.chip, self.dtype, point, self.near)
            self.ones[point] = {name_of(one): one for one in found}
        kind = others[1].kind
        for name in self.ones[point]:
            run = functools.partial(self._run, point, name)
            others.append(Contender(name, kind, run, ours=True))
        return others

    def measure(self, point: Point) -> str:
        """Measure the remaining candidates and write the table."""
        line = super().measure(point)
        self.write_table()
        fast = self.fastest(point)
        return f"{fast[0]} {fast[1]:.1f} us" if fast else line

    def _run(self, point: Point, name: str, problem: Any) -> Any:
        return run_with(self._rows(point, name), problem, point.mode)

    def _rows(self, point: Point, name: str) -> list[FileRow]:
        """Return a candidate and the rows that it needs; for a plan, the best tiles so far."""
        own = self.ones[point][name]
        return [own, *forced(own, point), *(self._tiles() if own.row.plan else ())]

    def prepare(self, point: Point) -> None:
        """Compile and run every candidate once, many at a time; record those that fail."""
        done = self.file.done(point)
        names = [c.name for c in self.contenders_for(point) if c.ours and c.name not in done]
        jobs = {n: (self._rows(point, n), point, self.dtype, self.device) for n in names}
        faults = self._answers(jobs, precompile.processes(self.device.type))
        unsure = [name for name, fault in faults.items() if fault.startswith(NO_ANSWER)]
        bad = {name: fault for name, fault in faults.items() if fault and name not in unsure}
        self._write(point, self.contenders_for(point), bad, {})
        for name in unsure:  # a process that dies or hangs affects others: run these one at a time
            faults = self._answers({name: jobs[name]}, 1)
            self._end_pool()
            if faults[name]:
                self._write(point, self.contenders_for(point), faults, {})

    def _answers(self, jobs: dict[str, Any], workers: int) -> dict[str, str]:
        """Return the result of `tried` for each job; shut the pool down if a job did not finish."""
        if not jobs:
            return {}
        context = multiprocessing.get_context("spawn")
        if not self.pool:
            self.pool = ProcessPoolExecutor(workers, mp_context=context)
            self.pool.submit(int).result()  # starts the processes before the time limit applies
        futures = {name: self.pool.submit(tried, *job) for name, job in jobs.items()}
        wait(futures.values(), TRY_SECONDS)
        faults = {}
        for name, future in futures.items():
            if not future.done():
                faults[name] = f"{NO_ANSWER} after {TRY_SECONDS:.0f} s"
            elif isinstance(future.exception(), BrokenProcessPool):
                faults[name] = f"{NO_ANSWER}, its process died"
            else:
                faults[name] = future.result()
        if any(fault.startswith(NO_ANSWER) for fault in faults.values()):
            self._end_pool()
        return faults

    def _end_pool(self) -> None:
        if self.pool:
            for process in multiprocessing.active_children():
                process.kill()
            self.pool.shutdown(wait=False, cancel_futures=True)
        self.pool = None

    def fastest(self, point: Point) -> tuple[str, float, float | None] | None:
        """Return the name and time of a group's best candidate, and the time of today's choice.

        Today's choice is kept unless the 80th percentile of a faster candidate is below its median.
        """
        names = {c.name: c for c in self.contenders_for(point) if c.ours}
        done = self.file.rows_of(point)
        good = {r["contender"]: r for r in done if r["status"] == "ok" and r["contender"] in names}
        if not good:
            return None
        best, today = min(good.values(), key=lambda r: float(r["median_us"])), next(iter(names))
        before = float(good[today]["median_us"]) if today in good else None
        if before is not None and float(best["p80_us"]) >= before:
            best = good[today]
        return best["contender"], float(best["median_us"]), before

    def _tiles(self) -> list[FileRow]:
        return [one for one, _ in self._found() if not one.row.plan]

    def _found(self) -> list[tuple[FileRow, dict[str, Any]]]:
        """Return the best candidate of each finished group, narrow limits first, with notes."""
        found = []
        for point in self.groups:
            if "base" in self.file.done(point) and (fast := self.fastest(point)):
                name, us, before = fast
                notes = {"us": us, "shipped_us": before, "problem": str(point)}
                found.append((self.ones[point][name], notes))
        sizes = ("n", "k", "max_r", "max_m")
        found.sort(key=lambda f: (*f[0][:2], *(getattr(f[0].row, s) or 0 for s in sizes)))
        return found

    def write_table(self) -> None:
        """Rewrite the table atomically: a reader finds the old table or the new one."""
        rows = [config_files.columns_of(one) | notes for one, notes in self._found()]
        about = {
            n: self.file.common[n] for n in ("card", "driver", "torch", "triton", "commit", "tests")
        }
        about |= {"arch": self.chip.arch, "dtype": str(self.dtype)}
        if self.device.type != "cuda":
            about["made_up"] = "a dry run: the times mean nothing"
        lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
        head = json.dumps(about, indent=1).removesuffix("\n}")
        fresh = self.table.with_suffix(".new")
        fresh.write_text(f'{head},\n "rows": [\n{lines}\n ]\n}}\n')
        fresh.replace(self.table)


def main() -> int:
    """Start measuring processes, one after another, until one finishes."""
    parser = linear.arguments(__doc__)
    parser.add_argument("--near", type=int, default=1, help="steps that candidates are moved by")
    parser.add_argument("--child", action="store_true", help="measure; for the first process")
    args = parser.parse_args()
    if args.child:
        args.out = args.out / "tune.csv"
        if args.dry_run:
            args.device, args.dtype = "cpu", "float32"
        tuner = Tuner(args)
        return linear.measure_all(tuner, tuner.groups, args)
    args.out.mkdir(parents=True, exist_ok=True)
    end, resume = time.monotonic() + args.seconds, args.resume
    environment = dict(os.environ)
    if args.dry_run:
        environment["TRITON_INTERPRET"] = "1"
    for _ in range(STARTS):
        left = max(0.0, end - time.monotonic())
        command = [sys.executable, *sys.argv, "--child", "--seconds", str(left)]
        command += ["--resume"] if resume else []
        # The child has its own session, so that hung processes of its pool are killed with it.
        child = subprocess.Popen(command, env=environment, start_new_session=True)
        try:
            code = child.wait(left + TRY_SECONDS + Tuner.hang_seconds)
        except subprocess.TimeoutExpired:
            code = linear.START_AGAIN
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
        if code in (0, linear.WRONG):
            return 0
        print(f"the process that measures ended with code {code}", flush=True)
        resume = True
        if time.monotonic() > end:
            break
    return code


if __name__ == "__main__":
    sys.exit(main())

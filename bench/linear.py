"""Times one LoRA linear: fastlora's plans, the base alone, PEFT's operations, and ``addmm_``.

    python bench/linear.py --out results.csv [--tests pass] [--seconds 300] [--device cpu --dry-run]

`bench/gpu.sh` runs it after the tests. `bench/README.md` explains the rows.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fastlora.bench.contenders import FORWARD, FUSED_VARIANTS, TRAIN, Contender
from fastlora.bench.harness import (
    Checker,
    DeviceLostError,
    ResultFile,
    Timing,
    count_sets,
    error_text,
    guarded,
    is_lost,
    time_contenders,
)
from fastlora.bench.machine import ROOT, describe, measure_roofs
from fastlora.bench.modes import MODES, Mode
from fastlora.bench.peers import listed, peers_for
from fastlora.bench.shapes import Point, Roofs, all_points, floor_us, tiny_points

WRONG = 3  # exit code: the run has finished, and a contender failed or gave wrong numbers
START_AGAIN = 75  # exit code: this process has lost the GPU; a new one can continue
LAUNCH_US = 3.0  # approximate cost of a kernel in a graph beyond its floor
# Assumed time of a point before any is measured. Later, the slowest point so far counts as well.
FIRST_POINT_SECONDS = 5.0


class Bench:
    """One run: its device, and the file that it fills. `MODES` defines what is measured."""

    hang_seconds = 45.0  # a point that takes longer is considered hung
    modes: Mapping[str, Mode] = MODES

    def __init__(self, args: argparse.Namespace) -> None:
        self.device = torch.device(args.device)
        self.impl = args.impl
        self.dtype = getattr(torch, args.dtype)
        common = describe(self.device, args.checkout) | {"tests": args.tests}
        self.file = ResultFile(args.out, args.resume, common)
        resumed = bool(self.file.rows)
        self.roofs = self._roofs(resumed)
        self.file.common |= {
            "dtype": args.dtype,
            "copy_gb_s": f"{self.roofs.bytes_per_s / 1e9:.1f}",
            "matmul_tflop_s": f"{self.roofs.flop_per_s / 1e12:.2f}",
        }
        if blamed := self.file.blame():
            point, name = blamed
            outcome = {name: "error: the process crashed or hung here"}
            self._write(point, self.contenders_for(point), outcome, {})

    def contenders_for(self, point: Point) -> Sequence[Contender]:
        """Return the contenders of a point, with peers last."""
        found = MODES[point.mode].contenders(point, self.impl, self.device.type, self.dtype)
        return (*found, *peers_for(point.mode))

    @property
    def failed(self) -> bool:
        """Whether any row has a status other than "ok"."""
        return any(row["status"] != "ok" for row in self.file.rows)

    def _roofs(self, resumed: bool) -> Roofs:
        roofs, copy, gemm = measure_roofs(self.device, self.dtype)
        print(
            f"{self.file.common['card']}: copy {roofs.bytes_per_s / 1e9:.0f} GB/s, "
            f"matmul {roofs.flop_per_s / 1e12:.1f} TFLOP/s",
            flush=True,
        )
        if not resumed:
            for name, timing in (("copy", copy), ("matmul", gemm)):
                row = {"mode": "roof", "contender": name, "impl": "torch", "status": "ok"}
                row["dtype"] = "float32" if name == "copy" else str(self.dtype).split(".")[1]
                row["copy_gb_s"] = f"{roofs.bytes_per_s / 1e9:.1f}"
                row["matmul_tflop_s"] = f"{roofs.flop_per_s / 1e12:.2f}"
                self.file.write(row | _times(timing))
        return roofs

    def prepare(self, point: Point) -> None:
        """Prepare a point outside of the time limit of `measure`. Does nothing by default."""

    def measure(self, point: Point) -> str:
        """Check and time all contenders of a point, write the rows, and return a line on them."""
        before = self.file.done(point)
        contenders = [c for c in self.contenders_for(point) if c.name not in before]
        counts = {"sets": count_sets(point, self.dtype.itemsize, self.device)}
        outcome: dict[str, Any] = {}
        try:
            self._measure(point, contenders, outcome, counts)
        except DeviceLostError:
            # The next process measures the rest of this point, without the contender that lost the
            # GPU.
            outcome = {name: text for name, text in outcome.items() if isinstance(text, str)}
            raise
        except Exception as error:  # mostly out of memory: the next point may fit
            text = error_text(error)
            outcome = {contender.name: text for contender in contenders} | outcome
            if is_lost(self.device):
                raise DeviceLostError("something") from error
        finally:
            self._write(point, contenders, outcome, counts)
        return _line(outcome)

    def _measure(
        self,
        point: Point,
        contenders: Sequence[Contender],
        outcome: dict[str, Any],
        counts: dict[str, int],
    ) -> None:
        def note(name: str) -> None:
            self.file.note(point, name)

        def draw() -> Any:
            return mode.draw(point, self.dtype, self.device, self.impl)

        note("base")
        mode = self.modes[point.mode]
        problem = draw()
        checker = Checker(problem, contenders, mode.truths(point, problem), mode.yardstick)
        for contender in contenders:
            note(contender.name)
            with guarded(self.device, contender.name, outcome):
                if fault := checker.fault(contender):
                    outcome[contender.name] = fault
        del checker
        good = [contender for contender in contenders if contender.name not in outcome]
        problems = [problem]
        while len(problems) < counts["sets"]:
            problems.append(draw())
        call_us = floor_us("base", point, self.dtype.itemsize, self.roofs) + LAUNCH_US
        calls, rounds = time_contenders(good, problems, call_us, note, outcome)
        counts |= {"calls": calls, "rounds": rounds}

    def _write(
        self,
        point: Point,
        contenders: Sequence[Contender],
        outcome: dict[str, Any],
        counts: dict[str, int],
    ) -> None:
        shape = {"mode": point.mode, "model": point.model, "layer": point.layer, "M": point.m}
        shape |= {"K": point.k, "N": point.n, "r": point.ranks or point.r}
        shape["adapters"] = point.adapters or ""
        base = outcome.get("base")
        for contender in contenders:
            result = outcome.get(contender.name)
            if result is None:
                continue
            floor = floor_us(contender.kind, point, self.dtype.itemsize, self.roofs)
            row = {
                "contender": contender.name,
                "impl": self.impl if contender.ours else "torch",
                "floor_us": f"{floor:.5g}",
                "status": "ok",
            }
            if isinstance(result, Timing):
                row |= _times(result) | {"ratio_to_floor": f"{result.median / floor:.4f}"}
                if isinstance(base, Timing):
                    row["ratio_to_base"] = f"{result.median / base.median:.4f}"
            else:
                row["status"] = result
            self.file.write(shape | counts | row)


def _times(timing: Timing) -> dict[str, str]:
    names = ("median_us", "p20_us", "p80_us")
    return {name: f"{value:.3f}" for name, value in zip(names, timing, strict=True)}


def _line(outcome: dict[str, Any]) -> str:
    """Return the base's time, the other times as multiples of it, and the failures."""
    base = outcome.get("base")
    unit = base.median if isinstance(base, Timing) else 0.0
    words = []
    for name, result in outcome.items():
        if not isinstance(result, Timing):
            words.append(f"{name} {result}")
        elif name == "base" or not unit:
            words.append(f"{name} {result.median:.1f} us")
        else:
            words.append(f"{name} x{result.median / unit:.2f}")
    return ", ".join(words)


class _List(argparse.Action):
    """Prints the contenders and exits. Like ``--help``, it needs no other argument."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        for mode, own in (("forward", (*FORWARD, *FUSED_VARIANTS)), ("train", TRAIN)):
            print(f"{mode}: {', '.join(contender.name for contender in own)}")
        print(*listed(), sep="\n")
        parser.exit()


def arguments(description: str) -> argparse.ArgumentParser:
    """Return a parser with the options that all scripts of this kind have."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--list", action=_List, nargs=0, help="who takes part, peers included")
    parser.add_argument("--out", type=Path, required=True, help="the CSV")
    parser.add_argument("--tests", choices=("pass", "fail"), required=True, help="for the CSV")
    parser.add_argument("--seconds", type=float, default=300.0, help="start no point after these")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--impl", default="triton", choices=("triton", "eager"))
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes; times mean nothing")
    parser.add_argument("--max-points", type=int, help="only the first ones")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the CSV of a lost process"
    )
    parser.add_argument("--checkout", type=Path, default=ROOT, help="whose commit the rows carry")
    return parser


def main(
    points: Callable[[], list[Point]] = all_points,
    tiny: Callable[[], list[Point]] = tiny_points,
    description: str = __doc__,
) -> int:
    """Measure the points that the command line selects, or tiny points in a dry run."""
    args = arguments(description).parse_args()
    return measure_all(Bench(args), tiny() if args.dry_run else points(), args)


def measure_all(bench: Bench, points: list[Point], args: argparse.Namespace) -> int:
    """Measure until all points are done or the time is up; return the exit code."""
    end = time.monotonic() + args.seconds
    torch.manual_seed(0)
    points = points[: args.max_points]
    slowest = 0.0 if args.dry_run else FIRST_POINT_SECONDS
    for index, point in enumerate(points):
        if "base" in bench.file.done(point):
            continue
        start = time.monotonic()
        if start + slowest > end:
            skipped = points[index:]
            print(f"deadline: {len(skipped)} of {len(points)} points skipped, from {skipped[0]}")
            break
        bench.prepare(point)
        watchdog = threading.Timer(bench.hang_seconds, _give_up, (point,))
        watchdog.daemon = True
        watchdog.start()
        try:
            line = bench.measure(point)
        except DeviceLostError as lost:
            print(f"{point}: {lost} took the GPU down", flush=True)
            bench.file.close()
            return START_AGAIN
        finally:
            watchdog.cancel()
        seconds = time.monotonic() - start
        if index:  # the first point also loads libraries
            slowest = max(slowest, seconds)
        print(f"[{index + 1}/{len(points)}, {seconds:.1f} s] {point}: {line}", flush=True)
    bench.file.close()
    return WRONG if bench.failed else 0


def _give_up(point: Point) -> None:
    """Exit from a process with a hung kernel. The journal names the contender."""
    print(f"{point}: no end", flush=True)
    os._exit(START_AGAIN)


if __name__ == "__main__":
    sys.exit(main())

"""Measures the assumptions that predictions and the choice of configs rest on.

    python bench/assumptions.py --out CSV --tests pass [--only l2,tiles] [--seconds 60] [--dry-run]

- ``l2``: 192 programs read the same x ``[64, 4096]`` from the L2 cache, next to a copy of as many
  bytes in memory.
- ``tiles``: `lora_linear` at 64 rows with tiles of 64x32, of 64x64, and of 64x64 with two splits
  of K.
- ``planes``: `lora_expand` that sums eight partial sums of s in every program, and `plane_sums`
  followed by `lora_expand` with one s.
- ``beta``: cuBLAS that adds a product to y, and that overwrites y.
- ``pdl``: the linears of a decoder layer with and without programmatic dependent launch.

`bench/harness.py` times them in CUDA graphs. The sizes are those of Llama-3.1-8B, in bf16.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
import triton.language as tl

from fastlora.bench import shared_input, tune
from fastlora.bench.contenders import Contender
from fastlora.bench.cpu_run import csv_rows
from fastlora.bench.harness import Timing, time_contenders
from fastlora.bench.host import OURS, Case, Shape, running, warm_up
from fastlora.bench.layer import TINY as TINY_LAYER
from fastlora.bench.shapes import DECODERS, LLAMA, SHARED_INPUTS, TINY, Point, grouped_point
from fastlora.bench.tune_points import plan_rows, rows_first
from fastlora.kernels import chips, config_tables, configs, launch, lora_expand, plane_sums
from fastlora.kernels.chips import ConfigRow
from fastlora.kernels.config_files import FileRow
from fastlora.kernels.modules import Module

PROGRAMS, PLANES = 192, 8
BLOCK, UNROLL = 2048, 8  # of `_reread_kernel`: 32 KiB in flight in a program
CALL_US = 50.0  # it determines the number of calls in a replay
SETS = 16  # sets of operands, together more than ten times as large as the L2 cache of an H100
MEASURE_SECONDS = 5.0  # about the time of one comparison, with compilation


class Operands(NamedTuple):
    """Tensors of one comparison; ``x`` tells the device."""

    x: torch.Tensor
    tensors: tuple[Any, ...] = ()


class Comparison(NamedTuple):
    """Ways to do one thing, which are timed in turn.

    Attributes:
        case: What is done.
        draw: Returns one set of operands.
        runs: The functions of a set, by name.
        issued: Bytes that each function loads and stores, or None if they are not of interest.
    """

    case: str
    draw: Callable[[], Any]
    runs: dict[str, Callable[[Any], Any]]
    issued: int | None = None


@triton.jit
def _reread_kernel(out_ptr, x_ptr, size, BLOCK: tl.constexpr, UNROLL: tl.constexpr):
    """Write the sum of all of x in every program."""
    offs = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK * UNROLL):
        for i in tl.static_range(UNROLL):
            place = start + i * BLOCK + offs
            total += tl.load(x_ptr + place, mask=place < size, other=0.0).to(tl.float32)
    tl.store(out_ptr + tl.program_id(0), tl.sum(total))


def reread(out: torch.Tensor, x: torch.Tensor) -> None:
    """Write the sum of x into each element of ``out``, with one program for each."""
    _reread_kernel[(out.numel(),)](out, x, x.numel(), BLOCK=BLOCK, UNROLL=UNROLL, num_warps=8)


def l2(device: torch.device, dtype: torch.dtype, dry: bool) -> Iterator[Comparison]:
    """Yield the comparison of reads of the L2 cache with a copy in memory."""
    rows, columns, programs = (4, 96, 3) if dry else (64, 4096, PROGRAMS)
    size = rows * columns

    def draw() -> Operands:
        x = torch.randn(size, device=device, dtype=dtype)
        wide = torch.randn(programs * size // 2, device=device, dtype=dtype)
        out = torch.empty(programs, dtype=torch.float32, device=device)
        return Operands(x, (out, wide, torch.empty_like(wide)))

    runs: dict[str, Callable[[Any], Any]] = {
        "x read by every program": lambda p: reread(p.tensors[0], p.x),
        "copy": lambda p: p.tensors[2].copy_(p.tensors[1]),
    }
    case = f"{rows}x{columns}, {programs} programs"
    yield Comparison(case, draw, runs, programs * size * dtype.itemsize)


def tiles(device: torch.device, dtype: torch.dtype, dry: bool) -> Iterator[Comparison]:
    """Yield a comparison of tiles of `lora_linear` for q|k|v, o, and down."""
    points = [grouped_point("forward", SHARED_INPUTS[i], 64, 16) for i in (0, 1, 3)]
    wanted = ((64, 32, 1), (64, 64, 1), (64, 64, 2))
    if dry:
        points = [Point("forward", TINY, "a", 40, 64, 48, 4, outputs="32+16")]
        wanted = ((64, 64, 1), (32, 32, 1))
    family, kind = chips.chip_of(device).family, "half" if dtype.itemsize == 2 else "ieee"
    shipped = [r for r in config_tables.candidates_of(family)["lora_linear", kind] if r.num_warps]
    for point in points:
        runs = {}
        for block_m, block_n, splits in wanted:
            tile = _tile(shipped, block_m, block_n)
            row = replace(tile, splits=splits, max_m=point.m)
            rows = [FileRow("lora_linear", kind, row), *plan_rows(point.m, "fused", dtype)]
            name = f"{block_m}x{block_n}, {splits} splits"
            runs[name] = lambda p, rows=rows: tune.run_with(rows, p, "forward")
        draw = lambda point=point: shared_input.Problem.random(point, dtype, device)  # noqa: E731
        yield Comparison(f"{point.layer} M={point.m} N={point.n} K={point.k}", draw, runs)


def _tile(rows: Sequence[ConfigRow], block_m: int, block_n: int) -> ConfigRow:
    """Return the shipped tile of a size, or a shipped tile of these rows with the other columns."""
    same = [row for row in rows if row.block_m == block_m]
    return next((r for r in same if r.block_n == block_n), replace(same[-1], block_n=block_n))


def planes(device: torch.device, dtype: torch.dtype, dry: bool) -> Iterator[Comparison]:
    """Yield a comparison of two ways to sum the partial sums of s, for q|k|v and gate|up."""
    m, r = (20, 4) if dry else (2048, 64)
    for names in (SHARED_INPUTS[0],) if dry else (SHARED_INPUTS[0], SHARED_INPUTS[2]):
        sizes = [24, 16] if dry else [DECODERS[LLAMA][name][1] for name in names]
        columns, chip = r * len(sizes), chips.chip_of(device)
        expand = configs.choose(chip, "lora_expand", dtype, m=m, n=sum(sizes), r=r)
        summing = configs.choose(chip, "plane_sums", dtype)

        def draw(sizes: list[int] = sizes, columns: int = columns) -> Operands:
            partials = torch.randn(PLANES, m, columns, device=device)
            scaling = torch.ones((), device=device)
            modules = [
                Module(
                    torch.empty(m, n, device=device, dtype=dtype),
                    torch.randn(n, r, device=device, dtype=dtype),
                    scaling,
                )
                for n in sizes
            ]
            return Operands(partials, (modules, torch.empty_like(partials[0], dtype=dtype)))

        def in_every_program(p: Any, config: Any = expand) -> None:
            modules, s = p.tensors
            lora_expand.launch_lora_expand(modules, p.x, reads_y=False, s_out=s, config=config)

        def once(p: Any, config: Any = expand, summing: Any = summing) -> None:
            modules, s = p.tensors
            plane_sums.launch_plane_sums([s], [p.x], config=summing)
            lora_expand.launch_lora_expand(modules, s, reads_y=False, config=config)

        runs: dict[str, Callable[[Any], Any]] = {
            f"{PLANES} planes in every program": in_every_program,
            "plane_sums, then one plane": once,
        }
        yield Comparison(f"M={m} N={sum(sizes)} r={r}", draw, runs)


def beta(device: torch.device, dtype: torch.dtype, dry: bool) -> Iterator[Comparison]:
    """Yield a comparison of cuBLAS with beta 1 and beta 0, for each weight of a layer."""
    for m in (5,) if dry else (2048, 8192):
        for k, n in ((16, 24),) if dry else dict.fromkeys(DECODERS[LLAMA].values()):

            def draw(m: int = m, k: int = k, n: int = n) -> Operands:
                made = (torch.randn(*size, device=device, dtype=dtype) for size in ((n, k), (m, n)))
                return Operands(torch.randn(m, k, device=device, dtype=dtype), tuple(made))

            runs: dict[str, Callable[[Any], Any]] = {
                "beta 0": lambda p: torch.mm(p.x, p.tensors[0].t(), out=p.tensors[1]),
                "beta 1": lambda p: p.tensors[1].addmm_(p.x, p.tensors[0].t()),
            }
            yield Comparison(f"M={m} N={n} K={k}", draw, runs)


def pdl(device: torch.device, dtype: torch.dtype, dry: bool) -> Iterator[Comparison]:
    """Yield a comparison of a decoder layer with and without programmatic dependent launch."""
    shape = TINY_LAYER if dry else Shape(hidden=4096, kv=1024, inner=14336, rank=16)
    for rows in (TINY_LAYER.rows,) if dry else (64, 1, 2048):
        with running(
            Case("forward", torch.no_grad), device, shape._replace(rows=rows), dtype
        ) as sides:
            side = sides[OURS]
            warm_up({OURS: side})
            runs: dict[str, Callable[[Any], Any]] = {
                "with PDL": lambda _, side=side: _with_pdl_on(chips._PDL_ARCHS, side, device),
                "without PDL": lambda _, side=side: _with_pdl_on((), side, device),
            }
            x = torch.empty(0, device=device)
            yield Comparison(f"decoder layer, M={rows}", lambda x=x: Operands(x), runs)


def _with_pdl_on(archs: tuple[str, ...], run: Callable[[], Any], device: torch.device) -> Any:
    """Call a function with PDL on the given chips, and without earlier choices of configs."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(chips, "_PDL_ARCHS", archs))
        stack.enter_context(mock.patch.object(launch, "_CAN_CACHE", False))
        stack.enter_context(rows_first((), chips.chip_of(device).arch))
        return run()


RULES = {"l2": l2, "tiles": tiles, "planes": planes, "beta": beta, "pdl": pdl}


def timed(comparison: Comparison) -> dict[str, Any]:
    """Return the timing of each function of a comparison, or a text that says why there is none."""
    outcome: dict[str, Any] = {}
    first = comparison.draw()
    others = SETS - 1 if first.x.is_cuda else 0
    problems = [first, *(comparison.draw() for _ in range(others))]
    contenders = [Contender(name, "", run) for name, run in comparison.runs.items()]
    time_contenders(contenders, problems, CALL_US, lambda _: None, outcome)
    return outcome


def main() -> int:
    """Measure the rules until all are done or the time is up; return 1 if one could not run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the CSV")
    parser.add_argument("--tests", choices=("pass", "fail"), required=True, help="for the CSV")
    parser.add_argument("--only", default=",".join(RULES), help="names of rules, with commas")
    parser.add_argument("--seconds", type=float, default=120.0, help="start nothing after these")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes; times mean nothing")
    args = parser.parse_args()
    device, failed = torch.device(args.device), False
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    end = time.monotonic() + args.seconds - MEASURE_SECONDS * (not args.dry_run)
    with csv_rows(args.out, device) as write:
        for rule in args.only.split(","):
            for comparison in RULES[rule](device, dtype, args.dry_run):
                if time.monotonic() > end:
                    print(f"deadline: nothing from {rule}, {comparison.case} on", flush=True)
                    return int(failed)
                for name, result in timed(comparison).items():
                    ok = isinstance(result, Timing)
                    failed |= not ok
                    times = result if ok else ("", "", "")
                    row = {"rule": rule, "case": comparison.case, "variant": name}
                    row |= {"status": "ok" if ok else result, "tests": args.tests}
                    row |= dict(zip(("median_us", "p20_us", "p80_us"), times, strict=True))
                    issued = comparison.issued if ok else None
                    row["gb_s"] = f"{issued / result.median / 1e3:.1f}" if issued else ""
                    write(row)
                    text = f"{result.median:.1f} us {row['gb_s']}" if ok else result
                    print(f"{rule}, {comparison.case}, {name}: {text}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

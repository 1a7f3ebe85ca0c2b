"""Predicts the time of a decoder layer's seven linears on a card that is not at hand.

python bench/predict.py [--model NAME] [--rank 16 ...] [--chip sm_90] [--details] [--out CSV]

No number here is measured. The launches, grids, and configs are recorded from the real host path on
CPU tensors (`fastlora.testing.stubbed_launches`). Bytes and FLOPs follow from closed forms
(`bench/byte_forms.py`), and registers and instructions from the compiled code. The limits of the
card are in `bench/ceilings.py`. The predicted time of a launch is its start-up time plus the
longest of

- its bytes through memory, at the share of the bandwidth that the loads in flight can use,
- the bytes of all its loads and stores through the L2 cache,
- its FLOPs on the processors that have a program,
- its instructions: those of one program in sequence, wave by wave, or those of all programs.

The predicted time of a product or another PyTorch operator is its start-up time, plus the longer of
its bytes and its FLOPs. The operators of PEFT, of ``addmm_``, and of the bare layer are recorded on
meta tensors. All factors are bf16.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib.util
import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
import triton

from fastlora.bench.ceilings import CEILINGS, Ceilings
from fastlora.bench.compiled import programs_per_processor, read_code
from fastlora.bench.counted import ADDMM, BARE, OURS, PEFT, SEQUENCES, Case, Linears, others, ours
from fastlora.bench.launch_forms import WIDTH, Work, bytes_in_flight, instructions_of
from fastlora.bench.machine import ROOT, commit, results_folder
from fastlora.bench.shapes import DECODE_MAX_ROWS, DECODERS, Point, Roofs, floor_us
from fastlora.kernels import chips, configs
from fastlora.kernels.chips import Chip

CASES = (
    *(Case("decode", m, n) for m in (1, 16, 64) for n in (0, 1, 4, 64) if n <= m),
    *(Case("decode", m) for m in (24, 33, 48)),
    *(Case("prefill", 2048, n) for n in (0, 4, 64)),
    *(Case("training", m, 0, p) for m in (2048, 8192) for p in (0.0, 0.1)),
)
# Parts of fastlora that can be switched off to predict their benefit.
PARTS = (
    "siblings at once",
    "split K",
    "tiles by bandwidth",
    "expand by pieces",
    "update first",
)


# --------------------------------------------------------------------------------- the prediction


class Time(NamedTuple):
    """A kernel's time in microseconds: start-up, work, and the resource that limits the work."""

    start: float
    work: float
    bound: str

    @property
    def us(self) -> float:
        """Start-up time plus work."""
        return self.start + self.work


def times_of(works: Sequence[Work], ceilings: Ceilings, chip: str) -> list[Time]:
    """Return the times of kernels that run one after the other.

    A linear launched as the programmatic dependent of a shrink waits for the shrink after its own K
    loop, so the shorter work of the two is hidden.
    """
    times: list[Time] = []
    for work in works:
        time = time_of(work, ceilings, chip)
        if work.name.endswith("lora_linear") and _is_dependent(work):
            hidden = min(time.work, times[-1].work)
            times[-1] = times[-1]._replace(work=times[-1].work - hidden)
        times.append(time)
    return times


def _is_dependent(work: Work) -> bool:
    return work.launch is not None and bool(work.launch.arguments.get("PDL"))


def time_of(work: Work, ceilings: Ceilings, chip: str) -> Time:
    """Return the time of a kernel that runs alone."""
    c, launch = ceilings, work.launch
    start = c.dependent_us if _is_dependent(work) else c.launch_us
    seconds = {
        "bytes": (work.loads + work.stores) / c.bytes_per_s,
        "FLOPs": work.flops / c.flop_per_s,
    }
    if launch is not None:
        programs, fit = math.prod(launch.grid), programs_per_processor(launch, c)
        at_once = min(programs, c.processors * fit)
        share = 1.0
        if on_way := bytes_in_flight(launch):
            share = min(1.0, at_once * on_way / Chip(chip, c.processors).bytes_in_flight)
        seconds["bytes"] = work.loads / (share * c.bytes_per_s) + work.stores / c.bytes_per_s
        alone = min(programs, c.processors) * c.l2_bytes_per_cycle * c.clock_hz
        seconds["L2"] = work.issued / min(c.l2_bytes_per_s, alone)
        seconds["FLOPs"] /= min(1.0, programs / c.processors)
        executed = instructions_of(launch, work.chunks)
        waves = -(-programs // (c.processors * fit))
        issued = programs * launch.num_warps * executed / (c.processors * c.issues_per_cycle)
        waited = waves * executed * c.cycles_per_instruction
        seconds["instructions"] = max(issued, waited) / c.clock_hz
    bound = max(seconds, key=lambda name: seconds[name])
    return Time(start, 1e6 * seconds[bound], bound)


def floor_of(linears: Linears, case: Case, r: int, c: Ceilings) -> float:
    """Return the sum of `shapes.floor_us` over all linear layers, in microseconds."""
    kind = {"training": "train"}.get(case.kind, "mixed" if case.adapters else "full")
    mode = {"full": "forward"}.get(kind, kind)
    roofs, ranks = Roofs(c.bytes_per_s, c.flop_per_s), str(r) if case.adapters else ""
    return sum(
        floor_us(
            kind, Point(mode, "", name, case.rows, k, n, r, case.adapters, ranks), WIDTH, roofs
        )
        for name, (k, n) in linears.items()
    )


def contenders_of(case: Case) -> list[str]:
    """Return the contenders of a case; fastlora's variants are named after the missing part."""
    names = [BARE, OURS]
    names += [f"{OURS} without {part}" for part in PARTS if _may_matter(part, case)]
    names += [PEFT] if importlib.util.find_spec("peft") else []
    return names + ([] if case.adapters else [ADDMM])


def predicted(
    contender: str, linears: Linears, case: Case, r: int, chip: str
) -> list[tuple[Work, Time]]:
    """Return every kernel in a contender's step, with its time."""
    ceilings = CEILINGS[chip]
    if contender.startswith(OURS):
        with without(contender.partition(" without ")[2]):
            works = ours(linears, case, r, chip, ceilings.processors)
    else:
        works = others(contender, linears, case, r)
    return list(zip(works, times_of(works, ceilings, chip), strict=True))


# ------------------------------------------------------------------------ fastlora without one part


def _may_matter(part: str, case: Case) -> bool:
    few = case.rows <= DECODE_MAX_ROWS
    return {
        "siblings at once": not case.adapters and case.kind != "training",
        "split K": few and not case.adapters,
        "tiles by bandwidth": few and not case.adapters,
        "expand by pieces": few and case.adapters > 4,
        "update first": not few and not case.adapters,
    }[part]


@contextlib.contextmanager
def without(part: str) -> Iterator[None]:
    """Switch off one part of fastlora within the block; with "", no part."""
    from fastlora.layers import linear_forward as layers
    from fastlora.ops.triton import expand, linear, shrink

    def product_first(
        x: Any, weight: Any, bias: Any, s: Any, lora_a: Any, lora_b: Any, scaling: Any,
        seed: Any, dropout_p: float, plan: str,
    ) -> list[torch.Tensor]:  # fmt: skip
        y, own = F.linear(x, weight, bias), s
        if own is None:
            own = shrink.shrink_one_adapter(x, [lora_a], seed, dropout_p)
        expand.expand_one_adapter_(y, own, lora_b, scaling)
        return [y, own] if s is None else [y]

    alone = (layers, "group_forward", lambda *_: None)
    changes: dict[str, list[tuple[Any, str, Any]]] = {
        "": [],
        "siblings at once": [alone],
        "split K": [(configs, "MAX_WEIGHT_SPLITS", 1)],
        "tiles by bandwidth": [(chips, "_BANDWIDTHS", {})],
        "expand by pieces": [(configs, "FUSED_MAX_ADAPTERS", SEQUENCES)],
        "update first": [alone, (linear, "linear_one_adapter", product_first)],
    }
    with contextlib.ExitStack() as stack:
        for owner, name, value in changes[part]:
            stack.enter_context(mock.patch.object(owner, name, value))
        for chosen in (configs.choose, configs.plan_of):
            chosen.cache_clear()
            stack.callback(chosen.cache_clear)
        yield


# -------------------------------------------------------------------------------------- the file


def row_of(
    contender: str, model: str, linears: Linears, case: Case, r: int, chip: str
) -> tuple[dict[str, Any], list[tuple[Work, Time]]]:
    """Return a row of the CSV, and the kernels that it was computed from."""
    found = predicted(contender, linears, case, r, chip)
    floor = floor_of(linears, case, r, CEILINGS[chip])
    us = sum(time.us for _, time in found)
    row = {
        "measured": "no",
        "chip": chip,
        "model": model,
        "case": case.kind,
        "M": case.rows,
        "adapters": case.adapters or "one for all rows",
        "r": r,
        "dropout": case.dropout,
        "contender": contender,
        "kernels": len(found),
        "launches": sum(work.launch is not None for work, _ in found),
        "megabytes": f"{sum(w.loads + w.stores for w, _ in found) / 1e6:.1f}",
        "issued_megabytes": f"{sum(w.issued for w, _ in found) / 1e6:.1f}",
        "gigaflops": f"{sum(w.flops for w, _ in found) / 1e9:.1f}",
        "predicted_us": f"{us:.1f}",
        "floor_us": f"{floor:.1f}",
        "ratio_to_floor": f"{us / floor:.3f}",
    }
    return row, found


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write the CSV."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def line_of(row: dict[str, Any]) -> str:
    """Return a row as one line of text."""
    return (
        f"prediction: {row['model']} {row['case']}, M {row['M']}, adapters: {row['adapters']}, "
        f"r {row['r']}, dropout {row['dropout']}: {row['contender']} {row['predicted_us']} us, "
        f"{row['ratio_to_floor']} times the floor, {row['kernels']} kernels, {row['megabytes']} MB"
    )


def details(found: Sequence[tuple[Work, Time]], ceilings: Ceilings) -> Iterator[str]:
    """Yield a line for each kernel of fastlora, and each product of PyTorch in the step."""
    for work, time in found:
        megabytes = (work.loads + work.stores) / 1e6
        line = f"{work.name}: {time.us:.1f} us by {time.bound}, {megabytes:.2f} MB"
        if work.launch is not None:
            launch, code = work.launch, read_code(work.launch.binary)
            programs, fit = math.prod(launch.grid), programs_per_processor(launch, ceilings)
            waves = -(-programs // (ceilings.processors * fit))
            line += (
                f" ({work.issued / 1e6:.2f} issued), {programs} programs of {launch.num_warps} "
                f"warps, {fit} a processor, {waves} waves; compiled: {code.registers} registers, "
                f"{code.spilled} bytes spilled, {launch.shared} bytes shared, "
                f"{code.instructions} instructions"
            )
        yield line


def inputs(chip: str) -> Iterator[str]:
    """Yield the assumptions about a chip, one line each."""
    for name, value in CEILINGS[chip]._asdict().items():
        yield f"input {name} = {value:g}" if isinstance(value, float) else f"input {name} = {value}"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the predictions and write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=tuple(DECODERS), help="default: all of them")
    parser.add_argument("--rank", type=int, nargs="+", default=[16])
    parser.add_argument("--chip", choices=tuple(CEILINGS), default="sm_90")
    parser.add_argument("--kind", choices=("decode", "prefill", "training"), help="default: all")
    parser.add_argument("--details", action="store_true", help="a line for each kernel of ours")
    parser.add_argument("--out", type=Path, default=results_folder() / "predicted.csv")
    args = parser.parse_args(argv)
    for line in inputs(args.chip):
        print(f"prediction: {line} (bench/ceilings.py says where it comes from)")
    rows, source = [], {"triton": triton.__version__, "commit": commit(ROOT)}
    models = [args.model] if args.model else list(DECODERS)
    for model, r in itertools.product(models, args.rank):
        for case in CASES:
            if args.kind not in (None, case.kind):
                continue
            for contender in contenders_of(case):
                row, found = row_of(contender, model, DECODERS[model], case, r, args.chip)
                rows.append(row | source)
                print(line_of(row), flush=True)
                if args.details and contender == OURS:
                    for line in details(found, CEILINGS[args.chip]):
                        print(f"prediction:   {line}")
    write(args.out, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())

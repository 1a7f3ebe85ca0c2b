"""Mixed batches on SmolLM2: fastlora against PEFT and against plain PyTorch by hand, on a CPU.

python bench/mixed.py [--dtypes fp32,bf16] [--adapters 1,4,16,64] [--base plain|nf4] [--out CSV]

All linear layers have adapters of rank 16. The 64 sequences have their adapters in random order.
All sides run in turn on one thread of one process. ``decode`` is one token per sequence, and
``prefill`` is sixteen. A side is timed only after its outputs have been compared with float64, or
with PEFT's outputs over an NF4 base.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

import fastlora
from fastlora.bench.cpu_run import BASES, DTYPES, csv_rows, load_base
from fastlora.bench.machine import results_folder
from fastlora.bench.measure import interleaved_seconds, median_ratio
from fastlora.bench.mixed_bench import counts
from fastlora.bench.mixed_contest import BASE, IN_TURN, OURS, PEFT, Contest, last_output
from fastlora.bench.mixed_report import columns
from fastlora.bench.mixed_strategies import STRATEGIES, by_hand

PHASES = {"decode": 1, "prefill": 16}
SEQUENCES, RANK = 64, 16
# One block around all forward passes, as in a decode loop. `OURS` enters a block for each of them.
OURS_ONCE = "fastlora_one_block"
SORTED = "_sorted_before"


def main() -> int:
    """Measure all batches and write the CSV, each row as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtypes", default="fp32,bf16")
    parser.add_argument("--phases", default="decode,prefill")
    parser.add_argument("--adapters", type=counts, default=[1, 4, 16, 64])
    parser.add_argument("--base", choices=BASES, default="plain")
    parser.add_argument("--rounds", type=int, default=9, help="of decode; prefill has a third")
    parser.add_argument("--out", type=Path, default=results_folder() / "mixed_cpu.csv")
    args = parser.parse_args()
    torch.manual_seed(0)
    with csv_rows(args.out) as write:
        for dtype in args.dtypes.split(","):
            base = load_base(args.base, DTYPES[dtype])
            contest = Contest(base, max(args.adapters), RANK)
            for phase in args.phases.split(","):
                rounds = args.rounds if phase == "decode" else max(1, args.rounds // 3)
                for adapters in args.adapters:
                    run = measured if args.base == "plain" else on_quantized
                    rows = run(contest, PHASES[phase], adapters, rounds)
                    for row in rows:
                        write({"dtype": dtype, "phase": phase} | row)
                    show(dtype, phase, adapters, rows)
    return 0


def measured(contest: Contest, tokens: int, adapters: int, rounds: int) -> list[dict[str, Any]]:
    """Check and time all sides of one batch; return a row for each."""
    ids = contest.random_ids(SEQUENCES, tokens)
    mix = contest.random_mix(SEQUENCES, adapters)
    sides = contest.sides(mix, ids)
    del sides[IN_TURN]
    sides[OURS_ONCE] = partial(last_output, contest.ours, ids)
    for name, strategy in STRATEGIES.items():
        sides[name] = by_hand(contest, strategy, mix, ids)
        if name != "gathered_bmm":  # this strategy moves no rows anyway
            sides[name + SORTED] = by_hand(contest, strategy, mix, ids, sorted_before=True)
    with fastlora.adapters(contest.ours, mix):
        rows, times = contest.measure(sides, mix, ids, rounds)
    best = min(STRATEGIES, key=lambda name: statistics.median(times[name]))
    batch = {"sequences": SEQUENCES, "tokens": tokens, "rank": RANK}
    return [
        batch
        | columns(row)
        | {
            "ratio_to_peft": f"{median_ratio(times, row.side, PEFT):.6g}",
            "ratio_to_best_by_hand": f"{median_ratio(times, row.side, best):.6g}",
            "best_by_hand": best,
        }
        for row in rows
    ]


@torch.no_grad()
def on_quantized(contest: Contest, tokens: int, adapters: int, rounds: int) -> list[dict[str, Any]]:
    """Time fastlora and PEFT over a quantized base and return a row for each.

    There is no implementation by hand for a quantized base.
    """
    ids = contest.random_ids(SEQUENCES, tokens)
    mix = contest.random_mix(SEQUENCES, adapters)
    sides = contest.sides(mix, ids)
    del sides[IN_TURN]
    sides[OURS_ONCE] = partial(last_output, contest.ours, ids)
    with fastlora.adapters(contest.ours, mix):
        outputs = {name: [side() for _ in range(3)][-1].double() for name, side in sides.items()}
        update = (outputs[PEFT] - outputs[BASE]).norm()
        errors = {name: float((y - outputs[PEFT]).norm() / update) for name, y in outputs.items()}
        for name in (OURS, OURS_ONCE):
            # In bf16, 30 layers change the adapters' term by a sixth. A wrong adapter changes it by
            # 1.4.
            if not errors[name] < 0.5:
                raise RuntimeError(f"{name} differs from PEFT by {errors[name]} of the update")
        times = interleaved_seconds(sides, rounds)
    return [
        {
            "base": "nf4",
            "sequences": SEQUENCES,
            "tokens": tokens,
            "rank": RANK,
            "adapters": adapters,
            "side": side,
            "median_ms": f"{statistics.median(seconds) * 1e3:.2f}",
            "ratio_to_base": f"{median_ratio(times, side, BASE):.4f}",
            "ratio_to_peft": f"{median_ratio(times, side, PEFT):.4f}",
            "rounds": rounds,
            "error": f"{errors[side]:.3e}",
        }
        for side, seconds in times.items()
    ]


def show(dtype: str, phase: str, adapters: int, rows: list[dict[str, Any]]) -> None:
    """Print the ratios of one batch."""
    found = {row["side"]: row for row in rows}
    base = ", ".join(f"{s} {float(r['ratio_to_base']):.2f}" for s, r in found.items())
    median = float(found[BASE]["median_ms"])
    print(f"{dtype} {phase} {adapters} adapters, base {median:.2f} ms; over base:")
    print(f"  {base}")
    for side in (OURS, OURS_ONCE):
        row = found[side]
        by_hand = "best_by_hand" in row and (
            f", {float(row['ratio_to_best_by_hand']):.3f} of {row['best_by_hand']}"
        )
        print(f"  {side}: {float(row['ratio_to_peft']):.3f} of PEFT{by_hand or ''}", flush=True)


if __name__ == "__main__":
    sys.exit(main())

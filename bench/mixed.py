"""Mixed batches on SmolLM2: fastlora against PEFT and against plain PyTorch by hand, on a CPU.

python bench/mixed.py [--dtypes fp32,bf16] [--adapters 1,4,16,64] [--out CSV]

All linear layers, rank 16, 64 sequences in random order over the adapters, one thread, one process,
all sides in turn. ``decode`` is one token of each sequence, ``prefill`` sixteen. A side is timed
only after its outputs have been compared with float64.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from machine import describe
from mixed_strategies import STRATEGIES, by_hand

import fastlora
from fastlora import measure, smollm2
from fastlora.mixed_bench import counts
from fastlora.mixed_contest import (
    BASE,
    IN_TURN,
    OURS,
    PEFT,
    Check,
    Contest,
    interleaved_seconds,
    last_output,
    median_ratio,
    quiet_transformers,
)

ROOT = Path(__file__).resolve().parent.parent
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PHASES = {"decode": 1, "prefill": 16}
SEQUENCES, RANK = 64, 16
# One block around all forwards: what a decode loop does, where `OURS` enters one for each.
OURS_ONCE = "fastlora_one_block"
SORTED = "_sorted_before"


def main() -> int:
    """Measures and writes the CSV, a row as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtypes", default="fp32,bf16")
    parser.add_argument("--phases", default="decode,prefill")
    parser.add_argument("--adapters", type=counts, default=[1, 4, 16, 64])
    parser.add_argument("--rounds", type=int, default=9, help="of decode; prefill has a third")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/mixed_cpu.csv")
    args = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device("cpu")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="") as file, measure.torch_threads(1), quiet_transformers():
        machine = describe(device, ROOT) | {"cpu": processor(), "threads": 1}
        writer = None
        for dtype in args.dtypes.split(","):
            base = smollm2.load_model(smollm2.model_dir(), DTYPES[dtype])
            contest = Contest(base, max(args.adapters), RANK)
            for phase in args.phases.split(","):
                rounds = args.rounds if phase == "decode" else max(1, args.rounds // 3)
                for adapters in args.adapters:
                    rows = measured(contest, PHASES[phase], adapters, rounds)
                    for row in rows:
                        facts = {"dtype": dtype, "phase": phase, "adapters": adapters}
                        full = machine | facts | row
                        if writer is None:
                            writer = csv.DictWriter(file, list(full))
                            writer.writeheader()
                        writer.writerow(full)
                    file.flush()
                    show(dtype, phase, adapters, rows)
    return 0


def measured(contest: Contest, tokens: int, adapters: int, rounds: int) -> list[dict[str, Any]]:
    """Checks and times all sides of one batch; a row each."""
    ids = contest.random_ids(SEQUENCES, tokens)
    mix = contest.random_mix(SEQUENCES, adapters)
    sides = contest.sides(mix, ids)
    del sides[IN_TURN]
    sides[OURS_ONCE] = partial(last_output, contest.ours, ids)
    for name, strategy in STRATEGIES.items():
        sides[name] = by_hand(contest, strategy, mix, ids)
        if name != "gathered_bmm":  # no row moves there anyway
            sides[name + SORTED] = by_hand(contest, strategy, mix, ids, sorted_before=True)
    with ExitStack() as stack:
        stack.enter_context(fastlora.adapters(contest.ours, mix))
        checks = contest.check(sides, mix, ids)
        times = interleaved_seconds(sides, rounds, device=ids.device)
    best = min(STRATEGIES, key=lambda name: statistics.median(times[name]))
    rows = []
    for side, seconds in times.items():
        check = checks.get(side, Check(0.0, 0.0))
        rows.append(
            {
                "sequences": SEQUENCES,
                "tokens": tokens,
                "rank": RANK,
                "side": side,
                "median_ms": f"{statistics.median(seconds) * 1e3:.2f}",
                "ratio_to_base": f"{median_ratio(times, side, BASE):.4f}",
                "ratio_to_peft": f"{median_ratio(times, side, PEFT):.4f}",
                "ratio_to_best_by_hand": f"{median_ratio(times, side, best):.4f}",
                "best_by_hand": best,
                "rounds": rounds,
                "error": f"{check.error:.3e}",
                "budget": f"{check.budget:.3e}",
            }
        )
    return rows


def show(dtype: str, phase: str, adapters: int, rows: list[dict[str, Any]]) -> None:
    """Prints one batch's ratios."""
    found = {row["side"]: row for row in rows}
    base = ", ".join(f"{s} {float(r['ratio_to_base']):.2f}" for s, r in found.items())
    print(f"{dtype} {phase} {adapters} adapters, base {found[BASE]['median_ms']} ms; over base:")
    print(f"  {base}")
    for side in (OURS, OURS_ONCE):
        row = found[side]
        print(
            f"  {side}: {float(row['ratio_to_peft']):.3f} of PEFT, "
            f"{float(row['ratio_to_best_by_hand']):.3f} of {row['best_by_hand']}",
            flush=True,
        )


def processor() -> str:
    """Returns the processor's name, or "unknown"."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "unknown"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown"


if __name__ == "__main__":
    sys.exit(main())

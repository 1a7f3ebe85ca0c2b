"""Times the seven linears of a decoder layer in one CUDA graph: bare, with fastlora and with PEFT.

    python bench/layer.py --out layer.csv --tests pass [--seconds 120] [--rank 16] [--dry-run]

The sizes are those of Llama-3.1-8B, in bf16. One call runs q, k, and v with one input, o, gate and
up with one input, and down. A training step also runs their backward pass. The weights of a layer
are larger than any L2 cache, so a second call finds none of them there. PEFT takes part if it is
installed.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastlora.bench.contenders import Contender
from fastlora.bench.cpu_run import csv_rows
from fastlora.bench.harness import Timing, error_text, time_contenders
from fastlora.bench.host import BARE, Case, Shape, running, warm_up

ROWS = (64, 1, 16, 2048, 32, 256, 24, 48, 128, 512, 8192)
TRAIN_ROWS, SOME_ROWS, ADAPTERS = (2048, 8192), (64, 2048), (64, 1, 4, 16)
TINY = Shape(hidden=32, kv=16, inner=48, rows=8, rank=4)
CALL_US = 200.0  # about the time of a decode; it determines the number of calls in a replay
CASE_SECONDS = 5.0


class LayerAdapterOperands(NamedTuple):
    """The attributes of a problem that `time_contenders` uses."""

    x: torch.Tensor


def cases() -> Iterator[tuple[Case, int]]:
    """Yield each case and its number of rows, the most informative first."""
    decode, train = Case("forward", torch.no_grad), Case("train", torch.enable_grad, dropout=0.0)
    mixed = Case("mixed", torch.no_grad, block="one")
    yield decode, ROWS[0]
    yield from ((mixed._replace(adapters=count), 64) for count in ADAPTERS)
    yield train, TRAIN_ROWS[0]
    yield from ((decode, m) for m in ROWS[1:])
    yield train._replace(name="train, dropout", dropout=0.1), TRAIN_ROWS[0]
    yield from ((decode._replace(name="forward, DoRA", dora=True), m) for m in SOME_ROWS)
    yield train._replace(name="train, DoRA", dora=True), TRAIN_ROWS[0]
    yield from ((mixed._replace(adapters=count), m) for m in (2048, 256) for count in ADAPTERS)
    yield train, TRAIN_ROWS[1]
    yield train._replace(name="train, dropout", dropout=0.1), TRAIN_ROWS[1]


def tiny_cases() -> Iterator[tuple[Case, int]]:
    """Yield the first two cases in small sizes, for a dry run."""
    for case, _ in itertools.islice(cases(), 2):
        yield case._replace(adapters=min(case.adapters, 4)), TINY.rows


def timed(case: Case, device: torch.device, shape: Shape) -> dict[str, Any]:
    """Return the timing of each side, or a text that says why there is none."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    outcome: dict[str, Any] = {}
    with running(case, device, shape, dtype) as sides:
        for name, side in list(sides.items()):
            try:
                warm_up({name: side})
            except Exception as error:
                outcome[name] = error_text(error)
                del sides[name]
        run = [Contender(name, "", lambda _, f=side: f()) for name, side in sides.items()]
        problem: Any = LayerAdapterOperands(torch.empty(0, device=device))
        time_contenders(run, [problem], CALL_US * max(1, shape.rows / 64), lambda _: None, outcome)
    return outcome


def main() -> int:
    """Time cases until all are done or the time is up; return 1 if fastlora failed in any case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the CSV")
    parser.add_argument("--tests", choices=("pass", "fail"), required=True, help="for the CSV")
    parser.add_argument("--seconds", type=float, default=120.0, help="start no case after these")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes; times mean nothing")
    args = parser.parse_args()
    end, failed = time.monotonic() + args.seconds, False
    llama = Shape(hidden=4096, kv=1024, inner=14336, rank=args.rank)
    shape, todo = (TINY, tiny_cases()) if args.dry_run else (llama, cases())
    with csv_rows(args.out, torch.device(args.device)) as write:
        for case, m in todo:
            if time.monotonic() + CASE_SECONDS * (not args.dry_run) > end:
                print(f"deadline: nothing from {case.name}, {m} rows on", flush=True)
                break
            outcome = timed(case, torch.device(args.device), shape._replace(rows=m))
            bare = outcome.get(BARE)
            for name, result in outcome.items():
                ok, unit = isinstance(result, Timing), isinstance(bare, Timing)
                failed |= not ok and name != "peft"
                times = result if ok else ("", "", "")
                ratio = f"{result.median / bare.median:.4f}" if ok and unit else ""
                row = {"case": case.name, "M": m, "adapters": case.adapters, "r": shape.rank}
                row |= {"side": name, "status": "ok" if ok else result, "tests": args.tests}
                row |= dict(zip(("median_us", "p20_us", "p80_us"), times, strict=True))
                write(row | {"ratio_to_bare": ratio})
                line = f"{result.median:.1f} us, x{ratio}" if ok else result
                print(f"{case.name} M={m} adapters={case.adapters} {name}: {line}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

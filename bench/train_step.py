"""The training step on SmolLM2: fastlora against PEFT, time and peak memory, on a CPU.

python bench/train_step.py [--methods lora,dora] [--dtypes fp32,bf16] [--dropout 0,0.1]
    [--batch 4x128] [--base plain|nf4] [--out CSV]

All linear layers have adapters of rank 16. A step consists of forward, loss, and backward, and
gradients are deleted after it. The sides run in turn on one thread of one process, and the clock is
the CPU time of this process. By default, PEFT keeps the adapters of a bf16 base in fp32. For bf16
there are therefore two rows per dropout, in which both sides have adapters of the row's dtype. A
step is timed only after its loss has been compared with PEFT's (without dropout, because the masks
differ), and after each model has run an untimed step. The first step in a fresh process has more
overhead for PEFT, because the pages of its temporaries have not been touched yet. A DoRA step is
also timed against fastlora's LoRA step. A forward pass is an evaluation, without dropout and
gradients.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fastlora
from fastlora.bench import measure
from fastlora.bench.cpu_run import BASES, DTYPES, csv_rows, load_base
from fastlora.bench.machine import results_folder

RANK = 16
ALLOCATOR = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "LD_PRELOAD")


def main() -> int:
    """Measure all cases and write the CSV, each row as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", default="lora,dora")
    parser.add_argument("--dtypes", default="fp32,bf16")
    parser.add_argument("--dropout", default="0,0.1")
    parser.add_argument("--batch", default="4x128", help="sequences x tokens")
    parser.add_argument("--base", choices=BASES, default="plain")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=results_folder() / "train_step_cpu.csv")
    args = parser.parse_args()
    sequences, tokens = map(int, args.batch.split("x"))
    ids = torch.randint(0, 49_000, (sequences, tokens), generator=torch.Generator().manual_seed(0))
    common = {"allocator": allocator(), "batch": args.batch, "rank": RANK, "base": args.base}
    with csv_rows(args.out) as write:
        for method, dtype, dropout in itertools.product(
            args.methods.split(","), args.dtypes.split(","), map(float, args.dropout.split(","))
        ):
            for adapters in ("fp32",) if dtype == "fp32" else ("fp32", dtype):
                row = measured(method, dtype, adapters, dropout, ids, args.rounds, args.base)
                write(common | row)
                show(row)
    return 0


def measured(
    method: str,
    dtype: str,
    adapters: str,
    dropout: float,
    ids: torch.Tensor,
    rounds: int,
    base_kind: str = "plain",
) -> dict[str, Any]:
    """Check and time one kind of step and return its row."""
    kind = base_kind, DTYPES[dtype], adapters == "fp32", dropout
    ours, theirs = twins(*kind, method == "dora")
    mine, other, base = step(ours, ids), step(theirs, ids), forward(ours, ids, bare=True)
    losses = mine(), other()
    # The tests compare gradients. This check finds sides that do not run the same model.
    if not dropout and abs(losses[0] - losses[1]) > 8 * torch.finfo(DTYPES[dtype]).eps * losses[1]:
        raise RuntimeError(f"losses differ: {losses[0]} and PEFT's {losses[1]}")
    times = measure.interleaved_seconds({"ours": mine, "peft": other}, rounds, warmup=1)
    over_base = ratio(mine, base, 3)
    peaks = [measure.peak_step_bytes(side) for side in (mine, other)]
    over_lora = ""
    if method == "dora":
        plain = sides_of(*kind, False)[0]()
        measure.share_frozen(ours, plain)
        over_lora = f"{ratio(mine, step(plain, ids), rounds):.4f}"
    # Evaluated last: on some CPUs, bitsandbytes repacks PEFT's 4-bit weights, which cannot train
    # then.
    forwards = ratio(forward(ours.eval(), ids), forward(theirs.eval(), ids), rounds)
    return {
        "method": method,
        "dtype": dtype,
        "adapters": adapters,
        "dropout": dropout,
        "fastlora_ms": f"{statistics.median(times['ours']) * 1e3:.1f}",
        "peft_ms": f"{statistics.median(times['peft']) * 1e3:.1f}",
        "ratio_to_peft": f"{measure.median_ratio(times, 'ours', 'peft'):.4f}",
        "forward_ratio_to_peft": f"{forwards:.4f}",
        "ratio_to_base_forward": f"{over_base:.4f}",
        "ratio_to_lora": over_lora,
        "fastlora_peak_mib": f"{peaks[0] / 2**20:.1f}",
        "peft_peak_mib": f"{peaks[1] / 2**20:.1f}",
        "peak_ratio": f"{peaks[0] / peaks[1]:.4f}",
        "rounds": rounds,
    }


def ratio(side: Callable[[], object], other: Callable[[], object], rounds: int) -> float:
    """Return one side's time divided by another's."""
    times = measure.interleaved_seconds({"side": side, "other": other}, rounds, warmup=1)
    return measure.median_ratio(times, "side", "other")


def twins(
    base_kind: str, dtype: torch.dtype, fp32_adapters: bool, dropout: float, use_dora: bool
) -> tuple[Any, Any]:
    """Return the same adapter in fastlora and in PEFT, in training mode, on one base model."""
    mine, theirs = (make() for make in sides_of(base_kind, dtype, fp32_adapters, dropout, use_dora))
    measure.share_frozen(mine, theirs)
    return mine, theirs


def sides_of(
    base_kind: str, dtype: torch.dtype, fp32_adapters: bool, dropout: float, use_dora: bool
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Return functions that create fastlora's model and PEFT's model."""
    import peft

    config = {
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "lora_dropout": dropout,
        "target_modules": "all-linear",
        "use_dora": use_dora,
    }

    def make(get: Callable[..., Any], config_class: Callable[..., Any]) -> Any:
        base = load_base(base_kind, dtype)
        model: Any = get(base, config_class(**config), autocast_adapter_dtype=fp32_adapters)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_A" in name or "lora_B" in name:  # a magnitude keeps its initial norm
                    size = 1.0 if "lora_A" in name else 0.1
                    values = torch.randn(parameter.shape, generator=generator)
                    parameter.copy_(values * size / parameter.shape[1] ** 0.5)
        return model.train()

    return (
        functools.partial(make, fastlora.get_peft_model, fastlora.LoraConfig),
        functools.partial(make, peft.get_peft_model, peft.LoraConfig),
    )


def step(model: Any, ids: torch.Tensor) -> Callable[[], float]:
    """Return a function that runs one step without an optimizer, which is torch's on both sides."""
    parameters = [p for p in model.parameters() if p.requires_grad]

    def run() -> float:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        for parameter in parameters:
            parameter.grad = None
        return float(loss.detach())

    return run


def forward(model: Any, ids: torch.Tensor, *, bare: bool = False) -> Callable[[], None]:
    """Return a function that runs one forward pass without gradients, of the base if ``bare``."""

    def run() -> None:
        with torch.no_grad(), model.disable_adapter() if bare else contextlib.nullcontext():
            model(input_ids=ids, labels=ids, use_cache=False)

    return run


def allocator() -> str:
    """Return the environment's settings of the allocator, which affect PEFT's overhead."""
    told = [f"{name}={os.environ[name]}" for name in ALLOCATOR if name in os.environ]
    return "; ".join(told) or "default"


def show(row: dict[str, Any]) -> None:
    """Print one row."""
    print(
        f"{row['method']}, {row['dtype']} base, {row['adapters']} adapters, "
        f"dropout {row['dropout']}: "
        f"{row['fastlora_ms']} ms, {row['ratio_to_peft']} of PEFT, "
        f"a forward {row['forward_ratio_to_peft']}; "
        f"{row['ratio_to_base_forward']} of the base forward, "
        f"{row['ratio_to_lora'] or 1} of LoRA; peak {row['fastlora_peak_mib']} MiB, "
        f"{row['peak_ratio']} of PEFT",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())

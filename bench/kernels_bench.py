"""``fastlora bench kernels``: time one linear layer of a given shape on a GPU, or predict its time.

On a GPU, every contender is checked against float64. It is then timed in CUDA graphs, with operands
that are not in the caches. Without a GPU, fastlora's kernels are compiled for ``--chip``. The
command prints properties of the compiled code and a prediction. Every line and row says that it is
a prediction.
"""

from __future__ import annotations

import argparse
import importlib.util
from argparse import ArgumentTypeError
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fastlora.bench import contenders, mixed_kernels
from fastlora.bench.contenders import SCALING, YARDSTICK, Contender, Problem
from fastlora.bench.harness import DeviceLostError
from fastlora.bench.linear import Bench
from fastlora.bench.machine import ROOT
from fastlora.bench.plot import picture
from fastlora.bench.shapes import DECODE_MAX_ROWS, Point, least_work
from fastlora.commands.options import Option, parse_options
from fastlora.validation import FastLoraError

DTYPES = ("bfloat16", "float16", "float32")


class KernelsBenchError(FastLoraError, ValueError):
    """The benchmark cannot run with these options."""


def shape(text: str) -> tuple[int, int, int, int]:
    """Parse ``"M,K,N,r"`` for argparse."""
    try:
        m, k, n, r = (int(part) for part in text.split(","))
    except ValueError:
        m = k = n = r = 0
    if min(m, k, n, r) < 1:
        raise ArgumentTypeError(
            f"expected rows, inputs, outputs and rank, such as 16,4096,4096,16, got {text!r}"
        )
    return m, k, n, r


OPTIONS = (
    Option(
        "--shape",
        "rows, input features, output features and rank; may be given several times",
        *(None, None, shape, "M,K,N,r", {"action": "append"}),
    ),
    Option("--adapters", "rows take N adapters in random order (default: one for all)", 0),
    Option(
        "--contender",
        "one of --list, or FILE.py:FUNCTION of yours, called as fn(x, weight, bias, lora_a, "
        "lora_b, scaling), which returns y; may be given several times (default: all)",
        metavar="NAME",
        more={"action": "append"},
    ),
    Option("--list", "list the contenders and stop", False),
    Option("--dtype", "dtype of x, weights and factors", "bfloat16", more={"choices": DTYPES}),
    Option(
        "--device",
        "auto: the GPU, or a prediction; cpu: check and time what needs no GPU",
        "auto",
        more={"choices": ("auto", "cpu", "cuda")},
    ),
    Option("--chip", "what to predict for without a GPU", "sm_90"),
    Option("--out", "the CSV", Path("kernels.csv"), metavar="FILE"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0, or 1 if a contender failed or its results were wrong."""
    args = parse_options(
        "fastlora bench kernels",
        "Times one linear with adapters on a GPU, by fastlora's kernels and without them. Without "
        "a GPU it compiles them, says what the code says, and predicts.",
        *(OPTIONS, argv),
        epilog="Example: fastlora bench kernels --shape 16,4096,4096,16 --contender mine.py:fn",
    )
    timed = args.device != "auto" or torch.cuda.is_available()
    device = "cpu" if args.device == "cpu" else "cuda"
    if timed and device == "cuda" and not torch.cuda.is_available():
        raise KernelsBenchError("--device cuda: PyTorch sees no GPU")
    if args.list:
        print("\n".join(names_of(args, device) if timed else predicted_names(args)))
        return 0
    if not args.shape:
        raise KernelsBenchError("--shape M,K,N,r is missing, such as --shape 16,4096,4096,16")
    for m, *_ in args.shape:
        if not 0 <= args.adapters <= m:
            raise KernelsBenchError(f"--adapters {args.adapters}: expected 0 to M = {m}")
    if not args.out.parent.is_dir():
        raise KernelsBenchError(f"--out {args.out}: there is no folder {args.out.parent}")
    return measure(args, device) if timed else predict(args)


# ------------------------------------------------------------------------------------- measured


def points(args: argparse.Namespace) -> list[Point]:
    """Return the problems to measure."""
    mode, ranks = ("mixed", True) if args.adapters else ("forward", False)
    return [
        Point(mode, "yours", "linear", m, k, n, r, args.adapters, str(r) if ranks else "")
        for m, k, n, r in args.shape
    ]


def names_of(args: argparse.Namespace, device: str) -> list[str]:
    """Return the names of the contenders that can be timed."""
    if args.adapters:
        ours = (*mixed_kernels.OURS, mixed_kernels.DENSE) if device == "cuda" else ()
        return [c.name for c in (*mixed_kernels.BY_HAND, *ours, mixed_kernels.GROUPED_MM)]
    variants = contenders.FUSED_VARIANTS if device == "cuda" else ()
    return [c.name for c in (*contenders.FORWARD, *variants) if c.kind != "part"]


def measure(args: argparse.Namespace, device: str) -> int:
    """Check and time the contenders; print a line for each, and write the CSV and the picture."""
    wanted = args.contender or names_of(args, device)
    yours = [contender_of(name) for name in wanted if ".py:" in name]
    if yours and args.adapters:
        raise KernelsBenchError(
            f"{yours[0].name}: a function has one adapter; leave --adapters out"
        )
    check_names([name for name in wanted if ".py:" not in name], names_of(args, device))
    kept = {"base", *YARDSTICK.values(), *mixed_kernels.YARDSTICK.values(), *wanted}

    class Chosen(Bench):
        """The requested contenders, and those that they are compared with."""

        def contenders_for(self, point: Point) -> Sequence[Contender]:
            found = [c for c in super().contenders_for(point) if c.kind != "part"]
            return [*(c for c in found if c.name in kept), *yours]

    torch.manual_seed(0)
    run = argparse.Namespace(
        device=device,
        impl="triton" if device == "cuda" else "eager",
        dtype=args.dtype,
        out=args.out,
        resume=False,
        tests="",
        checkout=ROOT,
    )
    bench = Chosen(run)
    for point in points(args):
        before = len(bench.file.rows)
        try:
            bench.measure(point)
        except DeviceLostError as lost:
            raise KernelsBenchError(f"{point}: {lost} took the GPU down") from lost
        print(point)
        for row in bench.file.rows[before:]:
            print(line_of(row, point, bench.contenders_for(point), bench.dtype.itemsize))
    bench.file.close()
    print(args.out)
    draw(args.out, list(dict.fromkeys(row["contender"] for row in bench.file.rows)))
    return 1 if bench.failed else 0


def line_of(row: dict[str, str], point: Point, found: Sequence[Contender], element: int) -> str:
    """Return a line with time, TFLOP/s and GB/s of the necessary work, and the floor's share."""
    if row["status"] != "ok":
        return f"  {row['contender']}: {row['status']}; not timed"
    kind = next(c.kind for c in found if c.name == row["contender"])
    elements, flop = least_work(kind, point)
    us, floor = float(row["median_us"]), float(row["floor_us"])
    return (
        f"  {row['contender']}: {us:.1f} us, {flop / us / 1e6:.1f} TFLOP/s, "
        f"{element * elements / us / 1e3:.0f} GB/s, {100 * floor / us:.0f} % of the floor's speed"
    )


def draw(source: Path, shown: Sequence[str]) -> None:
    """Draw the CSV as a picture next to it, if matplotlib is installed."""
    target = source.with_suffix(".png")
    try:
        if picture(source, target, shown):
            print(target)
    except ImportError:
        print("no picture: matplotlib is not installed")


def check_names(wanted: Sequence[str], known: Sequence[str]) -> None:
    """Raise `KernelsBenchError` for a name that is not a known contender."""
    for name in wanted:
        if name not in known:
            raise KernelsBenchError(
                f"--contender {name}: unknown; expected FILE.py:FUNCTION or one of "
                f"{', '.join(known)}"
            )


def contender_of(text: str) -> Contender:
    """Return the contender that ``FILE.py:FUNCTION`` names."""
    file, _, name = text.rpartition(":")
    if not Path(file).is_file():
        raise KernelsBenchError(f"--contender {text}: there is no file {file}")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    if spec is None or spec.loader is None:
        raise KernelsBenchError(f"--contender {text}: {file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise KernelsBenchError(f"--contender {text}: {type(error).__name__}: {error}") from error
    function: Callable[..., Any] | None = getattr(module, name, None)
    if not callable(function):
        raise KernelsBenchError(f"--contender {text}: {file} has no function {name!r}")

    def run(p: Problem) -> tuple[torch.Tensor]:
        return (function(p.x, p.weight, None, p.lora_a, p.lora_b, SCALING),)

    return Contender(text, "full", run)


# ------------------------------------------------------------------------------------ predicted


def predicted_names(args: argparse.Namespace) -> list[str]:
    """Return the names of the contenders that can be predicted."""
    from fastlora.bench.counted import ADDMM, BARE, OURS, PEFT

    peft = [PEFT] if importlib.util.find_spec("peft") else []
    return [BARE, OURS, *peft, *([] if args.adapters else [ADDMM])]


def predict(args: argparse.Namespace) -> int:
    """Compile the kernels, print properties of the code and a prediction, and write the CSV."""
    if importlib.util.find_spec("triton") is None:
        raise KernelsBenchError("there is no GPU, and without triton nothing can be compiled")
    from fastlora.bench import ceilings, counted
    from fastlora.bench import predict as prediction

    if args.chip not in ceilings.CEILINGS:
        known = ", ".join(ceilings.CEILINGS)
        raise KernelsBenchError(f"--chip {args.chip}: unknown; expected one of {known}")
    if args.dtype != "bfloat16":
        raise KernelsBenchError(f"--dtype {args.dtype}: without a GPU only bfloat16 is predicted")
    for name in args.contender or []:
        if ".py:" in name:
            raise KernelsBenchError(
                f"--contender {name}: without a GPU a function is not predicted; --device cpu "
                "checks and times it"
            )
    wanted = args.contender or predicted_names(args)
    check_names(wanted, predicted_names(args))
    print(f"prediction: no GPU; compiled for {args.chip}, nothing below is measured")
    for line in prediction.inputs(args.chip):
        print(f"prediction: {line}")
    rows = []
    for m, k, n, r in args.shape:
        case = counted.Case("decode" if m <= DECODE_MAX_ROWS else "prefill", m, args.adapters)
        for name in wanted:
            linears = {"linear": (k, n)}
            row, found = prediction.row_of(name, f"{k}->{n}", linears, case, r, args.chip)
            print(prediction.line_of(row))
            if name == counted.OURS:
                for line in prediction.details(found, ceilings.CEILINGS[args.chip]):
                    print(f"prediction:   {line}")
            rows.append(row)
    prediction.write(args.out, rows)
    print(f"prediction: {args.out}")
    return 0

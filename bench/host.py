"""Host time of a linear layer, a block, and a training step: fastlora, PEFT, and bare layers.

python bench/host.py [--device auto|cpu|cuda] [--repeats 15] [--calls 10] [--out CSV]

The layer has the seven linear layers of a decoder layer: q, k, and v with one input, o, gate and up
with one input, and down. K = N = 32, with 64 rows, rank 16, and fp32, because the host's work does
not depend on the size. All sides run in turn in one process on one thread, with the same weights.
The clock is the CPU time of this process. A row has the minimum of each side over the repeats.

On a GPU, everything is launched, and the time does not include the work of the device. Elsewhere,
Triton's launches are stubbed (`fastlora.testing.stubbed_launches`). fastlora's kernels then cost as
much as on a GPU up to the driver call, and compute nothing. The matrix products that PyTorch
computes for PEFT, for the bare layer, and for fastlora run on the CPU. Nothing is subtracted for
them.

Launches and products are counted with stubbed launches on every machine. The columns for PEFT are
empty if it is not installed.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import importlib.util
import itertools
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import fastlora
from fastlora.bench.cpu_run import csv_rows
from fastlora.bench.machine import results_folder
from fastlora.testing import stubbed_launches

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SIZE, ROWS, RANK = 32, 64, 16
MIXES = 8  # number of different orders of a batch's adapters, used in turn
PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm")

BARE, OURS, PEFT = "bare", "fastlora", "peft"
Sides = dict[str, Callable[[], object]]


class Shape(NamedTuple):
    """Sizes of the linear layers in a decoder layer, and rows of x: x is ``[rows, hidden]``.

    k and v have ``kv`` outputs, which must divide ``hidden``. gate and up have ``inner`` outputs.
    """

    hidden: int = SIZE
    kv: int = SIZE
    inner: int = SIZE
    rows: int = ROWS
    rank: int = RANK


SMALL = Shape()


class Case(NamedTuple):
    """One row of the CSV: what runs, and in which mode of PyTorch.

    Attributes:
        name: Name of the row.
        mode: Function that returns the context in which all sides run.
        adapters: Number of adapters in the model. With several, rows of the batch have them in
            random order.
        block: For a batch, "one" for one block around all forward passes, or "each" for a block
            around each.
        dropout: Dropout of a training step, or None for an evaluation.
        dora: Whether adapters use DoRA.
    """

    name: str
    mode: Callable[[], Any]
    adapters: int = 1
    block: str = ""
    dropout: float | None = None
    dora: bool = False


CASES = (
    Case("evaluation", torch.no_grad),
    Case("evaluation, inference_mode", torch.inference_mode),
    Case("mixed batch, one block", torch.no_grad, 4, "one"),
    Case("mixed batch, a block each", torch.no_grad, 4, "each"),
    Case("training step", torch.enable_grad, dropout=0.0),
    Case("training step, dropout", torch.enable_grad, dropout=0.1),
)


class Layer(nn.Module):
    """The seven linear layers, without the other parts of a decoder layer."""

    def __init__(self, shape: Shape = SMALL, **where: Any) -> None:
        super().__init__()
        hidden, kv, inner, *_ = shape
        outputs = (hidden, kv, kv, hidden, inner, inner, hidden)
        for name, n in zip(LINEARS, outputs, strict=True):
            k = inner if name == "down_proj" else hidden
            self.add_module(name, nn.Linear(k, n, bias=False, **where))

    def forward(self, x: torch.Tensor, **given: Any) -> torch.Tensor:
        """Return ``[M, hidden]`` for x of that shape; ``given`` goes to every linear layer."""
        q, k, v = (each(x, **given) for each in (self.q_proj, self.k_proj, self.v_proj))
        kv = k + v
        if kv.shape != q.shape:
            kv = kv.repeat(1, q.shape[1] // kv.shape[1])
        x = self.o_proj(q + kv, **given)
        return self.down_proj(self.gate_proj(x, **given) + self.up_proj(x, **given), **given)


def main() -> int:
    """Measure all cases and write the CSV, each row as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--calls", type=int, default=10, help="of a repeat")
    parser.add_argument("--dry-run", action="store_true", help="one call of one case")
    parser.add_argument("--tests", default="", help="whether the tests were green: a column")
    parser.add_argument("--out", type=Path, default=results_folder() / "host.csv")
    args = parser.parse_args()
    found = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(found if args.device == "auto" else args.device)
    repeats, calls = (1, 1) if args.dry_run else (args.repeats, args.calls)
    with csv_rows(args.out, device) as write:
        for case in CASES[: 1 if args.dry_run else None]:
            row = measured(case, device, repeats, calls)
            write(row | {"repeats": repeats, "calls": calls, "tests": args.tests})
            show(row)
    return 0


def measured(case: Case, device: torch.device, repeats: int, calls: int) -> dict[str, Any]:
    """Time and count one case and return its row, with times per linear layer (1/7 of a call)."""
    chip: tuple[Any, ...] = ()
    stubs: Any = contextlib.nullcontext()
    if device.type == "cuda":
        from fastlora.kernels.chips import chip_of

        chip = chip_of(device)
    else:
        stubs = stubbed_launches()
    with stubs as noted, running(case, device) as sides:
        found = host_us(sides, repeats, calls, noted)
        times = {name: us / len(LINEARS) for name, us in found.items()}
    launches, products = counted(case, chip)
    over = {name: us - times[BARE] for name, us in times.items()}
    return {
        "case": case.name,
        "adapters": case.adapters,
        "launching": "real" if device.type == "cuda" else "stubbed",
        "linears": len(LINEARS),
        "M": ROWS,
        "K": SIZE,
        "N": SIZE,
        "r": RANK,
        "bare_us": f"{times[BARE]:.2f}",
        "fastlora_us": f"{times[OURS]:.2f}",
        "peft_us": f"{times[PEFT]:.2f}" if PEFT in times else "",
        "fastlora_over_bare_us": f"{over[OURS]:.2f}",
        "peft_over_bare_us": f"{over[PEFT]:.2f}" if PEFT in over else "",
        "ratio_to_peft": f"{over[OURS] / over[PEFT]:.4f}" if PEFT in over else "",
        "launches": launches,
        "products": products,
    }


def host_us(
    sides: Sides, repeats: int, calls: int, noted: list[Any] | None = None
) -> dict[str, float]:
    """Return the CPU time of one call of each side, as the minimum over the repeats.

    In each repeat, every side runs ``calls`` times, starting with another side each time. Launches
    that the stubs have recorded are cleared first, because a real driver would not keep them.
    """
    best = dict.fromkeys(sides, float("inf"))
    names = list(sides)
    warm_up(sides)
    for index in range(repeats):
        start = index % len(names)
        for name in names[start:] + names[:start]:
            call = sides[name]
            if noted is not None:
                noted.clear()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            before = time.process_time()
            for _ in range(calls):
                call()
            best[name] = min(best[name], (time.process_time() - before) * 1e6 / calls)
    return best


def warm_up(sides: Sides) -> None:
    """Call each side until launches are compiled and layers know which of them share an input."""
    for call in (*sides.values(),) * 3:
        call()


def counted(case: Case, chip: tuple[Any, ...] = ()) -> tuple[int, int]:
    """Return the number of Triton launches and of PyTorch products in one call of fastlora.

    ``chip`` names the chip and its number of processors for the choice of configs; see
    `stubbed_launches`.
    """
    with stubbed_launches(*chip) as launches, running(case, torch.device("cpu")) as sides:
        warm_up(sides)
        before = len(launches)
        sides[OURS]()
        made = len(launches) - before
        # The profiler sees registered operators, which a grouped call of shared-input layers
        # bypasses.
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            sides[OURS]()
    return made, sum(e.count for e in recorded.key_averages() if e.key in PRODUCTS)


@contextlib.contextmanager
def running(
    case: Case, device: torch.device, shape: Shape = SMALL, dtype: torch.dtype = torch.float32
) -> Iterator[Sides]:
    """Yield the sides of a case, within the contexts in which they run."""
    torch.manual_seed(0)
    where = {"device": device, "dtype": dtype}
    bare = Layer(shape, **where).requires_grad_(False)
    x = torch.randn(shape.rows, shape.hidden, **where)
    models = {OURS: adapted(case, bare, fastlora, shape)}
    for name in LINEARS:  # also without a GPU
        getattr(models[OURS].base_model.model, name).impl = "triton"
    if importlib.util.find_spec("peft"):
        models[PEFT] = adapted(case, bare, importlib.import_module("peft"), shape)
    # Only the inner layers: a wrapper around the model is not part of a linear layer's cost.
    layers = {BARE: bare} | {name: model.base_model.model for name, model in models.items()}
    with case.mode(), contextlib.ExitStack() as around:
        if case.dropout is not None:
            yield {name: step(layer, x) for name, layer in layers.items()}
            return
        sides = {name: call(layer, x) for name, layer in layers.items()}
        mixes = orders(case.adapters, shape.rows)
        if case.block == "one":
            around.enter_context(fastlora.adapters(models[OURS], mixes[0]))
            if PEFT in sides:
                sides[PEFT] = call(layers[PEFT], x, adapter_names=mixes[0])
        elif case.block == "each":
            sides[OURS] = blocks(models[OURS], layers[OURS], x, mixes)
            if PEFT in sides:
                sides[PEFT] = batches(models[PEFT], x, mixes)
        yield sides


def adapted(case: Case, bare: Layer, library: Any, shape: Shape) -> Any:
    """Return a library's model over the weights of the bare layers."""
    layer = copy.deepcopy(bare, {id(weight): weight for weight in bare.parameters()})
    config = library.LoraConfig(
        r=shape.rank,
        lora_alpha=2 * shape.rank,
        lora_dropout=case.dropout or 0.0,
        target_modules=list(LINEARS),
        use_dora=case.dora,
    )
    first, *others = names_of(case.adapters)
    model = library.get_peft_model(layer, config, adapter_name=first)
    for name in others:
        model.add_adapter(name, config)
    return model.train(case.dropout is not None)


def names_of(adapters: int) -> list[str]:
    """Return the adapters' names."""
    return [f"adapter_{index}" for index in range(adapters)]


def orders(adapters: int, rows: int = ROWS) -> list[list[str]]:
    """Return mixes of a batch in random order, with the same number of rows for each adapter."""
    shuffle, names = random.Random(0), names_of(adapters) * (rows // adapters)
    return [shuffle.sample(names, len(names)) for _ in range(MIXES)]


def call(layer: nn.Module, x: torch.Tensor, **given: Any) -> Callable[[], object]:
    """Return a function that runs a forward pass."""
    return lambda: layer(x, **given)


def blocks(
    model: Any, layer: nn.Module, x: torch.Tensor, mixes: list[list[str]]
) -> Callable[[], object]:
    """Return a function that runs fastlora's forward pass in its own block, with the next mix."""
    turn = itertools.cycle(mixes)

    def run() -> None:
        with fastlora.adapters(model, next(turn)):
            layer(x)

    return run


def batches(model: Any, x: torch.Tensor, mixes: list[list[str]]) -> Callable[[], object]:
    """Return a function that runs PEFT's forward pass with the adapter names of the next mix."""
    turn = itertools.cycle(mixes)
    return lambda: model(x, adapter_names=next(turn))


def step(layer: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    """Return a function that runs forward and backward. As within a model, x needs a gradient."""
    own, dy = x.clone().requires_grad_(), torch.ones_like(x)
    trained = [own, *(p for p in layer.parameters() if p.requires_grad)]

    def run() -> None:
        layer(own).backward(dy)
        for tensor in trained:
            tensor.grad = None

    return run


def show(row: Mapping[str, Any]) -> None:
    """Print one row."""
    peft = f"PEFT {row['peft_over_bare_us']}, ratio {row['ratio_to_peft']}"
    print(
        f"{row['case']}: over the bare {row['bare_us']} us a linear "
        f"fastlora {row['fastlora_over_bare_us']} us, "
        f"{peft if row['peft_us'] else 'PEFT is not installed'}; "
        f"{row['launches']} launches ({row['launching']}), {row['products']} products "
        f"for {row['linears']} linears",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())

"""The launches and operators in a step of linear layers with adapters, with bytes and FLOPs.

For fastlora they are recorded from its real host path on CPU tensors, with launches stubbed and
PyTorch's products skipped. For PEFT, ``addmm_``, and the bare layers they are recorded on meta
tensors. Nothing is computed, so a layer of any size takes milliseconds. All tensors are bf16,
including factors.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastlora
from fastlora.bench.byte_forms import Batch
from fastlora.bench.contenders import addmm_linear
from fastlora.bench.launch_forms import BF16, WIDTH, Work, work_of
from fastlora.bench.shapes import SHARED_INPUTS
from fastlora.ops.torch import products
from fastlora.testing import Launch, stubbed_launches

SEQUENCES = 64  # in a mixed prefill
BARE, OURS, PEFT, ADDMM = "base", "fastlora", "peft", "addmm"
Linears = Mapping[str, tuple[int, int]]  # (K, N) by name
# Linear layers of a decoder layer that receive the same x as another one.
_SIBLING_OF = {name: first for first, *others in SHARED_INPUTS for name in others}
# Operators other than views that launch nothing.
_NO_KERNELS = (
    "empty",
    "new_empty",
    "empty_like",
    "empty_strided",
    "detach",
    "_unsafe_view",
    "lift",
)


class Case(NamedTuple):
    """A step of a layer, with ``adapters`` of a mixed batch, or 0 if one acts on all rows."""

    kind: str
    rows: int
    adapters: int = 0
    dropout: float = 0.0

    @property
    def sequences(self) -> int:
        """Number of sequences in a mixed batch. All rows of a sequence have the same adapter."""
        return min(self.rows, SEQUENCES)

    def names(self) -> list[str]:
        """Return the adapter name of each sequence in a mixed batch."""
        return [f"adapter_{i % self.adapters}" for i in range(self.sequences)]

    def batch(self, n: int, k: int, r: int) -> Batch:
        """Return the operands of a linear layer in a mixed batch, in bf16."""
        each = self.rows // self.sequences
        ids = [i % max(self.adapters, 1) for i in range(self.sequences) for _ in range(each)]
        return Batch(ids, [r] * max(self.adapters, 1), n, k, WIDTH, WIDTH)


# ------------------------------------------------------------------------------------ the model


class Layer(nn.Module):
    """A module of linear layers only, with uninitialized weights, because no value is read."""

    def __init__(self, linears: Linears, device: str) -> None:
        super().__init__()
        for name, (k, n) in linears.items():
            linear = nn.Linear(k, n, bias=False, device="meta", dtype=BF16)
            self.add_module(name, linear.to_empty(device=device).requires_grad_(False))

    def forward(self, xs: dict[str, torch.Tensor], **given: Any) -> list[torch.Tensor]:
        """Return the output of each linear layer. A shared-input group receives the same x."""
        named = self.named_children()
        return [linear(xs[_SIBLING_OF.get(name, name)], **given) for name, linear in named]


def adapted(library: Any, linears: Linears, case: Case, r: int, device: str) -> Any:
    """Return a library's model over a layer, with the adapters of a case."""
    config = library.LoraConfig(
        r=r, lora_alpha=2 * r, lora_dropout=case.dropout, target_modules=list(linears)
    )
    options = {"autocast_adapter_dtype": False}
    made = library.get_peft_model(
        Layer(linears, device), config, adapter_name="adapter_0", **options
    )
    for i in range(1, case.adapters):
        made.add_adapter(f"adapter_{i}", config, **options)
    # PEFT creates later adapters on meta tensors in fp32.
    return made.to(BF16).train(case.kind == "training")


def step(
    layer: Callable[..., Any], linears: Linears, case: Case, device: str
) -> Callable[[], None]:
    """Return a function that runs a forward pass of the case, and in training a backward pass."""
    shape = (case.sequences, case.rows // case.sequences) if case.adapters else (case.rows,)
    shape = (case.rows,) if case.kind == "decode" else shape
    trains = case.kind == "training"
    xs = {
        name: torch.empty(*shape, k, dtype=BF16, device=device, requires_grad=trains)
        for name, (k, _) in linears.items()
        if name not in _SIBLING_OF
    }

    def run() -> None:
        with torch.set_grad_enabled(trains):
            ys = layer(xs)
            if trains:
                torch.autograd.backward(ys, [torch.empty_like(y) for y in ys])
                for x in xs.values():
                    x.grad = None

    return run


# ----------------------------------------------------------------------------------------- counting


def ours(linears: Linears, case: Case, r: int, chip: str, processors: int) -> list[Work]:
    """Return the work of one step of fastlora: its own kernels, and PyTorch's operators."""
    with stubbed_launches(chip, processors) as launches, skipped_products() as made:
        run_last_of(3, linears, case, r, launches.clear, made.clear)
        names = ["", *(launch.kernel for launch in launches)]
        works = [
            work_of(launch, case.batch, r, after_sum=before == "_plane_sums_kernel")
            for before, launch in zip(names, launches, strict=False)
        ]
        return works + made


def run_last_of(
    times: int, linears: Linears, case: Case, r: int, *forget: Callable[[], object]
) -> None:
    """Run fastlora's step several times on CPU tensors, and forget what the earlier ones recorded.

    Layers find out in the first steps which of them share an input.
    """
    layer = adapted(fastlora, linears, case, r, "cpu")
    inner = layer.base_model.model
    for linear in inner.children():
        linear.impl = "triton"
    with contextlib.ExitStack() as stack:
        if case.adapters:
            stack.enter_context(torch.no_grad())
            stack.enter_context(fastlora.adapters(layer, case.names()))
        run = step(inner, linears, case, "cpu")
        for _ in range(times):
            for each in forget:
                each()
            run()
            for parameter in inner.parameters():
                parameter.grad = None


@contextlib.contextmanager
def uncompiled_launches(chip: str, processors: int) -> Iterator[list[Launch]]:
    """Record launches as `stubbed_launches` does, but compile no kernel.

    The launches have no compiled code, and their shared memory is 0.
    """
    from triton.runtime.jit import JITFunction

    from fastlora.kernels import launch as kernel_launches

    with contextlib.ExitStack() as stack:
        launches = stack.enter_context(stubbed_launches(chip, processors))

        def run(kernel: Any, *_: Any, grid: tuple[int, ...], warmup: bool, **given: Any) -> None:
            names = tuple(kernel.arg_names)
            options = given["num_warps"], given.get("num_stages", 1)
            x, y, z = (*grid, 1, 1)[:3]
            values = tuple(given[name] for name in names)
            launches.append(Launch(kernel.__name__, (x, y, z), *options, 0, b"", names, values))

        stack.enter_context(mock.patch.object(JITFunction, "run", run))
        stack.enter_context(mock.patch.object(kernel_launches, "_CAN_CACHE", False))
        yield launches


@contextlib.contextmanager
def skipped_products() -> Iterator[list[Work]]:
    """Record PyTorch's matrix products on CPUs within the block, without computing them.

    A dispatch mode could record them too, but layers take another path within one.
    """
    found: list[Work] = []

    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        made = a.new_empty(a.shape[0], b.shape[1])
        found.append(_operator("mm", [a, b], [made]))
        return made

    def accumulate(
        y: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: float = 1, alpha: float = 1
    ) -> torch.Tensor:
        found.append(_operator("addmm_", [y, a, b], [y]))
        return y

    def total(a: torch.Tensor, b: torch.Tensor, *, alpha: float = 1) -> torch.Tensor:
        if a.dtype != BF16:  # host arithmetic: use another operator than the replaced one
            return torch.sub(a, b, alpha=-alpha)
        made = torch.empty_like(a)
        found.append(_operator("add", [a, b], [made]))
        return made

    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns that a kernel is replaced
        library.impl("mm", product, "CPU")
        library.impl("addmm_", accumulate, "CPU")
        library.impl("add.Tensor", total, "CPU")
    try:
        # On this processor, fastlora may replace 16-bit products by products of parts in fp32.
        with mock.patch.dict(products.EMULATED, clear=True):
            yield found
    finally:
        library._destroy()


def _operator(name: str, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> Work:
    """Return the work of a PyTorch operator that moves each tensor once."""
    loads, stores = (sum(t.numel() * t.itemsize for t in side) for side in (inputs, outputs))
    flops = 2 * outputs[0].numel() * inputs[-1].shape[0] if "mm" in name else 0
    return Work(name, loads, stores, loads + stores, flops)


class _Operators(TorchDispatchMode):
    """A dispatch mode that records PyTorch's operators on meta tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Work] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call the operator and record its work."""
        made, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        inputs = [arg for arg in args if isinstance(arg, torch.Tensor)]
        outputs = [t for t in (made if isinstance(made, tuple) else (made,)) if t is not None]
        if not func.is_view and name not in _NO_KERNELS:
            if name == "index":  # reads only the rows that it writes
                inputs = outputs
            if name == "index_put_":
                inputs = outputs = [args[2]]
            self.found.append(_operator(name, inputs, outputs))
        return made


def others(contender: str, linears: Linears, case: Case, r: int) -> list[Work]:
    """Return the operators of the bare layer, PEFT, or ``addmm_``, recorded on meta tensors."""
    layer: Any = Layer(linears, "meta")
    if contender == PEFT:
        layer = adapted(importlib.import_module("peft"), linears, case, r, "meta").base_model.model
        if case.adapters:
            layer = functools.partial(layer, adapter_names=case.names())
    elif contender == ADDMM:
        trains = case.kind == "training"
        for linear in layer.children():
            linear.forward = addmm_linear(linear.weight, r, trains)
    run, mode = step(layer, linears, case, "meta"), _Operators()
    # As on GPUs, dropout is one kernel.
    with mock.patch.object(F, "dropout", _native_dropout), mode:
        run()
    return mode.found


def _native_dropout(
    x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> torch.Tensor:
    return torch.native_dropout(x, p, True)[0] if training and p else x

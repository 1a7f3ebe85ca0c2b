"""The registered operators: their schemas, and the shapes of what they return.

One opaque operator is crossed per launch sequence of a layer, so that `torch.compile` sees neither
Triton nor the choice of a plan. Nothing here imports Triton before a kernel runs. Everything that
depends on a batch's mix is a tensor on the device: nothing waits for the host, launches and grids
do not depend on the mix, and a CUDA graph replays any.

``impl="triton"`` runs the function of the operator's name in `fastlora.ops.triton.forward` or
`backward`, ``impl="eager"`` that in `fastlora.ops.torch.operators`: PyTorch for many slots, which
compiled graphs of mixed batches call, since they cannot read where rows begin.

Shapes, for M rows, S slots (adapters) and G modules (layers) that share x:

    x ``[M, K]``, weight ``[N, K]``, bias ``[N]``, y and dy ``[M, N]``, dx ``[M, K]``
    lora_a ``[rank, K]``, lora_b ``[N, rank]``, lora_bias ``[N]``, not scaled: one of each adapter,
        of one dtype, None where an adapter leaves the layer alone
    rows: empty where one slot has all rows. Else int32 order ``[M]``, segment_of ``[M]``,
        segment_slot, slot_start ``[S + 1]`` of `fastlora.ops.rows`, and for kernels pieces: see
        `fastlora.ops.triton.pieces`
    factors: lora_a, lora_b and lora_bias of each slot in turn
    s and ds: ``[M, R]`` in x's dtype. With rows they are over sorted positions, R is
        `layout.columns_of` the largest rank, and a row is written up to its adapter's rank
    scaling: fp32 ``[S]``; of one slot also ``[R]`` or without dimensions
    seeds: int64, one for each lora_a, on the device (for PyTorch on the CPU); None: no dropout
    tables: ``[G, S]`` each: int64 addresses of lora_a, of lora_b as rank rows ``[rank, N]``, int32
        rank, fp32 scaling, and if an adapter has one addresses of lora_bias. Blocks lie at
        multiples of 16 bytes in ``factor_dtype``; 0 is none. Addresses are trusted: what lies
        behind them must outlive the launch. ``max_rank`` is the largest rank there may be,
        ``index`` the module's row

A row's dropout mask is a function of its adapter's seed, its number among the adapter's rows and
the column: `fastlora.kernels.philox` with kernels; PyTorch draws its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any, Protocol

import torch

from fastlora.ops.conditions import on_device_of, sees_operators
from fastlora.ops.factors import Factor, present
from fastlora.ops.layout import columns_of, layout, layout_b, max_rank, planes_shape
from fastlora.ops.library import define, fakes, implements
from fastlora.ops.torch import operators, reference

_Tensors = list[torch.Tensor]
_Factors = list[Factor]
_DIRECT: Any = SimpleNamespace()


def operator(schema: str, impl: str | None = None) -> Callable[[Callable[..., Any]], Any]:
    """Adds an operator; decorates what tracing sees of it.

    Args:
        schema: Its first argument is a tensor on the device that it runs on.
        impl: What it always runs; None where its argument ``impl`` says so.
    """
    define(schema)
    name = schema.partition("(")[0]
    arguments = [a.name for a in torch._C.parse_schema(f"fastlora::{schema}").arguments]
    place = arguments.index("impl") if impl is None else None
    attribute, backward = name.removeprefix("lora_"), name.startswith("lora_grad_")

    @implements(name)
    def run(*args: Any) -> Any:
        chosen, given = impl, args
        if place is not None:
            chosen, given = args[place], (*args[:place], *args[place + 1 :])
        if chosen != "triton":
            return getattr(operators, attribute)(*given)
        function = getattr(kernels_of(backward), attribute)
        return on_device_of(args[0], function, *given)

    # Autograd counts writes into a tensor, so an operator that does that is called as registered.
    setattr(_DIRECT, name, getattr(torch.ops.fastlora, name) if "!" in schema else run)
    return fakes(name)


class Operators(Protocol):
    """The operators by name."""

    def __getattr__(self, name: str) -> Callable[..., Any]: ...


def operators_for(x: torch.Tensor, within_node: bool = False) -> Operators:
    """Returns the operators by name, for x and tensors of its kind.

    Where nothing would see a registered operator and x lies on the current device, these are the
    functions that run them: the dispatcher takes 5 us a call. ``within_node`` says that they will
    be called within a node of autograd's, which records nothing.
    """
    registered: Any = torch.ops.fastlora
    if sees_operators(x, within_node):
        return registered
    here = not x.is_cuda or x.device.index == torch.cuda.current_device()
    return _DIRECT if here else registered


@functools.cache
def kernels_of(backward: bool) -> ModuleType:
    """Returns the module that launches what a forward needs, or a backward."""
    from fastlora.ops.triton import backward as gradients
    from fastlora.ops.triton import forward

    return gradients if backward else forward


# -------------------------------------------------------------------------------------- forward

_DROP = "Tensor? seeds, float[] dropout_p"


@operator(
    f"lora_shrink(Tensor x, Tensor[] rows, Tensor?[] lora_a, int modules, {_DROP}, str impl)"
    " -> Tensor"
)
def _(x: torch.Tensor, rows: _Tensors, lora_a: _Factors, modules: int, *_: object) -> torch.Tensor:
    """s of G modules from one read of x: ``[G, M, R]``, or ``[M, R]`` side by side of one slot.

    ``lora_a`` has a module's slots side by side. Where dropout acts there is one module.
    """
    if rows:
        return x.new_empty(modules, x.shape[0], columns_of(max_rank(lora_a, 0)))
    return x.new_empty(x.shape[0], sum(factor.shape[0] for factor in present(lora_a, 0)))


@operator(
    "lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor[] rows, Tensor? s,"
    f" Tensor?[] factors, Tensor scaling, {_DROP}, str impl, str plan) -> Tensor[]"
)
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    rows: _Tensors,
    s: torch.Tensor | None,
    factors: _Factors,
    *_: object,
) -> _Tensors:
    """y, and s unless it is given."""
    y, largest = x.new_empty(x.shape[0], weight.shape[0]), max_rank(factors[::3], 0)
    if s is not None:
        return [y]
    return [y, x.new_empty(x.shape[0], columns_of(largest) if rows else largest)]


@operator(
    "lora_expand_(Tensor(a!) y, Tensor s, Tensor[] rows, Tensor?[] lora_b, Tensor?[] lora_bias,"
    " Tensor scaling, str impl) -> ()"
)
def _(*_: object) -> None:
    """Adds ``scaling * (s @ lora_b.T + lora_bias)`` to every adapter's rows of y."""


@operator("lora_dropout(Tensor x, Tensor seed, float dropout_p) -> Tensor", "triton")
def _(x: torch.Tensor, *_: object) -> torch.Tensor:
    """x, dropped by the kernels' mask of one slot."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@operator("lora_keep(Tensor x, Tensor seed, float dropout_p, Tensor? after) -> Tensor", "eager")
def _(x: torch.Tensor, *_: object) -> torch.Tensor:
    """PyTorch's mask of x; see `reference.lora_keep`.

    ``after`` is not read. A backward gives one of its tensors, so that compilers neither take its
    mask for the forward's nor draw it there: they would save it.
    """
    return torch.empty(x.shape, dtype=reference.INTEGERS[x.itemsize], device=x.device)


# ------------------------------------------------------------------------------------- backward


@operator(
    "lora_grad_b(Tensor dy, Tensor s, Tensor[] rows, SymInt run, Tensor?[] lora_b,"
    " bool[] with_bias, Tensor scaling, bool with_factors, str impl) -> (Tensor, Tensor, Tensor)"
)
def _(
    dy: torch.Tensor,
    s: torch.Tensor,
    rows: _Tensors,
    run: int,
    lora_b: _Factors,
    with_bias: list[bool],
    scaling: torch.Tensor,
    with_factors: bool,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ds, the factors' gradients, and sums, from one read of dy.

    With rows, in runs of ``run``, the gradients are one buffer for `layout.split_grad_b`, empty
    without ``with_factors``; ``with_bias`` says which slots have a lora_bias; there are no sums.
    Of one slot they are d_lora_b; ``with_bias`` asks for the sums of dy's columns, fp32 ``[N]``.
    """
    ups, sums = present(lora_b, 1), dy.new_empty(0, dtype=torch.float32)
    if rows:
        end = layout_b(ups, with_bias)[2] if with_factors else 0
        return torch.empty_like(s), ups[0].new_empty(end), sums
    (m, n), (up,) = dy.shape, ups
    if with_bias[0]:
        sums = dy.new_empty(n, dtype=torch.float32)
    return dy.new_empty(m, up.shape[1]), dy.new_empty(up.shape, dtype=up.dtype), sums


@operator(
    f"lora_grad_x(Tensor dy, Tensor? weight, Tensor ds, Tensor[] rows, Tensor?[] lora_a, {_DROP},"
    " str impl, str plan) -> Tensor"
)
def _(
    dy: torch.Tensor,
    weight: torch.Tensor | None,
    ds: torch.Tensor,
    rows: _Tensors,
    lora_a: _Factors,
    *_: object,
) -> torch.Tensor:
    """dx of one module; without a weight that of the adapters' term alone."""
    return dy.new_empty(dy.shape[0], present(lora_a, 0)[0].shape[1])


@operator(
    f"lora_grad_a(Tensor x, Tensor[] ds, Tensor[] rows, SymInt run, Tensor?[] lora_a, {_DROP},"
    " str impl) -> Tensor[]"
)
def _(
    x: torch.Tensor, ds: _Tensors, rows: _Tensors, run: int, lora_a: _Factors, *_: object
) -> _Tensors:
    """d_lora_a of G modules, one ds each, from one read of x unless dropout parts them.

    Of one slot each its own; with rows, in runs of ``run``, one buffer for `layout.split_grad_a`.
    """
    downs = present(lora_a, 0)
    if rows:
        return [downs[0].new_empty(layout(downs)[1])]
    return [x.new_empty(factor.shape, dtype=factor.dtype) for factor in downs]


# ----------------------------------------------------------------------------- behind addresses

_TABLES = "Tensor[] tables, int index, int max_rank, ScalarType factor_dtype"


@operator(
    f"lora_linear_at(Tensor x, Tensor weight, Tensor? bias, Tensor[] rows, Tensor? s, {_TABLES},"
    " str plan, int[]? siblings=None) -> Tensor[]",
    "triton",
)
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    rows: _Tensors,
    s: torch.Tensor | None,
    tables: _Tensors,
    index: int,
    max_rank: int,
    factor_dtype: torch.dtype,
    plan: str,
    siblings: list[int] | None = None,
) -> _Tensors:
    """y of one module, and of ``siblings`` that share a shrink their s unless it is given.

    ``siblings`` are the first row in the tables and the one behind the last. Their s is planes,
    `layout.planes_shape`, that are yet to be summed.
    """
    y = x.new_empty(x.shape[0], weight.shape[0])
    if s is not None or siblings is None:
        return [y]
    (m, k), modules = x.shape, siblings[1] - siblings[0]
    shape = planes_shape(m, k, modules, max_rank, plan == "invariant")
    return [y, x.new_empty(shape, dtype=torch.float32)]


@operator(f"lora_add_at_(Tensor(a!) y, Tensor x, Tensor[] rows, {_TABLES}, str impl) -> ()")
def _(*_: object) -> None:
    """Adds every row's own adapter to y."""


@operator(
    "lora_scale_(Tensor(a!) y, Tensor? bias, Tensor[] rows, Tensor scale_address, int index,"
    " str impl) -> ()"
)
def _(*_: object) -> None:
    """``y = (y - bias) * g + bias`` in the rows whose adapter has DoRA's scales g on the module.

    ``scale_address`` is int64 ``[G, S]`` of g, fp32 ``[N]``; 0 is none, see
    `fastlora.ops.factors.PENDING`. Other rows keep their bits.
    """

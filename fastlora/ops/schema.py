"""Definitions of the registered operators: their schemas, and the shapes of their results.

A layer calls one opaque operator for each sequence of launches, so that `torch.compile` sees
neither Triton nor the choice of a plan. Nothing here imports Triton before a kernel runs.
Everything that depends on the adapters of a batch's rows is a tensor on the device. Therefore no
synchronization with the host is needed, launches and grids are the same for all batches of one
size, and a CUDA graph can be replayed for each of them.

With ``impl="triton"``, an operator runs the function of its name in `fastlora.ops.triton.forward`
or `fastlora.ops.triton.backward`. With ``impl="eager"``, it runs the function of its name in
`fastlora.ops.torch.operators`, which is PyTorch code for many slots. Compiled graphs of mixed
batches call it, because they cannot read where the rows of each slot begin.

Shapes, for M rows, S slots (adapters), and G modules (layers) that share x:

    x ``[M, K]``, weight ``[N, K]``, bias ``[N]``, y and dy ``[M, N]``, dx ``[M, K]``
    lora_a ``[rank, K]``, lora_b ``[N, rank]``, lora_bias ``[N]``, not scaled: one per adapter, all
        of one dtype, with None for an adapter that does not adapt the layer
    rows: empty if one slot has all rows. Otherwise int32 order ``[M]``, segment_of ``[M]``,
        segment_slot, and slot_start ``[S + 1]`` of `fastlora.ops.rows`. For kernels, pieces follow:
        see `fastlora.ops.triton.rows_argument`
    factors: lora_a, lora_b, and lora_bias of each slot in turn
    s and ds: ``[M, R]`` in x's dtype. With rows, they are at sorted positions, R is
        a result of `layout.rank_to_multiple_of_16`, and a row is written up to its adapter's rank
    scaling: fp32 ``[S]``; for one slot also ``[R]`` or without dimensions
    seeds: int64, one for each lora_a, on the device (on the CPU for PyTorch), or None without
        dropout
    tables: ``[G, S]`` each. int64 addresses of lora_a; int64 addresses of lora_b, stored as rank
        rows ``[rank, N]``; int32 ranks; fp32 scalings; and int64 addresses of lora_bias if any
        adapter has one. Addresses are multiples of 16 bytes, and 0 stands for no factor. The
        factors have the dtype ``factor_dtype``. Addresses are not checked: the memory must stay
        allocated until the launch has finished. ``max_rank`` is an upper bound of the ranks, and
        ``index`` is the module's row

The dropout mask of a row is a function of its adapter's seed, its number among the adapter's rows,
and the column. Kernels compute it with `fastlora.kernels.philox`. PyTorch uses its own generator.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any, Protocol

import torch

from fastlora.ops.execution_mode import call_on_device_of, operators_are_observed
from fastlora.ops.factors import Factor, replace_missing_with_empty
from fastlora.ops.layout import (
    grad_a_buffer_layout,
    grad_b_buffer_layout,
    max_rank,
    rank_to_multiple_of_16,
    shrink_partials_shape,
)
from fastlora.ops.library import define_operator, register_fake, register_implementation
from fastlora.ops.torch import operators, reference

_Tensors = list[torch.Tensor]
_Factors = list[Factor]
_DIRECT: Any = SimpleNamespace()


def define_and_register_fake(
    schema: str, fixed_impl: str | None = None
) -> Callable[[Callable[..., Any]], Any]:
    """Define an operator, and return a decorator that registers its fake implementation.

    The operator's implementation is registered as well. The implementation calls the Triton or
    PyTorch function that is named after the operator.

    Args:
        schema: The operator's schema. The first argument is a tensor on the device that it runs on.
        fixed_impl: ``"triton"`` or ``"eager"`` if the operator always runs this implementation, or
            None if the operator's argument ``impl`` names the implementation.
    """
    define_operator(schema)
    name = schema.partition("(")[0]
    arguments = [a.name for a in torch._C.parse_schema(f"fastlora::{schema}").arguments]
    place = arguments.index("impl") if fixed_impl is None else None
    attribute, backward = name.removeprefix("lora_"), name.startswith("lora_grad_")

    @register_implementation(name)
    def run(*args: Any) -> Any:
        chosen, given = fixed_impl, args
        if place is not None:
            chosen, given = args[place], (*args[:place], *args[place + 1 :])
        if chosen != "triton":
            return getattr(operators, attribute)(*given)
        function = getattr(launch_module(backward), attribute)
        return call_on_device_of(args[0], function, *given)

    # Autograd counts writes to a tensor, so an operator that writes is called through the registry.
    setattr(_DIRECT, name, getattr(torch.ops.fastlora, name) if "!" in schema else run)
    return register_fake(name)


class OperatorNamespace(Protocol):
    """The operators that backends call, as attributes of an object.

    The object is a result of `registered_or_direct_operators`: the namespace `torch.ops.fastlora`,
    or an object that provides the functions that the operators run.
    """

    def __getattr__(self, name: str) -> Callable[..., Any]: ...


def registered_or_direct_operators(
    x: torch.Tensor, in_autograd_function: bool = False
) -> OperatorNamespace:
    """Return the registered operators, or functions that run their implementations directly.

    The caller passes x to the operators. The result is the registered operators if something
    observes operators on x, or if x is on a GPU other than the current one. Otherwise, the result
    provides the functions that the operators run, which saves the dispatcher's 5 us per call.
    An operator that writes to an argument is a registered operator in both cases.
    ``in_autograd_function`` means that the operators will be called within an autograd function, in
    which autograd records nothing.
    """
    registered: Any = torch.ops.fastlora
    if operators_are_observed(x, in_autograd_function):
        return registered
    here = not x.is_cuda or x.device.index == torch.cuda.current_device()
    return _DIRECT if here else registered


@functools.cache
def launch_module(backward: bool) -> ModuleType:
    """Return the Python module that contains the kernel launches of a forward or backward pass."""
    from fastlora.ops.triton import backward as gradients
    from fastlora.ops.triton import forward

    return gradients if backward else forward


# -------------------------------------------------------------------------------------- forward

_DROP = "Tensor? seeds, float[] dropout_p"


@define_and_register_fake(
    f"lora_shrink(Tensor x, Tensor[] rows, Tensor?[] lora_a, int modules, {_DROP}, str impl)"
    " -> Tensor"
)
def lora_shrink_fake(
    x: torch.Tensor, rows: _Tensors, lora_a: _Factors, modules: int, *_: object
) -> torch.Tensor:
    """Fake implementation of the operator ``lora_shrink``, which returns the shrink output s.

    The result is an uninitialized tensor for the s of G modules. The shape is ``[G, M, R]``. If
    there is one slot, it is ``[M, R]``, and the modules are side by side. ``lora_a`` lists the
    slots of each module in turn. Active dropout requires one module.
    """
    if rows:
        return x.new_empty(modules, x.shape[0], rank_to_multiple_of_16(max_rank(lora_a, 0)))
    return x.new_empty(
        x.shape[0], sum(factor.shape[0] for factor in replace_missing_with_empty(lora_a, 0))
    )


@define_and_register_fake(
    "lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor[] rows, Tensor? s,"
    f" Tensor?[] factors, Tensor scaling, {_DROP}, str impl, str plan) -> Tensor[]"
)
def lora_linear_fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    rows: _Tensors,
    s: torch.Tensor | None,
    factors: _Factors,
    *_: object,
) -> _Tensors:
    """Fake implementation of the operator ``lora_linear``, which computes a LoRA linear layer.

    The result is a list of uninitialized tensors: the output y and, unless s is given, the shrink
    output s.
    """
    y, largest = x.new_empty(x.shape[0], weight.shape[0]), max_rank(factors[::3], 0)
    if s is not None:
        return [y]
    return [y, x.new_empty(x.shape[0], rank_to_multiple_of_16(largest) if rows else largest)]


@define_and_register_fake(
    "lora_expand_(Tensor(a!) y, Tensor s, Tensor[] rows, Tensor?[] lora_b, Tensor?[] lora_bias,"
    " Tensor scaling, str impl) -> ()"
)
def lora_expand_fake(*_: object) -> None:
    """Fake implementation of the operator ``lora_expand_``, which modifies y in place.

    The fake implementation does nothing, because the operator returns nothing. The operator adds
    ``scaling * (s @ lora_b.T + lora_bias)`` to y.
    """


@define_and_register_fake(
    "lora_dropout(Tensor x, Tensor seed, float dropout_p) -> Tensor", "triton"
)
def lora_dropout_fake(x: torch.Tensor, *_: object) -> torch.Tensor:
    """Return an uninitialized tensor for the result of the operator ``lora_dropout``.

    The operator applies dropout to x with a Triton kernel.
    """
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@define_and_register_fake(
    "lora_keep(Tensor x, Tensor seed, float dropout_p, Tensor? after) -> Tensor", "eager"
)
def lora_keep_mask_fake(x: torch.Tensor, *_: object) -> torch.Tensor:
    """Fake implementation of the operator ``lora_keep``, which returns the dropout mask of x.

    The result is an uninitialized tensor for the mask. See `reference.draw_keep_mask`. ``after`` is
    not read. A backward pass passes one of its own tensors. The dependency prevents compilers from
    merging the mask with that of the forward pass and from computing it there, either of which
    would make them save it.
    """
    return torch.empty(x.shape, dtype=reference.INTEGERS[x.itemsize], device=x.device)


# ------------------------------------------------------------------------------------- backward


@define_and_register_fake(
    "lora_grad_b(Tensor dy, Tensor s, Tensor[] rows, SymInt run, Tensor?[] lora_b,"
    " bool[] with_bias, Tensor scaling, bool with_factors, str impl) -> (Tensor, Tensor, Tensor)"
)
def lora_grad_b_fake(
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
    """Fake implementation of the operator ``lora_grad_b``, which returns the gradient of lora_b.

    The result is a tuple of uninitialized tensors: ds, the gradients of lora_b and lora_bias, and
    the column sums of dy.

    With rows, which come in runs of ``run``, the gradients are one buffer for
    `layout.split_grad_b`. The buffer is empty unless ``with_factors`` is set. ``with_bias`` tells
    which slots have a lora_bias, and the column sums are empty. For one slot, the gradients are
    d_lora_b, and ``with_bias`` requests the column sums of dy, fp32 ``[N]``.
    """
    ups, sums = replace_missing_with_empty(lora_b, 1), dy.new_empty(0, dtype=torch.float32)
    if rows:
        end = grad_b_buffer_layout(ups, with_bias)[2] if with_factors else 0
        return torch.empty_like(s), ups[0].new_empty(end), sums
    (m, n), (up,) = dy.shape, ups
    if with_bias[0]:
        sums = dy.new_empty(n, dtype=torch.float32)
    return dy.new_empty(m, up.shape[1]), dy.new_empty(up.shape, dtype=up.dtype), sums


@define_and_register_fake(
    f"lora_grad_x(Tensor dy, Tensor? weight, Tensor ds, Tensor[] rows, Tensor?[] lora_a, {_DROP},"
    " str impl, str plan) -> Tensor"
)
def lora_grad_x_fake(
    dy: torch.Tensor,
    weight: torch.Tensor | None,
    ds: torch.Tensor,
    rows: _Tensors,
    lora_a: _Factors,
    *_: object,
) -> torch.Tensor:
    """Fake implementation of the operator ``lora_grad_x``, which returns the gradient of x.

    The result is an uninitialized tensor of x's shape. Without a weight, the tensor is for the
    adapters' contribution to the gradient.
    """
    return dy.new_empty(dy.shape[0], replace_missing_with_empty(lora_a, 0)[0].shape[1])


@define_and_register_fake(
    f"lora_grad_a(Tensor x, Tensor[] ds, Tensor[] rows, SymInt run, Tensor?[] lora_a, {_DROP},"
    " str impl) -> Tensor[]"
)
def lora_grad_a_fake(
    x: torch.Tensor, ds: _Tensors, rows: _Tensors, run: int, lora_a: _Factors, *_: object
) -> _Tensors:
    """Return uninitialized tensors for the lora_a gradients.

    The gradients are those of G modules. ``ds`` contains one tensor for each module. With active
    dropout, x is read once for each module. With one slot, the result contains one tensor for each
    module. With rows, which are in runs of ``run`` rows, the result contains one buffer for
    `layout.split_grad_a`.
    """
    downs = replace_missing_with_empty(lora_a, 0)
    if rows:
        return [downs[0].new_empty(grad_a_buffer_layout(downs)[1])]
    return [x.new_empty(factor.shape, dtype=factor.dtype) for factor in downs]


# ------------------------------------------------------------------------------- factors by address

_TABLES = "Tensor[] tables, int index, int max_rank, ScalarType factor_dtype"


@define_and_register_fake(
    f"lora_linear_at(Tensor x, Tensor weight, Tensor? bias, Tensor[] rows, Tensor? s, {_TABLES},"
    " str plan, int[]? shrink_range=None) -> Tensor[]",
    "triton",
)
def lora_linear_at_fake(
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
    shrink_range: list[int] | None = None,
) -> _Tensors:
    """Fake implementation of the operator ``lora_linear_at``, which reads factors by address.

    The operator returns the output y of one module and, if needed, a shared s. The fake
    implementation returns uninitialized tensors for these results.

    ``shrink_range`` has the modules that share a shrink, as a range of table rows: the first row,
    and the row after the last one. Their s, which the list omits if it is given, consists of
    split-K partial sums that have not been added yet, of shape `layout.shrink_partials_shape`.
    """
    y = x.new_empty(x.shape[0], weight.shape[0])
    if s is not None or shrink_range is None:
        return [y]
    (m, k), modules = x.shape, shrink_range[1] - shrink_range[0]
    shape = shrink_partials_shape(m, k, modules, max_rank, plan == "invariant")
    return [y, x.new_empty(shape, dtype=torch.float32)]


@define_and_register_fake(
    f"lora_add_at_(Tensor(a!) y, Tensor x, Tensor[] rows, {_TABLES}, str impl) -> ()"
)
def lora_add_at_fake(*_: object) -> None:
    """Fake implementation of the operator ``lora_add_at_``, which modifies y in place.

    The fake implementation does nothing, because the operator returns nothing. The operator adds
    the update of each row's own adapter to y.
    """


@define_and_register_fake(
    "lora_scale_(Tensor(a!) y, Tensor? bias, Tensor[] rows, Tensor scale_address, int index,"
    " str impl) -> ()"
)
def lora_scale_fake(*_: object) -> None:
    """Fake implementation of the operator ``lora_scale_``, which modifies y in place.

    The fake implementation does nothing, because the operator returns nothing. The operator
    computes ``y = (y - bias) * g + bias`` in the rows that belong to DoRA adapters. All other rows
    are not changed. ``scale_address`` is int64 ``[G, S]``, the addresses of g, fp32 ``[N]``. 0
    stands for no scales; see also `fastlora.ops.factors.PENDING`.
    """

"""`OperatorBackend`, which calls the registered operators, with Triton or in compiled graphs.

Operators are opaque to a compiler, which sees neither Triton nor, in a mixed batch, the order of
the rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from fastlora.ops import schema
from fastlora.ops.backend import Backend, BackwardArguments, Gradients, register_backend
from fastlora.ops.execution_mode import call_on_device_of, operators_are_observed
from fastlora.ops.factors import Base, LayerAdapterOperands
from fastlora.ops.layout import split_grad_a, split_grad_b
from fastlora.ops.plans import choose_plan
from fastlora.ops.rows import Rows
from fastlora.ops.torch import reference
from fastlora.ops.triton.rows_argument import (
    rows_and_run_length_for_gradients,
    rows_argument_for_factor_lists,
)
from fastlora.quantized_tensor import QuantizedData, QuantizedTensor, dequantize

_Function = TypeVar("_Function", bound=Callable[..., Any])


class OperatorBackend(Backend):
    """Backend that runs fastlora's registered operators, or their implementations directly.

    The operators run either Triton kernels or plain PyTorch. The backend calls the registered
    operators if the calls are observed, for example by a tracer or by autograd. Otherwise, the
    backend calls the operators' implementations directly where this is possible.

    Args:
        impl: The implementation that the operators run, ``"triton"`` or ``"eager"``.
    """

    def __init__(self, impl: str) -> None:
        self.impl = impl

    def _registered_or_direct_operators(
        self, x: torch.Tensor, weight: torch.Tensor | None = None
    ) -> schema.OperatorNamespace:
        """Return the registered operators, or functions that run their implementations directly.

        The caller passes x and a weight to the result. The result is the registered operators if
        something observes operators on x, else their implementations. In a backward pass, x is dy.
        """
        # With a quantized weight, no PyTorch operation runs that autograd could record.
        alone = isinstance(weight, QuantizedTensor) and self.impl == "triton"
        return schema.registered_or_direct_operators(x, in_autograd_function=alone)

    def forward(
        self,
        x: torch.Tensor,
        base: Base,
        operands: LayerAdapterOperands,
        rows: Rows | None,
        s: torch.Tensor | None,
        plan: str,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        lora_a, lora_b, lora_bias, scaling, dropout_p, seeds, _ = operands
        weight, bias, y, inplace = base
        drop, operators = (seeds, list(dropout_p)), self._registered_or_direct_operators(x, weight)
        biases, pieces = lora_bias if rows is not None else [None], self._rows_argument(rows)
        if weight is not None:
            factors = [lora_a[0], lora_b[0], None]
            if rows is not None:
                factors = [t for own in zip(lora_a, lora_b, biases, strict=True) for t in own]
            y, *own = operators.lora_linear(
                *(
                    x,
                    self._weight_for_operators(weight, x, lora_b, plan, operators),
                    bias,
                    pieces,
                    s,
                    factors,
                ),
                *(scaling, *drop, self.impl, plan),
            )
            return y, own[0] if s is None else s
        if y is None:
            raise ValueError("neither a base weight nor a base output is given")
        if s is None:
            s = operators.lora_shrink(x, pieces, lora_a, 1, *drop, self.impl)
            s = s if rows is None else s.squeeze(0)
        y = y if inplace else y.clone(memory_format=torch.contiguous_format)
        operators.lora_expand_(y, s, pieces, lora_b, biases, scaling, self.impl)
        return y, s

    def _weight_for_operators(
        self,
        weight: torch.Tensor,
        x: torch.Tensor,
        lora_b: Sequence[torch.Tensor],
        plan: str,
        operators: schema.OperatorNamespace,
        launch: str = "coded_lora_linear",
    ) -> torch.Tensor | QuantizedData:
        """Return the base weight in the form that the given operators expect.

        Registered operators and the PyTorch implementation take the weight itself, quantized or
        not. If Triton kernels are called directly, the form depends on the plan, as in
        `weight_for_kernels`: quantized data or a dense matrix.
        """
        if operators is torch.ops.fastlora or self.impl != "triton":
            return weight
        return weight_for_kernels(weight, x, max(b.shape[1] for b in lora_b), plan, launch)

    def _rows_argument(self, rows: Rows | None) -> list[torch.Tensor]:
        """Return the tensors for an operator's ``rows`` argument.

        For kernels, the pieces are included.
        """
        if rows is None:
            return []
        return (
            rows_argument_for_factor_lists(rows)
            if self.impl == "triton"
            else rows.operator_arguments()
        )

    def gradients(self, given: BackwardArguments) -> Gradients:
        operators, function = (
            self._registered_or_direct_operators(given.dy),
            OperatorBackend._gradients,
        )
        read: torch.Tensor | QuantizedData | None = None
        if given.weight is not None and given.wants_x:
            dy, ups, launch = given.dy, given.operands.lora_b, "coded_lora_grad_x"
            read = given.weight if given.weight.dtype is dy.dtype else given.weight.to(dy.dtype)
            read = self._weight_for_operators(read, dy, ups, given.plan, operators, launch)
        given = given._replace(weight=None)
        if given.rows is None and operators is not torch.ops.fastlora and self.impl == "triton":
            function = _with_cached_launches(function)
        return function(self, given, read, operators)

    def _gradients(
        self,
        given: BackwardArguments,
        weight: torch.Tensor | QuantizedData | None,
        operators: schema.OperatorNamespace,
    ) -> Gradients:
        """Compute the gradients of a layer by calling the given operators.

        ``operators`` are the registered operators, or functions that run their implementations
        directly. The result is that of `gradients`. The weight is in the form that ``operators``
        expect.
        """
        dy, _, x, operands, rows, s, plan, wants_x, wants_bias, wants_s, wants = given
        lora_a, lora_b, lora_bias, scaling, dropout_p, seeds, _ = operands
        drop = seeds, list(dropout_p)
        found: list[torch.Tensor | None] = [None] * len(wants)
        d_bias = None
        if rows is not None:
            own, run = self._rows_argument_and_max_rows_per_program("mixed_lora_grad_b", rows, dy)
            with_bias = [bias is not None for bias in lora_bias]
            with_factors = any(wants[1::3]) or any(wants[2::3])
            ds, packed, _ = operators.lora_grad_b(
                dy, s, own, run, lora_b, with_bias, scaling, with_factors, self.impl
            )
            if with_factors:
                for slot, pair in enumerate(split_grad_b(packed, lora_b, with_bias)):
                    found[3 * slot + 1 : 3 * slot + 3] = pair
        elif wants[1]:
            ds, found[1], d_bias = operators.lora_grad_b(
                dy, s, [], 0, lora_b, [wants_bias], scaling, True, self.impl
            )
        else:
            ds = reference.lora_ds(dy, lora_b[0], scaling)
        if wants_bias and d_bias is None:
            d_bias = reference.column_sums(dy)
        dx = None
        if wants_x:
            dx = operators.lora_grad_x(
                dy, weight, ds, self._rows_argument(rows), lora_a, *drop, self.impl, plan
            )
        if x is not None and any(wants[::3]):
            found[::3] = self._grad_a(x, [ds], lora_a, *drop, rows, operators.lora_grad_a)
        if wants_s and rows is not None and torch.is_anomaly_enabled():
            ds = _zero_unwritten_elements(ds, rows, lora_a)
        return dx, d_bias, ds, found

    def _rows_argument_and_max_rows_per_program(
        self, launch: str, rows: Rows, like: torch.Tensor
    ) -> tuple[list[torch.Tensor], int]:
        """Return the ``rows`` argument of a launch, and the maximum number of rows per program.

        The result is a tuple of a list of tensors and a number. Each program of a Triton kernel
        works on a run, which is a range of at most this many sorted positions. For other
        implementations, the number is 0.
        """
        if self.impl != "triton":
            return rows.operator_arguments(), 0
        return rows_and_run_length_for_gradients(launch, rows, like.dtype, like.shape[1])

    def _grad_a(
        self,
        x: torch.Tensor,
        ds: Sequence[torch.Tensor],
        lora_a: Sequence[torch.Tensor],
        seeds: torch.Tensor | None,
        dropout_p: Sequence[float],
        rows: Rows | None,
        operator: Callable[..., Any],
    ) -> list[torch.Tensor]:
        """Compute the gradients of lora_a factors by calling the given operator.

        The result is a list of the lora_a gradients of one or more layers. ``ds`` contains the
        gradient of each layer's s.
        """
        drop = seeds, list(dropout_p)
        if rows is None:
            made: list[torch.Tensor] = operator(x, ds, [], 0, lora_a, *drop, self.impl)
            return made
        own, run = self._rows_argument_and_max_rows_per_program("mixed_lora_grad_a", rows, x)
        (packed,) = operator(x, ds, own, run, lora_a, *drop, self.impl)
        return split_grad_a(packed, lora_a)

    # -------------------------------------------------------------------------- shared-input groups

    def grouped_shrink(
        self,
        x: torch.Tensor,
        lora_a: Sequence[Sequence[torch.Tensor]],
        seeds: Sequence[torch.Tensor | None],
        dropout_p: Sequence[float],
        rows: Rows | None,
    ) -> list[torch.Tensor]:
        operator, flat = (
            self._registered_or_direct_operators(x).lora_shrink,
            [a for own in lora_a for a in own],
        )
        if rows is not None:
            none = [0.0] * len(flat)
            s = operator(x, self._rows_argument(rows), flat, len(lora_a), None, none, self.impl)
            return list(s.unbind())
        found: dict[int, torch.Tensor] = {}
        bare = [index for index, seed in enumerate(seeds) if seed is None]
        if len(bare) > 1:
            some = [flat[index] for index in bare]
            s = operator(x, [], some, len(some), None, [0.0] * len(some), self.impl)
            parts = s.split([a.shape[0] for a in some], dim=1)
            found = dict(zip(bare, parts, strict=True))
        for index, (a, seed, p) in enumerate(zip(flat, seeds, dropout_p, strict=True)):
            if index not in found:
                found[index] = operator(x, [], [a], 1, seed, [p], self.impl)
        return [found[index] for index in range(len(flat))]

    def supports_grouped_forward(self, x: torch.Tensor) -> bool:
        # Not if something observes operators. A profiler also records the launches themselves.
        return self.impl == "triton" and not operators_are_observed(x, True, by_profiler=False)

    def grouped_forward(
        self,
        x: torch.Tensor,
        operands: Sequence[torch.Tensor | None],
        dropout_p: tuple[float, ...],
        with_s: bool = False,
    ) -> list[torch.Tensor]:
        read: Sequence[torch.Tensor | QuantizedData | None] = operands
        if _any_weight_is_quantized(operands, len(dropout_p)):
            read = _with_kernel_weights(operands, len(dropout_p), x, "coded_lora_linear")
        function = schema.launch_module(False).grouped_forward
        made: list[torch.Tensor] = call_on_device_of(x, function, x, dropout_p, with_s, *read)
        return made

    def grouped_gradients(
        self,
        dys: Sequence[torch.Tensor | None],
        x: torch.Tensor | None,
        operands: Sequence[torch.Tensor | None],
        dropout_p: tuple[float, ...],
        s: Sequence[torch.Tensor],
        wants: tuple[bool, ...],
    ) -> list[torch.Tensor | None]:
        read: Sequence[torch.Tensor | QuantizedData | None] = operands
        if _any_weight_is_quantized(operands, len(dropout_p)):
            dy = next(dy for dy in dys if dy is not None) if wants[0] else None
            read = _with_kernel_weights(operands, len(dropout_p), dy, "coded_lora_grad_x")
        function = schema.launch_module(True).grouped_gradients
        made: list[torch.Tensor | None] = call_on_device_of(
            s[0], function, x, dropout_p, wants, *dys, *read, *s
        )
        return made

    def grouped_grad_a(
        self,
        x: torch.Tensor,
        ds: Sequence[torch.Tensor],
        lora_a: Sequence[Sequence[torch.Tensor]],
        seeds: Sequence[torch.Tensor | None],
        dropout_p: Sequence[float],
        rows: Rows | None,
    ) -> list[torch.Tensor]:
        flat, all_seeds = [a for own in lora_a for a in own], None
        if rows is not None:
            dropout_p = [0.0] * len(flat)
        elif any(seed is not None for seed in seeds):
            any_seed = next(seed for seed in seeds if seed is not None)
            all_seeds = torch.cat([any_seed if seed is None else seed for seed in seeds])
        operator = self._registered_or_direct_operators(x).lora_grad_a
        return [*self._grad_a(x, list(ds), flat, all_seeds, dropout_p, rows, operator)]


def launch_mixed_group_without_operator(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    rows: list[torch.Tensor],
    tables: list[torch.Tensor],
    first: int,
    max_rank: int,
    factor_dtype: torch.dtype,
) -> list[torch.Tensor] | None:
    """Launch the kernels of a layer group for a mixed batch, without using a custom operator.

    The layers are linear layers with adapters. They share the input x, and have adjacent rows in
    the address tables, starting at ``first``. The result is a list of the outputs of the layers.

    The result is None if the kernels cannot be launched in this way. This is the case if something
    observes operators, or if one launch cannot read all of the weights.
    """
    if operators_are_observed(x, by_profiler=False):
        return None
    from fastlora.kernels.modules import are_of_a_kind

    read = [weight_for_kernels(weight, x, max_rank, "auto") for weight in weights]
    if not are_of_a_kind(read):
        return None
    function, given = (
        schema.launch_module(False).mixed_grouped_forward,
        (x, read, biases, rows, tables),
    )
    made: list[torch.Tensor] = call_on_device_of(x, function, *given, first, max_rank, factor_dtype)
    return made


def weight_for_kernels(
    weight: torch.Tensor,
    x: torch.Tensor,
    r: int,
    plan: str,
    launch: str = "coded_lora_linear",
) -> torch.Tensor | QuantizedData:
    """Return a base weight in the form that kernels read: quantized data or a dense matrix.

    A dense weight is returned unchanged. For a quantized weight, the result is its `QuantizedData`
    if the kernel of the plan for ``launch`` reads quantized data. Otherwise, the result is a new
    dense matrix. If there are many rows, the table's plan requires a dense matrix. ``x`` is
    ``[M, K]``, or dy ``[M, N]`` to compute a dx. ``r`` is the largest rank.
    """
    if not isinstance(weight, QuantizedTensor):
        return weight
    reads_codes = choose_plan(plan, x, weight.quantized_data, r, launch) != "split"
    return weight.quantized_data if reads_codes else dequantize(weight)


def _any_weight_is_quantized(operands: Sequence[torch.Tensor | None], num_modules: int) -> bool:
    """Return whether any base weight among the operands is quantized.

    The base weights are the first ``num_modules`` operands.
    """
    return QuantizedTensor in map(type, operands[:num_modules])


def _with_kernel_weights(
    operands: Sequence[torch.Tensor | None], num_modules: int, x: torch.Tensor | None, launch: str
) -> Sequence[torch.Tensor | QuantizedData | None]:
    """Replace each weight in the operands with a weight that kernels can read.

    The operands are those of a group of modules that share an input. The first ``num_modules``
    operands are the base weights of the modules. Each weight is replaced with the result of
    `weight_for_kernels`. If x is None, each weight is replaced with None. The result is a new list.
    """
    read: list[torch.Tensor | QuantizedData | None] = [None] * num_modules
    if x is not None:
        for i, (weight, up) in enumerate(
            zip(operands[:num_modules], operands[3 * num_modules : 4 * num_modules], strict=True)
        ):
            if weight is not None and up is not None:
                read[i] = weight_for_kernels(weight, x, up.shape[1], "auto", launch)
    return [*read, *operands[num_modules:]]


@functools.cache
def _with_cached_launches(function: _Function) -> _Function:
    """Wrap a function so that its kernel launches are cached.

    See `fastlora.kernels.launch.cached_launches`.
    """
    from fastlora.kernels.launch import cached_launches

    return cached_launches(function)


def _zero_unwritten_elements(
    ds: torch.Tensor, rows: Rows, lora_a: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Zero the elements of ds that no kernel has written.

    The result is a new tensor. Unwritten elements are in rows without an adapter, or beyond the
    rank of the row's adapter. Such elements could be NaN, which anomaly detection would report.
    """
    # Slots -2 and -1 are for rows without an adapter. As indices, they select the two zeros.
    ranks = torch.tensor([*(a.shape[0] for a in lora_a), 0, 0], device=ds.device)
    own = ranks[rows.segment_slot.long()[rows.segment_of.long()]]
    return torch.where(torch.arange(ds.shape[1], device=ds.device) < own[:, None], ds, 0)


register_backend("triton", OperatorBackend("triton"))

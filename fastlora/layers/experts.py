"""`FastLoraExperts`: the experts of a transformers model, with adapters on their stacked weights.

transformers marks the modules with its decorator `use_experts_implementation`. Attributes that the
decorator sets describe what a module computes. The forward pass is transformers'
`grouped_mm_experts_forward` with LoRA on both products. Each row is a token together with one of
its experts. Rows are sorted by key, which is ``expert * S + slot`` for S adapters, and products
cover only the rows of each expert and adapter. Nothing as large as a stack is allocated.

Shapes: ``hidden_states [T, H]``, ``top_k_index`` and ``top_k_weights [T, k]``, and T * k rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from fastlora.autograd.stacks import stacked_lora_linear
from fastlora.layers.adapted_parameters import (
    FastLoraAdaptedParameters,
    ParameterLoraLayer,
    check_parameter_settings,
    parameter_adapter_shapes,
    shape_as_stack,
)
from fastlora.layers.adapter_factors import has_module_hooks, scalings_as_tensor
from fastlora.layers.call import MixedCall, UniformCall
from fastlora.layers.fallback_reasons import FusionStatus
from fastlora.layers.layer_kinds import LayerAdapterSettings, LayerKind, register_layer_kind
from fastlora.layers.lora_layer import LoraLayer
from fastlora.ops.backend import draw_dropout_seed
from fastlora.ops.execution_mode import ExecutionMode, disable_autocast_on
from fastlora.ops.factors import Factors, number_tensor_without_sync
from fastlora.ops.rows import Rows, sort_rows
from fastlora.ops.seeds import derive_seeds_of_layer
from fastlora.ops.stacks import StackedWeightAdapterOperands, dropout_seeds_of_keys
from fastlora.routing.routing import Routing
from fastlora.validation import UnsupportedLayerError, check_dropout_dtype

# Attributes that `use_experts_implementation` sets.
_MARKS = (
    *("num_experts", "is_transposed", "has_bias", "has_gate", "has_post_expert_norm"),
    *("_apply_gate", "_is_expert_parallel"),
)


class _RowsSortedByExpert(NamedTuple):
    """The rows of one call to an experts module, sorted by expert.

    The rows of each expert are sorted by adapter slot.

    Attributes:
        rows: The order and the segments of the sorted rows, with ``expert * S + slot`` as slots.
        matrix: The expert of each sorted row, int64 ``[P]``; 0 for rows without an expert.
        routing: The routing of a mixed batch, or None if the same adapters apply to all rows.
        adapters: The slots of the routing that keys distinguish. In a graph that is compiled, they
            are all slots, and otherwise those with rows.
        conditions: The conditions of the call.
    """

    rows: Rows
    matrix: torch.Tensor
    routing: Routing | None
    adapters: Sequence[int]
    conditions: ExecutionMode

    @property
    def slots_per_expert(self) -> int:
        """The number of adapter slots for each expert.

        The number is the same for all experts, and is the S in the keys, ``expert * S + slot``. The
        number is 1 if the same adapters apply to all rows. Otherwise, the last slot is for rows
        without an adapter.
        """
        return 1 if self.routing is None else len(self.adapters) + 1


def _weight_stack_names(module: nn.Module) -> tuple[str, str]:
    """Return the names of the two weight stacks of an experts module.

    The first stack is the weight of the module's first matrix product, and the second stack is the
    weight of the second product.
    """
    return "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj", "down_proj"


class FastLoraExperts(FastLoraAdaptedParameters):
    """LoRA layer for a mixture-of-experts module whose weights are stacked.

    The LoRA layer replaces the module in the model, and the module becomes the base layer. The
    module contains experts of a transformers model. transformers marks modules of experts with
    `use_experts_implementation`.

    Args:
        base_layer: The module with the stacks.

    Attributes:
        module_of_forward: The Python module that defines the ``forward`` which the layer replaces.
            If a class overrides it, or another library replaces it, the layer calls the module.
    """

    module_of_forward = "transformers.integrations.moe"
    runs_kernels = True
    fallback_reason = "its products depend on the number of rows"

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        # K of the first product, and N of the second.
        self.in_features = shape_as_stack(base_layer, _weight_stack_names(base_layer)[0])[2]
        self.out_features = shape_as_stack(base_layer, _weight_stack_names(base_layer)[1])[1]

    def fusion(self, gathered: bool = False) -> FusionStatus:
        """Return the fusion status of the layer.

        The status states whether the layer is fused and, if not, the reason. A fused layer computes
        the base GEMM and the LoRA update in one call. A layer of this class is never fused.
        """
        if self._calls_module():
            return FusionStatus(False, FastLoraAdaptedParameters.fallback_reason)
        base = self.base_layer
        config = getattr(base, "config", None)
        replaced = getattr(config, "_experts_implementation", None)
        return FusionStatus(
            False,
            f"its base layer is {type(base).__name__}: grouped products with LoRA replace "
            f"experts_implementation={replaced!r} while an adapter is active",
        )

    def _calls_module(self) -> bool:
        """Return whether the layer calls the base module.

        The layer calls the module if the module has hooks or a ``forward`` that is not
        transformers' own. Otherwise, the layer computes grouped products. Only a call of the module
        runs such hooks or such a ``forward``.
        """
        base = self.base_layer
        return has_module_hooks(base) or _module_of_forward(base) != self.module_of_forward

    def _run(
        self,
        applied: Mapping[str, list[str]],
        conditions: ExecutionMode,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if self._calls_module():
            layers: Any = self._modules["parameters_with_adapters"]
            given = ((layers[name], own) for name, names in applied.items() for own in names)
            if any(_drops(layer.lora_dropout[own]) for layer, own in given):
                raise UnsupportedLayerError(
                    f"{self._description()} has hooks, or a forward method that was replaced or "
                    "overridden, so it does not support lora_dropout; set lora_dropout=0"
                )
            return super()._run(applied, conditions, *args, **kwargs)
        return self._forward(None, conditions, *args, **kwargs)

    def _run_mixed(
        self, routing: Routing, conditions: ExecutionMode, *args: Any, **kwargs: Any
    ) -> Any:
        if self._calls_module():
            raise UnsupportedLayerError(
                f"{self._description()} has hooks, or a forward method that was replaced or "
                "overridden, so it does not support mixed batches; run one adapter at a time"
            )
        return self._forward(routing, conditions, *args, **kwargs)

    def _forward(
        self,
        routing: Routing | None,
        conditions: ExecutionMode,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """Compute the output of the experts with the adapters applied.

        The output is ``[T, H]``. ``routing`` and ``conditions`` are those of the call.
        """
        base, k = self.base_layer, top_k_index.shape[-1]
        bad = (top_k_index < 0) | (top_k_index >= base.num_experts)
        if not base._is_expert_parallel:
            if conditions.compiling or conditions.impl != "eager" or bad.is_meta:
                # The host does not wait for the indices.
                top_k_weights = top_k_weights.masked_fill(bad, float("nan"))
            elif bad.any():
                raise ValueError(
                    f"top_k_index contains {int(top_k_index[bad][0])}, expected the index of one "
                    f"of the {base.num_experts} experts"
                )
        # Indices out of range belong to experts of other processes. Without expert parallelism, the
        # output is NaN for any expert.
        replacement = -1 if base._is_expert_parallel else base.num_experts - 1
        call = self._sort_by_expert_and_slot(
            top_k_index.masked_fill(bad, replacement), routing, conditions
        )
        order = call.rows.order.long()
        x = _rows_at(hidden_states, order // k)
        absent = bad.reshape(-1)[order].unsqueeze(-1) if base._is_expert_parallel else None
        up, down = _weight_stack_names(base)
        # Products and their gradients leave rows without an expert uninitialized.
        y = _with_zeros_in_masked_rows(
            self._product(up, _with_zeros_in_masked_rows(x, absent), call), absent
        )
        y = base._apply_gate(y) if base.has_gate else base.act_fn(y)
        y = _with_zeros_in_masked_rows(self._product(down, y, call), absent)
        if base.has_post_expert_norm:
            y = _with_zeros_in_masked_rows(base.post_expert_norm(y), absent)
        y = y.index_select(0, _inverse_permutation(order)).view(*top_k_index.shape, y.shape[-1])
        dtype = torch.promote_types(y.dtype, top_k_weights.dtype)
        with disable_autocast_on(y.device):
            y = torch.bmm(top_k_weights.to(dtype).unsqueeze(1), y.to(dtype))
        return y.squeeze(1).to(hidden_states.dtype)

    def _sort_by_expert_and_slot(
        self, expert_ids: torch.Tensor, routing: Routing | None, conditions: ExecutionMode
    ) -> _RowsSortedByExpert:
        """Sort the rows of the input by expert and adapter slot.

        Args:
            expert_ids: The expert of each row, ``[T, k]``: k rows for each token; -1 for none.
            routing: The routing of a mixed batch, or None.
            conditions: The conditions of the call.
        """
        if expert_ids.is_meta:  # Values are unknown, as in a graph that is being compiled.
            conditions = replace(conditions, compiling=True)
        count, tokens = self.base_layer.num_experts, len(expert_ids)
        keys, slots = expert_ids.reshape(-1), 1
        adapters: Sequence[int] = ()
        if routing is not None:
            if conditions.compiling:
                adapters, ids = range(len(routing.names)), routing.ids.to(expert_ids.device)
                slot = torch.where(ids < 0, len(adapters), ids)
            else:
                token_rows = routing.sorted_rows(tokens, expert_ids.device, check_ids_now=True)
                adapters, slot = token_rows.used_slots, token_rows.segment_index
            slots = len(adapters) + 1  # The last slot is for rows without an adapter.
            slot = slot.repeat_interleave(len(keys) // max(len(slot), 1))
            keys = torch.where(keys < 0, keys, keys * slots + slot)
        rows = sort_rows(keys, len(keys), count * slots, cache_pieces=not conditions.compiling)
        matrix = keys[rows.order.long()].clamp(min=0) // slots
        return _RowsSortedByExpert(rows, matrix, routing, adapters, conditions)

    def _product(self, name: str, x: torch.Tensor, call: _RowsSortedByExpert) -> torch.Tensor:
        """Multiply each of the sorted rows ``x`` by its expert's weight in the stack ``name``.

        The bias and the adapters' updates are added to the products.
        """
        base = self.base_layer
        stack = base._parameters[name]
        stack = stack.transpose(1, 2) if base.is_transposed else stack
        bias = getattr(base, f"{name}_bias") if base.has_bias else None
        layer = self.inner_layers().get(name)
        return self._adapted_product(layer, stack, bias, x, call)  # type: ignore[arg-type]

    def _adapted_product(
        self,
        layer: ParameterLoraLayer | None,
        stack: torch.Tensor,
        bias: torch.Tensor | None,
        x: torch.Tensor,
        call: _RowsSortedByExpert,
    ) -> torch.Tensor:
        """Multiply each of the sorted rows ``x`` by its expert's weight, with the adapters applied.

        ``stack`` contains the weights of all experts and has the shape ``[E, N, K]``. Without
        adapters, the result is ``x @ stack[expert].T + bias[expert]``.
        """
        # As in transformers, products are computed in the dtype of the weights under autocast.
        with disable_autocast_on(x.device):
            x = x.to(stack.dtype)
            bias = None if bias is None else bias[call.matrix]
            adapters = [] if layer is None else self._adapter_operands(layer, x, call)
            none = StackedWeightAdapterOperands([], [], x.new_empty(0), ())
            first, *others = adapters or [none]
            y = _stacked_linear(x, stack, bias, first, call)
            for operands in others:
                y = _stacked_linear(x, None, y, operands, call)
            return y

    def _adapter_operands(
        self, layer: ParameterLoraLayer, x: torch.Tensor, call: _RowsSortedByExpert
    ) -> list[StackedWeightAdapterOperands]:
        """Return the operands for applying a layer's adapters to the sorted rows.

        The layer holds the adapters of one stack of weights. The result is a list. One update is
        computed from each entry of the list, and the updates are added one after another.
        """
        if call.routing is None:
            return [self._uniform_operands(layer, n, x, call) for n in layer._applied_adapters()]
        return self._mixed_operands(layer, x, call, call.routing)

    def _uniform_operands(
        self, layer: ParameterLoraLayer, name: str, x: torch.Tensor, call: _RowsSortedByExpert
    ) -> StackedWeightAdapterOperands:
        factors = layer.factors_in_file_shapes(
            name, UniformCall(layer, x, x, call.conditions, [name])
        )
        seeds = None
        if factors.dropout_p:
            seeds = dropout_seeds_of_keys(
                draw_dropout_seed(x, call.conditions.impl), layer.num_matrices
            )
        lora_a, lora_b = self._factors_in_product_order(layer, name, factors)
        scaling = scalings_as_tensor([factors.scaling], x)
        return StackedWeightAdapterOperands(
            [lora_a], [lora_b], scaling, (factors.dropout_p,), seeds
        )

    def _mixed_operands(
        self,
        layer: ParameterLoraLayer,
        x: torch.Tensor,
        call: _RowsSortedByExpert,
        routing: Routing,
    ) -> list[StackedWeightAdapterOperands]:
        count, compiling = layer.num_matrices, call.conditions.compiling
        own = MixedCall(layer, x, x, call.conditions, routing) if compiling else None
        found = [routing.source.factors(layer, slot, own) for slot in call.adapters]
        pairs = [
            None
            if factors is None
            else self._factors_in_product_order(layer, routing.names[slot], factors)
            for slot, factors in zip(call.adapters, found, strict=True)
        ]
        known = [pair for pair in pairs if pair is not None]
        if not known:
            return []
        a, b = known[0]
        empty = a.new_empty(count, 0, a.shape[2]), b.new_empty(count, 0, b.shape[2])
        # The last slot is for rows without an adapter.
        chosen = [pair or empty for pair in (*pairs, None)]
        p = [0.0 if factors is None else factors.dropout_p for factors in (*found, None)]
        scalings = [0.0 if factors is None else factors.scaling for factors in (*found, None)]
        seeds = None
        if any(p):
            check_dropout_dtype(x.dtype)
            device = x.device if call.conditions.impl == "triton" else torch.device("cpu")
            if compiling:
                seeds = derive_seeds_of_layer(routing.seeds, layer.routing_index).to(device)
            else:
                seeds = MixedCall(layer, x, x, call.conditions, routing).dropout_seeds(device)
            if len(call.adapters) < len(routing.names):
                slots = number_tensor_without_sync(tuple(call.adapters), torch.int64, seeds.device)
                seeds = seeds.index_select(0, slots)
            seeds = dropout_seeds_of_keys(torch.cat([seeds, seeds.new_zeros(1)]), count)
        lora_a, lora_b = ([pair[side] for pair in chosen] for side in range(2))
        scaling = scalings_as_tensor(scalings, x)
        return [StackedWeightAdapterOperands(lora_a, lora_b, scaling, tuple(p), seeds)]

    def _factors_in_product_order(
        self, layer: ParameterLoraLayer, name: str, factors: Factors
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return an adapter's two factors in the order of multiplication.

        x is multiplied by the first factor, ``[E, R, K]``. The result is then multiplied by the
        second factor, ``[E, R, N]``.
        """
        return layer.rank_rows(name, factors)


def _rows_at(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return the rows of x at the given indices.

    The result is ``x[index]``, where ``index`` may contain duplicates. On a CPU, `index_select`
    with its gradient takes half as long as indexing (4.8 and 8.1 ms for 8,192 rows of 512 fp32
    numbers, on an Intel Xeon with AVX-512 and one thread). On a GPU, its gradient is not
    deterministic.
    """
    return x.index_select(0, index) if x.is_cpu else x[index]


def _with_zeros_in_masked_rows(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Return x with the masked rows set to zero.

    x is ``[P, N]`` and is not changed. The masked rows are those where the bool mask ``[P, 1]`` is
    True. If the mask is None, x itself is returned.
    """
    return x if mask is None else x.masked_fill(mask, 0.0)


def _inverse_permutation(order: torch.Tensor) -> torch.Tensor:
    """Return the inverse of a permutation.

    The result is an int64 tensor.
    """
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def _stacked_linear(
    x: torch.Tensor,
    stack: torch.Tensor | None,
    addend: torch.Tensor | None,
    operands: StackedWeightAdapterOperands,
    call: _RowsSortedByExpert,
) -> torch.Tensor:
    """Multiply each sorted row by its matrix, and add ``addend`` and the adapters' updates.

    Returns the sum. ``stack`` contains the matrices. ``addend`` or ``stack`` may be None. If
    ``stack`` is None, the rows are not multiplied, and the updates may be added to ``addend`` in
    place.
    """
    rows, impl = call.rows, call.conditions.backend
    if call.conditions.compiling:
        linear: Any = torch.ops.fastlora.stacked_linear
        made: torch.Tensor = linear(
            x, stack, addend, call.slots_per_expert, *operands, rows.operator_arguments(), impl
        )
        return made
    if stack is None:
        return stacked_lora_linear(x, None, addend, call.slots_per_expert, operands, rows, impl)
    product = stacked_lora_linear(x, stack, None, call.slots_per_expert, operands, rows, impl)
    return product if addend is None else product + addend


class FastLoraExpertsOfAllTokens(FastLoraExperts):
    """LoRA layer for experts that each receive every token, as in Llama 4 models.

    Each expert receives one input row for each token. The input is ``[E * T, H]``, expert by
    expert. The stacks are ``[E, K, N]``, but no attribute of the module indicates this layout. PEFT
    0.21.2 therefore takes the stacks for ``[E, N, K]``, and x is multiplied by lora_B first.
    """

    module_of_forward = "transformers.models.llama4.modeling_llama4"

    def _forward(  # type: ignore[override]  # these experts get no choices of a router
        self, routing: Routing | None, conditions: ExecutionMode, x: torch.Tensor
    ) -> torch.Tensor:
        """Compute the output of the experts with the adapters applied.

        The output is ``[E * T, H]``. ``routing`` and ``conditions`` are those of the call.
        """
        base = self.base_layer
        count = base.num_experts
        tokens = len(x) // count
        # Rows are sorted by token first, as if each token had chosen all experts.
        matrices = torch.arange(count, device=x.device).expand(tokens, count)
        call = self._sort_by_expert_and_slot(matrices, routing, conditions)
        order = call.rows.order.long()
        place = order % count * tokens + order // count
        gate, up = self._product("gate_up_proj", x[place], call).chunk(2, dim=-1)
        y = self._product("down_proj", up * base.act_fn(gate), call)
        return y.index_select(0, _inverse_permutation(place))

    def _product(self, name: str, x: torch.Tensor, call: _RowsSortedByExpert) -> torch.Tensor:
        stack = self.base_layer._parameters[name].transpose(1, 2)
        layer: Any = self.inner_layers().get(name)
        return self._adapted_product(layer, stack, None, x, call)

    def _factors_in_product_order(
        self, layer: ParameterLoraLayer, name: str, factors: Factors
    ) -> tuple[torch.Tensor, torch.Tensor]:
        lora_a, lora_b = layer.rank_rows(name, factors)
        return lora_b, lora_a


def _is_marked(module: nn.Module) -> bool:
    return (
        all(hasattr(module, mark) for mark in _MARKS)
        and not isinstance(module, LoraLayer)
        and all(_is_stack(module, name) for name in _weight_stack_names(module))
    )


def _drops(dropout: nn.Module) -> bool:
    return isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0


def _module_of_forward(module: nn.Module) -> str | None:
    """Return the name of the Python module that defines the ``forward`` of a module's class."""
    namespace: dict[str, Any] = getattr(type(module).forward, "__globals__", {})
    return namespace.get("__name__")


def _is_stack(module: nn.Module, name: str) -> bool:
    parameter = module._parameters.get(name)
    return parameter is not None and parameter.dim() == 3


def _check(module: nn.Module, settings: LayerAdapterSettings) -> None:
    check_parameter_settings(module, settings)
    known = _weight_stack_names(module)
    for name, *_ in settings.parameters:
        if name not in known:
            raise UnsupportedLayerError(
                f"parameter {name!r} is not one of the module's weight stacks "
                f"({' and '.join(known)})"
            )
    config = getattr(module, "config", None)
    if getattr(config, "_experts_implementation", None) == "deepgemm":
        raise UnsupportedLayerError(
            f"its parameter {settings.parameters[0].name!r} is used by "
            "experts_implementation='deepgemm'; load the model with "
            "experts_implementation='grouped_mm'"
        )


register_layer_kind(
    LayerKind(
        "stacked experts",
        _is_marked,
        FastLoraExperts,
        parameter_adapter_shapes,
        _check,
        adapts_parameters=True,
    )
)
register_layer_kind(
    LayerKind(
        "stacked experts of all tokens",
        lambda module: type(module).__name__ == "Llama4TextExperts",
        FastLoraExpertsOfAllTokens,
        parameter_adapter_shapes,
        _check,
        adapts_parameters=True,
    )
)

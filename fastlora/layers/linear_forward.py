"""The forward pass of linear LoRA layers: fastlora's own, patched PEFT layers, and split layers.

A layer calls `create_call`, prepares its base layer, and calls `forward`. In a mixed batch, each
row has its own adapter (`fastlora.layers.mixed_forward`). Outside a mixed batch, the active
adapters apply to all rows, in one call if possible. There are three exceptions. DoRA
(`fastlora.layers.dora`) scales the output of everything before it. Dropout masks x separately for
each adapter. Modules that are hooked or replaced are called unchanged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fastlora.autograd.adapter import run_adapter
from fastlora.layers.adapter_factors import (
    fallback_reason_adapter_called,
    scaling_as_scalar_tensor,
)
from fastlora.layers.call import MixedCall, UniformCall
from fastlora.layers.dora import run_dora
from fastlora.layers.fallback_reasons import BASE_GEMM_VARIES, raise_if_triton_required, uses_dora
from fastlora.layers.group_forward import group_forward
from fastlora.layers.mixed_forward import forward_mixed
from fastlora.ops.execution_mode import execution_mode_of
from fastlora.ops.factors import Base, Factors
from fastlora.routing.active import active_routing
from fastlora.validation import UnsupportedLayerError
from fastlora.weights_version import WeightsVersion, weights_versions

if TYPE_CHECKING:
    from fastlora.layers.linear_with_adapters import BaseLinearWithAdapters


def create_call(layer: BaseLinearWithAdapters, x: torch.Tensor) -> UniformCall | MixedCall:
    """Create the `UniformCall` or `MixedCall` for calling a layer with x.

    x is ``[..., K]``. The object contains the conditions of the forward pass and the adapters to
    apply. A `UniformCall` without names means that only the base layer runs.

    Raises:
        UnsupportedLayerError: A mixed batch is being exported in a way that is not supported.
    """
    routing = None if layer._disabled else active_routing(layer)
    names = layer._applied_adapters() if routing is None else []
    acts = routing is not None or names
    conditions = execution_mode_of(x, layer.impl if acts else "eager")
    if torch.is_grad_enabled() and not conditions.compiling:
        weights_versions.trained = WeightsVersion()  # An optimizer step may follow.
    given, autocast = x, conditions.autocast
    if autocast is not None and acts:
        x = x.to(autocast)
    if routing is None:
        return UniformCall(layer, given, x, conditions, names)
    if (
        conditions.compiling
        and not torch.compiler.is_dynamo_compiling()
        and torch.compiler.is_exporting()
        and routing.source.loaded_adapters is None
    ):
        raise UnsupportedLayerError(
            "torch.export exports a mixed batch of adapters that are not in a pool only with "
            "strict=True; pass it to torch.export, or export the model outside the "
            "fastlora.adapters block"
        )
    if layer.may_see_partial_rows or (
        not conditions.compiling and routing.cache.row_checker is not None
    ):
        routing.check_gets_all_rows(layer, given, conditions.compiling)
    if not conditions.compiling and given.dim() > 2 and len(given) != len(routing.ids):
        routing.check_sample_dimension(layer, given)
    return MixedCall(layer, given, x, conditions, routing)


def forward(call: UniformCall | MixedCall, base: Base) -> torch.Tensor:
    """Run a linear layer, and apply the adapters that ``call`` specifies.

    Returns the output ``[..., N]``.
    """
    if isinstance(call, MixedCall):
        if call.conditions.compiling or call.routing.cache.row_checker is None:
            return forward_mixed(call, base)
        with call.routing.pause_row_order_tracking():
            return forward_mixed(call, base)
    magnitudes = call.layer._modules.get("lora_magnitude_vector")
    if magnitudes is None or not magnitudes._modules or not uses_dora(call.layer, call.names):
        return _forward_without_dora(call, base, call.names)
    # Run in sequence, as PEFT does: DoRA scales the sum of all terms before it.
    for run in _split_at_dora_adapters(call.layer, call.names):
        if uses_dora(call.layer, run):
            y = run_dora(call, base, run[0])
        else:
            y = _forward_without_dora(call, base, run)
        base = Base(y=y, inplace=True)
    return y


def _split_at_dora_adapters(layer: BaseLinearWithAdapters, names: list[str]) -> list[list[str]]:
    """Split a list of adapter names so that each DoRA adapter is in a list of its own.

    The result is a list of runs. A run is a list of the names of adapters that one call applies.
    Consecutive adapters without DoRA form one run.
    """
    runs: list[list[str]] = []
    for name in names:
        alone = uses_dora(layer, [name])
        if runs and not alone and not uses_dora(layer, runs[-1]):
            runs[-1].append(name)
        else:
            runs.append([name])
    return runs


def _forward_without_dora(call: UniformCall, base: Base, names: list[str]) -> torch.Tensor:
    """Run a base layer with adapters that do not use DoRA.

    Returns the output ``[..., N]``.
    """
    layer, x, conditions = call.layer, call.x, call.conditions
    if conditions.invariant and base.weight is None:
        conditions.raise_if_batch_invariant(layer, BASE_GEMM_VARIES)
    bias = shared = None
    others: list[Factors] = []
    if len(names) == 1:
        first = layer._local_factors(names[0], call)
        if first is not None and conditions.impl != "eager":  # Kernels run.
            shared = group_forward(call, base, first)
            if shared is not None and shared.y is not None:
                return shared.y
    else:
        first, others, bias = _concatenate_factors_and_sum_biases(call, names)
    if first is None:
        conditions.raise_if_batch_invariant(layer, fallback_reason_adapter_called(layer, names))
        return _add_by_calling_modules(call, base.base_layer_output(x), names)
    if bias is not None and base.weight is not None:
        base, bias = base._replace(bias=bias if base.bias is None else base.bias + bias), None
    y = run_adapter(x, base, first, conditions, "auto", shared, layer._local_dropout_seed)
    if bias is not None:
        y = y + bias.to(y.dtype)
    for other in others:
        y = run_adapter(
            x, Base(y=y, inplace=True), other, conditions, adjust_seed=layer._local_dropout_seed
        )
    return y


def _concatenate_factors_and_sum_biases(
    call: UniformCall, names: list[str]
) -> tuple[Factors | None, list[Factors], torch.Tensor | None]:
    """Concatenate the factors of several adapters, and sum their biases.

    The factors are concatenated along the rank dimension, so that one pass applies all adapters.
    Returns a tuple of the concatenated factors, a list of the factors to apply separately, and the
    sum of the adapters' scaled lora_bias ``[N]`` or None. The list is empty unless dropout is
    active. With active dropout, nothing is concatenated or summed: the first item contains the
    first adapter's factors, and the list contains those of the other adapters. The first item is
    None if the modules of any adapter must be called.
    """
    found: list[Factors] = []
    for name in names:
        factors = call.layer._local_factors(name, call)
        if factors is None:
            return None, [], None
        found.append(factors)
    if any(factors.dropout_p for factors in found):
        return found[0], found[1:], None
    biases = [f.lora_bias * f.scaling for f in found if f.lora_bias is not None]
    joined = Factors(
        torch.cat([factors.lora_a for factors in found]),
        torch.cat([factors.lora_b for factors in found], dim=1),
        torch.cat([factors.scaling.expand(factors.lora_a.shape[0]) for factors in found]),
    )
    return joined, [], sum(biases[1:], biases[0]) if biases else None


def _add_by_calling_modules(call: UniformCall, y: torch.Tensor, names: list[str]) -> torch.Tensor:
    """Call each adapter's modules to compute its update, and add the updates to y.

    The adapters are called one by one, as in PEFT.
    """
    layer, x = call.layer, call.original_x
    raise_if_triton_required(layer, names)
    for name in names:
        down, up = layer.lora_A[name], layer.lora_B[name]
        cast = call.conditions.autocast is None and layer.cast_input_dtype_enabled
        inner = x.to(down.weight.dtype) if cast else x
        update = up(down(layer.lora_dropout[name](inner))) * scaling_as_scalar_tensor(
            layer, name, call
        )
        y = (y + update).to(y.dtype)
    return y

"""Access to the factors of adapters, which are parameters of layers or belong to a pool."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from fastlora.layers.call import MixedCall, UniformCall
from fastlora.layers.dora_norms import cached_adapted_squared_norms
from fastlora.layers.scalings import Scalings
from fastlora.ops.factors import AddressTables, Factors, Slots, number_tensor_without_sync
from fastlora.sharding import is_dtensor
from fastlora.validation import UnsupportedLayerError

if TYPE_CHECKING:
    from fastlora.layers.linear_with_adapters import BaseLinearWithAdapters
    from fastlora.pool.records import LoadedAdapter


def has_module_hooks(*modules: nn.Module) -> bool:
    """Return whether any of the modules has hooks.

    A replaced ``forward`` counts as a hook.
    """
    for module in modules:
        own = module.__dict__  # This runs in every forward pass; attributes are slower.
        if (
            own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or own["_backward_hooks"]
            or own["_backward_pre_hooks"]
            or "forward" in own
        ):
            return True
    return False


# With map(), attrgetter reads an attribute of many tensors without a Python call for each.
_hooks_of, _post_hooks_of = map(attrgetter, ("_backward_hooks", "_post_accumulate_grad_hooks"))


def has_gradient_hooks(tensors: Sequence[torch.Tensor]) -> bool:
    """Return whether any of the tensors has a gradient hook."""
    return any(map(_hooks_of, tensors)) or any(map(_post_hooks_of, tensors))


def weight_of_linear_without_hooks(module: nn.Module) -> torch.Tensor | None:
    """Return the weight of a linear module, or None if the module has hooks.

    The result is also None for a module that is not an `nn.Linear`, for an instance of a subclass
    of `nn.Linear`, and for an `nn.Linear` whose weight is not a plain `nn.Parameter`.
    """
    if type(module) is not nn.Linear or has_module_hooks(module):
        return None
    weight = module._parameters.get("weight")
    return weight if type(weight) is nn.Parameter else None


def _weight_was_replaced_with_tensor(module: nn.Module) -> bool:
    """Return whether a module's weight was replaced with a tensor that is not an `nn.Parameter`.

    For example, `torch.func.functional_call` replaces the parameter with a tensor. The result is
    False for a module that has hooks or is not an `nn.Linear`, because such modules are not
    examined.
    """
    if type(module) is not nn.Linear or has_module_hooks(module):
        return False
    weight = module._parameters.get("weight")
    return weight is not None and not isinstance(weight, nn.Parameter)


def factors_without_calling_modules(
    layer: BaseLinearWithAdapters,
    name: str,
    call: UniformCall | MixedCall | None = None,
    *,
    with_dropout: bool = True,
) -> Factors | None:
    """Return an adapter's factors without calling its modules, or None if they must be called.

    The factors are taken from the parameters of the modules. The factors include the scaling, the
    dropout probability, and the DoRA magnitude. The modules must be called, for example, if they
    have hooks.

    Args:
        layer: The layer, which must have the adapter.
        name: The adapter's name.
        call: If given, the scaling is the tensor that `scaling_as_scalar_tensor` returns.
            Otherwise it is the layer's own value.
        with_dropout: Whether dropout can be active. If False, the dropout module is ignored.
    """
    # Read the module dicts directly: each attribute lookup takes microseconds in a large model.
    modules = layer._modules
    down, up = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
    dropout, dropout_p = modules["lora_dropout"]._modules[name], 0.0
    if type(dropout) is nn.Dropout:
        dropout_p = dropout.p if dropout.training else 0.0
    elif with_dropout and type(dropout) is not nn.Identity:  # PEFT uses nn.Identity for no dropout.
        return None
    if type(down) is not nn.Linear or type(up) is not nn.Linear:
        return None
    if call is not None and call.conditions.tracing:
        return None
    if has_module_hooks(down, up, dropout) if with_dropout else has_module_hooks(down, up):
        return None
    lora_a, lora_b = down._parameters.get("weight"), up._parameters.get("weight")
    if type(lora_a) is not nn.Parameter or type(lora_b) is not nn.Parameter:
        return None
    if call is None:
        # This is `layer.scaling[name]` without the property's Python call.
        scaling = layer.__dict__["_scaling"][name]
    else:
        scaling = scaling_as_scalar_tensor(layer, name, call)
    magnitudes = modules.get("lora_magnitude_vector")
    magnitude = None
    if magnitudes is not None and name in magnitudes._modules:
        magnitude = magnitudes._modules[name]._parameters.get("weight")
        if magnitude is None:  # a parametrization computes it
            return None
    return Factors(lora_a, lora_b, scaling, up._parameters["bias"], dropout_p, magnitude)


def promoted_factor_dtype(slots: Slots) -> torch.dtype:
    """Return the dtype that results from promoting the dtypes of all factors.

    The dtype is fp32 if there are no factors.
    """
    dtypes = [
        tensor.dtype
        for factors in slots
        if factors is not None
        for tensor in (factors.lora_a, factors.lora_b, factors.lora_bias)
        if tensor is not None
    ]
    return functools.reduce(torch.promote_types, dtypes or [torch.float32])


def fallback_reason_adapter_called(
    layer: BaseLinearWithAdapters, names: list[str], gathered: bool = False
) -> str:
    """Return why the adapters' modules must be called, or an empty string if they need not be.

    ``names`` are the names of the adapters. If the modules need not be called, fused operations can
    be used. Fused operations read the parameters of the modules directly. Hooks, parametrizations,
    shards, and replaced modules take effect only if the modules are called. ``gathered`` means that
    FSDP2 replaces shards with plain parameters during the forward pass.
    """
    for name in names:
        factors = (
            weight_of_linear_without_hooks(layer.lora_A[name]),
            weight_of_linear_without_hooks(layer.lora_B[name]),
        )
        if any(factor is None for factor in factors):
            modules = layer.lora_A[name], layer.lora_B[name]
            if all(type(m) is nn.Linear and is_dtensor(m.weight) for m in modules):
                if gathered and not any(map(has_module_hooks, modules)):
                    continue
                return f"adapter {name!r} has sharded factors (DTensors) that are not gathered"
            if any(map(_weight_was_replaced_with_tensor, modules)):
                return (
                    f"adapter {name!r} has a factor that was replaced by a plain tensor, as "
                    "torch.func.functional_call does unless it is given nn.Parameter objects"
                )
            return f"adapter {name!r} has a factor with hooks, or one that is not a plain nn.Linear"
        dropout = layer.lora_dropout[name]
        if type(dropout) not in (nn.Dropout, nn.Identity) or has_module_hooks(dropout):
            return f"adapter {name!r} has a custom dropout module, or hooks on its dropout module"
        magnitudes: Any = layer._modules.get("lora_magnitude_vector", {})
        if name in magnitudes and "weight" not in magnitudes[name]._parameters:
            return f"adapter {name!r} has a DoRA magnitude with a parametrization"
    return ""


def scaling_as_scalar_tensor(
    layer: BaseLinearWithAdapters, name: str, call: UniformCall | MixedCall
) -> torch.Tensor:
    """Return an adapter's scaling as a scalar tensor.

    The tensor has no dimensions and is on x's device. The dtype is fp64 if x is fp64, and fp32
    otherwise. In a graph that is being compiled, the tensor is an input of the graph; a number
    would be a constant of the graph.
    """
    x = call.x
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    scalings: Scalings = layer.__dict__["_scaling"]  # The value of `layer.scaling`.
    beside = scalings.tensors[name]
    if beside.dtype is exact and beside.device == x.device and not beside.dim():
        return beside
    value = scalings[name]
    if call.conditions.compiling or isinstance(value, torch.Tensor):
        return beside.to(device=x.device, dtype=exact).reshape(())
    return torch.full((), value, dtype=exact, device=x.device)


def scalings_as_tensor(values: Sequence[float | torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Return scalings as one tensor on the device of x.

    The tensor has the shape ``[S]``. Its dtype is fp32, or fp64 if x is fp64. If PEFT's compiled
    hot swap has made a scaling a tensor, the host does not read its value.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    numbers: list[float] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            same = [torch.as_tensor(v, dtype=dtype, device=x.device).reshape(()) for v in values]
            return torch.stack(same)
        numbers.append(value)
    return number_tensor_without_sync(tuple(numbers), dtype, x.device)


# The components of the DoRA scale ``g [N]`` of one adapter on one linear (see
# `fastlora.ops.torch.dora`): the magnitude ``[N]``, and the squared norms ``[N]`` with infinity for
# 0. If the squared norms are None, the magnitude is g itself.
DoraScaleTerms = tuple[torch.Tensor, Any]


def dora_scales_of_adapters(
    call: UniformCall | MixedCall, names: Sequence[str]
) -> list[DoraScaleTerms]:
    """Return the DoRA scales of the named adapters as a list of `DoraScaleTerms`.

    The adapters must be parameters of the layer and use DoRA.
    """
    layer, compiling = call.layer, call.conditions.compiling
    sums = []
    for name in names:
        scaling = scaling_as_scalar_tensor(layer, name, call) if compiling else layer.scaling[name]
        sums.append(cached_adapted_squared_norms(layer, name, scaling, compiling))
    squares = layer._reduce_squares_and_replace_zeros(sums)
    magnitudes = [layer._local_magnitude(name) for name in names]
    return list(zip(magnitudes, squares, strict=True))


# --------------------------------------------------------------------------------------- sources


class AdapterSource(Protocol):
    """The source from which a layer gets the factors of a batch's adapters.

    The factors are parameters of the model's layers or belong to a pool. This class is a protocol.
    """

    @property
    def loaded_adapters(self) -> tuple[LoadedAdapter | None, ...] | None:
        """The loaded adapters, by slot.

        The tuple has one entry per slot. The entry of an empty slot is None. Only a pool has loaded
        adapters. If the source is not a pool, the value is None instead of a tuple.
        """

    @property
    def tables(self) -> AddressTables | None:
        """The address tables of the adapters' factors.

        Kernels read the addresses of the factors from these tables. Only a pool has tables of its
        own. If the source is not a pool, the value is None. For a model's own adapters,
        `get_or_build_address_tables` builds the tables.
        """

    def factors(
        self, layer: BaseLinearWithAdapters, slot: int, call: MixedCall | None = None
    ) -> Factors | None:
        """Return a layer's factors for the adapter in a slot.

        Returns None if the layer does not have the adapter. If ``call`` is given, the scaling is a
        zero-dimensional tensor on the device of its x.

        Raises:
            UnsupportedLayerError: The adapter's modules must be called, which a mixed batch does
                not support.
        """

    def dora_scales(self, call: MixedCall, slots: Sequence[int]) -> list[DoraScaleTerms]:
        """Return the DoRA scales of the given slots as a list of `DoraScaleTerms`.

        The adapter in each of these slots must use DoRA on the layer.
        """

    def adapter_key(self, slot: int) -> Hashable:
        """Return a hashable key that identifies the adapter in a slot."""


class ModelAdapterSource:
    """`AdapterSource` for the adapters in a model's layers.

    The adapters' factors are taken from the parameters of the layers.

    Args:
        names: Name of the adapter in each slot.
    """

    loaded_adapters = tables = None

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names

    def factors(
        self, layer: BaseLinearWithAdapters, slot: int, call: MixedCall | None = None
    ) -> Factors | None:
        name = self.names[slot]
        if name not in layer._modules["lora_A"]._modules:
            return None
        found = layer._local_factors(name, call)
        if found is None:
            raise UnsupportedLayerError(
                f"{fallback_reason_adapter_called(layer, [name])}, so it cannot be used in a mixed "
                "batch; run the adapter outside a fastlora.adapters block, or "
                "make its factors plain parameters again"
            )
        return found

    def dora_scales(self, call: MixedCall, slots: Sequence[int]) -> list[DoraScaleTerms]:
        return dora_scales_of_adapters(call, [self.names[slot] for slot in slots])

    def adapter_key(self, slot: int) -> Hashable:
        return self.names[slot]


class PoolAdapterSource:
    """`AdapterSource` for the adapters in a `fastlora.AdapterPool`.

    Args:
        loaded_adapters: The pool's entry of each slot, or None for an empty slot. Slots are columns
            of the tables.
        tables: The pool's address tables.
    """

    def __init__(
        self, loaded_adapters: tuple[LoadedAdapter | None, ...], tables: AddressTables
    ) -> None:
        self.loaded_adapters, self.tables = loaded_adapters, tables

    def factors(
        self, layer: BaseLinearWithAdapters, slot: int, call: MixedCall | None = None
    ) -> Factors | None:
        loaded = self.loaded_adapters[slot]
        found: Factors | None = None if loaded is None else loaded.factors(layer.table_row)
        if found is None or call is None:
            return found
        x = call.x
        exact = torch.float64 if x.dtype == torch.float64 else torch.float32
        return found._replace(scaling=torch.full((), found.scaling, dtype=exact, device=x.device))

    def dora_scales(self, call: MixedCall, slots: Sequence[int]) -> list[DoraScaleTerms]:
        """Return the DoRA scales of the given slots.

        The pool caches them. See `fastlora.pool.scales`.
        """
        found: list[Any] = [
            self.loaded_adapters[slot] for slot in slots
        ]  # Each has its scales by now.
        row = call.layer.table_row
        return [(loaded.scales.by_module[row], None) for loaded in found]

    def adapter_key(self, slot: int) -> Hashable:
        loaded = self.loaded_adapters[slot]
        return None if loaded is None else (loaded.name, loaded.version)


def factors_in_slots(
    source: AdapterSource,
    layer: BaseLinearWithAdapters,
    slots: Sequence[int],
    excluded_slots: Sequence[int] = (),
) -> Slots:
    """Return a layer's factors for the adapters in the given slots.

    The result is a list that has one entry for each slot in ``slots``. The entry is None for a slot
    in ``excluded_slots`` and for an adapter that does not adapt the layer.
    """
    found: Slots = []
    for slot in slots:
        found.append(None if slot in excluded_slots else source.factors(layer, slot))
    return found

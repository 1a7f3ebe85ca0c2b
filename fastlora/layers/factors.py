"""Where a layer's adapters come from: its parameters, or a pool's images."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from fastlora.layers.call import LayerCall, MixedCall
from fastlora.layers.norms import kept_sums
from fastlora.layers.scalings import Scalings
from fastlora.ops.factors import Factors, Slots, Tables, numbers_on
from fastlora.sharding import is_sharded
from fastlora.validation import UnsupportedLayerError

if TYPE_CHECKING:
    from fastlora.layers.layer import AdaptedLayer
    from fastlora.pool.resident import Resident


def is_hooked(*modules: nn.Module) -> bool:
    """Whether calling one of these modules does more than its class's forward."""
    for module in modules:
        own = module.__dict__  # every module's forward asks this: attributes would take longer
        if (
            own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or own["_backward_hooks"]
            or own["_backward_pre_hooks"]
            or "forward" in own
        ):
            return True
    return False


# In one call for many tensors.
_hooks_of, _post_hooks_of = map(attrgetter, ("_backward_hooks", "_post_accumulate_grad_hooks"))


def has_tensor_hooks(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether something waits for the gradient of one of these."""
    return any(map(_hooks_of, tensors)) or any(map(_post_hooks_of, tensors))


def plain_weight(module: nn.Module) -> torch.Tensor | None:
    """Returns the weight of a linear that nothing has hooked into, else None."""
    if type(module) is not nn.Linear or is_hooked(module):
        return None
    weight = module._parameters.get("weight")
    return weight if type(weight) is nn.Parameter else None


def _is_replaced(module: nn.Module) -> bool:
    """Whether a linear that nothing has hooked into has a plain tensor in place of its weight."""
    if type(module) is not nn.Linear or is_hooked(module):
        return False
    weight = module._parameters.get("weight")
    return weight is not None and not isinstance(weight, nn.Parameter)


def factors_of(
    layer: AdaptedLayer,
    name: str,
    call: LayerCall | MixedCall | None = None,
    *,
    drops: bool = True,
) -> Factors | None:
    """Returns one adapter's factors from its parameters; None where its modules must be called.

    Args:
        layer: Has the adapter.
        name: The adapter's.
        call: Where given, the scaling is `scaling_beside`; else the number.
        drops: False where no dropout can act: its module is not looked at.
    """
    # Looked up as nn.Module keeps them, in few calls: each takes microseconds in a large model.
    modules = layer._modules
    down, up = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
    dropout, dropout_p = modules["lora_dropout"]._modules[name], 0.0
    if type(dropout) is nn.Dropout:
        dropout_p = dropout.p if dropout.training else 0.0
    elif drops and type(dropout) is not nn.Identity:  # PEFT's, where there is no dropout
        return None
    if type(down) is not nn.Linear or type(up) is not nn.Linear:
        return None
    if call is not None and call.conditions.tracing:
        return None
    if is_hooked(down, up, dropout) if drops else is_hooked(down, up):
        return None
    lora_a, lora_b = down._parameters.get("weight"), up._parameters.get("weight")
    if type(lora_a) is not nn.Parameter or type(lora_b) is not nn.Parameter:
        return None
    if call is None:
        scaling = layer.__dict__["_scaling"][name]  # as `layer.scaling[name]`, in no call of ours
    else:
        scaling = scaling_beside(layer, name, call)
    magnitudes = modules.get("lora_magnitude_vector")
    magnitude = None
    if magnitudes is not None and name in magnitudes._modules:
        magnitude = magnitudes._modules[name]._parameters["weight"]
    return Factors(lora_a, lora_b, scaling, up._parameters["bias"], dropout_p, magnitude)


def dtype_of(slots: Slots) -> torch.dtype:
    """Returns the dtype that holds all factors exactly."""
    dtypes = [
        tensor.dtype
        for factors in slots
        if factors is not None
        for tensor in (factors.lora_a, factors.lora_b, factors.lora_bias)
        if tensor is not None
    ]
    return functools.reduce(torch.promote_types, dtypes or [torch.float32])


def why_not_fused(layer: AdaptedLayer, names: list[str], gathered: bool = False) -> str:
    """Returns why adapters cannot run as bare tensors, or an empty string.

    Their modules must then be called: hooks, parametrizations, shards and replacements of users and
    libraries live there. ``gathered`` says that FSDP2 puts plain parameters in place of shards for
    the forward.
    """
    for name in names:
        factors = plain_weight(layer.lora_A[name]), plain_weight(layer.lora_B[name])
        if any(factor is None for factor in factors):
            modules = layer.lora_A[name], layer.lora_B[name]
            if all(type(m) is nn.Linear and is_sharded(m.weight) for m in modules):
                if gathered and not any(map(is_hooked, modules)):
                    continue
                return f"adapter {name!r} has sharded factors (DTensors) that nothing gathers"
            if any(map(_is_replaced, modules)):
                return (
                    f"adapter {name!r} has a factor that was replaced by a plain tensor, as "
                    "torch.func.functional_call does where it is not given nn.Parameter objects"
                )
            return f"adapter {name!r} has a factor that is hooked, or not a plain linear"
        dropout = layer.lora_dropout[name]
        if type(dropout) not in (nn.Dropout, nn.Identity) or is_hooked(dropout):
            return f"adapter {name!r} has its own dropout module, or hooks on it"
    return ""


def scaling_beside(layer: AdaptedLayer, name: str, call: LayerCall | MixedCall) -> torch.Tensor:
    """Returns an adapter's scaling as a tensor without dimensions: on x's device, fp32 or fp64.

    In a graph that is compiled it is the graph's input; a number would be part of the graph.
    """
    x = call.x
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    scalings: Scalings = layer.__dict__["_scaling"]  # what `layer.scaling` returns
    beside = scalings.tensors[name]
    if beside.dtype is exact and beside.device == x.device and not beside.dim():
        return beside
    value = scalings[name]
    if call.conditions.compiling or isinstance(value, torch.Tensor):
        return beside.to(device=x.device, dtype=exact).reshape(())
    return torch.full((), value, dtype=exact, device=x.device)


def scalings_beside(values: Sequence[float | torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Returns scalings as a tensor beside x, fp32 (fp64 for fp64) ``[S]``.

    A tensor of PEFT's compiled hot swap is read on its device.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    numbers: list[float] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            same = [torch.as_tensor(v, dtype=dtype, device=x.device).reshape(()) for v in values]
            return torch.stack(same)
        numbers.append(value)
    return numbers_on(tuple(numbers), dtype, x.device)


# What DoRA's g ``[N]`` of one adapter on one linear is made of, see `fastlora.ops.torch.dora`: the
# magnitude ``[N]``, and the norms' squares ``[N]``, infinity for 0. Without squares, None, the
# magnitude is g itself.
Scale = tuple[torch.Tensor, Any]


def scales_by_name(call: LayerCall | MixedCall, names: Sequence[str]) -> list[Scale]:
    """Returns the `Scale` of adapters that are parameters and use DoRA on a layer."""
    layer, compiling = call.layer, call.conditions.compiling
    sums = []
    for name in names:
        scaling = scaling_beside(layer, name, call) if compiling else layer.scaling[name]
        sums.append(kept_sums(layer, name, scaling, compiling))
    squares = layer._of_whole_rows(sums)
    magnitudes = [layer._own_magnitude(name) for name in names]
    return list(zip(magnitudes, squares, strict=True))


# --------------------------------------------------------------------------------------- sources


class Source(Protocol):
    """Where the adapters of a batch come from."""

    @property
    def residents(self) -> tuple[Any, ...] | None:
        """A pool's entry of each slot, None for an empty one; None for parameters."""

    @property
    def tables(self) -> Tables | None:
        """Where all factors lie, where that is known at all times."""

    def factors(
        self, layer: AdaptedLayer, slot: int, call: MixedCall | None = None
    ) -> Factors | None:
        """Returns a slot's factors on a layer; None where the adapter leaves the layer alone.

        Where a call is given, the scaling is a tensor without dimensions beside its x.

        Raises:
            UnsupportedLayerError: The adapter's modules must be called, which rows cannot share.
        """

    def scales(self, call: MixedCall, slots: Sequence[int]) -> list[Scale]:
        """Returns what DoRA scales with on a layer in slots that use it there."""

    def identity(self, slot: int) -> Hashable:
        """Returns what tells the adapter of a slot from all others."""


class Parameters:
    """Adapters that are parameters of the model's layers.

    Args:
        names: Adapter of each slot.
    """

    residents = tables = None

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names

    def factors(
        self, layer: AdaptedLayer, slot: int, call: MixedCall | None = None
    ) -> Factors | None:
        name = self.names[slot]
        if name not in layer._modules["lora_A"]._modules:
            return None
        found = layer._own_factors(name, call)
        if found is None:
            raise UnsupportedLayerError(
                f"{why_not_fused(layer, [name])}, which rows cannot share; run this adapter "
                "outside of fastlora.adapters, or make its factors plain parameters again"
            )
        return found

    def scales(self, call: MixedCall, slots: Sequence[int]) -> list[Scale]:
        return scales_by_name(call, [self.names[slot] for slot in slots])

    def identity(self, slot: int) -> Hashable:
        return self.names[slot]


class Pool:
    """Adapters that an `fastlora.AdapterPool` holds.

    Args:
        residents: The pool's entry of each slot, a column of the tables; None for an empty one.
        tables: The pool's.
    """

    def __init__(self, residents: tuple[Resident | None, ...], tables: Tables) -> None:
        self.residents, self.tables = residents, tables

    def factors(
        self, layer: AdaptedLayer, slot: int, call: MixedCall | None = None
    ) -> Factors | None:
        resident = self.residents[slot]
        found: Factors | None = None if resident is None else resident.factors(layer.table_row)
        if found is None or call is None:
            return found
        x = call.x
        exact = torch.float64 if x.dtype == torch.float64 else torch.float32
        return found._replace(scaling=torch.full((), found.scaling, dtype=exact, device=x.device))

    def scales(self, call: MixedCall, slots: Sequence[int]) -> list[Scale]:
        """See `Source.scales`; a pool keeps g itself (`fastlora.pool.scales`)."""
        found: list[Any] = [self.residents[slot] for slot in slots]  # each has scales by now
        row = call.layer.table_row
        return [(resident.scales.by_module[row], None) for resident in found]

    def identity(self, slot: int) -> Hashable:
        resident = self.residents[slot]
        return None if resident is None else (resident.name, resident.version)


def slots_of(
    source: Source, layer: AdaptedLayer, which: Sequence[int], without: Sequence[int] = ()
) -> Slots:
    """Returns a layer's adapters in these slots; those of ``without`` are None."""
    found: Slots = []
    for slot in which:
        found.append(None if slot in without else source.factors(layer, slot))
    return found

"""Where a layer's adapters come from: its parameters, or a pool's images."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import repeat
from operator import attrgetter, contains, eq, getitem, is_
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from fastlora.layers.norms import kept_sums
from fastlora.layers.protocol import AdapterLayer
from fastlora.layers.why import is_hooked, why_not_fused
from fastlora.ops.factors import Factors, Slots, Tables
from fastlora.validation import UnsupportedLayerError


def factors_of(
    layer: AdapterLayer, name: str, x: torch.Tensor | None = None, *, drops: bool = True
) -> Factors | None:
    """Returns one adapter's factors from its parameters; None where its modules must be called.

    Args:
        layer: Has the adapter.
        name: The adapter's.
        x: Where given, the scaling is a tensor without dimensions beside x; else as `scaling_of`.
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
    if is_hooked(down, up, dropout) if drops else is_hooked(down, up):
        return None
    lora_a, lora_b = down._parameters.get("weight"), up._parameters.get("weight")
    if type(lora_a) is not nn.Parameter or type(lora_b) is not nn.Parameter:
        return None
    scaling = scaling_of(layer, name) if x is None else scaling_beside(layer, name, x)
    magnitudes = modules.get("lora_magnitude_vector")
    magnitude = None
    if magnitudes is not None and name in magnitudes._modules:
        magnitude = magnitudes._modules[name]._parameters["weight"]
    return Factors(lora_a, lora_b, scaling, up._parameters["bias"], dropout_p, magnitude)


def scaling_of(layer: AdapterLayer, name: str) -> Any:
    """Returns an adapter's scaling: a number, or in a graph that is compiled a tensor, its input.

    A number would be part of the graph. A tensor also where the user put one.
    """
    return layer.scaling.tensors[name] if torch.compiler.is_compiling() else layer.scaling[name]


def scaling_beside(layer: AdapterLayer, name: str, x: torch.Tensor) -> torch.Tensor:
    """Returns an adapter's scaling as a tensor without dimensions: on x's device, fp32 or fp64."""
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    scalings = layer.scaling
    beside: torch.Tensor = scalings.tensors[name]
    if beside.dtype is exact and beside.device == x.device and not beside.dim():
        return beside
    if torch.compiler.is_compiling() or isinstance(scalings[name], torch.Tensor):
        return beside.to(device=x.device, dtype=exact).reshape(())
    return torch.full((), scalings[name], dtype=exact, device=x.device)


class Scale(NamedTuple):
    """What DoRA's g ``[N]`` of one adapter on one linear is made of; see `scale_of`.

    Attributes:
        magnitude: ``[N]``; g itself where there are no squares.
        squares: The norms' squares, ``[N]``, infinity for 0; or None.
    """

    magnitude: torch.Tensor
    squares: Any  # as above


def scales_by_name(layer: AdapterLayer, names: Sequence[str]) -> list[Scale]:
    """Returns the `Scale` of adapters that are parameters and use DoRA on a layer."""
    sums = [kept_sums(layer, name, scaling_of(layer, name)) for name in names]
    squares = layer._of_whole_rows(sums)
    magnitudes = [layer._own_magnitude(name) for name in names]
    return list(map(Scale, magnitudes, squares))


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
        self, layer: AdapterLayer, slot: int, x: torch.Tensor | None = None
    ) -> Factors | None:
        """Returns a slot's factors on a layer; None where the adapter leaves the layer alone.

        Where x is given, the scaling is a tensor without dimensions beside it.

        Raises:
            UnsupportedLayerError: The adapter's modules must be called, which rows cannot share.
        """

    def scales(self, layer: AdapterLayer, slots: Sequence[int]) -> list[Scale]:
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
        self, layer: AdapterLayer, slot: int, x: torch.Tensor | None = None
    ) -> Factors | None:
        """See `Source.factors`."""
        name = self.names[slot]
        if name not in layer._modules["lora_A"]._modules:
            return None
        found = layer._own_factors(name, x)
        if found is None:
            raise UnsupportedLayerError(why_not_fused(layer, [name]) + ", which rows cannot share")
        return found

    def scales(self, layer: AdapterLayer, slots: Sequence[int]) -> list[Scale]:
        """See `Source.scales`."""
        return scales_by_name(layer, [self.names[slot] for slot in slots])

    def identity(self, slot: int) -> Hashable:
        """See `Source.identity`."""
        return self.names[slot]


class Resident(Protocol):
    """An adapter that a pool holds on the device."""

    name: str
    version: int
    uses_dora: bool
    scales: Any

    def factors(self, row: int) -> Factors | None:
        """Returns its factors on a layer by the layer's row in the pool's tables."""


class Pool:
    """Adapters that an `fastlora.AdapterPool` holds.

    Args:
        residents: The pool's entry of each slot, a column of the tables; None for an empty one.
        tables: The pool's.
    """

    def __init__(self, residents: tuple[Resident | None, ...], tables: Tables) -> None:
        self.residents, self.tables = residents, tables

    def factors(
        self, layer: AdapterLayer, slot: int, x: torch.Tensor | None = None
    ) -> Factors | None:
        """See `Source.factors`."""
        resident = self.residents[slot]
        found: Factors | None = None if resident is None else resident.factors(layer.table_row)
        if found is None or x is None:
            return found
        exact = torch.float64 if x.dtype == torch.float64 else torch.float32
        return found._replace(scaling=torch.full((), found.scaling, dtype=exact, device=x.device))

    def scales(self, layer: AdapterLayer, slots: Sequence[int]) -> list[Scale]:
        """See `Source.scales`; a pool keeps g itself (`fastlora.pool.scales`)."""
        found = [resident for slot in slots if (resident := self.residents[slot]) is not None]
        return [Scale(resident.scales.by_module[layer.table_row], None) for resident in found]

    def identity(self, slot: int) -> Hashable:
        """See `Source.identity`."""
        resident = self.residents[slot]
        return None if resident is None else (resident.name, resident.version)


def slots_of(
    source: Source, layer: AdapterLayer, which: Sequence[int], without: Sequence[int] = ()
) -> Slots:
    """Returns a layer's adapters in these slots; those of ``without`` are None."""
    own: list[Factors | None] = []
    for slot in which:
        own.append(None if slot in without else source.factors(layer, slot))
    return Slots(tuple(own))


# --------------------------------------------------------------- whether parameters are unchanged

_version = attrgetter("_version")
_data_ptr = torch.Tensor.data_ptr
_training = attrgetter("training")
# Without gradients, backward hooks are of no consequence.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
# A layer's whole table of modules is compared where at least one in so many is of the set.
_MOST_OTHERS = 4


class Watch:
    """Remembers modules, parameters with their versions, scalings and dropouts of adapters.

    It is asked once when a block begins. It does not see writes that move no version: for these
    there are marks (`fastlora.weight_marks`), which are checked within a block too.

    In flat lists, which are compared without a loop in Python: 64 adapters on SmolLM2 are 13,440
    pairs of factors, and every block pays for the look at each of them.
    """

    def __init__(self) -> None:
        self._tables: list[dict[str, Any]] = []
        self._copies: list[dict[str, Any]] = []
        self._holders: list[Mapping[str, object]] = []
        self._keys: list[str] = []
        self._objects: list[Any] = []
        self._parameters: list[torch.Tensor] = []
        self._stamps: list[tuple[int, int]] = []
        self._dropouts: list[nn.Module] = []
        self._hooks: list[dict[Any, Any]] = []
        self._own: list[dict[str, Any]] = []
        self._hooked = self._untold = False

    def add(self, layer: AdapterLayer, names: Sequence[str]) -> None:
        """Remembers those of the adapters that a layer has."""
        modules = layer._modules
        downs, ups = modules["lora_A"]._modules, modules["lora_B"]._modules
        dropouts = modules["lora_dropout"]._modules
        present = [name for name in names if name in downs]
        # Modules and numbers compare by identity and by value; tensors do not, and have a list.
        for table in (downs, ups, dropouts, layer.scaling):
            # A scaling may be a tensor, which is itself whatever was written into it.
            told = not any(isinstance(value, torch.Tensor) for value in table.values())
            if told and len(table) <= _MOST_OTHERS * len(present):
                self._tables.append(table)
                self._copies.append(dict(table))
            else:
                for name in present:
                    self._remember(table, name)
        for name in present:
            for module in (downs[name], ups[name]):
                self._hooked |= is_hooked(module)
                self._hooks += [module.__dict__[kind] for kind in _HOOKS]
                self._own.append(module.__dict__)
                for key in module._parameters:
                    self._remember(module._parameters, key)
            if type(dropouts[name]) is nn.Dropout:
                self._dropouts.append(dropouts[name])

    def _remember(self, holder: Mapping[str, object], key: str) -> None:
        value = holder[key]
        self._holders.append(holder)
        self._keys.append(key)
        self._objects.append(value)
        if isinstance(value, torch.Tensor) and value.is_inference():
            self._untold = True
        elif isinstance(value, torch.Tensor):
            self._parameters.append(value)
            self._stamps.append((value._version, value.data_ptr()))

    def unchanged(self) -> bool:
        """Whether all of it is as it was, and nothing has been hooked into it."""
        # One pass for both: a tensor once read is still in the processor's cache.
        tensors = self._parameters
        stamps = zip(map(_version, tensors), map(_data_ptr, tensors), strict=True)
        try:
            return (
                not self._hooked
                and not self._untold
                and self._tables == self._copies
                and all(map(is_, map(getitem, self._holders, self._keys), self._objects))
                and all(map(eq, stamps, self._stamps))
                and not any(map(_training, self._dropouts))
                and not any(self._hooks)
                and not any(map(contains, self._own, repeat("forward")))
            )
        except KeyError:  # an adapter was deleted
            return False

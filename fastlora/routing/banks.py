"""Layers that may see only a part of a batch's rows, such as experts, and what shows that they do.

Experts are alike: siblings below one module, of one class and with parameters of the same shapes.
So are the layers of a decoder, and q and o. A `Bank` holds the layers at one place in alike
siblings. The first block in which some of them run follows the rows (`fastlora.routing.row_order`):
either rows reach them in the order of the batch, and the bank is never followed again, or the data
chose these rows, and the layer raises before it computes.

Whether a model chooses rows is a property of its code, in training and in evaluation. Compiled code
cannot be followed: there, structure decides until a block without compilation has.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fastlora.routing.row_order import RowOrder
from fastlora.validation import UnsupportedLayerError

# So many blocks follow a bank of which some layers do not run, as in a part that is unused. Later
# blocks do not, until one of these layers has run: following costs 8 us an operator.
_MOST_IDLE = 8


@dataclass(eq=False)
class Bank:
    """Layers at one place in alike siblings, as ``experts.*.w1``.

    Attributes:
        layers: By their numbers in the model, their names and the layers.
        is_expert: Whether structure says that they are experts: a name does, or there is a router.
        is_refused: Whether a block has shown that they see only some rows.
        ran: By mode (training or not), the layers that a followed block has shown to get all rows.
        idle: By mode, the blocks that have followed the bank and left out some of its layers.
    """

    layers: dict[int, tuple[str, Any]] = field(default_factory=dict)
    is_expert: bool = False
    is_refused: bool = False
    ran: dict[bool, set[int]] = field(default_factory=lambda: {False: set(), True: set()})
    idle: dict[bool, int] = field(default_factory=lambda: {False: 0, True: 0})

    def name_of(self, layer: Any) -> str:
        """Returns the name of one of the layers in the model."""
        return self.layers[layer.routed_as][0]

    def decide(self, sees_part: bool) -> None:
        """Keeps for each layer whether it raises where rows are not followed."""
        for _, layer in self.layers.values():
            layer.sees_part = sees_part


class Banks:
    """The banks of a model.

    Args:
        root: The model.
        layers: Names in it, and the layers that mixed batches concern.
    """

    def __init__(self, root: nn.Module, layers: Iterable[tuple[str, Any]]) -> None:
        found: dict[str, Bank] = {}
        alike = _Alike()
        self._of: dict[int, Bank] = {}
        for name, layer in layers:
            place, is_expert = alike.place(root, name, layer)
            if place == name:
                layer.sees_part = False
                continue
            bank = found.setdefault(place, Bank())
            bank.layers[layer.routed_as] = name, layer
            bank.is_expert |= is_expert
            self._of[layer.routed_as] = bank
        self._all = list(found.values())
        for bank in self._all:
            bank.decide(bank.is_expert)
        # By mode, the banks that no block has decided about.
        self._pending = {mode: set(self._all) for mode in (False, True)}

    def followed(self) -> FollowedRows | None:
        """Returns what follows the rows of a block; None where every bank is decided about."""
        if not self._all:
            return None
        (_, layer), *_ = self._all[0].layers.values()
        mode = bool(layer.training)
        pending = tuple(self._pending[mode])  # other threads may decide about some meanwhile
        if not pending:
            return None
        return FollowedRows(self, any(bank.idle[mode] < _MOST_IDLE for bank in pending))

    def bank_of(self, layer: Any) -> Bank | None:
        """Returns the bank of a layer; None where it has no alike siblings."""
        return self._of.get(layer.routed_as)

    def settle(self, ran: Iterable[Any]) -> None:
        """Notes the layers that a followed block has shown to get all rows."""
        modes = set()
        for layer in ran:
            bank, mode = self._of[layer.routed_as], bool(layer.training)
            if bank.is_refused:
                continue
            bank.ran[mode].add(layer.routed_as)
            bank.decide(False)
            modes.add(mode)
        for mode in modes:
            for bank in list(self._pending[mode]):
                if len(bank.ran[mode]) == len(bank.layers):
                    self._pending[mode].discard(bank)
                else:
                    bank.idle[mode] += 1

    def refuse(self, bank: Bank, layer: Any) -> None:
        """Has the layers of a bank raise from now on, and raises for one of them.

        Raises:
            UnsupportedLayerError: Always.
        """
        bank.decide(True)
        for pending in self._pending.values():
            pending.discard(bank)
        bank.is_refused = True
        raise UnsupportedLayerError(_message(bank, layer))


class FollowedRows:
    """Follows the rows of one block: a context manager around it.

    Args:
        banks: The model's.
        follows: Whether rows are followed. Else it is only noted that a layer has run, which the
            next block then follows.
    """

    def __init__(self, banks: Banks, follows: bool) -> None:
        self._banks = banks
        self.order = RowOrder() if follows else None
        self._ran: dict[int, Any] = {}

    def __enter__(self) -> FollowedRows:
        if self.order is not None:
            self.order.__enter__()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if self.order is not None:
            self.order.__exit__(kind, error, trace)
        if kind is None and self._ran:
            self._banks.settle(self._ran.values())

    def begin(self, inputs: Iterable[object]) -> None:
        """Takes what a model is called with to be in the order of the batch."""
        if self.order is not None:
            self.order.in_order(inputs)

    def abandon(self) -> None:
        """Follows nothing from now on, and shows nothing of the layers that ran."""
        self._ran.clear()
        if self.order is not None:
            self.order.blind()

    def check(self, layer: Any, x: torch.Tensor) -> None:
        """Raises `UnsupportedLayerError` for a layer whose input has rows that the data chose."""
        bank = self._banks.bank_of(layer)
        if bank is None:
            return
        if self.order is not None and self.order.sees:
            if self.order.is_chosen(x):
                self._banks.refuse(bank, layer)
            self._ran[layer.routed_as] = layer
            return
        mode = bool(layer.training)
        if layer.routed_as not in bank.ran[mode]:
            bank.idle[mode] = 0  # the next block follows it
        if layer.sees_part:
            refuse_part(layer)


def refuse_part(layer: Any) -> None:
    """Raises for a layer that may see only a part of the rows, where rows are not followed.

    Raises:
        UnsupportedLayerError: Always.
    """
    banks = layer.routed_by.banks
    bank = None if banks is None else banks.bank_of(layer)
    if bank is None or bank.is_refused:
        raise UnsupportedLayerError(_message(bank, layer))
    raise UnsupportedLayerError(
        f"layer {bank.name_of(layer)!r} looks like an expert of a mixture, which would get only "
        "some rows of the batch, and no mixed batch has shown yet that it gets all of them: run "
        f"one without torch.compile first. If it does not get all: {_ADVICE}"
    )


def _message(bank: Bank | None, layer: Any) -> str:
    name = type(layer).__name__ if bank is None else bank.name_of(layer)
    return (
        f"layer {name!r} gets only some rows of the batch, as an expert of a mixture does: their "
        f"position does not tell which adapter they belong to; {_ADVICE}"
    )


_ADVICE = (
    "leave the experts out of target_modules, or use one adapter at a time, with "
    "set_adapter() and without fastlora.adapters or adapter_names"
)


# --------------------------------------------------------------------------------------- structure


_LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


class _Alike:
    """Finds which modules are alike, and remembers it."""

    def __init__(self) -> None:
        self._known: dict[int, int] = {}
        self._numbers: dict[Any, int] = {}
        self._counts: dict[int, Counter[int]] = {}

    def place(self, root: nn.Module, name: str, layer: Any) -> tuple[str, bool]:
        """Returns a layer's name with a star for each module that has alike siblings.

        Also returns whether one of these is an expert, by a name or a router beside it.
        """
        names = name.split(".")
        parts, is_expert = list(names), False
        holder: nn.Module = root
        above: nn.Module | None = None
        for depth, part in enumerate(names):
            child = holder._modules.get(part)
            if child is None:
                break
            count = self._count(holder)[self._number(child)]
            if count > 1:
                words = [part, _class_name(child)]
                if child is not layer or isinstance(holder, _LISTS):
                    words += [names[depth - 1] if depth else "", _class_name(holder)]
                is_expert |= any("expert" in word.lower() for word in words)
                is_expert |= _has_router(holder, above, count, getattr(layer, "in_features", 0))
                parts[depth] = "*"
            holder, above = child, holder
        return ".".join(parts), is_expert

    def _count(self, holder: nn.Module) -> Counter[int]:
        """Returns how many children of a module have each number."""
        known = self._counts.get(id(holder))
        if known is None:
            children = [child for child in holder._modules.values() if child is not None]
            known = self._counts[id(holder)] = Counter(map(self._number, children))
        return known

    def _number(self, module: nn.Module) -> int:
        """Returns a number that a module has in common with those that are alike."""
        known = self._known.get(id(module))
        if known is None:
            look = (*_look(module), *((n, self._number(m)) for n, m in _children(module)))
            known = self._known[id(module)] = self._numbers.setdefault(look, len(self._numbers))
        return known


def _base(module: nn.Module) -> nn.Module:
    """Returns the module that adapters are on; the module itself where there are none."""
    find: Any = getattr(module, "get_base_layer", None)
    return module if find is None else find()


def _class_name(module: nn.Module) -> str:
    return type(_base(module)).__name__


def _look(module: nn.Module) -> Sequence[object]:
    """Returns class and shapes of a module's own parameters, adapters apart."""
    base = _base(module)
    kind = nn.Linear if base is module and hasattr(module, "lora_A") else type(base)
    shapes = [(n, tuple(p.shape)) for n, p in base._parameters.items() if p is not None]
    return (kind, *shapes)


def _children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields name and module of the children of what adapters are on, adapters apart."""
    for name, child in _base(module)._modules.items():
        if child is not None and not name.startswith("lora_"):
            yield name, child


def _has_router(holder: nn.Module, above: nn.Module | None, count: int, width: int) -> bool:
    """Whether beside alike modules a matrix has a row for each of them, as wide as their input."""
    beside = [module for module in (holder, above) if module is not None]
    children = [child for module in beside for child in module._modules.values()]
    for module in (*beside, *children):
        parameters = () if module is None else _base(module)._parameters.values()
        if any(p is not None and tuple(p.shape) == (count, width) for p in parameters):
            return True
    return False

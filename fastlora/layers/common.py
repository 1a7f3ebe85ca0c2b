"""What layers of ours and patched layers of PEFT's have in common, beside their forward."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from fastlora.layers.norms import forget_norms
from fastlora.layers.protocol import AdapterLayer
from fastlora.layers.scalings import Scaling, Scalings
from fastlora.layers.sharing import knows_siblings, note_compiled
from fastlora.layers.whole import Whole
from fastlora.routing.routing import Group
from fastlora.routing.siblings import Family
from fastlora.weight_marks import marks


def forget_kept(layer: AdapterLayer) -> None:
    """Drops what a layer keeps of its weights, and its model of the adapters in mixed batches."""
    forget_norms(layer)
    marks.end_trained()  # blocks that are open keep some too
    if layer.routed_by is not None:
        layer.routed_by.packs.clear()


class CommonLayer(Whole):
    """A layer with ``lora_A`` by adapter name; comes before `nn.Module` among the bases.

    It keeps nothing of its weights from one mode, training or evaluation, to the other. Its
    ``scaling`` is always a `Scalings`, whose tensors lie where the factors do.

    Attributes:
        impl: Implementation, as in `fastlora.functional.lora_linear`.
        routed_by: The model's group of layers, once the layer is in a model.
        routed_as: Its number there.
        table_row: Its row in a pool's tables.
        _family: The layer and its siblings, once a forward has shown them.
    """

    impl = "auto"
    routed_by: Group | None = None
    routed_as = 0
    table_row = 0
    _family: Family
    training: bool
    knows_siblings = knows_siblings
    note_compiled = note_compiled

    def train(self, mode: bool = True) -> Any:
        """As `nn.Module.train`."""
        layer: Any = self
        if mode != self.training:
            forget_kept(layer)
        return super().train(mode)  # type: ignore[misc]  # nn.Module has it

    @property
    def scaling(self) -> dict[str, Scaling]:
        """Adapter name to the number that its update is multiplied with."""
        scalings: dict[str, Scaling] = self.__dict__["_scaling"]
        return scalings

    @scaling.setter
    def scaling(self, values: dict[str, Scaling]) -> None:
        self.__dict__["_scaling"] = values if isinstance(values, Scalings) else Scalings(values)
        self._fit_scalings(values)

    def _watch_loads(self: Any) -> None:
        """Has scalings follow factors that ``load_state_dict(assign=True)`` replaces."""
        if _fit_loaded not in self._load_state_dict_post_hooks.values():
            self.register_load_state_dict_post_hook(_fit_loaded)

    def _unwatch_loads(self: Any) -> None:
        hooks = self._load_state_dict_post_hooks
        for key in [key for key, hook in hooks.items() if hook is _fit_loaded]:
            del hooks[key]

    def _fit_scalings(self: Any, names: Iterable[str]) -> None:
        scalings: Scalings = self.__dict__["_scaling"]
        factors = self._modules.get("lora_A")  # not there at the very beginning
        for name in names:
            if isinstance(factors, nn.ModuleDict) and name in factors:
                lora_a: Any = factors[name].weight
                scalings.fit(name, lora_a)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[misc]  # nn.Module has it
        self._fit_scalings(self.scaling)
        return self


def _fit_loaded(layer: CommonLayer, _: object) -> None:
    layer._fit_scalings(layer.scaling)

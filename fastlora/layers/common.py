"""What layers of ours and patched layers of PEFT's have in common, beside their forward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from fastlora.layers.bases import dense_weight
from fastlora.layers.coded_base import forget_weights
from fastlora.layers.factors import factors_of
from fastlora.layers.norms import magnitude_of
from fastlora.layers.quantised import Quantised
from fastlora.layers.scalings import Scaling, Scalings
from fastlora.layers.sharing import knows_siblings, note_compiled
from fastlora.ops.factors import Base
from fastlora.ops.torch.dora import nonzero
from fastlora.routing.routing import Group
from fastlora.routing.siblings import Family, forget_siblings
from fastlora.weight_marks import marks


def forget_kept(layer: CommonLayer) -> None:
    """Drops what a layer keeps of its weights, and its model of the adapters in mixed batches."""
    forget_weights(layer)
    forget_siblings(layer)
    marks.end_trained()  # blocks that are open keep some too
    layer._forget_packed()


class CommonLayer(nn.Module):
    """A linear with adapters by name, under PEFT's names; ours, and PEFT's after `fastlora.patch`.

    It keeps nothing of its weights from one mode, training or evaluation, to the other. Its
    ``scaling`` is always a `Scalings`, whose tensors lie where the factors do.

    What begins with `_own` is all of the layer's, or of one that is split over processes
    (`fastlora.layers.tensor_parallel`) what this process has; shapes are then this process's.

    Attributes:
        impl: Implementation, as in `fastlora.functional.lora_linear`.
        in_features, out_features: K and N.
        lora_A, lora_B: Adapter name to a linear with weight ``[R, K]``, and ``[N, R]``.
        lora_dropout: Adapter name to a dropout or an identity.
        merged_adapters: A list of the adapters that are merged into the base weight.
        cast_input_dtype_enabled: Whether modules of an adapter that are called one by one get x in
            their own dtype; PEFT's `disable_input_dtype_casting` sets it.
        is_split: Whether other processes have the rest of the layer.
        is_linear: Whether it is a linear, whose adapters kernels and packs may hold.
        routed_by: The model's group of layers, once the layer is in a model.
        routed_as: Its number there.
        sees_part: Whether the layer raises in a mixed batch, since it may see a part of the rows.
        table_row: Its row in a pool's tables.
        _disabled: Whether the layer is its base layer, whatever is active or in force.
        _family: The layer and its siblings, once a forward has shown them.
        get_base_layer: Returns the base layer; the layer itself where it is its own.
        _acting: Returns the names that act outside of a mixed batch.
    """

    _modules: dict[str, Any]
    impl = "auto"
    in_features: int
    out_features: int
    lora_A: Any
    lora_B: Any
    lora_dropout: Any
    merged_adapters: Any
    cast_input_dtype_enabled = True
    is_split = False
    is_linear = True
    routed_by: Group | None = None
    routed_as = 0
    sees_part = False
    table_row = 0
    _disabled: bool
    _family: Family
    get_base_layer: Callable[[], Any]
    _acting: Callable[[], list[str]]
    knows_siblings = knows_siblings
    note_compiled = note_compiled
    _own_factors = factors_of
    _own_magnitude = magnitude_of

    def _forget_packed(self) -> None:
        """Drops packed factors of mixed batches, within a block too: they are about to change."""
        if self.routed_by is not None:
            self.routed_by.packs.clear()

    def _plain_base(self) -> Base | None:
        """Returns the base layer's weight and bias; None where it must be called."""
        return None

    def _own_weight(self) -> torch.Tensor:
        """Returns the base weight as a dense matrix, ``[N, K]``."""
        return dense_weight(self.get_base_layer())

    def _own_quantised(self) -> Quantised | None:
        """Returns how the base weight is quantised; None where it is not."""
        return None

    def _weight_to_save(self, compiling: bool) -> torch.Tensor:
        """Returns the base weight for a node of a graph: without a matrix where it is quantised."""
        found = None if compiling else self._own_quantised()
        return self._own_weight() if found is None else found.unread()

    def _own_bias(self) -> torch.Tensor | None:
        """Returns the base bias, ``[N]``, or None."""
        bias: torch.Tensor | None = getattr(self.get_base_layer(), "bias", None)
        return bias

    def _own_seed(self, seed: torch.Tensor) -> torch.Tensor:
        """Returns the dropout seeds to use in place of drawn ones, same shape."""
        return seed

    def _of_whole_rows(self, sums: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Returns the norms' squares of adapters, given `adapted_sums` over the columns here."""
        return [nonzero(each) for each in sums]

    def train(self, mode: bool = True) -> Any:
        """As `nn.Module.train`."""
        if mode != self.training:
            forget_kept(self)
        return super().train(mode)

    @property
    def scaling(self) -> dict[str, Scaling]:
        """Adapter name to the number that its update is multiplied with."""
        scalings: dict[str, Scaling] = self.__dict__["_scaling"]
        return scalings

    @scaling.setter
    def scaling(self, values: dict[str, Scaling]) -> None:
        self.__dict__["_scaling"] = values if isinstance(values, Scalings) else Scalings(values)
        self._fit_scalings(values)

    def _watch_loads(self) -> None:
        """Has scalings follow factors that ``load_state_dict(assign=True)`` replaces."""
        if _fit_loaded not in self._load_state_dict_post_hooks.values():
            self.register_load_state_dict_post_hook(_fit_loaded)

    def _unwatch_loads(self) -> None:
        hooks = self._load_state_dict_post_hooks
        for key in [key for key, hook in hooks.items() if hook is _fit_loaded]:
            del hooks[key]

    def _fit_scalings(self, names: Iterable[str]) -> None:
        scalings: Scalings = self.__dict__["_scaling"]
        for name in names:
            factor = self._first_factor(name)
            if factor is not None:
                scalings.fit(name, factor)

    def _first_factor(self, name: str) -> torch.Tensor | None:
        """Returns a tensor that lies where an adapter's scaling is to lie, once there is one."""
        factors = self._modules.get("lora_A")  # not there at the very beginning
        if isinstance(factors, nn.ModuleDict) and name in factors:
            lora_a: Any = factors[name].weight
            return lora_a
        return None

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        forget_kept(self)  # caches keep no memory that the model has left
        super()._apply(fn, recurse)
        self._fit_scalings(self.scaling)
        return self


def _fit_loaded(layer: CommonLayer, _: object) -> None:
    layer._fit_scalings(layer.scaling)

"""What a forward asks of a layer, whoever implements it: the type that annotations name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastlora.layers.shared_input import SharedInputGroup
from fastlora.ops.factors import Base, Factors
from fastlora.ops.torch.dora import nonzero
from fastlora.routing.routing import Group

if TYPE_CHECKING:
    from fastlora.layers.quantised.kind import Quantised


class AdaptedLayer(nn.Module):
    """A linear with adapters by name, under PEFT's names; `fastlora.layers.common` implements it.

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
        _shared_input: The layer and its siblings, once a forward has shown them.
        get_base_layer: Returns the base layer; the layer itself where it is its own.
        _acting: Returns the names that act outside of a mixed batch.
        scaling: Adapter name to the number that its update is multiplied with.
        knows_siblings: Whether a forward has shown the layer's group.
        note_compiled: Keeps why the layer shares nothing in a graph that is being compiled.
        _own_weight: Returns the base weight as a dense matrix, ``[N, K]``.
        _own_factors: Returns an adapter's factors, as `fastlora.layers.factors.factors_of`.
        _own_magnitude: Returns an adapter's magnitude, as `fastlora.layers.norms.magnitude_of`.
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
    _shared_input: SharedInputGroup
    get_base_layer: Callable[[], Any]
    _acting: Callable[[], list[str]]
    scaling: Any
    knows_siblings: Callable[[], bool]
    note_compiled: Callable[[str], None]
    _own_weight: Callable[[], torch.Tensor]
    _own_factors: Callable[..., Factors | None]
    _own_magnitude: Callable[[str], torch.Tensor]

    def _plain_base(self) -> Base | None:
        """Returns the base layer's weight and bias; None where it must be called."""
        return None

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

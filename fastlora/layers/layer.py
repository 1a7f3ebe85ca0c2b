"""`AdaptedLayer`, the interface that forward passes require of a layer, for annotations."""

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
    """Interface of a linear layer with named adapters, under PEFT's attribute names.

    `fastlora.layers.common` implements it. Names that start with ``_own`` refer to the whole layer.
    For a layer that is split over processes (`fastlora.layers.tensor_parallel`) they refer to this
    process's shard, and shapes are those of the shard.

    Attributes:
        impl: Implementation, as in `fastlora.functional.lora_linear`.
        in_features, out_features: K and N.
        lora_A, lora_B: Maps an adapter name to a linear with weight ``[R, K]`` and ``[N, R]``.
        lora_dropout: Maps an adapter name to a dropout module or an identity.
        merged_adapters: List of the adapters that are merged into the base weight.
        cast_input_dtype_enabled: Whether x is cast to an adapter's dtype when the adapter's modules
            are called one by one. PEFT's `disable_input_dtype_casting` sets it.
        is_split: Whether the layer is split over several processes.
        is_linear: Whether the layer is a linear. Only then may address tables and packed factors
            include its adapters.
        routed_by: The routing group of the model that the layer belongs to, or None.
        routed_as: The layer's number in that group.
        sees_part: Whether the layer raises in a mixed batch because it may receive only part of the
            rows.
        table_row: The layer's row in a pool's address tables.
        _disabled: Whether the layer runs as its base layer alone, regardless of the active adapters
            and of open `fastlora.adapters` blocks.
        _shared_input: The layer's shared-input group, once a forward pass has identified it.
        get_base_layer: Returns the base layer, which may be the layer itself.
        _acting: Returns the names of the adapters that are applied outside a mixed batch.
        scaling: Maps an adapter name to the number that multiplies its update.
        knows_siblings: Returns whether a forward pass has identified the layer's shared-input
            group.
        note_compiled: Records why the layer shares nothing in a graph that is being compiled.
        _own_weight: Returns the base weight as a dense matrix, ``[N, K]``.
        _own_factors: Returns an adapter's factors; see `fastlora.layers.factors.factors_of`.
        _own_magnitude: Returns an adapter's magnitude; see `fastlora.layers.norms.magnitude_of`.
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
        """Return a `Base` with the weight and bias, or None if the base layer must be called."""
        return None

    def _own_quantised(self) -> Quantised | None:
        """Return the `Quantised` that describes the base weight, or None if it is not quantized."""
        return None

    def _weight_to_save(self, compiling: bool) -> torch.Tensor:
        """Return the base weight in the form in which an autograd node saves it.

        If the weight is quantized, the result represents it without a dense matrix.
        """
        found = None if compiling else self._own_quantised()
        return self._own_weight() if found is None else found.unread()

    def _own_bias(self) -> torch.Tensor | None:
        """Return the base bias, ``[N]``, or None."""
        bias: torch.Tensor | None = getattr(self.get_base_layer(), "bias", None)
        return bias

    def _own_seed(self, seed: torch.Tensor) -> torch.Tensor:
        """Return the dropout seeds to use instead of the drawn ``seed``, in the same shape."""
        return seed

    def _of_whole_rows(self, sums: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return a list of each adapter's squared norms of whole rows, ``[N]``; 0 becomes infinity.

        ``sums`` are the `adapted_sums` over this process's columns.
        """
        return [nonzero(each) for each in sums]

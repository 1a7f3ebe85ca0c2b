"""What the code of a forward needs of a layer: ours have it, and PEFT's after `fastlora.patch`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from fastlora.ops.factors import Base, Factors
from fastlora.routing.routing import Group
from fastlora.routing.siblings import Family

if TYPE_CHECKING:
    from fastlora.layers.call import LayerCall, MixedCall
    from fastlora.layers.quantised import Quantised


class AdapterLayer(Protocol):
    """A linear with adapters by name, under PEFT's names.

    Attributes:
        impl: As in `fastlora.functional.lora_linear`.
        training: Whether dropout can act.
        routed_by: The model's group of layers; None outside of a model.
        routed_as: The layer's number in its model.
        in_features, out_features: K and N.
        table_row: The layer's row in a pool's tables; only layers of a pool have one.
        cast_input_dtype_enabled: Whether modules that are called one by one get x in their dtype.
        is_split: Whether other processes have the rest of the layer; what is `_own` is this one's.
        _family: The layer and its siblings, once a forward has shown them.
    """

    impl: str
    training: bool
    routed_by: Group | None
    routed_as: int
    table_row: int
    _family: Family
    in_features: int
    out_features: int
    is_split: bool
    cast_input_dtype_enabled: bool

    @property
    def _disabled(self) -> bool:
        """Whether the layer is its base layer, whatever is active or in force."""

    @property
    def _modules(self) -> Mapping[str, Any]:
        """``lora_A``, ``lora_B``, ``lora_dropout`` and others, as nn.Module keeps them."""

    @property
    def lora_A(self) -> Any:
        """Adapter name to a linear with weight ``[R, K]``."""

    @property
    def lora_B(self) -> Any:
        """Adapter name to a linear with weight ``[N, R]``."""

    @property
    def lora_dropout(self) -> Any:
        """Adapter name to a dropout or an identity."""

    @property
    def scaling(self) -> Any:
        """Adapter name to a number."""

    @property
    def merged_adapters(self) -> Sequence[str]:
        """Names of the adapters that are merged into the base weight."""

    def get_base_layer(self) -> Any:
        """Returns the base layer; the layer itself where it is its own."""

    def _acting(self) -> list[str]:
        """Returns the names that act outside of a mixed batch."""

    def knows_siblings(self) -> bool:
        """Whether a forward has shown the layers that are fed by the same tensor."""

    def note_compiled(self, why: str) -> None:
        """Keeps why the layer shares nothing in a graph that is being compiled."""

    # What differs where the layer is split; see `fastlora.layers.common`.

    def _own_factors(self, name: str, call: LayerCall | MixedCall | None = None) -> Factors | None:
        """As `fastlora.layers.factors.factors_of`."""

    def _plain_base(self) -> Base | None:
        """Returns the base layer's weight and bias; None where it must be called."""

    def _own_magnitude(self, name: str) -> torch.Tensor:
        """Returns an adapter's magnitude, ``[N]``."""

    def _own_weight(self) -> torch.Tensor:
        """Returns the base weight as a dense matrix, ``[N, K]``."""

    def _own_quantised(self) -> Quantised | None:
        """Returns how the base weight is quantised; None where it is not."""

    def _weight_to_save(self, compiling: bool) -> torch.Tensor:
        """Returns the base weight for a node of a graph: without a matrix where it is quantised."""

    def _own_bias(self) -> torch.Tensor | None:
        """Returns the base bias, ``[N]``, or None."""

    def _own_seed(self, seed: torch.Tensor) -> torch.Tensor:
        """Returns the dropout seeds to use in place of drawn ones, same shape."""

    def _of_whole_rows(self, sums: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Returns the norms' squares of adapters, given `adapted_sums` over the columns here."""

"""What a forward and a merge ask of a layer that one process has whole.

A layer that is split over processes (`fastlora.layers.tensor_parallel`) answers with what this
process has of it. Shapes are then those of this process.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastlora.layers.bases import dense_weight
from fastlora.layers.factors import factors_of
from fastlora.layers.norms import magnitude_of
from fastlora.layers.protocol import AdapterLayer
from fastlora.ops.factors import Base
from fastlora.ops.torch.norms import nonzero


class Whole:
    """The answers of a layer that has all of its weight.

    Attributes:
        is_split: Whether other processes have the rest of the layer.
    """

    is_split = False
    _own_factors = factors_of
    _own_magnitude = magnitude_of

    def _plain_base(self: AdapterLayer) -> Base | None:
        """Returns the base layer's weight and bias; None where it must be called."""
        return None

    def _own_weight(self: AdapterLayer) -> torch.Tensor:
        """Returns the base weight as a dense matrix, ``[N, K]``."""
        return dense_weight(self.get_base_layer())

    def _own_bias(self: AdapterLayer) -> torch.Tensor | None:
        """Returns the base bias, ``[N]``, or None."""
        bias: torch.Tensor | None = getattr(self.get_base_layer(), "bias", None)
        return bias

    def _own_seed(self, seed: torch.Tensor) -> torch.Tensor:
        """Returns the dropout seeds to use in place of drawn ones, same shape."""
        return seed

    def _of_whole_rows(self, sums: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Returns the norms' squares of adapters, given `adapted_sums` over the columns here."""
        return [nonzero(each) for each in sums]

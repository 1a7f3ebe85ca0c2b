"""`BaseLinearWithAdapters`, the interface that forward passes require of a layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastlora.layers.shared_input import SharedInputGroup
from fastlora.ops.factors import Base, Factors
from fastlora.ops.torch.dora import replace_zeros_with_infinity
from fastlora.routing.routing import RoutedLayerGroup

if TYPE_CHECKING:
    from fastlora.layers.quantized.base_weight import BaseQuantizedWeight


class BaseLinearWithAdapters(nn.Module):
    """Base class for linear layers with named adapters.

    The class declares the attributes and methods that forward passes use.
    `fastlora.layers.base_adapter_layer` implements them. The attributes have PEFT's names. Names
    that start with ``_local`` refer to the whole layer. For a layer that is split across processes
    (`fastlora.layers.tensor_parallel`), they refer to this process's shard, and shapes are those of
    the shard.

    Attributes:
        impl: Implementation, as in `fastlora.functional.lora_linear`.
        in_features, out_features: K and N.
        lora_A, lora_B: Maps an adapter name to a linear module with weight ``[R, K]`` and
            ``[N, R]``.
        lora_dropout: Maps an adapter name to a dropout module or an identity.
        merged_adapters: List of the adapters that are merged into the base weight.
        cast_input_dtype_enabled: Whether x is cast to an adapter's dtype when the adapter's modules
            are called one by one. PEFT's `disable_input_dtype_casting` sets it.
        is_split: Whether the layer is split across several processes.
        is_linear: Whether the layer is a linear layer. Only then may address tables and packed
            factors include its adapters.
        routing_group: The routing group of the model that the layer belongs to, or None.
        routing_index: The layer's number in that group.
        may_see_partial_rows: Whether the layer raises in a mixed batch because it may receive only
            part of the rows.
        table_row: The layer's row in a pool's address tables.
        _disabled: Whether the layer runs as its base layer alone, regardless of the active adapters
            and of open `fastlora.adapters` blocks.
        _shared_input_group: The layer's shared-input group, once a forward pass has identified it.
        get_base_layer: Returns the base layer, which may be the layer itself.
        _applied_adapters: Returns the names of the adapters that are applied outside a mixed batch.
        scaling: Maps an adapter name to the number that multiplies its update.
        has_shared_input_group: Returns whether a forward pass has identified the layer's
            shared-input group.
        record_compiled_fallback: Records why the layer shares nothing in a graph that is being
            compiled.
        _local_weight: Returns the base weight as a dense matrix, ``[N, K]``.
        _local_factors: Returns an adapter's factors; see
            `fastlora.layers.adapter_factors.factors_without_calling_modules`.
        _local_magnitude: Returns an adapter's magnitude; see
            `fastlora.layers.dora_norms.dora_magnitude_of`.
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
    routing_group: RoutedLayerGroup | None = None
    routing_index = 0
    may_see_partial_rows = False
    table_row = 0
    _disabled: bool
    _shared_input_group: SharedInputGroup
    get_base_layer: Callable[[], Any]
    _applied_adapters: Callable[[], list[str]]
    scaling: Any
    has_shared_input_group: Callable[[], bool]
    record_compiled_fallback: Callable[[str], None]
    _local_weight: Callable[[], torch.Tensor]
    _local_factors: Callable[..., Factors | None]
    _local_magnitude: Callable[[str], torch.Tensor]

    def _fusable_base(self) -> Base | None:
        """Return the base weight and bias as a `Base` for fused operations.

        Returns None if the base layer must be called.
        """
        return None

    def _local_weight_if_quantized(self) -> BaseQuantizedWeight | None:
        """Return this process's shard of the base weight if the weight is quantized.

        If the layer is not split across processes, the shard is the whole weight. Returns None if
        the base weight is not quantized.
        """
        return None

    def _weight_saved_for_backward(self, dequantize: bool) -> torch.Tensor:
        """Return the base weight to save for the backward pass.

        The result is in the form that autograd saves. A quantized weight is represented without a
        dense matrix, unless ``dequantize`` is set, for example during compilation.
        """
        found = None if dequantize else self._local_weight_if_quantized()
        return self._local_weight() if found is None else found.tensor_for_pytorch_only()

    def _local_base_bias(self) -> torch.Tensor | None:
        """Return this process's part of the base layer's bias.

        If the layer is not split across processes, the part is the whole bias ``[N]``. Returns None
        if the base layer has no bias.
        """
        bias: torch.Tensor | None = getattr(self.get_base_layer(), "bias", None)
        return bias

    def _local_dropout_seed(self, seed: torch.Tensor) -> torch.Tensor:
        """Derive this process's own dropout seed from a given seed.

        ``seed`` is a tensor of one or more seeds. The result has the same shape. By default, the
        result is ``seed`` itself.
        """
        return seed

    def _reduce_squares_and_replace_zeros(
        self, squared_norms: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Sum squared row norms across tensor-parallel processes, and replace zeros.

        Zeros are replaced with infinity so that DoRA does not divide by zero. Each entry of
        ``squared_norms`` contains the squared norms ``[N]`` of an adapted weight over this
        process's columns. Each result contains the squared norms ``[N]`` of whole rows. By default,
        a process has whole rows, so no norms are summed.
        """
        return [replace_zeros_with_infinity(each) for each in squared_norms]

"""Merging adapters into the base weight, and unmerging them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastlora.layers.base_adapter_layer import BaseAdapterLayer
from fastlora.layers.dora_norms import base_squared_norms, base_weight_rows
from fastlora.layers.fallback_reasons import uses_dora
from fastlora.layers.merge_target import Fingerprint, MergeTarget, bit_sums, fingerprints_equal
from fastlora.layers.module_with_adapters import ModuleWithAdapters
from fastlora.layers.quantized_base import clear_base_and_adapter_caches
from fastlora.layers.scalings import Scaling
from fastlora.ops.torch.dora import dora_scale, squared_row_norms, squared_row_norms_with_update
from fastlora.validation import AdapterStateError, UnsupportedLayerError

# Number of rows that a merge handles at a time. These rows are its only temporary.
_MERGE_ROWS = 1024


class MergeableLayer(ModuleWithAdapters, BaseAdapterLayer):
    """Base class for layers that can merge adapters into the base weight and unmerge them.

    `LoraLayer` is derived from this class.
    """

    out_features: int
    in_features: int
    r: dict[str, int]
    scaling: dict[str, Scaling]

    def _init_merging(self) -> None:
        self._init_adapter_state()
        # While adapters are merged: the (weight, bias) from before the first merge, and the
        # `_weight_and_bias_fingerprints` from after the last one. `MergeTarget` determines how a
        # weight is saved.
        self._unmerged: tuple[object, torch.Tensor | None] | None = None
        self._when_merged: list[Fingerprint] = []
        # g of each merged adapter that uses DoRA, from norms of the unmerged weight.
        self._merged_scales: dict[str, torch.Tensor] = {}

    def get_base_layer(self) -> nn.Module:
        """Return the base layer to which the adapters are applied."""
        base: nn.Module | None = self._modules.get("base_layer")
        if base is None:
            raise UnsupportedLayerError(f"{type(self).__name__} has no base layer")
        return base

    def _weight_and_bias_to_merge(self) -> tuple[MergeTarget, torch.Tensor | None]:
        """Return the base weight and bias that adapters are merged into.

        Raises an error that states the reason if the weight or the bias does not support merging.
        """
        raise UnsupportedLayerError(f"{type(self).__name__} cannot be merged")

    def _weight_and_bias_fingerprints(self) -> list[Fingerprint]:
        """Return fingerprints of the base weight and the bias.

        Adapters are merged into the weight and the bias. The list contains one fingerprint for each
        of them, in this order.
        """
        weight, bias = self._weight_and_bias_to_merge()
        return [weight.fingerprint(), bit_sums(bias)]

    def _is_base_layer_unmodified_since_merge(self) -> bool:
        """Return whether the base layer has remained unchanged since the last merge.

        The fingerprints of the base weight and the bias are compared with those from the last
        merge. If the weight and the bias are both unmodified, `unmerge` can restore the values that
        `merge` saved.
        """
        return all(map(fingerprints_equal, self._weight_and_bias_fingerprints(), self._when_merged))

    # Overridden if several processes have parts of the layer.

    def _true_in_all_processes(self, condition: bool) -> bool:
        """Return whether a condition is true in every process.

        All processes get the same result, so that they raise an error together or not at all.
        """
        return condition

    def _merge_without_checks(self, names: list[str], keep_base: bool) -> None:
        weight, bias = self._weight_and_bias_to_merge()
        snapshot = _snapshot(weight, bias) if keep_base and not self.merged else self._unmerged
        scales = self._merged_scales | self._scales_of_dora_adapters(names)
        matrix = weight.merge_buffer()
        for name in names:
            self._add_delta_weight(matrix, name, 1.0, scales.get(name))
        self._requantize_and_measure_error(weight, matrix)
        self._unmerged, self._merged_scales = snapshot, scales
        for name in names:
            self.merged_adapters.append(name)
            self._add_bias_change_of_last_adapter(bias, self.merged_adapters, 1.0, scales)
        self._when_merged = [] if snapshot is None else self._weight_and_bias_fingerprints()
        clear_base_and_adapter_caches(self)

    def _requantize_and_measure_error(self, weight: MergeTarget, matrix: torch.Tensor) -> None:
        """Requantize the weight after a merge, and measure the quantization error.

        The weight's new values are the quantized values of ``matrix [N, K]``. The error is stored
        in `merge_error`. For weights that are merged in place, the method does nothing.
        """
        if weight.in_place:
            return
        wanted = weight.squared_distance_to(matrix)
        weight.write(matrix)
        lost = weight.squared_distance_to(matrix)
        self.merge_error = math.sqrt(lost / wanted) if wanted else 0.0

    def check_merge(
        self, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> list[str]:
        """Check that adapters can be merged.

        Returns a list of the adapters that would be merged. Raises the same errors as `merge`. The
        layer is not changed.
        """
        for name in adapter_names or ():
            self._check_has_adapter(name)
        wanted = self._active_adapters if adapter_names is None else adapter_names
        merged = self.merged_adapters
        names = [n for n in dict.fromkeys(wanted) if n in self.r and n not in merged]
        if not names:
            return []
        weight, bias = self._weight_and_bias_to_merge()
        for name in names:
            if bias is None and self._factors(name)[2] is not None:
                raise AdapterStateError(
                    f"adapter {name!r} has a lora_bias, but the base layer has no bias to merge "
                    "it into"
                )
        if safe_merge:
            matrix = weight.merge_buffer().clone() if weight.in_place else weight.merge_buffer()
            new_bias = None if bias is None else bias.detach().clone()
            scales = self._merged_scales | self._scales_of_dora_adapters(names)
            for place, name in enumerate(names, 1):
                self._add_delta_weight(matrix, name, 1.0, scales.get(name))
                self._add_bias_change_of_last_adapter(
                    new_bias, [*merged, *names[:place]], 1.0, scales
                )
                if not self._true_in_all_processes(_is_finite(matrix, new_bias)):
                    raise AdapterStateError(
                        "NaNs detected in the merged weights. The adapter "
                        f"{name} seems to be broken: merging it produces values that are not finite"
                    )
        return names

    @torch.no_grad()
    def unmerge(self) -> None:
        """Unmerge every merged adapter.

        If `merge` was called with ``keep_base``, the base weight is restored exactly. If the weight
        or bias was written to after the merge (for example, by loading a state dict or training the
        bias), the update is subtracted instead, which preserves the written values.

        Raises:
            AdapterStateError: The update of a DoRA adapter must be subtracted, but its scale is 0
                in a row. Nothing has changed.
        """
        if not self.merged:
            return
        weight, bias = self._weight_and_bias_to_merge()
        snapshot = self._unmerged
        # All processes must take the same branch: one that takes the second branch alone would wait
        # for the others in the calls below.
        if self._can_restore_base() and snapshot is not None:
            weight.restore(snapshot[0])
            if bias is not None and snapshot[1] is not None:
                bias.copy_(snapshot[1])
        else:
            self._check_merged_scales_invertible()
            matrix = weight.merge_buffer()
            self._subtract_merged_adapters(matrix, bias)
            weight.write(matrix)
        self._unmerged = self.merge_error = None
        self.merged_adapters.clear()
        self._merged_scales.clear()
        clear_base_and_adapter_caches(self)

    def _can_restore_base(self) -> bool:
        """Return whether `unmerge` can restore the values from before the merge.

        The result is the same in all processes.
        """
        kept = self._unmerged is not None
        return self._true_in_all_processes(kept and self._is_base_layer_unmodified_since_merge())

    def _check_unmerge(self) -> None:
        """Check that every merged adapter can be unmerged.

        Raises the same errors as `unmerge`. The layer is not changed.
        """
        if self.merged:
            self._weight_and_bias_to_merge()
        if self._merged_scales and not self._can_restore_base():
            self._check_merged_scales_invertible()

    def _check_merged_scales_invertible(self) -> None:
        for name, scale in self._merged_scales.items():
            if not self._true_in_all_processes(bool(scale.all())):
                raise AdapterStateError(
                    f"adapter {name!r} cannot be unmerged: its magnitude or norm is 0 for "
                    "at least one row, and the weight was modified after the merge or was "
                    "merged without a copy (keep_base=False)"
                )

    def _parameters_and_values_before_merge(self) -> list[tuple[object, object]]:
        """Return the base parameters that the merge of adapters has changed.

        The result is a list of tuples ``(parameter, value)``, where ``value`` is the parameter's
        value before the merge, or None if it was not kept.
        """
        kept: tuple[object, object] = (None, None)
        if self._unmerged is not None and self._is_base_layer_unmodified_since_merge():
            kept = self._unmerged
        with_bias = any(self._factors(name)[2] is not None for name in self.merged_adapters)
        base = self.get_base_layer()
        changed = [(getattr(base, "weight", None), kept[0])] if self.merged else []
        return [*changed, (getattr(base, "bias", None), kept[1])] if with_bias else changed

    def _subtract_merged_adapters(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Subtract all merged adapters from a weight and a bias in place.

        The weight is ``[N, K]``, and the bias is ``[N]``.
        """
        merged = list(self.merged_adapters)
        for place in range(len(merged) - 1, -1, -1):
            name = merged[place]
            scale = self._merged_scales.get(name)
            self._add_delta_weight(weight, name, -1.0, None if scale is None else 1.0 / scale)
            self._add_bias_change_of_last_adapter(
                bias, merged[: place + 1], -1.0, self._merged_scales
            )

    def _scales_of_dora_adapters(self, names: list[str]) -> dict[str, torch.Tensor]:
        """Return the DoRA scales of those of the named adapters that use DoRA.

        The result is a dict that maps each adapter's name to the adapter's scale g, ``[N]``. The
        scale is the magnitude divided by the row norms of the adapted weight.
        """
        layer: Any = self
        dora = [name for name in names if uses_dora(layer, [name])]
        return {
            name: dora_scale(layer._local_magnitude(name).detach(), squares)
            for name, squares in self._adapted_squared_norms_by_adapter(dora).items()
        }

    @torch.no_grad()
    def _adapted_squared_norms_by_adapter(self, names: list[str]) -> dict[str, torch.Tensor]:
        """Return the squared row norms of the adapted weight for each named adapter.

        The result is a dict that maps each adapter's name to squared norms ``[N]``. An adapter's
        adapted weight is the unmerged base weight plus the adapter's update. DoRA scales and
        magnitudes are computed from these norms.
        """
        if not names:
            return {}
        layer: Any = self
        if not self.merged:
            base = base_weight_rows(layer)
            squares = base_squared_norms(layer, base)
        else:
            weight, _ = self._weight_and_bias_to_merge()
            snapshot = self._unmerged
            if snapshot is not None and fingerprints_equal(
                weight.fingerprint(), self._when_merged[0]
            ):
                base = weight.snapshot_to_dense(snapshot[0])
            else:
                base = weight.merge_buffer().clone() if weight.in_place else weight.merge_buffer()
                self._subtract_merged_adapters(base, None)
            squares = squared_row_norms(base)
        sums = []
        for name in names:
            factors = *self._factors_for_dora_norm(name), self.scaling[name]
            sums.append(squared_row_norms_with_update(base, squares, *factors))
        return dict(zip(names, self._reduce_squares_and_replace_zeros(sums), strict=True))

    @torch.no_grad()
    def _add_delta_weight(
        self,
        weight: torch.Tensor,
        adapter_name: str,
        sign: float,
        dora_row_scale: torch.Tensor | None = None,
    ) -> None:
        """Add an adapter's delta weight to a weight in place, or subtract it if ``sign < 0``.

        The weight is ``[N, K]``. The delta weight is ``scaling * B @ A``. The sum is rounded once.
        For a DoRA adapter, ``dora_row_scale [N]`` contains a factor for each row. If ``sign`` is
        positive, the factors are the adapter's DoRA scale g, by which the sum is multiplied. If
        ``sign`` is negative, the factors are ``1 / g``, by which the weight is multiplied before
        the delta weight is subtracted.
        """
        lora_a, lora_b, _ = self._factors(adapter_name)
        compute = torch.promote_types(torch.float32, weight.dtype)
        alpha = sign * float(self.scaling[adapter_name])
        lora_a = lora_a.to(compute)
        for start in range(0, weight.shape[0], _MERGE_ROWS):
            rows = weight[start : start + _MERGE_ROWS]
            factor = lora_b[start : start + _MERGE_ROWS].to(compute)
            by = (
                None
                if dora_row_scale is None
                else dora_row_scale[start : start + _MERGE_ROWS, None].to(compute)
            )
            wide = rows.to(compute)  # Rows that are wide already are not copied.
            if by is not None and sign < 0:
                wide *= by
            wide.addmm_(factor, lora_a, alpha=alpha)
            if by is not None and sign > 0:
                wide *= by
            if wide is not rows:
                rows.copy_(wide)

    @torch.no_grad()
    def _add_bias_change_of_last_adapter(
        self,
        bias: torch.Tensor | None,
        names_in_merge_order: list[str],
        sign: float,
        dora_scales: dict[str, torch.Tensor],
    ) -> None:
        """Add the last adapter's bias delta to the bias in place.

        The delta is multiplied by ``sign`` before it is added. The list ``names_in_merge_order``
        contains the names of the adapters in the order in which they are merged. The last name is
        that of the adapter whose delta is added. ``dora_scales`` maps the name of each DoRA adapter
        to its scale g, shape ``[N]``.
        """
        before: torch.Tensor | None = None
        change: torch.Tensor | None = None
        for name in names_in_merge_order if bias is not None else ():
            before, lora_bias = change, self._factors(name)[2]
            if lora_bias is not None:
                own = lora_bias.detach() * self.scaling[name]
                change = own if change is None else change + own
            elif name in dora_scales and change is not None:
                change = change * dora_scales[name]
        if bias is not None and change is not None:
            bias.add_((change if before is None else change - before) * sign)

    def _factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return an adapter's factors and its bias, if any.

        The result is a tuple (lora_a, lora_b, lora_bias). The shapes are ``[R, K]``, ``[N, R]``,
        and ``[N]``. lora_bias is None if the adapter has no bias.
        """
        down, up = self.lora_A[name], self.lora_B[name]
        return down.weight, up.weight, up.bias

    def _factors_for_dora_norm(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the two factors from which an adapter's DoRA norms are computed.

        By default, these are the factors lora_a and lora_b of the weight update.
        """
        lora_a, lora_b, _ = self._factors(name)
        return lora_a, lora_b

    def _copy_into_factors(
        self, name: str, lora_a: torch.Tensor, lora_b: torch.Tensor, bias: torch.Tensor | None
    ) -> None:
        """Copy tensors into an adapter's factors.

        The tensors must have the shapes of those that `_factors` returns.

        Raises:
            AdapterStateError: If a tensor has a different shape.
        """
        pairs = list(zip(self._factors(name), (lora_a, lora_b, bias), strict=True))
        for place, value in pairs:
            # `copy_` would broadcast the factors of rank 1.
            if place is not None and value is not None and place.shape != value.shape:
                raise AdapterStateError(
                    f"a factor of adapter {name!r} has shape {tuple(place.shape)}, but the tensor "
                    f"to copy into it has shape {tuple(value.shape)}"
                )
        self._write_factors(name, lora_a, lora_b, bias)

    def _write_factors(
        self, name: str, lora_a: torch.Tensor, lora_b: torch.Tensor, bias: torch.Tensor | None
    ) -> None:
        """Write new values to an adapter's factors and bias in place.

        The new values must have the shapes of the tensors that `_factors` returns. Unlike
        `_copy_into_factors`, this method does not check the shapes.
        """
        for place, value in zip(self._factors(name), (lora_a, lora_b, bias), strict=True):
            if place is not None and value is not None:
                place.copy_(value)

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """Return an adapter's delta weight ``scaling * B @ A``.

        It has the base weight's shape and the factors' dtype. As in PEFT, a DoRA magnitude is not
        included.
        """
        self._check_has_adapter(adapter_name)
        lora_a, lora_b, _ = self._factors(adapter_name)
        delta = lora_b.new_zeros(lora_b.shape[0], lora_a.shape[1])
        self._add_delta_weight(delta, adapter_name, 1.0)
        return self._reshape_to_weight(delta)

    def _reshape_to_weight(self, delta: torch.Tensor) -> torch.Tensor:
        """Reshape an update of shape ``[N, K]`` to the shape of the base weight."""
        return delta

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        clear_base_and_adapter_caches(self)
        self._clear_model_packed_factors()
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        self._merged_scales = {name: fn(scale) for name, scale in self._merged_scales.items()}
        unwritten = self._unmerged is not None and self._is_base_layer_unmodified_since_merge()
        if self._unmerged is not None:
            snapshot, bias = self._unmerged
            snapshot = self._weight_and_bias_to_merge()[0].convert_snapshot_if_needed(snapshot, fn)
            self._unmerged = snapshot, None if bias is None else fn(bias)
        super()._apply(fn, recurse)
        if unwritten:
            self._when_merged = self._weight_and_bias_fingerprints()
        return self


def _snapshot(weight: MergeTarget, bias: torch.Tensor | None) -> tuple[object, torch.Tensor | None]:
    return weight.snapshot(), None if bias is None else bias.detach().clone()


def _is_finite(matrix: torch.Tensor, bias: torch.Tensor | None) -> bool:
    # The minimum or the maximum is not finite if any value is not; `isfinite` would make copies.
    ends = [*matrix.aminmax(), *(() if bias is None else bias.aminmax())] if matrix.numel() else []
    return all(bool(end.isfinite()) for end in ends)

"""Merging: adapters added to the base weight, and taken out of it again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastlora.validation import AdapterStateError, UnsupportedLayerError

# Rows of the weight that a merge handles at once: its only temporary.
_MERGE_ROWS = 1024


class Mergeable(nn.Module):
    """The merging half of `LoraLayer`, which has the adapters.

    Attributes:
        merged_adapters: Names whose update is in the base weight now, in order.
    """

    out_features: int
    in_features: int
    scaling: dict[str, float]
    lora_A: nn.ModuleDict
    lora_B: nn.ModuleDict
    _active_adapters: list[str]

    def _init_merging(self) -> None:
        self.merged_adapters: list[str] = []
        # (weight, bias) as they were before the first merge, only while merged, and the versions
        # of the parameters behind the last one.
        self._unmerged: tuple[torch.Tensor, torch.Tensor | None] | None = None
        self._merged_versions: tuple[int, ...] = ()

    def _check_known(self, adapter_name: str) -> None:
        """Raises `AdapterNotFoundError` unless the layer has the adapter."""
        raise UnsupportedLayerError(f"{type(self).__name__} has no adapters")

    def _mergeable(self) -> tuple[torch.Tensor, torch.Tensor | None, bool]:
        """Returns base weight, bias, and whether the weight is stored ``[K, N]``; or raises."""
        raise UnsupportedLayerError(f"{type(self).__name__} cannot be merged")

    @property
    def merged(self) -> bool:
        """Whether any adapter is in the base weight now."""
        return bool(self.merged_adapters)

    def merge(
        self,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        *,
        keep_base: bool = True,
    ) -> None:
        """Adds adapters to the base weight, so that the forward is one plain linear.

        Args:
            safe_merge: Refuse a result that is not finite.
            adapter_names: Which; None for the active ones. Those merged already are left out.
            keep_base: Keep a copy of the weight until `unmerge`, which then restores it bit for
                bit. False saves that memory, and `unmerge` subtracts instead, as PEFT does.

        Raises:
            AdapterNotFoundError: The layer has no such adapter.
            AdapterStateError: ``safe_merge`` found a value that is not finite, or lora_bias has no
                base bias to go into. Nothing has changed then.
            UnsupportedLayerError: The base weight cannot take an update.
        """
        names = self.check_merge(safe_merge, adapter_names)
        if not names:
            return
        weight, bias, transposed = self._mergeable()
        if keep_base and not self.merged:
            self._unmerged = (
                weight.detach().clone(),
                None if bias is None else bias.detach().clone(),
            )
        for name in names:
            self._add_delta(weight.t() if transposed else weight, bias, name, 1.0)
        self.merged_adapters.extend(names)
        self._merged_versions = _versions(weight, bias)

    def check_merge(
        self, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> list[str]:
        """Returns the names that `merge` would merge, or raises as it would; changes nothing."""
        names = self._active_adapters if adapter_names is None else adapter_names
        if adapter_names is not None:
            for name in names:
                self._check_known(name)
        names = [
            name
            for name in dict.fromkeys(names)
            if name in self.lora_A and name not in self.merged_adapters
        ]
        if not names:
            return []
        weight, bias, transposed = self._mergeable()
        for name in names:
            if bias is None and self.lora_B[name].bias is not None:
                raise AdapterStateError(
                    f"adapter {name!r} has a lora_bias, and the base layer no bias to merge it into"
                )
        if safe_merge:
            new_weight = weight.detach().clone()
            new_bias = None if bias is None else bias.detach().clone()
            for name in names:
                self._add_delta(new_weight.t() if transposed else new_weight, new_bias, name, 1.0)
                if not _all_finite(new_weight, new_bias):
                    raise AdapterStateError(
                        f"merging adapter {name!r} gives weights that are not finite"
                    )
        return names

    def unmerge(self) -> None:
        """Takes every merged adapter out of the base weight again.

        Exactly, with ``keep_base``; unless the weight or bias was written to while merged (a loaded
        state, a trained bias): then the update is subtracted, so that what was written stays.
        """
        if not self.merged:
            return
        weight, bias, transposed = self._mergeable()
        if self._unmerged is not None and _versions(weight, bias) == self._merged_versions:
            _restore(weight, bias, self._unmerged)
        else:
            for name in reversed(self.merged_adapters):
                self._add_delta(weight.t() if transposed else weight, bias, name, -1.0)
        self._unmerged = None
        self.merged_adapters.clear()

    @torch.no_grad()
    def _add_delta(
        self, weight: torch.Tensor, bias: torch.Tensor | None, name: str, sign: float
    ) -> None:
        """Adds ``sign * scaling * B @ A`` to ``weight [N, K]`` in place, rounding once.

        And ``sign * scaling * lora_bias`` to ``bias [N]``.
        """
        lora_a, lora_b, lora_bias = self._factors(name)
        compute = torch.promote_types(torch.float32, weight.dtype)
        alpha = sign * self.scaling[name]
        lora_a = lora_a.to(compute)
        for start in range(0, weight.shape[0], _MERGE_ROWS):
            rows = weight[start : start + _MERGE_ROWS]
            factor = lora_b[start : start + _MERGE_ROWS].to(compute)
            if rows.dtype == compute:
                rows.addmm_(factor, lora_a, alpha=alpha)
            else:
                rows.copy_(torch.addmm(rows.to(compute), factor, lora_a, alpha=alpha))
        if lora_bias is not None and bias is not None:
            bias.add_(lora_bias * alpha)

    def _factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Returns lora_a ``[R, K]``, lora_b ``[N, R]`` and lora_bias ``[N]`` or None."""
        up: Any = self.lora_B[name]
        down: Any = self.lora_A[name]
        return down.weight, up.weight, up.bias

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """Returns ``scaling * B @ A``, ``[N, K]``, in the factors' dtype."""
        self._check_known(adapter_name)
        _, lora_b, _ = self._factors(adapter_name)
        delta = lora_b.new_zeros(self.out_features, self.in_features)
        self._add_delta(delta, None, adapter_name, 1.0)
        return delta

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        if self._unmerged is not None:
            unwritten = _versions(*self._mergeable()[:2]) == self._merged_versions
            weight, bias = self._unmerged
            self._unmerged = (fn(weight), None if bias is None else fn(bias))
            super()._apply(fn, recurse)
            if unwritten:
                self._merged_versions = _versions(*self._mergeable()[:2])
            return self
        super()._apply(fn, recurse)
        return self


def _versions(weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[int, ...]:
    """How often each tensor was written in place (inference tensors are not counted: 0)."""
    tensors = [weight] if bias is None else [weight, bias]
    return tuple(0 if tensor.is_inference() else tensor._version for tensor in tensors)


def _all_finite(weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    tensors = [weight] if bias is None else [weight, bias]
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


@torch.no_grad()
def _restore(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    before: tuple[torch.Tensor, torch.Tensor | None],
) -> None:
    weight.copy_(before[0])
    if bias is not None and before[1] is not None:
        bias.copy_(before[1])

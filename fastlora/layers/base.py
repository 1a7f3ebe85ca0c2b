"""What every LoRA layer has: named adapters, which of them act, and merging."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from fastlora.routing import Group
from fastlora.validation import (
    AdapterNotFoundError,
    AdapterStateError,
    ConfigError,
    UnsupportedLayerError,
    check_dropout,
    check_rank,
    near_names,
)

# Rows of the weight that a merge handles at once: its only temporary.
_MERGE_ROWS = 1024


class LoraLayer(nn.Module):
    """Adapters by name on one base layer; the attribute names are PEFT's.

    Attributes:
        lora_A: Adapter name to a linear module with weight ``[R, K]``.
        lora_B: Adapter name to a linear module with weight ``[N, R]``, with a bias for lora_bias.
        lora_dropout: Adapter name to `nn.Dropout` or `nn.Identity`.
        r, lora_alpha, scaling: Adapter name to number.
        merged_adapters: Names whose update is in the base weight now, in order.
        impl: Implementation, as in `fastlora.functional.lora_linear`.
    """

    in_features: int
    out_features: int

    def _init_adapters(self) -> None:
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.use_rslora: dict[str, bool] = {}
        self.lora_dropout = nn.ModuleDict()
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.impl = "auto"
        self.merged_adapters: list[str] = []
        self._active_adapters: list[str] = []
        self._disabled = False
        # The model's group of layers, and this one's number, once it is in a model.
        self.routed_by: Group | None = None
        self.routed_as = 0
        # (weight, bias) as they were before the first merge, only while merged, and the versions
        # of the parameters behind the last one.
        self._unmerged: tuple[torch.Tensor, torch.Tensor | None] | None = None
        self._merged_versions: tuple[int, ...] = ()

    # ------------------------------------------------------------------ what subclasses provide

    def get_base_layer(self) -> nn.Module:
        """Returns the module that the adapters modify."""
        raise UnsupportedLayerError(f"{type(self).__name__} has no base layer")

    def _mergeable(self) -> tuple[torch.Tensor, torch.Tensor | None, bool]:
        """Returns base weight, bias, and whether the weight is stored ``[K, N]``; or raises."""
        raise UnsupportedLayerError(f"{type(self).__name__} cannot be merged")

    def fusion(self) -> tuple[bool, str]:
        """Returns whether the base GEMM and the LoRA term run fused, and the reason if not."""
        raise UnsupportedLayerError(f"{type(self).__name__} has no base layer")

    # ----------------------------------------------------------------------------- adapters

    @property
    def active_adapters(self) -> list[str]:
        """Names set active, whether or not this layer has them."""
        return list(self._active_adapters)

    @property
    def merged(self) -> bool:
        """Whether any adapter is in the base weight now."""
        return bool(self.merged_adapters)

    @property
    def disable_adapters(self) -> bool:
        """Whether the forward ignores every adapter."""
        return self._disabled

    def add_adapter(
        self,
        adapter_name: str,
        *,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        lora_bias: bool = False,
        init_lora_weights: bool | str = True,
    ) -> None:
        """Adds an adapter; it acts only after `set_adapter`.

        Random values are drawn as PEFT draws them, so the same seed gives the same factors.

        Args:
            adapter_name: A name that the layer does not have, without dots.
            r: Rank, positive.
            lora_alpha: Numerator of the scaling.
            lora_dropout: Probability in [0, 1) of dropping an element of the adapter's input.
            use_rslora: Scale by ``lora_alpha / sqrt(r)`` instead of ``lora_alpha / r``.
            lora_bias: Give lora_B a bias.
            init_lora_weights: True (A Kaiming-uniform, B zero), ``"gaussian"`` (A normal with
                standard deviation ``1 / r``, B zero), or False (both random).

        Raises:
            AdapterStateError: The name exists.
            ConfigError: A value is out of range.
        """
        if adapter_name in self.lora_A:
            raise AdapterStateError(f"adapter {adapter_name!r} exists already on this layer")
        if not adapter_name or "." in adapter_name:
            raise ConfigError(
                f"adapter_name must be a non-empty string without dots, got {adapter_name!r}"
            )
        if hasattr(nn.ModuleDict, adapter_name):
            raise ConfigError(f"adapter_name cannot be {adapter_name!r}, a method of nn.ModuleDict")
        check_rank(r)
        check_dropout("lora_dropout", lora_dropout)
        if not math.isfinite(lora_alpha):
            raise ConfigError(f"lora_alpha must be a finite number, got {lora_alpha!r}")
        lora_a = nn.Linear(self.in_features, r, bias=False)
        lora_b = nn.Linear(r, self.out_features, bias=lora_bias)
        _reset_parameters(lora_a, lora_b, r, init_lora_weights)
        reference = self._factor_like()
        if reference is not None:
            lora_a.to(device=reference.device, dtype=reference.dtype)
            lora_b.to(device=reference.device, dtype=reference.dtype)
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.use_rslora[adapter_name] = use_rslora
        self.scaling[adapter_name] = lora_alpha / (math.sqrt(r) if use_rslora else r)
        dropout = nn.Dropout(lora_dropout) if lora_dropout > 0.0 else nn.Identity()
        self.lora_dropout[adapter_name] = dropout.train(self.training)
        self.lora_A[adapter_name] = lora_a.train(self.training)
        self.lora_B[adapter_name] = lora_b.train(self.training)
        for factor in (lora_a, lora_b):
            factor.requires_grad_(False)

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes an adapter.

        Raises:
            AdapterNotFoundError: The layer has no such adapter.
            AdapterStateError: It is merged.
        """
        self._check_known(adapter_name)
        if adapter_name in self.merged_adapters:
            raise AdapterStateError(
                f"adapter {adapter_name!r} is merged; call unmerge() before deleting it"
            )
        for table in (self.r, self.lora_alpha, self.scaling, self.use_rslora):
            table.pop(adapter_name)
        for modules in (self.lora_dropout, self.lora_A, self.lora_B):
            del modules[adapter_name]
        self._active_adapters = [n for n in self._active_adapters if n != adapter_name]

    def set_adapter(self, adapter_names: str | list[str], *, inference_mode: bool = False) -> None:
        """Makes these adapters act, and them alone trainable.

        Args:
            adapter_names: One name, or several whose updates add up.
            inference_mode: Leave all of them frozen.

        Raises:
            AdapterNotFoundError: The layer has no such adapter.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        for name in names:
            self._check_known(name)
        self._activate(names, inference_mode)

    def _activate(self, names: list[str], inference_mode: bool = False) -> None:
        """`set_adapter` for a whole model, where a layer may lack some of the names."""
        if self.merged:
            warnings.warn("set_adapter() unmerges the adapters merged so far", stacklevel=3)
            self.unmerge()
        self._active_adapters = list(dict.fromkeys(names))
        self._set_trainable([] if inference_mode else self._active_adapters)

    def _set_trainable(self, names: list[str]) -> None:
        for modules in (self.lora_A, self.lora_B):
            for name, module in modules.items():
                module.requires_grad_(name in names)

    def set_scale(self, adapter_name: str, factor: float) -> None:
        """Sets the scaling to ``factor`` times what rank and alpha give."""
        self._check_known(adapter_name)
        r = self.r[adapter_name]
        base = math.sqrt(r) if self.use_rslora[adapter_name] else r
        self.scaling[adapter_name] = factor * self.lora_alpha[adapter_name] / base

    def scale_layer(self, scale: float) -> None:
        """Multiplies the scaling of the active adapters."""
        for name in self._active_adapters:
            if name in self.scaling:
                self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divides the scaling of the active adapters, or sets it back to what the config gives."""
        for name in self._active_adapters:
            if name in self.scaling:
                if scale is None:
                    self.set_scale(name, 1.0)
                else:
                    self.scaling[name] /= scale

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the block the layer is its base layer; a merge is undone and done again."""
        merged, kept = list(self.merged_adapters), self._unmerged is not None
        active, was_disabled = self._active_adapters, self._disabled
        if merged:
            self.unmerge()
        self._disabled = True
        try:
            yield
        finally:
            self._disabled = was_disabled
            # Where other adapters were set active meanwhile, these are to act.
            if merged and self._active_adapters == active:
                self.merge(adapter_names=merged, keep_base=kept)

    def _acting(self) -> list[str]:
        """Names that the next forward adds to the base layer's output."""
        if self._disabled or self.merged_adapters:
            return []
        return [name for name in self._active_adapters if name in self.lora_A]

    # ----------------------------------------------------------------------------- merging

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

    # ----------------------------------------------------------------------------- plumbing

    def _check_known(self, adapter_name: str) -> None:
        if adapter_name not in self.lora_A:
            names = list(self.lora_A)
            raise AdapterNotFoundError(
                f"no adapter {adapter_name!r} on this layer, which has {names}"
                f"{near_names(adapter_name, names)}"
            )

    def _factor_like(self) -> torch.Tensor | None:
        """A tensor whose device and dtype new factors take, or None for torch's defaults."""
        for parameter in self.get_base_layer().parameters(recurse=False):
            if parameter.is_floating_point() and parameter.itemsize >= 2:  # fp8 cannot train
                return parameter
        return None

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


def _reset_parameters(
    lora_a: nn.Linear, lora_b: nn.Linear, r: int, init_lora_weights: bool | str
) -> None:
    """Fills fresh factors; what each option draws, and in which order, is PEFT's."""
    if init_lora_weights is False:
        return
    if init_lora_weights is True:
        nn.init.kaiming_uniform_(lora_a.weight, a=math.sqrt(5))
    elif isinstance(init_lora_weights, str) and init_lora_weights.lower() == "gaussian":
        nn.init.normal_(lora_a.weight, std=1 / r)
    else:
        raise ConfigError(
            f"init_lora_weights must be True, False or 'gaussian', got {init_lora_weights!r}"
        )
    nn.init.zeros_(lora_b.weight)
    if lora_b.bias is not None:
        nn.init.zeros_(lora_b.bias)

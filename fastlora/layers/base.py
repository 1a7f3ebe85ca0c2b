"""What every LoRA layer has: named adapters, and which of them act and train."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import nn

from fastlora.init import Init
from fastlora.layers import parts
from fastlora.layers.bases import dense_weight, factor_like, keep_weight, replace_weight
from fastlora.layers.coded_base import forget_weights
from fastlora.layers.common import forget_kept
from fastlora.layers.merging import Mergeable
from fastlora.layers.starting import Starter, drop_data, find_data
from fastlora.routing.ids import check_adapter_name
from fastlora.sharding import is_sharded
from fastlora.validation import (
    AdapterNotFoundError,
    AdapterStateError,
    ConfigError,
    UnsupportedLayerError,
    check_dropout,
    check_rank,
    near_names,
)
from fastlora.weight_marks import marks


class LoraLayer(Mergeable):
    """Adapters by name on one base layer; the attribute names are PEFT's.

    What is here holds for every kind of layer. A kind answers the few methods below "what a kind
    answers"; as they are here they are a linear's.

    Attributes:
        adapter_parts: Names of what holds an adapter's tensors by its name, in files too.
        lora_A: Adapter name to a linear module with weight ``[R, K]``.
        lora_B: Adapter name to a linear module with weight ``[N, R]``, with a bias for lora_bias.
        lora_dropout: Adapter name to `nn.Dropout` or `nn.Identity`.
        lora_magnitude_vector: Name of an adapter that uses DoRA to a module with weight ``[N]``.
        r, lora_alpha, scaling: Adapter name to number.
        frozen_peft_weight_names: Adapter name to the parts of it that never train.
        impl: Implementation, as in `fastlora.functional.lora_linear`.
    """

    in_features: int
    out_features: int
    adapter_parts: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B", "lora_magnitude_vector")
    other_param_names: ClassVar[tuple[str, ...]] = ("r", "lora_alpha", "scaling", "lora_dropout")

    def _init_adapters(self) -> None:
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling = {}
        self.use_rslora: dict[str, bool] = {}
        self.lora_dropout = nn.ModuleDict()
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.lora_magnitude_vector = nn.ModuleDict()
        self.frozen_peft_weight_names: dict[str, tuple[str, ...]] = {}
        self._init_merging()
        self._watch_loads()

    # ----------------------------------------------------------------------- what a kind answers

    def release(self) -> nn.Module:
        """Returns the module to put where this layer is, once its adapters are to go."""
        return self.get_base_layer()

    def fusion(self, gathered: bool = False) -> tuple[bool, str]:
        """Returns whether the base GEMM and the LoRA term run fused, and the reason if not."""
        raise UnsupportedLayerError(f"{type(self).__name__} has no base layer")

    def _new_factors(self, r: int, lora_bias: bool, start: Starter) -> dict[str, parts.Factor]:
        """Returns an adapter's new factors by the part that they belong to, drawn as PEFT does."""
        lora_a = nn.Linear(self.in_features, r, bias=False)
        lora_b = nn.Linear(r, self.out_features, bias=lora_bias)
        start.fill(lora_a, lora_b)
        return {"lora_A": lora_a, "lora_B": lora_b}

    def _init_here(self, init: bool | str) -> bool | str:
        """Returns what an ``init_lora_weights`` means on this kind."""
        return init

    def _calibrated(self) -> list[nn.Module]:
        """Returns the modules on which a calibration may have left its result."""
        return [self.get_base_layer()]

    def _weight_to_start_from(self, why: str) -> torch.Tensor:
        """Returns the base weight ``[N, K]``; ``why`` begins what is said where it has none."""
        return dense_weight(self.get_base_layer(), why).detach()

    def _magnitude_like(self, norms: torch.Tensor) -> torch.Tensor:
        """Returns norms ``[N]`` in the shape of a magnitude."""
        return norms

    def inner_layers(self) -> dict[str, LoraLayer]:
        """Returns, by their names below this one, LoRA layers that always have its adapters."""
        return {}

    # ----------------------------------------------------------------------------- adapters

    def add_adapter(
        self,
        adapter_name: str,
        *,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        lora_bias: bool = False,
        use_dora: bool = False,
        init_lora_weights: bool | str = True,
        init_config: object | None = None,
        from_file: bool = False,
    ) -> None:
        """Adds an adapter; it acts only after `set_adapter`.

        Random values are drawn as PEFT draws them, so the same seed gives the same factors. Some
        initialisations move a part of the base weight into the factors: the layer's output stays
        what it was, and the base weight is another one from then on.

        Args:
            adapter_name: A name that the layer does not have, without dots.
            r: Rank, positive.
            lora_alpha: Numerator of the scaling.
            lora_dropout: Probability in [0, 1) of dropping an element of the adapter's input.
            use_rslora: Scale by ``lora_alpha / sqrt(r)`` instead of ``lora_alpha / r``.
            lora_bias: Give lora_B a bias.
            use_dora: Give the adapter a magnitude for each output, at first the norm of that row of
                the adapted weight (DoRA, https://arxiv.org/abs/2402.09353).
            init_lora_weights: True (A Kaiming-uniform, B zero), ``"gaussian"`` (A normal with
                standard deviation ``1 / r``, B zero), False (both random), or the name of another
                method of `fastlora.init`.
            init_config: The method's own settings, as ``LoraConfig.lora_ga_config``.
            from_file: The factors are about to be overwritten with trained ones. Only a change of
                the base weight is then repeated.

        Raises:
            AdapterStateError: The name exists, or an adapter is merged into the weight that the
                initialisation reads.
            ConfigError: A value is out of range, or lora_bias is asked for beside use_dora.
            InitialisationError: The initialisation cannot start from this weight, or lacks data.
            UnsupportedLayerError: use_dora, or an initialisation that reads the base weight, and
                the base weight cannot be read or changed.
        """
        if adapter_name in self.r:
            raise AdapterStateError(f"adapter {adapter_name!r} exists already on this layer")
        check_adapter_name(adapter_name)
        check_rank(r)
        check_dropout("lora_dropout", lora_dropout)
        if not math.isfinite(lora_alpha):
            raise ConfigError(f"lora_alpha must be a finite number, got {lora_alpha!r}")
        if use_dora and lora_bias:
            raise ConfigError(
                "The argument lora_bias=True is not supported for DoRA; expected use_dora=False"
            )
        reference = self._factor_like()  # raises before anything changes, as what follows may
        if use_dora:
            self._own_weight()
        scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        init_lora_weights = self._init_here(init_lora_weights)
        start = Starter(self, init_lora_weights, scaling, init_config, from_file)
        factors = self._new_factors(r, lora_bias, start)
        init = start.asked
        undo = self._keep_base(init)
        self._forget_packed()
        try:
            self.r[adapter_name] = r
            self.lora_alpha[adapter_name] = lora_alpha
            self.use_rslora[adapter_name] = use_rslora
            self.scaling[adapter_name] = scaling
            dropout = nn.Dropout(lora_dropout) if lora_dropout > 0.0 else nn.Identity()
            self.lora_dropout[adapter_name] = dropout.train(self.training)
            for part, factor in factors.items():
                frozen = parts.frozen_like(factor, reference, self.training)
                self._modules[part][adapter_name] = frozen
            if init.frozen:
                pair = dict(zip(("lora_A", "lora_B"), factors, strict=True))
                self.frozen_peft_weight_names[adapter_name] = tuple(pair[f] for f in init.frozen)
            if start.weight is not None:
                replace_weight(self.get_base_layer(), start.weight)
                self.refresh()
            self._fit_scalings([adapter_name])
            self._place(adapter_name)
            if use_dora:
                self.reset_magnitude(adapter_name)
        except BaseException:
            self.delete_adapter(adapter_name)
            undo()
            raise
        if init.data:
            drop_data(self, init)

    def _keep_base(self, init: Init, offload: bool = False) -> Callable[[], None]:
        """Returns a function that undoes what an init is about to do to the base layer.

        With ``offload`` a weight that lies on an accelerator is kept in the CPU's memory.
        """
        data = find_data(self, init) if init.data else None
        restore = keep_weight(self.get_base_layer(), offload) if init.changes_base else None

        def undo() -> None:
            if data is not None:
                setattr(data[0], init.data, data[1])
            if restore is not None:
                restore()
                self.refresh()

        return undo

    def _place(self, adapter_name: str) -> None:
        """Puts an adapter's new factors where they belong; no word about a magnitude yet."""

    def reset_magnitude(self, adapter_name: str) -> None:
        """Makes an adapter's magnitude the norms of its adapted weight, in its factors' dtype.

        The adapter then changes nothing but the direction of the weight's rows: with lora_B zero,
        as it starts, the layer is its base layer. It is frozen.
        """
        self._check_known(adapter_name)
        _, lora_b, _ = self._factors(adapter_name)
        squares = self._unmerged_squares([adapter_name])[adapter_name]
        norms = torch.where(squares.isinf(), 0.0, squares).sqrt()
        norms = self._magnitude_like(norms.to(lora_b.device, lora_b.dtype))
        magnitude = parts.DoraMagnitude(norms).train(self.training).requires_grad_(False)
        self.lora_magnitude_vector[adapter_name] = magnitude

    def refresh(self) -> None:
        """Forgets what the layer keeps of its weights, and its model of adapters in mixed batches.

        Call it after writing through a parameter's ``.data``, which nothing else can see.
        """
        marks.end_all()
        forget_kept(self)

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
        self._forget_packed()
        for table in (self.r, self.lora_alpha, self.scaling, self.use_rslora):
            table.pop(adapter_name, None)
        for part in ("lora_dropout", *self.adapter_parts):
            holder = self._modules[part]
            if adapter_name in holder:
                del holder[adapter_name]
        self.frozen_peft_weight_names.pop(adapter_name, None)
        forget_weights(self)
        self._active_adapters = [n for n in self._active_adapters if n != adapter_name]

    def adapter_parameters(self, adapter_name: str) -> Iterator[nn.Parameter]:
        """Yields what an adapter can train on this layer; nothing where it is not on it."""
        fixed = self.frozen_peft_weight_names.get(adapter_name, ())
        for part in self.adapter_parts:
            holder = self._modules[part]
            if adapter_name in holder and part not in fixed:
                factor = holder[adapter_name]
                yield from (factor,) if isinstance(factor, nn.Parameter) else factor.parameters()

    def set_scale(self, adapter_name: str, factor: float) -> None:
        """Sets the scaling to ``factor`` times what rank and alpha give."""
        self._check_known(adapter_name)
        r = self.r[adapter_name]
        base = math.sqrt(r) if self.use_rslora[adapter_name] else r
        self.scaling[adapter_name] = factor * self.lora_alpha[adapter_name] / base
        self._forget_packed()

    def scale_layer(self, scale: float) -> None:
        """Multiplies the scaling of the active adapters."""
        self._forget_packed()
        for name in self._active_adapters:
            if name in self.scaling:
                self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divides the scaling of the active adapters, or sets it back to what the config gives."""
        self._forget_packed()
        for name in self._active_adapters:
            if name in self.scaling:
                if scale is None:
                    self.set_scale(name, 1.0)
                else:
                    self.scaling[name] /= scale

    def _acting(self) -> list[str]:
        """Names that the next forward adds to the base layer's output."""
        if self._disabled or self.merged_adapters:
            return []
        active: Any = self._active_adapters
        known = self.r
        if len(active) == 1 and active[0] in known:
            return [active[0]]
        return [name for name in active if name in known]

    # ----------------------------------------------------------------------------- plumbing

    def file_names(self, adapter_name: str) -> dict[str, str]:
        return parts.file_names(self._held_parts(adapter_name), adapter_name)

    def widen(self, adapter_name: str) -> None:
        """Makes factors of fewer than 32 bits fp32, and anew the magnitude that was rounded."""
        for part, factor in self._held_parts(adapter_name).items():
            if not isinstance(factor, parts.DoraMagnitude):
                self._modules[part][adapter_name] = parts.widened(factor)
        if adapter_name in self.lora_magnitude_vector:
            self.reset_magnitude(adapter_name)  # not rounded to 16 bits first

    def _held_parts(self, adapter_name: str) -> dict[str, parts.Factor]:
        """Returns an adapter's factors and magnitude by the part that they belong to."""
        held: dict[str, parts.Factor] = {}
        for part in self.adapter_parts:
            holder = self._modules[part]
            if adapter_name in holder:
                held[part] = holder[adapter_name]
        return held

    @property
    def adapter_layer_names(self) -> tuple[str, ...]:
        """Names of what holds each adapter's factors."""
        return tuple(part for part in self.adapter_parts if part != "lora_magnitude_vector")

    def _all_available_adapter_names(self) -> list[str]:
        return sorted(self.r)

    def _check_known(self, adapter_name: str) -> None:
        if adapter_name not in self.r:
            names = list(self.r)
            raise AdapterNotFoundError(
                f"no adapter {adapter_name!r} on this layer, which has {names}"
                f"{near_names(adapter_name, names)}"
            )

    def _factor_like(self) -> torch.Tensor | None:
        """A tensor whose device and dtype new factors take, or None for torch's defaults."""
        base = self.get_base_layer()
        if any(map(is_sharded, base.parameters(recurse=False))):
            raise AdapterStateError(
                "the base weight is sharded (a DTensor) and the new factors would not be: add "
                "adapters before fully_shard(), which then shards them too; under tensor "
                "parallelism, layers that torch's parallelize_module split take adapters"
            )
        return factor_like(base)

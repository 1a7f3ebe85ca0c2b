"""`LoraLayer`, the base class of fastlora's LoRA layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from fastlora.deprecation import RenamedAttribute, without_old_names
from fastlora.init import InitMethod
from fastlora.layers import parts
from fastlora.layers.adapter_init import (
    AdapterInitializer,
    delete_calibration_result,
    find_calibration_result,
)
from fastlora.layers.base_adapter_layer import clear_layer_caches
from fastlora.layers.base_layers import (
    dense_weight,
    factor_reference,
    make_weight_restorer,
    replace_weight_data,
)
from fastlora.layers.fallback_reasons import FusionStatus
from fastlora.layers.merging import MergeableLayer
from fastlora.routing.ids import check_adapter_name
from fastlora.sharding import is_dtensor
from fastlora.validation import (
    AdapterNotFoundError,
    AdapterStateError,
    ConfigError,
    UnsupportedLayerError,
    check_dropout,
    check_rank,
    near_names,
)
from fastlora.weights_version import weights_versions


class LoraLayer(MergeableLayer):
    """Layer with named LoRA adapters.

    This is the base class of all kinds of LoRA layers, and implements what they have in common. The
    attributes have PEFT's names. A subclass for another kind of layer overrides the methods in the
    section "methods that a layer kind overrides", which by default are those of a linear layer.

    Attributes:
        adapter_parts: Names of the module dicts that map an adapter name to one of its tensors.
            Adapter files use these names too.
        lora_A: Maps an adapter name to a linear module with weight ``[R, K]``.
        lora_B: Maps an adapter name to a linear module with weight ``[N, R]``, and a bias if the
            adapter has lora_bias.
        lora_dropout: Maps an adapter name to `nn.Dropout` or `nn.Identity`.
        lora_magnitude_vector: Maps the name of an adapter that uses DoRA to a module with weight
            ``[N]``.
        r, lora_alpha, scaling: Map an adapter name to a number.
        frozen_peft_weight_names: Maps an adapter name to the names of its parts that are never
            trained.
        impl: Implementation, as in `fastlora.functional.lora_linear`.
        replaces_module: Whether the layer replaces a module of the model. A layer for a parameter
            of a module does not.
        num_matrices: Number of matrices that the weight consists of, 1 unless it is a stack.
    """

    replaces_module: ClassVar[bool] = True
    num_matrices = 1
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
        self._register_load_hook_that_moves_scalings()

    # ------------------------------------------- methods that a layer kind overrides

    def release(self) -> nn.Module:
        """Release the base layer from this layer, and return it.

        The base layer replaces this layer when its adapters are removed.
        """
        return self.get_base_layer()

    def fusion(self, gathered: bool = False) -> FusionStatus:
        """Return the fusion status of the layer.

        The status states whether the layer is fused and, if not, the reason. A fused layer computes
        the base GEMM and the LoRA update in one call.
        """
        raise UnsupportedLayerError(f"{type(self).__name__} has no base layer")

    def _create_factors(
        self, r: int, lora_bias: bool, start: AdapterInitializer
    ) -> dict[str, parts.Factor]:
        """Create a new adapter's factors.

        Returns a dict whose keys are part names such as ``"lora_A"``. Values are drawn as PEFT
        draws them.
        """
        lora_a = nn.Linear(self.in_features, r, bias=False)
        lora_b = nn.Linear(r, self.out_features, bias=lora_bias)
        start.initialize_weights(lora_a, lora_b)
        return {"lora_A": lora_a, "lora_B": lora_b}

    def _resolve_init(self, init: bool | str) -> bool | str:
        """Resolve an initialization setting to the initialization method that this layer uses.

        ``init`` is a value of ``init_lora_weights``. By default, the result is ``init`` itself. A
        layer kind that uses another initialization method for ``init`` overrides `_resolve_init`.
        """
        return init

    def _modules_that_may_hold_calibration_results(self) -> list[nn.Module]:
        """Return the modules on which calibration results may be stored.

        A calibration stores its result as an attribute of the calibrated module.
        """
        return [self.get_base_layer()]

    def _weight_for_init(self, purpose: str) -> torch.Tensor:
        """Return the base weight from which an adapter is initialized.

        The weight is ``[N, K]``. ``purpose`` begins the error message if the weight cannot be read.
        """
        return dense_weight(self.get_base_layer(), purpose).detach()

    def _reshape_to_magnitude(self, norms: torch.Tensor) -> torch.Tensor:
        """Reshape a tensor of N norms to the shape of this layer's DoRA magnitude."""
        return norms

    def inner_layers(self) -> dict[str, LoraLayer]:
        """Return the LoRA layers nested in this layer, by name.

        The result is a dict. Each key is the name of a nested layer, relative to this layer.
        """
        return {}

    def _layers_to_adapt(
        self, settings: Mapping[str, object]
    ) -> list[tuple[LoraLayer, dict[str, Any]]]:
        """Return the LoRA layers to adapt, each with its settings for a new adapter.

        The settings of a layer are the arguments for adding the adapter to the layer. By default,
        the adapter is added to this layer and to all of its inner layers, with the same settings.

        Args:
            settings: The fields of a `LayerAdapterSettings`.

        Returns:
            A list of tuples (layer, keyword arguments of its `add_adapter`).

        Raises:
            UnsupportedLayerError: The settings are for adapters on parameters.
        """
        arguments = {name: value for name, value in settings.items() if name != "parameters"}
        parameters: Any = settings["parameters"]
        if parameters:
            raise UnsupportedLayerError(
                f"target_parameters selects {parameters[0].name!r} of a "
                f"{type(self.get_base_layer()).__name__}, but another adapter targets the whole "
                "module; all adapters must target either the module or its parameters"
            )
        return [(layer, arguments) for layer in (self, *self.inner_layers().values())]

    def _has_adapter(self, adapter_name: str) -> bool:
        """Return whether this layer has an adapter.

        An adapter on one of the inner layers counts too.
        """
        return any(adapter_name in layer.r for layer in (self, *self.inner_layers().values()))

    def _num_rank_blocks(self, factor_name: str) -> int:
        """Return the number of rank blocks that a factor consists of.

        The rank dimension of a factor is divided into blocks of the same size. The lora_A of a
        stack has one block per matrix, and the lora_A of a convolution has one block per group. Any
        other factor has one block.
        """
        base: Any = self.get_base_layer()
        return int(getattr(base, "groups", 1)) if factor_name == "lora_A" else 1

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
        """Add an adapter to the layer.

        The adapter stays inactive until `set_adapter` activates it. Random values are drawn as PEFT
        draws them, so the same seed gives the same factors. Some initializations move a part of the
        base weight into the factors, which changes the base weight. When the adapter is active, the
        layer's output is the same as before (with LoftQ, only approximately).

        Args:
            adapter_name: A name without dots that is not in use on the layer.
            r: Rank, positive.
            lora_alpha: Numerator of the scaling.
            lora_dropout: Probability in [0, 1) of dropping an element of the adapter's input.
            use_rslora: Whether to scale by ``lora_alpha / sqrt(r)`` instead of ``lora_alpha / r``.
            lora_bias: Whether lora_B has a bias.
            use_dora: Whether the adapter has a magnitude for each output, initialized to the norm
                of that row of the adapted weight (DoRA, https://arxiv.org/abs/2402.09353).
            init_lora_weights: True (A Kaiming-uniform, B zero), ``"gaussian"`` (A normal with
                standard deviation ``1 / r``, B zero), False (both random), or the name of another
                method of `fastlora.init`.
            init_config: Settings of the initialization method, such as
                ``LoraConfig.lora_ga_config``.
            from_file: Whether trained factors from a file are about to overwrite the new factors.
                The initialization method is then skipped, except that a change of the base weight
                is repeated.

        Raises:
            AdapterStateError: The name is in use, or an adapter is merged into the base weight that
                the initialization reads.
            ConfigError: A value is out of range, or both lora_bias and use_dora are set.
            InitializationError: The initialization cannot start from this weight, or lacks data.
            UnsupportedLayerError: The base weight cannot be read or changed as use_dora or the
                initialization requires.
        """
        if adapter_name in self.r:
            raise AdapterStateError(f"adapter {adapter_name!r} already exists on this layer")
        check_adapter_name(adapter_name)
        check_rank(r)
        check_dropout("lora_dropout", lora_dropout)
        if not math.isfinite(lora_alpha):
            raise ConfigError(f"lora_alpha must be a finite number, got {lora_alpha!r}")
        if use_dora and lora_bias:
            raise ConfigError(
                "The argument lora_bias=True is not supported for DoRA; expected use_dora=False"
            )
        # This and the calls below may raise; nothing has changed yet.
        reference = self._reference_for_new_factors()
        if use_dora:
            self._local_weight()
        scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        init_lora_weights = self._resolve_init(init_lora_weights)
        start = AdapterInitializer(self, init_lora_weights, scaling, init_config, from_file)
        factors = self._create_factors(r, lora_bias, start)
        init = start.asked
        undo = self._make_base_undo(init)
        self._clear_model_packed_factors()
        try:
            self.r[adapter_name] = r
            self.lora_alpha[adapter_name] = lora_alpha
            self.use_rslora[adapter_name] = use_rslora
            self.scaling[adapter_name] = scaling
            dropout = nn.Dropout(lora_dropout) if lora_dropout > 0.0 else nn.Identity()
            self.lora_dropout[adapter_name] = dropout.train(self.training)
            for part, factor in factors.items():
                frozen = parts.freeze_and_convert(factor, reference, self.training)
                self._modules[part][adapter_name] = frozen
            if init.frozen:
                pair = dict(zip(("lora_A", "lora_B"), factors, strict=True))
                self.frozen_peft_weight_names[adapter_name] = tuple(pair[f] for f in init.frozen)
            if start.weight is not None:
                replace_weight_data(self.get_base_layer(), start.weight)
                self.clear_caches()
            self._move_scalings_to_factors([adapter_name])
            self._on_factors_added(adapter_name)
            if use_dora:
                self.reset_magnitude(adapter_name)
        except BaseException:
            self._remove_adapter(adapter_name)
            undo()
            raise
        if init.data:
            delete_calibration_result(self, init)

    def _make_base_undo(self, init: InitMethod, copy_to_cpu: bool = False) -> Callable[[], None]:
        """Return a function that undoes an initialization's changes to the base layer.

        If ``copy_to_cpu`` is set, a dense weight on an accelerator is saved in CPU memory. A
        quantized weight is saved on its device.
        """
        data = find_calibration_result(self, init) if init.data else None
        restore = (
            make_weight_restorer(self.get_base_layer(), copy_to_cpu) if init.changes_base else None
        )

        def undo() -> None:
            if data is not None:
                setattr(data[0], init.data, data[1])
            if restore is not None:
                restore()
                self.clear_caches()

        return undo

    def _on_factors_added(self, adapter_name: str) -> None:
        """Hook that is called after an adapter's factors are added to the layer.

        Subclasses can override it to prepare the factors. It runs before the magnitude of a new
        adapter is computed. By default, it does nothing.
        """

    def reset_magnitude(self, adapter_name: str) -> None:
        """Reset an adapter's DoRA magnitude to the norms of the current weight.

        The norms are the row norms of the adapted weight, which is the base weight plus the
        adapter's update. The magnitude of a new adapter is initialized in the same way. The
        magnitude has the dtype of the factors. The adapter then changes only the direction of the
        weight's rows. While lora_B is zero, as it is at initialization, the layer's output is that
        of its base layer. The new magnitude is frozen.
        """
        self._check_has_adapter(adapter_name)
        _, lora_b, _ = self._factors(adapter_name)
        squares = self._adapted_squared_norms_by_adapter([adapter_name])[adapter_name]
        norms = torch.where(squares.isinf(), 0.0, squares).sqrt()
        norms = self._reshape_to_magnitude(norms.to(lora_b.device, lora_b.dtype))
        magnitude = parts.DoraMagnitude(norms).train(self.training).requires_grad_(False)
        self.lora_magnitude_vector[adapter_name] = magnitude

    def clear_caches(self) -> None:
        """Clear all caches of this layer.

        The values cached for its model's adapters are invalidated too. Call this method after
        writing through a parameter's ``.data``: no cache can detect such a write.
        """
        weights_versions.invalidate_all()
        clear_layer_caches(self)

    refresh = RenamedAttribute("clear_caches")

    def __dir__(self) -> list[str]:
        return without_old_names(self, super().__dir__())

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter from the layer.

        Raises:
            AdapterNotFoundError: The layer has no adapter of this name.
            AdapterStateError: The adapter is merged, or a `fastlora.adapters` block is open for
                the model.
        """
        if self.routing_group is not None:
            self.routing_group.check_no_open_blocks("delete_adapter")
        self._check_has_adapter(adapter_name)
        if adapter_name in self.merged_adapters:
            raise AdapterStateError(
                f"adapter {adapter_name!r} is merged; call unmerge() before deleting it"
            )
        self._remove_adapter(adapter_name)

    def _remove_adapter(self, adapter_name: str) -> None:
        """Remove an adapter from the layer.

        Unlike `delete_adapter`, this method does not check that the adapter can be deleted. A
        failed `add_adapter` calls it, for example.
        """
        for table in (self.r, self.lora_alpha, self.scaling, self.use_rslora):
            table.pop(adapter_name, None)
        for part in ("lora_dropout", *self.adapter_parts):
            holder = self._modules[part]
            if adapter_name in holder:
                del holder[adapter_name]
        self.frozen_peft_weight_names.pop(adapter_name, None)
        clear_layer_caches(self)
        self._active_adapters = [n for n in self._active_adapters if n != adapter_name]

    def adapter_parameters(self, adapter_name: str) -> Iterator[nn.Parameter]:
        """Yield an adapter's parameters in this layer.

        The parameters are those of the factors, the DoRA magnitude, and the lora_bias. Weights that
        are listed in ``frozen_peft_weight_names`` are left out, because they are never trained.
        Nothing is yielded if the layer lacks the adapter.
        """
        fixed = self.frozen_peft_weight_names.get(adapter_name, ())
        for part in self.adapter_parts:
            holder = self._modules[part]
            if adapter_name in holder and part not in fixed:
                factor = holder[adapter_name]
                yield from (factor,) if isinstance(factor, nn.Parameter) else factor.parameters()

    def set_scale(self, adapter_name: str, factor: float) -> None:
        """Set an adapter's scaling to ``factor`` times its initial value.

        The initial value follows from the rank and lora_alpha. Active `fastlora.adapters` blocks
        use the new scaling from their next forward pass onward.
        """
        self._check_has_adapter(adapter_name)
        r = self.r[adapter_name]
        base = math.sqrt(r) if self.use_rslora[adapter_name] else r
        self.scaling[adapter_name] = factor * self.lora_alpha[adapter_name] / base

    def scale_layer(self, scale: float) -> None:
        """Multiply the scaling of each active adapter by ``scale``."""
        for name in self._active_adapters:
            if name in self.scaling:
                self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scaling of each active adapter by ``scale``, or reset it if ``scale`` is None.

        The division undoes the effect of `scale_layer` with the same ``scale``. A scaling is reset
        to its initial value, which follows from the rank and lora_alpha.
        """
        for name in self._active_adapters:
            if name in self.scaling:
                if scale is None:
                    self.set_scale(name, 1.0)
                else:
                    self.scaling[name] /= scale

    def _applied_adapters(self) -> list[str]:
        """Return a list of the adapters that the layer applies.

        These are the active adapters, or none if adapters are disabled or merged. The adapters of
        mixed batches are not included.
        """
        if self._disabled or self.merged_adapters:
            return []
        active: Any = self._active_adapters
        known = self.r
        if len(active) == 1 and active[0] in known:
            return [active[0]]
        return [name for name in active if name in known]

    # ------------------------------------------------------------------------- state and file names

    def file_names(self, adapter_name: str) -> dict[str, str]:
        """Return the names of an adapter's tensors in the adapter file.

        The result is a dict that maps each name in the adapter file to the name of the same tensor
        in the state dict. All names are relative to this layer. The tensors of inner layers are
        included.
        """
        names = parts.file_to_state_dict_names(self._factors_by_name(adapter_name), adapter_name)
        for below, layer in self.inner_layers().items():
            for disk, key in layer.file_names(adapter_name).items():
                names[f"{below}.{disk}"] = f"{below}.{key}"
        return names

    def widen(self, adapter_name: str) -> None:
        """Upcast an adapter's factors to fp32.

        Only factors with lower precision than fp32 are converted. If the adapter uses DoRA, its
        magnitude is recomputed.
        """
        for part, factor in self._factors_by_name(adapter_name).items():
            if not isinstance(factor, parts.DoraMagnitude):
                self._modules[part][adapter_name] = parts.upcast_to_fp32(factor)
        if adapter_name in self.lora_magnitude_vector:
            # Recomputed in fp32, because the old magnitude was rounded to the narrower dtype.
            self.reset_magnitude(adapter_name)

    def _factors_by_name(self, adapter_name: str) -> dict[str, parts.Factor]:
        """Return a dict of an adapter's factors, keyed by name.

        The keys are names in `adapter_parts`, such as ``"lora_A"`` or, for DoRA,
        ``"lora_magnitude_vector"``.
        """
        held: dict[str, parts.Factor] = {}
        for part in self.adapter_parts:
            holder = self._modules[part]
            if adapter_name in holder:
                held[part] = holder[adapter_name]
        return held

    @property
    def adapter_layer_names(self) -> tuple[str, ...]:
        """Names of the attributes that hold the parameters of each adapter.

        Each of these attributes, such as ``lora_A``, maps an adapter name to a factor of the
        adapter. ``lora_magnitude_vector`` is not included. The property's name is PEFT's.
        """
        return tuple(part for part in self.adapter_parts if part != "lora_magnitude_vector")

    def _all_available_adapter_names(self) -> list[str]:
        return sorted(self.r)

    def _check_has_adapter(self, adapter_name: str) -> None:
        if adapter_name not in self.r:
            names = list(self.r)
            raise AdapterNotFoundError(
                f"this layer has no adapter {adapter_name!r}; its adapters are {names}"
                f"{near_names(adapter_name, names)}"
            )

    def _reference_for_new_factors(self) -> torch.Tensor | None:
        """Return a reference tensor with the device and dtype for new factors.

        Returns None if new factors should have the default device and dtype.
        """
        base = self.get_base_layer()
        if any(map(is_dtensor, base.parameters(recurse=False))):
            raise AdapterStateError(
                "the base weight is sharded (a DTensor), but the new factors would not be: add "
                "adapters before you call fully_shard(), which then shards them too. Under tensor "
                "parallelism, layers that were split by PyTorch's parallelize_module support new "
                "adapters"
            )
        return factor_reference(base)

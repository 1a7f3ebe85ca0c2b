"""Adapters on the parameters of a module, which ``target_parameters`` selects.

`ParameterLoraLayer` holds the adapters of one parameter. `FastLoraAdaptedParameters` replaces the
module. It runs the module with each parameter replaced by ``parameter + scaling * B @ A``, because
it does not know what the module computes. `fastlora.layers.experts` avoids this for the experts of
transformers' models.

A parameter is a matrix ``[N, K]`` or a stack of E matrices. Shapes and file names follow PEFT
0.21.2, ``tuners/lora/layer.py`` (`ParamWrapper`): ``lora_A [E * R, K]`` and ``lora_B [N, R * E]``.
A stack has the shape ``[E, N, K]``, or ``[E, K, N]`` if the module has ``is_transposed``. In files,
the names of several parameters of a module are nested: the last one is ``lora_A``, the one before
it ``base_layer.lora_A``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fastlora.layers import parts
from fastlora.layers.adapter_factors import fallback_reason_adapter_called
from fastlora.layers.adapter_init import AdapterInitializer
from fastlora.layers.call import MixedCall, UniformCall
from fastlora.layers.dora_norms import is_device_capturing
from fastlora.layers.fallback_reasons import FusionStatus
from fastlora.layers.layer_kinds import (
    LayerAdapterSettings,
    LayerKind,
    TensorShapes,
    linear_adapter_shapes,
    register_layer_kind,
)
from fastlora.layers.lora_layer import LoraLayer
from fastlora.layers.merge_target import DenseMergeTarget, MergeTarget
from fastlora.layers.mixed_dispatch import check_not_merged
from fastlora.layers.unfused import (
    BaseUnfusedLoraLayer,
    call_with_parameters,
    copy_with_parameters,
    has_replaced_forward_that_cannot_be_copied,
)
from fastlora.layers.unused_adapters import attach_unused_parameters
from fastlora.ops.execution_mode import (
    ExecutionMode,
    disable_autocast_on,
    is_being_compiled,
)
from fastlora.ops.factors import Factors
from fastlora.ops.rows import Segment
from fastlora.ops.stacks import rank_row_views, transposed_rank_rows
from fastlora.routing.active import active_routing
from fastlora.routing.ids import ids_divide_rows
from fastlora.routing.routing import Routing
from fastlora.sharding import fully_shard_was_called, is_dtensor
from fastlora.validation import AdapterNotFoundError, AdapterStateError, UnsupportedLayerError
from fastlora.weights_version import TensorStamp, UncopiedCache, stamp_tensors, weights_versions

# Initializations that do not read the base weight.
_INITS = (True, False, "gaussian")


def shape_as_stack(module: nn.Module, name: str) -> tuple[int, int, int]:
    """Return the shape that a module's parameter has when it is viewed as a stack of matrices.

    The shape is a tuple (E, N, K). E is the number of matrices, and each matrix is ``[N, K]``. The
    parameter has two or three dimensions. A parameter with two dimensions is a single matrix, so E
    is 1.
    """
    shape = module._parameters[name].shape  # type: ignore[union-attr]
    if len(shape) == 2:
        return 1, shape[0], shape[1]
    count, first, second = shape
    return (count, second, first) if is_transposed(module) else (count, first, second)


def is_transposed(module_with_stacks: nn.Module) -> bool:
    """Return whether a module stores its stacked weights in transposed form.

    Transposed stacks have the shape ``[E, K, N]``. Other stacks have the shape ``[E, N, K]``.
    """
    return bool(getattr(module_with_stacks, "is_transposed", False))


class TransposedLoraBCache(UncopiedCache):
    """Cache for the transposed lora_B of each adapter.

    A transposed lora_B is a stack of matrices ``[E, R, N]``. Each matrix has one row per rank
    index, which is called a rank row. The cache is used only while gradients are disabled.

    Attributes:
        entries: Maps an adapter name to a stamp of its lora_B and the rank rows ``[E, R, N]``.
    """

    def __init__(self) -> None:
        self.entries: dict[str, tuple[TensorStamp, torch.Tensor]] = {}


class ParameterLoraLayer(LoraLayer):
    """LoRA layer for a module's parameter, such as stacked expert weights.

    The config field ``target_parameters`` selects the parameters, and each parameter has its own
    layer. The layer holds the parameter's adapters, and provides their factors, their delta
    weights, and the adapted parameter. The layer is never called. Instead,
    `FastLoraAdaptedParameters` runs the module of the parameter.

    Args:
        module: The module that owns the parameter.
        name: The name of the parameter.

    Attributes:
        parameter_name: The name of the parameter.
        lora_A: Maps an adapter name to a linear module with weight ``[E * R, K]``.
        lora_B: Maps an adapter name to a linear module with weight ``[N, R * E]``.
    """

    is_linear = False
    replaces_module = False

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__()
        self.parameter_name = name
        self.__dict__["_owner"] = module  # Not a child: its parameters belong to the outer layer.
        self.num_matrices, self.out_features, self.in_features = shape_as_stack(module, name)
        self.training = module.training
        self._init_adapters()

    def get_base_layer(self) -> nn.Module:
        """Return the base layer, which is the module that owns the parameter."""
        owner: nn.Module = self.__dict__["_owner"]
        return owner

    @property
    def parameter(self) -> Any:
        """The parameter that the adapters adapt."""
        return self.get_base_layer()._parameters[self.parameter_name]

    def fusion(self, gathered: bool = False) -> FusionStatus:
        """Return the fusion status of the layer.

        The status states whether the layer is fused and, if not, the reason. A fused layer computes
        the base GEMM and the LoRA update in one call. A layer of this class is never fused.
        """
        kind = type(self.get_base_layer()).__name__
        return FusionStatus(False, f"the layer of its {kind} adds its update")

    def _num_rank_blocks(self, factor_name: str) -> int:
        return self.num_matrices if factor_name == "lora_A" else 1

    def view_as_stack(self, tensor: torch.Tensor) -> torch.Tensor:
        """View a tensor as a stack of matrices.

        The tensor must have the shape of the layer's parameter. The result is a view ``[E, N, K]``
        of the tensor. A tensor with two dimensions is viewed as a stack of one matrix.
        """
        if tensor.dim() == 2:
            return tensor.unsqueeze(0)
        return tensor.transpose(1, 2) if is_transposed(self.get_base_layer()) else tensor

    # -------------------------------------------------------------------------------- factors

    def _reference_for_new_factors(self) -> torch.Tensor | None:
        super()._reference_for_new_factors()  # Raises for shards.
        reference: torch.Tensor = self.parameter
        return reference

    def _create_factors(
        self, r: int, lora_bias: bool, start: AdapterInitializer
    ) -> dict[str, parts.Factor]:
        lora_a = nn.Linear(self.in_features, r * self.num_matrices, bias=False)
        lora_b = nn.Linear(r * self.num_matrices, self.out_features, bias=False)
        start.initialize_weights(lora_a, lora_b, rank=r)
        return {"lora_A": lora_a, "lora_B": lora_b}

    def factors_in_file_shapes(self, adapter_name: str, call: UniformCall | None = None) -> Factors:
        """Return an adapter's factors in the shapes used in adapter files.

        If ``call`` is given, the scaling is a tensor on the device of its x.

        Raises:
            UnsupportedLayerError: The adapter's modules would have to be called.
        """
        found = self._local_factors(adapter_name, call)
        if found is None:
            reason = fallback_reason_adapter_called(self, [adapter_name])
            raise UnsupportedLayerError(f"parameter {self.parameter_name!r}: {reason}")
        return found

    def rank_rows(self, adapter_name: str, factors: Factors) -> tuple[torch.Tensor, torch.Tensor]:
        """Return an adapter's lora_a and lora_b as stacks of matrices with one row per rank index.

        The result is a tuple of lora_a ``[E, R, K]`` and the transposed lora_b ``[E, R, N]``. Each
        matrix has R rows, where R is the adapter's rank. The rows are called rank rows. The
        transposed lora_b is a copy, which is cached while gradients are disabled. If lora_b is
        stored as rank rows, as in a pool, the transposed lora_b is a view of lora_b instead.
        ``adapter_name`` identifies the adapter in the cache.
        """
        lora_a, _ = rank_row_views(factors.lora_a, factors.lora_b, self.num_matrices)
        watched = factors.lora_b
        if (
            torch.is_grad_enabled()
            or watched.t().is_contiguous()  # Nothing is copied.
            or fully_shard_was_called()  # A newly gathered tensor may reuse the last one's memory.
            or is_being_compiled()
            or is_device_capturing(watched.device)
        ):
            return lora_a, transposed_rank_rows(watched, self.num_matrices)
        cache = self.__dict__.setdefault("_rank_rows", TransposedLoraBCache()).entries
        context = (id(watched), weights_versions.version_of_trainable_weights())
        known = cache.get(adapter_name)
        if known is None or not known[0].matches((watched,), context):
            stamp = stamp_tensors((watched,), context)
            with torch.inference_mode(False):  # A later backward pass may need the result.
                rank_rows = transposed_rank_rows(watched.detach(), self.num_matrices)
            if stamp is None:
                return lora_a, rank_rows
            known = cache[adapter_name] = stamp, rank_rows
        return lora_a, known[1]

    def factors_and_scaling(self, adapter_name: str) -> Factors:
        """Return an adapter's factors and scaling.

        The factors have the shapes used in adapter files. Hooks of the adapter's modules are not
        run. The scaling is a tensor on the device of the parameter.
        """
        lora_a, lora_b, _ = self._factors(adapter_name)
        scaling = self.__dict__["_scaling"].tensors[adapter_name].to(self.parameter.device)
        return Factors(lora_a, lora_b, scaling)

    # -------------------------------------------------------------------------------- merging

    def _weight_and_bias_to_merge(self) -> tuple[MergeTarget, torch.Tensor | None]:
        weight = self.parameter
        plain = type(weight) is nn.Parameter and weight.is_floating_point() and weight.itemsize >= 2
        if not plain:
            raise UnsupportedLayerError(
                f"cannot merge into {self.parameter_name!r} of a "
                f"{type(self.get_base_layer()).__name__}: it is not a plain floating-point tensor"
            )
        if not weight.is_contiguous():
            return DenseMergeTarget(weight, self.view_as_stack), None
        # As a matrix, so that fingerprints are computed from few rows at a time.
        shape = weight.shape
        return DenseMergeTarget(
            weight.detach().flatten(0, -2), lambda matrix: self.view_as_stack(matrix.view(shape))
        ), None

    @torch.no_grad()
    def _add_delta_weight(
        self,
        weight: torch.Tensor,
        adapter_name: str,
        sign: float,
        dora_row_scale: torch.Tensor | None = None,
    ) -> None:
        """Add an adapter's delta weight to a weight in place, or subtract it if ``sign < 0``.

        The delta weight is ``scaling * B @ A``. The weight is a stack of matrices ``[E, N, K]``,
        which are changed one by one. ``dora_row_scale`` is always None here, because adapters on
        parameters do not use DoRA.
        """
        factors = rank_row_views(*self._factors(adapter_name)[:2], self.num_matrices)
        compute = torch.promote_types(torch.float32, weight.dtype)
        alpha = sign * float(self.scaling[adapter_name])
        for matrix, lora_a, lora_b in zip(weight, *factors, strict=True):
            wide = matrix.to(compute)  # A matrix that is wide already is not copied.
            wide.addmm_(lora_b.t().to(compute), lora_a.to(compute), alpha=alpha)
            if wide is not matrix:
                matrix.copy_(wide)

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """Return an adapter's delta weight ``scaling * B @ A``.

        The delta weight has the parameter's shape and the factors' dtype, and is as large as the
        parameter.
        """
        self._check_has_adapter(adapter_name)
        factor = self.lora_B[adapter_name].weight
        delta = torch.zeros_like(self.parameter, dtype=factor.dtype, device=factor.device)
        self._add_delta_weight(self.view_as_stack(delta), adapter_name, 1.0)
        return delta.requires_grad_(False)

    def adapted(self, adapters: Sequence[Factors]) -> torch.Tensor:
        """Return the sum of the parameter and the adapters' updates.

        The sum is rounded once, to the parameter's dtype. ``adapters`` contains the factors of each
        adapter.
        """
        parameter: torch.Tensor = self.parameter
        wide = torch.promote_types(torch.float32, parameter.dtype)
        with disable_autocast_on(parameter.device):
            made = self.view_as_stack(parameter.to(wide))
            for each in adapters:
                lora_a, lora_b = rank_row_views(each.lora_a, each.lora_b, self.num_matrices)
                made = torch.baddbmm(
                    made, lora_b.transpose(1, 2).to(wide) * each.scaling, lora_a.to(wide)
                )
            if parameter.dim() == 3 and is_transposed(self.get_base_layer()):
                made = made.transpose(1, 2)
            return made.reshape(parameter.shape).to(parameter.dtype)


class FastLoraAdaptedParameters(BaseUnfusedLoraLayer):
    """LoRA layer for a module whose parameters have adapters.

    This class is also the base class of the LoRA layer for stacked experts.

    Args:
        base_layer: The module.

    Attributes:
        parameters_with_adapters: Maps the name of a parameter to the layer with its adapters.
    """

    fallback_reason = "it runs with each adapted parameter replaced by the parameter and its update"

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer, 0, 0)
        self.parameters_with_adapters = nn.ModuleDict()

    def inner_layers(self) -> dict[str, LoraLayer]:
        """Return the LoRA layers nested in this layer, by parameter name.

        The layers are the `ParameterLoraLayer` layers. The result is a dict in the order of
        ``named_parameters()``.
        """
        layers: Any = self._modules["parameters_with_adapters"]
        return {name: layers[name] for name in self.base_layer._parameters if name in layers}

    def adapted_parameters(self) -> list[ParameterLoraLayer]:
        """Return a list of `ParameterLoraLayer` layers, one for each parameter with adapters."""
        return list(self.inner_layers().values())  # type: ignore[arg-type]

    def _layers_to_adapt(
        self, settings: Mapping[str, object]
    ) -> list[tuple[LoraLayer, dict[str, Any]]]:
        """Return the layers to adapt, each with its own settings for the adapter.

        There is one LoRA layer for each parameter that the new adapter adapts. Layers that do not
        exist yet are created. The settings of a layer are the arguments for adding the adapter to
        the layer. See `LoraLayer._layers_to_adapt`.
        """
        common = {name: value for name, value in settings.items() if name != "parameters"}
        parameters: Any = settings["parameters"]
        if not parameters:
            raise UnsupportedLayerError(
                "other adapters use target_parameters to adapt parameters of this "
                f"{type(self.base_layer).__name__}; expected the same kind of target for all "
                "adapters"
            )
        layers = self.get_or_add_parameter_layers([name for name, *_ in parameters])
        return [
            (layer, {**common, "r": r, "lora_alpha": lora_alpha})
            for layer, (_, r, lora_alpha) in zip(layers, parameters, strict=True)
        ]

    def get_or_add_parameter_layers(self, names: Sequence[str]) -> list[ParameterLoraLayer]:
        """Add LoRA layers for the named parameters, and return the layers.

        Existing layers are kept. The list contains the layers of all named parameters, whether or
        not this call added them.

        Raises:
            UnsupportedLayerError: The name of a parameter cannot be used.
        """
        holder: Any = self.parameters_with_adapters
        for name in names:
            if name not in holder:
                if hasattr(nn.ModuleDict, name):
                    raise UnsupportedLayerError(
                        f"parameter {name!r} of a {type(self.base_layer).__name__} has the same "
                        "name as an attribute of nn.ModuleDict, so its adapters cannot be stored "
                        "under this name; rename the parameter"
                    )
                made = ParameterLoraLayer(self.base_layer, name)
                made._active_adapters, made._disabled = list(self._active_adapters), self._disabled
                holder[name] = made
        return [holder[name] for name in names]

    def file_names(self, adapter_name: str) -> dict[str, str]:
        layers = {n: layer for n, layer in self.inner_layers().items() if adapter_name in layer.r}
        names: dict[str, str] = {}
        for name, prefix in file_prefixes_by_parameter(list(layers)).items():
            for disk, key in layers[name].file_names(adapter_name).items():
                names[prefix + disk] = f"parameters_with_adapters.{name}.{key}"
        return names

    def _create_factors(
        self, r: int, lora_bias: bool, start: AdapterInitializer
    ) -> dict[str, parts.Factor]:
        raise UnsupportedLayerError(
            f"this {type(self.base_layer).__name__} has adapters on its parameters; use "
            "target_parameters to select the parameters to which a new adapter applies"
        )

    def _check_has_adapter(self, adapter_name: str) -> None:
        if not self._has_adapter(adapter_name):
            known = sorted({n for layer in self.inner_layers().values() for n in layer.r})
            raise AdapterNotFoundError(
                f"the parameters of this layer have no adapter named {adapter_name!r}; available "
                f"adapters: {known}"
            )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        # The parameters are converted before the layers that compare them with their merged state.
        merged = [layer for layer in self.adapted_parameters() if layer._unmerged is not None]
        for layer in merged:
            if not layer._is_base_layer_unmodified_since_merge():
                layer._unmerged = None  # unmerge() will subtract the updates.
            layer._when_merged = []
        super()._apply(fn, recurse)
        for layer in merged:
            layer._when_merged = (
                [] if layer._unmerged is None else layer._weight_and_bias_fingerprints()
            )
        return self

    # -------------------------------------------------------------------------------- forward

    def _check_parameters_not_sharded(self) -> None:
        """Raise `AdapterStateError` if a parameter of the module is sharded.

        A sharded parameter is a DTensor.
        """
        for name, parameter in self.base_layer._parameters.items():
            if is_dtensor(parameter):
                raise AdapterStateError(
                    f"parameter {name!r} is sharded (a DTensor) in the forward pass; call "
                    "fully_shard() on a module that contains the parameter's adapters, so that the "
                    "parameter is gathered"
                )

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Call the module with the adapters' updates added to its parameters.

        In a mixed batch, each row uses its own adapter. In any other batch, all rows use the active
        adapters.
        """
        routing = None if self._disabled else active_routing(self)
        applied = {} if routing is not None else self._parameters_with_adapters_for_all_rows()
        if routing is None and not applied:
            return self.base_layer(x, *args, **kwargs)
        conditions = self._check_mode_is_supported(x)
        self._check_parameters_not_sharded()
        if routing is None:
            return self._run(applied, conditions, x, *args, **kwargs)
        for layer in (self, *self.adapted_parameters()):
            routing.check_gets_all_rows(layer, x, conditions.compiling)
            check_not_merged(layer)
        if routing.captured:
            raise UnsupportedLayerError(
                f"{self._description()} does not support CUDA graphs with the adapters of a pool; "
                "leave its parameters out of the pool, or run without a CUDA graph"
            )
        if conditions.compiling and routing.source.loaded_adapters is not None:
            # The adapters of the batch are not known in the graph, which breaks here.
            return torch.compiler.disable(self.forward)(x, *args, **kwargs)
        if conditions.compiling:
            return self._run_mixed(routing.whole or routing, conditions, x, *args, **kwargs)
        slots = [slot for slot, name in enumerate(routing.names) if name]
        with routing.pause_row_order_tracking():
            if any(self._factors_in_slot(routing, slot) for slot in slots):
                made = self._run_mixed(routing, conditions, x, *args, **kwargs)
            else:
                made = self.base_layer(x, *args, **kwargs)
        y, *others = _as_tuple(made)
        if routing.unused_gradients and torch.is_grad_enabled():
            for layer in self.adapted_parameters():
                call = MixedCall(layer, x, x, conditions, routing)
                y = attach_unused_parameters(call, y, may_sync=True)
        return y if isinstance(made, torch.Tensor) else (y, *others)

    def _parameters_with_adapters_for_all_rows(self) -> dict[str, list[str]]:
        """Return a dict that maps parameter names to the adapters that apply to all rows.

        Parameters without such adapters are left out.
        """
        found = {name: layer._applied_adapters() for name, layer in self.inner_layers().items()}
        return {name: names for name, names in found.items() if names}

    def _run(
        self,
        applied: Mapping[str, list[str]],
        conditions: ExecutionMode,
        x: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Run the module with the given adapters applied.

        ``applied`` maps the name of each parameter to the adapters applied to it.
        """
        layers: Any = self._modules["parameters_with_adapters"]
        factors = {
            n: [layers[n].factors_and_scaling(a) for a in names] for n, names in applied.items()
        }
        base, tensors = self.base_layer, self._parameters_with_factors_applied(factors, x)
        # The compiler does not support modules that are created during the call.
        if conditions.compiling:
            return torch.func.functional_call(base, tensors, (x, *args), kwargs)
        return call_with_parameters(base, tensors, x, *args, **kwargs)

    def _parameters_with_factors_applied(
        self, factors: Mapping[str, Sequence[Factors]], x: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Add LoRA updates to parameters of the module, and return the results as a dict.

        The parameters themselves are not changed. ``factors`` maps the name of each parameter to
        the factors of the adapters applied to it. ``x`` is the module's input.
        """
        layers: Any = self._modules["parameters_with_adapters"]
        for name in factors:
            if layers[name].parameter.is_meta and not x.is_meta:
                raise UnsupportedLayerError(
                    f"{self._description()} cannot run, because its parameter {name!r} is on the "
                    "meta device; load the module onto a real device, and do not offload it"
                )
        return {name: layers[name].adapted(given) for name, given in factors.items()}

    def _call_without_forward_hooks(
        self, factors: Mapping[str, Sequence[Factors]], x: torch.Tensor
    ) -> Any:
        """Call the module with its adapted parameters, without running its forward hooks.

        The module's forward pre-hooks do not run either. ``factors`` maps the name of each adapted
        parameter to the factors of the adapters applied to it.
        """
        base, tensors = self.base_layer, self._parameters_with_factors_applied(factors, x)
        if has_replaced_forward_that_cannot_be_copied(base):
            if base._forward_hooks or base._forward_pre_hooks:
                raise UnsupportedLayerError(
                    f"{self._description()} has forward hooks and a replaced forward method, so it "
                    "does not support mixed batches; run one adapter at a time"
                )
            return call_with_parameters(base, tensors, x)
        made = copy_with_parameters(base, tensors)
        made.__dict__.update(_forward_hooks=OrderedDict(), _forward_pre_hooks=OrderedDict())
        return made(x)

    def _run_mixed(
        self,
        routing: Routing,
        conditions: ExecutionMode,
        x: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Run the module on a mixed batch.

        This implementation runs the module separately for each adapter's rows. The module's forward
        hooks and forward pre-hooks run once, with the whole batch. The layer for experts overrides
        this method, and sorts the rows instead.
        """

        def run(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            return self._run_separately(routing, conditions, x, *args, **kwargs)

        if conditions.compiling:
            return run(x, *args, **kwargs)  # Raises.
        return _copy_with_forward(self.base_layer, run)(x, *args, **kwargs)

    def _run_separately(
        self,
        routing: Routing,
        conditions: ExecutionMode,
        x: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Run the module separately for each adapter's rows.

        Returns the combined outputs of these runs. The module's forward hooks do not run. Each row
        along the first dimension of x uses at most one adapter. An output must have the same number
        of rows for each row of x. The outputs have the rows in the order of x.
        """
        count = routing.ids.numel()
        if (
            conditions.compiling
            or args
            or kwargs
            or x.dim() < 2
            or not ids_divide_rows(len(x), count)
        ):
            raise UnsupportedLayerError(
                f"{self._description()} cannot run once per adapter on a mixed batch: "
                "such runs require a single input with one row per sample or token, and are not "
                "supported under torch.compile; run one adapter at a time"
            )
        if not len(x):
            return self._call_without_forward_hooks({}, x)
        rows = routing.sorted_rows(len(x), x.device, check_ids_now=True)
        spans = [*rows.segments, Segment(-1, int(rows.slot_start[-1]), len(x))]
        if len(rows.segments) == 1 and not rows.has_rows_without_slot:
            own = self._factors_in_slot(routing, rows.segments[0].slot)
            return self._call_without_forward_hooks(own, x)
        with torch.no_grad():
            whole = self._call_without_forward_hooks({}, x)
        shapes = [(t.shape[0] / len(x), *t.shape[1:]) for t in _as_tuple(whole)]
        outputs: list[tuple[torch.Tensor, ...]] = []
        for slot, start, stop in (span for span in spans if span.start < span.stop):
            own = {} if slot < 0 else self._factors_in_slot(routing, slot)
            own_x = x[rows.order[start:stop].long()]
            made = _as_tuple(self._call_without_forward_hooks(own, own_x))
            if [(t.shape[0] / (stop - start), *t.shape[1:]) for t in made] != shapes:
                raise UnsupportedLayerError(
                    f"{self._description()} does not return the same number of output rows for "
                    "each input row, so it does not support mixed batches; run one adapter at a "
                    "time"
                )
            outputs.append(tuple(t.unflatten(0, (stop - start, -1)) for t in made))
        combined = [
            torch.cat(each)[rows.inverse_order].flatten(0, 1) for each in zip(*outputs, strict=True)
        ]
        return combined[0] if isinstance(whole, torch.Tensor) else tuple(combined)

    def _factors_in_slot(self, routing: Routing, slot: int) -> dict[str, list[Factors]]:
        """Return each parameter's factors for the adapter in a slot.

        The result is a dict that maps each parameter's name to a list with one entry, which is the
        parameter's `Factors`. Parameters that the adapter does not adapt are left out.
        """
        found = ((n, routing.source.factors(own, slot)) for n, own in self.inner_layers().items())
        return {name: [factors] for name, factors in found if factors is not None}

    def _description(self) -> str:
        checks = None if self.routing_group is None else self.routing_group.row_checks
        name = "" if checks is None else f" {checks.name_of(self)!r}"
        adapted = ", ".join(map(repr, self.inner_layers()))
        return f"module{name} ({type(self.base_layer).__name__}, target_parameters {adapted})"


def _copy_with_forward(module: nn.Module, forward: Callable[..., Any]) -> nn.Module:
    """Return a copy of a module with a different ``forward`` method.

    The copy runs the module's forward hooks and forward pre-hooks. It has no backward hooks,
    because the modules that ``forward`` calls have them.
    """
    made = copy_with_parameters(module, {})
    made.__dict__.update(
        forward=forward,
        _backward_hooks=OrderedDict(),
        _backward_pre_hooks=OrderedDict(),
    )
    return made


def _as_tuple(outputs: torch.Tensor | Iterable[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Return a module's outputs as a tuple of tensors."""
    return (outputs,) if isinstance(outputs, torch.Tensor) else tuple(outputs)


def file_prefixes_by_parameter(parameter_names: Sequence[str]) -> dict[str, str]:
    """Return a dict that maps each of a module's adapted parameters to its prefix in adapter files.

    The prefixes are relative to the module.

    Args:
        parameter_names: The adapted parameters, in the order of ``named_parameters()``.
    """
    last = len(parameter_names) - 1
    return {name: "base_layer." * (last - place) for place, name in enumerate(parameter_names)}


def parameter_adapter_shapes(module: nn.Module, settings: LayerAdapterSettings) -> TensorShapes:
    """Return the shapes of an adapter's tensors for the adapted parameters of a module.

    The tensors are lora_A and lora_B for each parameter in ``settings.parameters``. The result is a
    dict that is keyed by the factors' names in adapter files.
    """
    prefixes = file_prefixes_by_parameter([each.name for each in settings.parameters])
    shapes: TensorShapes = {}
    for name, r, _ in settings.parameters:
        count, n, k = shape_as_stack(module, name)
        for key, shape in linear_adapter_shapes(k, n, LayerAdapterSettings(r=r * count)).items():
            shapes[prefixes[name] + key] = shape
    return shapes


def check_parameter_settings(module: nn.Module, settings: LayerAdapterSettings) -> None:
    """Raise `UnsupportedLayerError` if the settings are not supported for a parameter."""
    for name, *_ in settings.parameters:
        for field, value in (("use_dora", settings.use_dora), ("lora_bias", settings.lora_bias)):
            if value:
                raise UnsupportedLayerError(
                    f"{field}=True is not supported for the parameter {name!r}, which is selected "
                    f"by target_parameters (PEFT has the same restriction); set {field}=False"
                )
        if settings.init_lora_weights not in _INITS and not settings.from_file:
            raise UnsupportedLayerError(
                f"init_lora_weights={settings.init_lora_weights!r} is not supported for the "
                f"parameter {name!r}, which is selected by target_parameters; use True, False, or "
                "'gaussian'"
            )


register_layer_kind(
    LayerKind(
        "modules with adapted parameters",
        lambda module: True,
        FastLoraAdaptedParameters,
        parameter_adapter_shapes,
        check_parameter_settings,
        uses_dropout=False,
        adapts_parameters=True,
    )
)

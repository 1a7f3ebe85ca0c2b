"""LoRA layers that call their base layer unchanged and run in PyTorch, without Triton kernels.

`BaseAdditiveLoraLayer` adds adapters one by one to the module's output. In a mixed batch, each
adapter runs on its own samples.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from fastlora.layers.dora_norms import adapted_squared_norms
from fastlora.layers.fallback_reasons import FusionStatus
from fastlora.layers.lora_layer import LoraLayer
from fastlora.layers.mixed_dispatch import check_not_merged
from fastlora.layers.scalings import Scalings
from fastlora.ops.execution_mode import ExecutionMode, execution_mode_of
from fastlora.ops.torch.dora import dora_scale
from fastlora.routing.active import active_routing, is_capturing_cuda_graph
from fastlora.routing.ids import ids_divide_rows
from fastlora.routing.routing import Routing, has_active_dropout
from fastlora.validation import ImplementationError, UnsupportedLayerError
from fastlora.weights_version import WeightsVersion, weights_versions


class BaseUnfusedLoraLayer(LoraLayer):
    """Base class of unfused LoRA layers.

    An unfused layer calls its base layer unchanged and uses no Triton kernels. Attributes that the
    layer lacks are looked up on the base layer, because models read, for example, the stride of a
    convolution.

    Args:
        base_layer: The module.
        in_features, out_features: K and N of the weight as a matrix ``[N, K]``.
    """

    base_layer: Any
    is_linear = False
    runs_kernels = False  # Whether Triton kernels compute a part of the layer.
    fallback_reason = "it is computed with PyTorch operations"

    def __init__(self, base_layer: nn.Module, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.base_layer = base_layer
        self.training = base_layer.training
        self._init_adapters()
        base_layer.requires_grad_(False)

    @property
    def weight(self) -> Any:
        """The base layer's weight."""
        return self.base_layer.weight

    @property
    def bias(self) -> Any:
        """The base layer's bias.

        It is None if the base layer has no bias.
        """
        return getattr(self.base_layer, "bias", None)

    def __getattr__(self, name: str) -> Any:
        """Look up missing attributes on the base layer."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "base_layer" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self._modules["base_layer"], name)

    def fusion(self, gathered: bool = False) -> FusionStatus:
        """Return the fusion status of the layer.

        The status states whether the layer is fused and, if not, the reason. A layer of this
        class is never fused.
        """
        kind = type(self.base_layer).__name__
        return FusionStatus(False, f"its base layer is {kind}: {self.fallback_reason}")

    def _check_mode_is_supported(self, x: torch.Tensor) -> ExecutionMode:
        """Check that the layer supports the execution mode for x, and return that mode.

        The execution mode is determined by `execution_mode_of`.

        Raises:
            ImplementationError: ``impl="triton"`` or the batch-invariant mode requires kernels.
        """
        conditions = execution_mode_of(x, self.impl if self.runs_kernels else "eager")
        if self.impl == "triton" and not self.runs_kernels:
            kind = type(self.base_layer).__name__
            raise ImplementationError(
                f"impl='triton' cannot be used with {kind}: {self.fallback_reason}"
            )
        conditions.raise_if_batch_invariant(self, self.fallback_reason)
        if torch.is_grad_enabled() and not conditions.compiling:
            weights_versions.trained = WeightsVersion()  # An optimizer step may follow.
        return conditions


class BaseAdditiveLoraLayer(BaseUnfusedLoraLayer):
    """Base class of unfused LoRA layers that add the adapters' updates to the base output.

    The updates are added one by one. Besides the methods that `LoraLayer` lists for subclasses, a
    subclass implements `_add_update` and `_count_samples_and_batch_dims`.
    """

    # ------------------------------------------- methods that a layer kind overrides

    def _add_update(
        self,
        name: str,
        x: torch.Tensor,
        y: torch.Tensor,
        conditions: ExecutionMode,
        seed: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Add one adapter's update to y, and return the sum.

        The sum has y's dtype or a wider dtype.

        Args:
            name: The adapter's name.
            x: The input, of all samples or some.
            y: The output for these samples so far.
            conditions: The conditions of the call.
            seed: The seed of the adapter's dropout, int64 ``[]`` on the CPU; None draws from
                torch's generator.
        """
        raise UnsupportedLayerError(f"{type(self).__name__} does not implement _add_update()")

    def _count_samples_and_batch_dims(self, x: torch.Tensor) -> tuple[int, int]:
        """Return the number of samples in x and the number of batch dimensions.

        The batch dimensions are the leading dimensions of x that index the samples.
        """
        raise UnsupportedLayerError(
            f"{type(self).__name__} does not implement _count_samples_and_batch_dims()"
        )

    # ------------------------------------------------------------------------------------ forward

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Call the base layer, and add the adapters' updates to its output."""
        y: torch.Tensor = self.base_layer(x, *args, **kwargs)
        routing = None if self._disabled else active_routing(self)
        names = self._applied_adapters() if routing is None else []
        if routing is None and not names:
            return y
        conditions = self._check_mode_is_supported(x)
        if routing is not None:
            routing.check_gets_all_rows(self, x, conditions.compiling)
            with (
                contextlib.nullcontext()
                if conditions.compiling
                else routing.pause_row_order_tracking()
            ):
                return self._add_mixed_updates(routing, x, y, conditions)
        made = y
        for name in names:
            made = self._add_update(name, x, made, conditions)
        return made.to(y.dtype)

    def _add_mixed_updates(
        self, routing: Routing, x: torch.Tensor, y: torch.Tensor, conditions: ExecutionMode
    ) -> torch.Tensor:
        """Add the adapters' updates for a mixed batch to y.

        Samples may use different adapters. Each sample gets the update that its own adapter
        computes.
        """
        check_not_merged(self)
        m, dims = self._count_samples_and_batch_dims(x)
        count = routing.ids.shape[0]
        one_id_per_row = m == count and not routing.cache.ids_are_per_sample
        if not one_id_per_row and not ids_divide_rows(x.shape[0] if dims else 1, count):
            raise ValueError(
                f"{type(self).__name__} for {type(self.base_layer).__name__} got an input of "
                f"shape {tuple(x.shape)} in a batch with {count} adapter ids; expected one id "
                "per sample along the first dimension, or one per token. If this layer is a "
                "position embedding, which has no sample dimension, remove it from target_modules"
            )
        flat_x = x.reshape(m, *x.shape[dims:])
        flat_y = y.reshape(m, *y.shape[dims:])
        if conditions.compiling or is_capturing_cuda_graph(x):
            made = self._add_updates_by_mask(routing.whole or routing, flat_x, flat_y, conditions)
        else:
            made = self._add_updates_by_segment(routing, flat_x, flat_y, conditions)
        return made.reshape(y.shape)

    def _add_updates_by_segment(
        self, routing: Routing, x: torch.Tensor, y: torch.Tensor, conditions: ExecutionMode
    ) -> torch.Tensor:
        """Add the adapters' updates to y segment by segment.

        Each adapter runs only on its own samples, which form a segment. The host waits for the
        adapter ids if they are on a GPU.
        """
        rows = routing.sorted_rows(x.shape[0], x.device, check_ids_now=True)
        seeds, number = None, self.routing_index
        if has_active_dropout(self):
            call_number = routing.count_dropout_call(number)
            seeds = routing.layer_dropout_seeds(number, call_number, torch.device("cpu"))
        spans = {routing.names[s.slot]: (s.slot, s.start, s.stop) for s in rows.segments}
        names = [name for name in spans if name in self.r]
        if routing.unused_gradients and torch.is_grad_enabled():
            # These run on no samples, which gives them zeros as gradients.
            names += [name for name in self.r if name not in spans]
        for name in names:
            slot, start, stop = spans.get(name, (None, 0, 0))
            seed = None if seeds is None or slot is None else seeds[slot]
            if 0 < stop - start == x.shape[0]:
                y = self._add_update(name, x, y, conditions, seed).to(y.dtype)
                continue
            index = rows.order[start:stop].long()
            own = x.index_select(0, index), y.index_select(0, index)
            made = self._add_update(name, *own, conditions, seed)
            y = y.index_copy(0, index, made.to(y.dtype))
        return y

    def _add_updates_by_mask(
        self, routing: Routing, x: torch.Tensor, y: torch.Tensor, conditions: ExecutionMode
    ) -> torch.Tensor:
        """Add the adapters' updates to y by mask.

        Every adapter runs on all samples, and a mask selects the samples that have its id. The
        graph of operations does not depend on the values of ids.
        """
        each = x.shape[0] // max(routing.ids.shape[0], 1)
        ids = routing.ids.to(x.device).unsqueeze(1).expand(-1, each).reshape(-1)
        ids = ids.view(-1, *(1,) * (y.dim() - 1))
        made = y
        for slot, name in enumerate(routing.names):
            if name in self.r:
                own = self._add_update(name, x, y, conditions).to(y.dtype)
                made = torch.where(ids == slot, own, made)
        return made

    # --------------------------------------------------------------------------------------- parts

    def _apply_dropout(
        self, dropout: nn.Module, x: torch.Tensor, seed: torch.Tensor | None
    ) -> torch.Tensor:
        """Apply dropout to x, and return the result.

        If dropout is not active, x itself is returned. With a seed, an adapter drops the same
        elements of its samples whatever else is in the batch.
        """
        if isinstance(dropout, nn.Identity):
            return x
        if type(dropout) is not nn.Dropout or seed is None or not dropout.training:
            dropped: torch.Tensor = dropout(x)
            return x if isinstance(dropout, nn.Dropout) and not dropout.training else dropped
        keep = torch.ops.fastlora.lora_keep(x, seed, dropout.p, None)
        return torch.where(keep.bool(), x, 0.0) * (1.0 / (1.0 - dropout.p))

    def _scaling_on_device_of(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return an adapter's scaling as a scalar tensor on the device of ``tensor``.

        The result is fp64 if ``tensor`` is, otherwise fp32.
        """
        dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
        scalings: Scalings = self.__dict__["_scaling"]
        return scalings.tensors[name].to(tensor.device, dtype).reshape(())

    def _dora_scale(self, name: str, conditions: ExecutionMode) -> torch.Tensor | None:
        """Return an adapter's DoRA scale.

        The scale g ``[N]`` is in fp32. Returns None for an adapter without DoRA.
        """
        if name not in self.lora_magnitude_vector:
            return None
        lora_a, lora_b = self._factors_for_dora_norm(name)
        compiling = conditions.compiling
        scaling = self._scaling_on_device_of(name, lora_a) if compiling else self.scaling[name]
        squares = adapted_squared_norms(self, lora_a, lora_b, scaling, compiling)
        return dora_scale(self._local_magnitude(name), squares)


def call_with_parameters(
    module: nn.Module, tensors: Mapping[str, torch.Tensor], *args: Any, **kwargs: Any
) -> Any:
    """Call a module with some of its parameters replaced by the given tensors.

    Returns the result of the call, as `torch.func.functional_call` does. A copy of the module is
    called, so that other threads do not see the replacement. Plain attributes that the call sets on
    the copy are set on the module, too. If ``forward`` was replaced by a function that cannot be
    copied, the parameters are replaced in place during the call.
    """
    if has_replaced_forward_that_cannot_be_copied(module):
        return torch.func.functional_call(module, dict(tensors), args, kwargs)
    copied = copy_with_parameters(module, tensors)
    before = dict(copied.__dict__)
    result = copied(*args, **kwargs)
    for name, value in copied.__dict__.items():
        if name not in before or before[name] is not value:
            module.__dict__[name] = value
    return result


def has_replaced_forward_that_cannot_be_copied(module: nn.Module) -> bool:
    """Return whether a module's ``forward`` was replaced by a function that cannot be copied.

    A ``forward`` that was replaced on the instance is copied by binding it to a copy of the module.
    Binding is possible only if the replacement is a method of the module, or a `functools.partial`
    that has the module among its positional arguments.
    """
    forward = module.__dict__.get("forward")
    return forward is not None and _method_or_partial_bound_to(forward, module, module) is None


def copy_with_parameters(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """Return a copy of a module with some parameters replaced by tensors.

    The copy is shallow. The original is not changed, so other threads do not see the replacement.
    A ``forward`` that was replaced on the instance is bound to the copy, and one that was compiled
    in place is not compiled in the copy.
    """
    made = object.__new__(type(module))
    made.__dict__.update(module.__dict__)
    made.__dict__["_parameters"] = {**module._parameters, **tensors}
    made.__dict__["_compiled_call_impl"] = None
    for name in ("forward", "_old_forward"):  # accelerate's hooks set both.
        bound = _method_or_partial_bound_to(module.__dict__.get(name), module, made)
        if bound is not None:
            made.__dict__[name] = bound
    for name in tensors:  # FSDP stores gathered weights here.
        made.__dict__.pop(name, None)
    return made


def _method_or_partial_bound_to(
    function: object, module: nn.Module, copied: nn.Module
) -> Callable[..., Any] | None:
    """Return a copy of ``function`` that is bound to ``copied`` instead of ``module``.

    If ``function`` is a method of ``module``, the result is the same method of ``copied``. If
    ``function`` is a `functools.partial` that has ``module`` among its positional arguments,
    ``copied`` replaces ``module`` in the result. Otherwise, the result is None.
    """
    if isinstance(function, types.MethodType) and function.__self__ is module:
        return types.MethodType(function.__func__, copied)
    if isinstance(function, functools.partial) and any(a is module for a in function.args):
        own = [copied if each is module else each for each in function.args]
        return functools.partial(function.func, *own, **function.keywords)
    return None

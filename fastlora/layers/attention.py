"""`FastLoraMultiheadAttention`: an `nn.MultiheadAttention` with adapters.

``in_proj_weight [3E, E]`` and ``out_proj.weight [E, E]`` each have an adapter, of the same name and
rank. The attention module reads both weights and does not call linear layers. A forward pass
therefore replaces each weight by ``weight + scaling * lora_B @ lora_A``, computed anew each time.
Gradients flow into the factors, and the module's own weights are not written to.

Shapes and file names follow PEFT 0.21.2, ``tuners/lora/layer.py`` (`MultiheadAttention`):
``lora_A``, ``lora_B`` and ``base_layer.out_proj.lora_A``, ``.lora_B``. PEFT merges and unmerges in
every forward pass, and merges out_proj's adapter twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastlora.layers import parts
from fastlora.layers.adapter_init import AdapterInitializer
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
from fastlora.layers.unfused import (
    BaseUnfusedLoraLayer,
    call_with_parameters,
    copy_with_parameters,
    has_replaced_forward_that_cannot_be_copied,
)
from fastlora.layers.wrapped import FastLoraWrapper
from fastlora.ops.execution_mode import disable_autocast_on
from fastlora.routing.active import active_routing
from fastlora.validation import UnsupportedLayerError

_FALLBACK_REASON = (
    "nn.MultiheadAttention uses its weights without calling a linear layer, so PyTorch adds the "
    "update to the weights"
)
_OUT = "base_layer.out_proj"


class MultiheadAttentionOutProjection(FastLoraWrapper):
    """LoRA layer for the out_proj of an `nn.MultiheadAttention`.

    The attention module reads the weight of out_proj and never calls out_proj itself.
    """

    is_linear = False

    def fusion(self, gathered: bool = False) -> FusionStatus:
        """Return the fusion status of the layer.

        The status states whether this projection of the attention module is fused and, if not, the
        reason. A fused layer computes the base GEMM and the LoRA update in one call. A layer of
        this class is never fused.
        """
        return FusionStatus(False, _FALLBACK_REASON)


class FastLoraMultiheadAttention(BaseUnfusedLoraLayer):
    """LoRA layer for an `nn.MultiheadAttention`.

    The module may also be an instance of a subclass.

    Args:
        base_layer: The attention module. Its out_proj is replaced by a LoRA layer until `release`.

    Attributes:
        lora_A: Maps an adapter name to a linear module with weight ``[R, E]``.
        lora_B: Maps an adapter name to a linear module with weight ``[3E, R]``.
    """

    fallback_reason = _FALLBACK_REASON
    parameter_name = "in_proj_weight"  # The parameter that the layer's own adapters change.

    def __init__(self, base_layer: nn.MultiheadAttention) -> None:
        super().__init__(base_layer, base_layer.embed_dim, 3 * base_layer.embed_dim)
        base_layer.out_proj = MultiheadAttentionOutProjection(base_layer.out_proj)  # type: ignore[assignment]

    @property
    def _qkv_same_embed_dim(self) -> bool:
        """The attribute of `nn.MultiheadAttention` with this name, which PyTorch reads.

        `nn.MultiheadAttention` sets the attribute to True if q, k, and v have the same dimension.
        If no adapter applies, the value is that of the base layer's attribute, which is True for
        every supported module. If an adapter applies, the value is False.

        In evaluation mode, `nn.TransformerEncoderLayer` may read the base weights itself only if
        the attribute is True. The value False makes the encoder layer call this layer. Otherwise,
        the encoder layer would ignore the adapters.
        """
        return not self._applied_adapters() and not self._out()._applied_adapters()

    def _out(self) -> FastLoraWrapper:
        out: FastLoraWrapper = self._modules["base_layer"]._modules["out_proj"]
        return out

    def inner_layers(self) -> dict[str, LoraLayer]:
        """Return the LoRA layers inside the attention module, by relative name.

        The returned dict contains the LoRA layer of out_proj. The adapters of in_proj belong to
        this layer itself.
        """
        return {_OUT: self._out()}

    def release(self) -> nn.Module:
        """Release the attention module from this layer, and return the module.

        The module's original out_proj is restored. The module is the base layer, and it replaces
        this layer when the adapters are removed.
        """
        base = self.base_layer
        if isinstance(base.out_proj, LoraLayer):
            base.out_proj = base.out_proj.release()
        return self.base_layer

    def _create_factors(
        self, r: int, lora_bias: bool, start: AdapterInitializer
    ) -> dict[str, parts.Factor]:
        # PEFT draws the first adapter's out_proj factors twice, before and after these.
        if not self.r:
            self._out()._create_factors(r, lora_bias, start)
        return super()._create_factors(r, lora_bias, start)

    def _weight_and_bias_to_merge(self) -> tuple[MergeTarget, torch.Tensor | None]:
        weight, bias = self.base_layer.in_proj_weight, self.base_layer.in_proj_bias
        if type(weight) is not nn.Parameter or not weight.is_floating_point():
            raise UnsupportedLayerError(
                f"cannot merge into {type(self.base_layer).__name__}: its in_proj_weight is not a "
                "plain floating-point matrix"
            )
        return DenseMergeTarget(weight), bias

    def forward(self, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the attention module with the active adapters applied.

        The adapters' updates are added to the module's weights for this call.
        """
        routing = None if self._disabled else active_routing(self)
        if routing is not None and any(name in self.r for name in routing.names):
            raise UnsupportedLayerError(
                "the rows of a batch cannot use different adapters on a "
                f"{type(self.base_layer).__name__}, as in PEFT, because all rows share its "
                "weight; run one adapter at a time, or remove the module from target_modules"
            )
        own, inner = self._applied_adapters(), self._out()._applied_adapters()
        if routing is not None or not (own or inner):
            return self.base_layer(query, *args, **kwargs)
        conditions = self._check_mode_is_supported(query)
        base = self.base_layer
        weight = _add_lora_updates(self, base.in_proj_weight, own)
        out_weight = _add_lora_updates(self._out(), self._out().weight, inner)
        weights = {"in_proj_weight": weight, "out_proj.base_layer.weight": out_weight}
        # The compiler does not support modules that are created during the call.
        if conditions.compiling:
            return torch.func.functional_call(base, weights, (query, *args), kwargs)
        if has_replaced_forward_that_cannot_be_copied(base):
            return call_with_parameters(base, weights, query, *args, **kwargs)
        out = copy_with_parameters(self._out().get_base_layer(), {"weight": out_weight})
        stand_in = copy_with_parameters(base, {"in_proj_weight": weight})
        stand_in._modules = {**base._modules, "out_proj": out}
        return stand_in(query, *args, **kwargs)


def _add_lora_updates(layer: LoraLayer, weight: torch.Tensor, names: list[str]) -> torch.Tensor:
    """Add the LoRA updates of the named adapters to a projection weight of an attention module.

    Returns the sum, which is rounded once to the weight's dtype. The weight is ``[N, K]`` and is
    not changed.
    """
    if not names:
        return weight
    wide = torch.promote_types(torch.float32, weight.dtype)
    with disable_autocast_on(weight.device):
        made = weight.to(wide)
        for name in names:
            lora_a, lora_b, _ = layer._factors(name)
            scaling = layer.__dict__["_scaling"].tensors[name].to(weight.device)
            made = torch.addmm(made, lora_b.to(wide) * scaling, lora_a.to(wide))
        return made.to(weight.dtype)


def _shapes(module: nn.Module, settings: LayerAdapterSettings) -> TensorShapes:
    base: Any = module
    e = base.embed_dim
    shapes = linear_adapter_shapes(e, 3 * e, settings)
    inner = linear_adapter_shapes(e, e, settings)
    return shapes | {f"{_OUT}.{name}": shape for name, shape in inner.items()}


def _check(module: nn.Module, settings: LayerAdapterSettings) -> None:
    base: Any = module
    if not base._qkv_same_embed_dim:
        raise UnsupportedLayerError(
            "its queries, keys, and values have different sizes "
            f"(embed_dim={base.embed_dim}, kdim={base.kdim}, vdim={base.vdim}); expected equal "
            "sizes (PEFT has the same restriction)"
        )
    if not isinstance(base.out_proj, nn.Linear) and not isinstance(base.out_proj, LoraLayer):
        raise UnsupportedLayerError(
            f"out_proj must be an nn.Linear, got a {type(base.out_proj).__name__} (PEFT has the "
            "same restriction)"
        )
    for field, value in (("use_dora", settings.use_dora), ("lora_bias", settings.lora_bias)):
        if value:
            raise UnsupportedLayerError(
                f"{field}=True is not supported for nn.MultiheadAttention; set {field}=False, or "
                "exclude the module with exclude_modules"
            )


_PEFT_NOTE = (
    "PEFT 0.21.2 adds the update of out_proj twice, but fastlora adds it once. To get PEFT's "
    f"outputs, call set_scale(adapter_name, 2.0) on {_OUT} of the layer"
)
register_layer_kind(
    LayerKind(
        "nn.MultiheadAttention",
        lambda m: isinstance(m, nn.MultiheadAttention),
        FastLoraMultiheadAttention,
        _shapes,
        _check,
        uses_dropout=False,
        peft_note=_PEFT_NOTE,
    )
)

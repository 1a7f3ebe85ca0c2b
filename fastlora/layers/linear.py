"""`FastLoraLinear`: an `nn.Linear` with adapters, which one fused call computes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastlora.layers.base_layers import fallback_reason_not_plain_linear
from fastlora.layers.call import UniformCall
from fastlora.layers.fallback_reasons import FusionStatus, fusion_status
from fastlora.layers.linear_forward import create_call, forward
from fastlora.layers.lora_layer import LoraLayer
from fastlora.layers.merge_target import DenseMergeTarget, MergeTarget
from fastlora.ops.factors import Base
from fastlora.sharding import is_dtensor, raise_if_base_weight_is_dtensor
from fastlora.validation import UnsupportedLayerError

DEFAULT_ADAPTER = "default"


class FastLoraLinear(LoraLayer, nn.Linear):
    """LoRA layer for an `nn.Linear`.

    Computes ``y = x @ weight.T + bias + scaling * dropout(x) @ lora_A.T @ lora_B.T``.

    In every other respect the layer is an `nn.Linear`. ``weight [N, K]`` and ``bias [N]`` keep
    their names and are frozen. The adapter, named ``"default"``, is trainable.

    Args:
        in_features: K.
        out_features: N.
        bias: Whether the base layer has a bias.
        r: Rank of the first adapter.
        lora_alpha: Numerator of the first adapter's scaling.
        lora_dropout: Probability in [0, 1) of dropping an element of the adapter's input.
        use_rslora: Whether to scale by ``lora_alpha / sqrt(r)``.
        lora_bias: Whether lora_B has a bias.
        use_dora: Whether to scale each output by a trained magnitude; see `LoraLayer.add_adapter`.
        init_lora_weights: Initialization method; see `LoraLayer.add_adapter`.
        init_config: Settings of the initialization method; see `LoraLayer.add_adapter`.
        device: Device of all parameters.
        dtype: Dtype of all parameters.

    Raises:
        ConfigError: A value is out of range.
        InitializationError: The initialization does not support the rank, or lacks data.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        lora_bias: bool = False,
        use_dora: bool = False,
        init_lora_weights: bool | str = True,
        init_config: object | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, bias, device=device, dtype=dtype)
        self._init_adapters()
        self._freeze_base()
        self.add_adapter(
            DEFAULT_ADAPTER,
            r=r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            use_rslora=use_rslora,
            lora_bias=lora_bias,
            use_dora=use_dora,
            init_lora_weights=init_lora_weights,
            init_config=init_config,
        )
        self.set_adapter(DEFAULT_ADAPTER)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, *, adapter_name: str | None = DEFAULT_ADAPTER, **adapter: Any
    ) -> FastLoraLinear:
        """Create a LoRA layer from an `nn.Linear`.

        By default, a new adapter is added. The layer shares the weight and bias of ``linear``,
        which become frozen.

        Args:
            linear: A plain `nn.Linear`.
            adapter_name: Name of the first adapter, or None to add no adapter.
            **adapter: ``r``, ``lora_alpha``, and the other arguments of `LoraLayer.add_adapter`.

        Raises:
            UnsupportedLayerError: ``linear`` is not a plain `nn.Linear`.
            ConfigError: A value is out of range.
            InitializationError: The initialization does not support the rank or the weight, or
                lacks data. ``linear`` is unchanged after any of these errors.
        """
        reason = fallback_reason_not_plain_linear(linear)
        if reason:
            raise UnsupportedLayerError(
                "from_linear expects a plain nn.Linear; a LoRA layer created from this module "
                f"could not be fused: {reason}"
            )
        self = cls._from_linear_without_adapter(linear)
        if adapter_name is not None:
            self.add_adapter(adapter_name, **adapter)
            self.set_adapter(adapter_name)
        self._freeze_base()
        return self

    @classmethod
    def _from_linear_without_adapter(cls, linear: nn.Linear) -> FastLoraLinear:
        """Create a LoRA layer from an `nn.Linear`, without an adapter yet.

        The layer shares the weight and bias of ``linear``, which are not frozen.
        """
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = linear.weight
        # Register a bias of None too, because forward() looks for "bias" among the parameters.
        self.register_parameter("bias", linear.bias)
        self.training = linear.training
        # Not a submodule: `to_linear` returns this very module once the adapters are removed.
        self.__dict__["_linear"] = (linear,)
        self._init_adapters()
        return self

    def to_linear(self) -> nn.Linear:
        """Return a plain `nn.Linear` with the layer's current weight and bias.

        The `nn.Linear` is the base layer without adapters. The weight and the bias are shared with
        this layer, and are not copied. If this layer was created from an `nn.Linear`, that module
        is returned.

        Raises:
            UnsupportedLayerError: The weight or bias is computed from other parameters.
        """
        self._check_release()
        (linear,) = self.__dict__.get("_linear", (None,))
        if linear is None:
            linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight, linear.bias = self.weight, self.bias
        return linear.train(self.training)

    def release(self) -> nn.Module:
        """Release the base layer from this layer, and return it.

        The base layer is a plain `nn.Linear`. It replaces this layer when the adapters are removed.
        """
        return self.to_linear()

    def _check_release(self) -> None:
        """Check that this layer can release its base layer.

        The base layer is released as a plain `nn.Linear`, which must be able to hold the layer's
        weight and bias.

        Raises:
            UnsupportedLayerError: The weight or bias is computed from other parameters.
        """
        self._check_weight_and_bias_are_parameters("return this layer's nn.Linear")

    def _check_weight_and_bias_are_parameters(self, action: str) -> None:
        """Check that the weight and bias are parameters of this layer.

        Raises `UnsupportedLayerError` if the weight or bias is computed from other parameters, by a
        parametrization or by pruning. The message states that ``action`` is not possible.
        """
        for name in ("weight", "bias"):
            if name not in self._parameters:
                raise UnsupportedLayerError(
                    f"cannot {action}: its {name} is computed from other parameters "
                    "(by a parametrization or by pruning); first call "
                    "torch.nn.utils.parametrize.remove_parametrizations or "
                    "torch.nn.utils.prune.remove"
                )

    def _freeze_base(self) -> None:
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the layer's output for x, with the active adapters applied.

        The output is ``[..., N]`` for ``x [..., K]``. In a mixed batch, each row uses its own
        adapter or none.
        """
        call = create_call(self, x)
        # Read `_parameters` directly: an attribute lookup on a module takes a microsecond.
        weight: Any = self._parameters.get("weight")
        if type(weight) is nn.Parameter and "bias" in self._parameters:
            bias = self._parameters["bias"]
        else:
            raise_if_base_weight_is_dtensor(self)
            weight, bias = self.weight, self.bias
        if isinstance(call, UniformCall) and not call.names:
            reason = (
                "no adapter is active; for rows without an adapter, pass None in "
                "fastlora.adapters()"
            )
            call.conditions.raise_if_batch_invariant(self, reason)
            return F.linear(x, weight, bias)
        if not call.conditions.tracing and x.shape[-1] != self.in_features:
            raise ValueError(f"x has shape {tuple(x.shape)}, expected [..., {self.in_features}]")
        return forward(call, Base(weight, bias))

    def _fusable_base(self) -> Base | None:
        weight: Any = self._parameters.get("weight")
        return Base(weight, self.bias) if type(weight) is nn.Parameter else None

    def get_base_layer(self) -> nn.Module:
        """Return the base layer, as PEFT's method of this name does.

        This layer contains the base weight, so it is its own base layer and is returned. The
        property `base_layer` is the base `nn.Linear` without the adapters.
        """
        return self

    @property
    def base_layer(self) -> nn.Linear:
        """The base `nn.Linear`, without the adapters.

        The `nn.Linear` shares this layer's weight and bias. If the layer was created from an
        `nn.Linear`, the value is that module. Otherwise, the value is a new `nn.Linear`. The
        attribute's name is PEFT's.
        """
        return self.to_linear()

    def _modules_that_may_hold_calibration_results(self) -> list[nn.Module]:
        """Return the modules on which calibration results may be stored.

        A calibration stores its result as an attribute of the calibrated module. The list contains
        the layer and, if the layer was created from an `nn.Linear`, also that `nn.Linear`.
        """
        return [self, *self.__dict__.get("_linear", ())]

    def fusion(self, gathered: bool = False) -> FusionStatus:
        """Return whether the layer's forward pass is fused and, if not, the reason.

        A fused layer computes the base GEMM and the LoRA update in one call.

        Args:
            gathered: Whether FSDP2 replaces the layer's shards with plain parameters during the
                forward pass.
        """
        if is_dtensor(self._parameters.get("weight")) and not gathered:
            return FusionStatus(False, "its base weight is sharded (a DTensor) and is not gathered")
        return fusion_status(self, self._applied_adapters(), "", gathered)

    def _weight_and_bias_to_merge(self) -> tuple[MergeTarget, torch.Tensor | None]:
        if is_dtensor(self._parameters.get("weight")):
            raise UnsupportedLayerError(
                "cannot merge into this layer: its weight is sharded (a DTensor); save the adapter "
                "and merge it into an unsharded base model"
            )
        self._check_weight_and_bias_are_parameters("merge into this layer")
        if type(self.weight) is not nn.Parameter:
            raise UnsupportedLayerError(
                f"cannot merge into this layer: its weight is a {type(self.weight).__name__}, "
                "expected a plain nn.Parameter; restore the original weight first"
            )
        return DenseMergeTarget(self.weight), self.bias

    def extra_repr(self) -> str:
        """Return the extra text for the layer's repr.

        The text of `nn.Linear.extra_repr` is followed by the ranks and the active adapters.
        """
        return f"{nn.Linear.extra_repr(self)}, r={self.r}, active={self._active_adapters}"

"""Properties of base layers, such as their features, hooks, sharding, and dense weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from fastlora.layers.merge_target import DenseMergeTarget, MergeTarget
from fastlora.layers.quantized import UNREFERENCED_OUTPUT_MODULES, quantized_weight_of
from fastlora.sharding import is_dtensor
from fastlora.validation import UnsupportedLayerError

# How tensor parallelism splits a linear layer: along N, or along K.
COLUMN_PARALLEL, ROW_PARALLEL = "column-parallel", "row-parallel"


def linear_features(module: nn.Module) -> tuple[int, int] | None:
    """Return ``(in_features, out_features)`` of a linear layer.

    Returns None if the module is not a linear layer. A module counts as a linear layer, and is
    called linear-like, if it has the attributes ``in_features`` and ``out_features``. Examples are
    `nn.Linear` and the quantized linear layers of bitsandbytes, torchao, GPTQ, and others. Hugging
    Face's Conv1D, which has a weight ``[K, N]``, counts as a linear layer too.
    """
    weight = getattr(module, "weight", None)
    if type(module).__name__ == "Conv1D" and isinstance(weight, torch.Tensor):
        k, n = weight.shape
        return int(k), int(n)
    features = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(features[0], int) and isinstance(features[1], int):
        return features[0], features[1]
    return None


def fallback_reason_not_plain_linear(module: nn.Module, gathered: bool = False) -> str:
    """Return the reason why a module does not count as a plain `nn.Linear`.

    The reason is an empty string if the module is plain. Set ``gathered`` if FSDP2 replaces shards
    with plain parameters during the forward pass.

    The weight of a plain module can be used without calling the module. A module that is not plain
    must be called if, for example, it is an instance of a subclass or has a parametrization, a
    forward hook (such as a hook with which accelerate offloads weights), or a replaced ``forward``.
    """
    if type(module) is not nn.Linear:
        return f"its base layer is {type(module).__name__}, which the kernels do not support"
    reason = fallback_reason_hooked(module)
    if reason:
        return reason
    if module._state_dict_hooks or module._load_state_dict_pre_hooks:
        return "its base layer has state-dict hooks"
    if len(module._parameters) != 2 or module._buffers or module._modules:
        return "its base layer has more than a weight and a bias"
    if type(module.weight) is not nn.Parameter and not (gathered and is_dtensor(module.weight)):
        return f"its base weight is a {type(module.weight).__name__}"
    if not module.weight.is_floating_point() or module.weight.itemsize < 2:
        return f"its base weight is {module.weight.dtype}"
    return ""


def fallback_reason_hooked(module: nn.Module) -> str:
    """Return the fallback reason if a module has hooks.

    In a fallback, the module is called, so that its hooks run. The result is an empty string if the
    module has no hooks. A replaced ``forward`` counts as a hook.
    """
    if "forward" in module.__dict__:
        return "its base layer's forward was replaced"
    if module._forward_hooks or module._forward_pre_hooks:
        return "its base layer has forward hooks"
    if module._backward_hooks or module._backward_pre_hooks:
        return "its base layer has backward hooks"
    return ""


def factor_reference(base: nn.Module) -> torch.Tensor | None:
    """Return a reference tensor with the device and dtype for new factors.

    Returns None if the base layer has no such tensor. New factors should then have the default
    device and dtype. The tensor is usually one of the base layer's parameters. As in PEFT, new
    factors use the ``compute_dtype`` of a base layer that has one (bitsandbytes' 4-bit layers,
    HQQ). For a base layer with a ``compute_dtype``, the tensor is an empty tensor of this dtype.
    """
    own = list(base.parameters(recurse=False))
    compute = getattr(base, "compute_dtype", None)
    if own and isinstance(compute, torch.dtype) and compute.is_floating_point:
        return torch.empty(0, dtype=compute, device=own[0].device)
    for parameter in own:
        if parameter.is_floating_point() and parameter.itemsize >= 2:
            return parameter  # fp8 and packed integers cannot train.
    return None


def is_tensor_parallel(module: nn.Module) -> bool:
    """Return whether a module is tensor-parallel.

    The weight of such a module is sharded by tensor parallelism. The result does not depend on
    whether adapters support the sharding.
    """
    split = getattr(module, "_distribute_module_applied", False)
    return bool(split) and is_dtensor(module._parameters.get("weight"))


def tensor_parallel_style(module: nn.Module) -> str | None:
    """Return the tensor-parallel style of a module (column-parallel or row-parallel).

    The result is `COLUMN_PARALLEL` or `ROW_PARALLEL`, or None if the module is not tensor-parallel.

    Raises:
        UnsupportedLayerError: Adapters do not support the way in which the weight is split.
    """
    weight: Any = module._parameters.get("weight")
    if not is_tensor_parallel(module):
        return None
    if type(module) is nn.Linear and weight.device_mesh.ndim == 1:
        (placement,) = weight.placements
        if placement.is_shard() and weight.shape[placement.dim] < weight.device_mesh.size():
            raise UnsupportedLayerError(
                "LoRA needs a shard of the weight in every process, got a weight of shape "
                f"{tuple(weight.shape)} with placement {placement} over {weight.device_mesh}"
            )
        if placement.is_shard(0):
            return COLUMN_PARALLEL
        if placement.is_shard(1):
            return ROW_PARALLEL
    raise UnsupportedLayerError(
        "with tensor parallelism, LoRA supports only an nn.Linear that ColwiseParallel or "
        "RowwiseParallel has sharded over a one-dimensional device mesh, got a "
        f"{type(module).__name__} with placements {weight.placements} over {weight.device_mesh}"
    )


def keeps_no_reference_to_output(module: nn.Module) -> bool:
    """Return whether a linear-like module keeps no reference to its output.

    The result is True only for classes that are known to return a new tensor. The output may be
    overwritten only if the module keeps no reference to it.
    """
    kind = type(module)
    # The name has the form that `qualified_class_name` returns.
    return (
        kind is nn.Linear or f"{kind.__module__}.{kind.__qualname__}" in UNREFERENCED_OUTPUT_MODULES
    )


def merge_target_of(module: nn.Module, expected_shape: tuple[int, int]) -> MergeTarget:
    """Return the `MergeTarget` for the weight of a linear-like module.

    Args:
        module: The base layer.
        expected_shape: N and K.

    Raises:
        UnsupportedLayerError: The weight does not support merging.
    """
    found = quantized_weight_of(module)
    if found is not None:
        found.check_writable()
        return found
    weight: Any = getattr(module, "weight", None)
    transposed = type(module).__name__ == "Conv1D"
    plain = type(weight) is nn.Parameter and weight.is_floating_point() and weight.itemsize >= 2
    if not plain or tuple(weight.t().shape if transposed else weight.shape) != expected_shape:
        raise UnsupportedLayerError(
            f"cannot merge into {type(module).__name__}: its weight is neither a plain "
            "floating-point matrix nor a weight quantized by bitsandbytes or torchao; dequantize "
            "the base model first"
        )
    return DenseMergeTarget(weight, torch.t if transposed else None)


def dense_weight(
    module: object, purpose: str = "DoRA needs the base weight to compute its norm"
) -> torch.Tensor:
    """Return the weight of a linear-like module as a dense matrix.

    The matrix is ``[N, K]``. A quantized weight is dequantized. The supported modules are
    `nn.Linear` and its subclasses, transformers' Conv1D (as a view of its transposed weight), and
    the kinds in `fastlora.layers.quantized`.

    Args:
        module: The base layer.
        purpose: The purpose of reading the weight, which begins the error message.

    Raises:
        UnsupportedLayerError: The module's weight is of none of these kinds.
    """
    base: Any = module
    own = base._parameters.get("weight") if isinstance(base, nn.Module) else None
    if type(own) is nn.Parameter and type(base).__name__ != "Conv1D" and _is_dense(own):
        return own  # Return early: this runs in every forward pass.
    found = quantized_weight_of(base)
    if found is not None:
        return found.dense()
    weight: Any = getattr(base, "weight", None)
    kind = type(weight).__name__
    if not isinstance(weight, torch.Tensor) or not _is_dense(weight):
        raise UnsupportedLayerError(
            f"{purpose}, but the weight of this {type(base).__name__} is "
            f"{'missing' if weight is None else f'a {kind} with dtype {weight.dtype}'}; expected a "
            "floating-point matrix or a weight quantized by bitsandbytes, HQQ, or torchao"
        )
    return weight.t() if type(base).__name__ == "Conv1D" else weight


def stores_weight_transposed(module: nn.Module) -> bool:
    """Return whether a module stores its weight transposed.

    A linear-like module that does so stores its weight as ``[K, N]``.
    """
    return type(module).__name__ == "Conv1D"


def reason_weight_not_replaceable(module: nn.Module, allow_quantized: bool) -> str:
    """Return the reason why a module's weight cannot be replaced.

    Returns an empty string if it can be replaced. If ``allow_quantized`` is set, a quantized weight
    can be replaced by quantizing the new values.

    Raises:
        UnsupportedLayerError: ``allow_quantized`` is set, but the weight's kind of quantization
            does not support it.
    """
    found = quantized_weight_of(module)
    if found is not None and allow_quantized:
        found.check_writable()
        return ""
    weight: Any = module._parameters.get("weight")
    if type(weight) is not nn.Parameter or not _is_dense(weight):
        if weight is None:
            return (
                f"this {type(module).__name__} has no weight of its own (the weight is computed, "
                "or has another name); choose another init_lora_weights, or exclude the module "
                "(exclude_modules)"
            )
        return (
            f"the weight of this {type(module).__name__} is a {type(weight).__name__} with dtype "
            f"{weight.dtype}; initialize the adapter on the model in float32, float16, or "
            "bfloat16, and quantize the model afterward"
        )
    return ""


def replace_weight_data(module: nn.Module, weight: torch.Tensor) -> None:
    """Replace the data of a module's weight with the given values.

    The module is linear-like, and the new data is ``[N, K]``. The parameter remains the same
    object, and its dtype and layout stay the same. A dense weight gets new memory, because other
    code may refer to its old memory. A quantized weight is quantized again, possibly in the same
    memory. See `reason_weight_not_replaceable`.
    """
    found = quantized_weight_of(module)
    if found is not None:
        found.write(weight)
        return
    own: Any = module.weight
    laid_out = weight.t() if stores_weight_transposed(module) else weight
    own.data = laid_out.to(own.device, own.dtype).contiguous()


def make_weight_restorer(module: nn.Module, save_on_cpu: bool) -> Callable[[], None]:
    """Save a module's current weight, and return a function that restores it.

    The returned function restores the saved values bit for bit. The values of a quantized weight
    are saved as a copy on the weight's device. If ``save_on_cpu`` is set, the values of a dense
    weight on an accelerator are copied to the CPU, for models that do not fit on the accelerator
    twice. If ``save_on_cpu`` is not set, the values of a dense weight need no copy: the function
    keeps the weight's current memory, which `replace_weight_data` does not overwrite.
    """
    found = quantized_weight_of(module)
    if found is not None:
        copied = found.snapshot()

        def put_back() -> None:
            found.restore(copied)

        return put_back
    own: Any = module._parameters.get("weight")
    if own is None:
        return lambda: None  # `reason_weight_not_replaceable` gives the reason.
    where, saved = own.device, own.data.cpu() if save_on_cpu and not own.is_meta else own.data

    def restore() -> None:
        own.data = saved.to(where)

    return restore


def _is_dense(weight: torch.Tensor) -> bool:
    # torch.export replaces parameters with FakeTensors.
    known = type(weight) in (nn.Parameter, torch.Tensor, FakeTensor)
    return known and weight.dim() == 2 and weight.is_floating_point() and weight.itemsize >= 2

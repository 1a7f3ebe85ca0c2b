"""Distributed training with adapters, for cases that torch.distributed does not support.

DDP and FSDP2 (`fully_shard`) accept models with adapters unchanged; docs/distributed.md describes
how to use them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from fastlora.layers import FastLoraLinear, LoraLayer
from fastlora.layers.base_layers import tensor_parallel_style
from fastlora.layers.tensor_parallel import TensorParallelLoraLinear
from fastlora.model import LoraModel
from fastlora.model.base_modules import named_modules_outside_adapters
from fastlora.sharding import clip_grads_with_norm_, total_norm
from fastlora.validation import AdapterStateError


def clip_grad_norm_(parameters: Iterable[torch.Tensor], max_norm: float) -> torch.Tensor:
    """Clip the gradients of parameters by their total norm, and return the norm.

    Plain tensors and DTensors may be mixed. The gradients are clipped as by
    `torch.nn.utils.clip_grad_norm_`. If there are DTensors, every process must call this function.

    Args:
        parameters: The parameters with the gradients to clip. Parameters without a gradient are
            ignored.
        max_norm: The maximum norm of all gradients together.

    Returns:
        The norm of all gradients before clipping, a scalar tensor.

    Raises:
        ValueError: max_norm is not positive, or no parameter has a gradient.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm must be greater than 0, got {max_norm}")
    chosen = [parameter for parameter in parameters if parameter.grad is not None]
    if not chosen:
        raise ValueError("no parameter has a gradient; call backward() first")
    norm = total_norm([p.grad for p in chosen if p.grad is not None])
    clip_grads_with_norm_(chosen, max_norm, norm)
    return norm


def tensor_parallel(model: LoraModel, device_mesh: Any, plan: dict[str, Any]) -> LoraModel:
    """Apply tensor parallelism in place to a model that already has adapters.

    The adapters are sharded together with their base layers.
    `torch.distributed.tensor.parallel.parallelize_module` cannot shard a LoRA layer. This function
    is not needed if ``parallelize_module`` is applied to the base model before any adapter is
    added, because `fastlora.get_peft_model` then creates sharded adapters.

    Args:
        model: A model with adapters. It must be the same in every process.
        device_mesh: A one-dimensional device mesh.
        plan: The ``parallelize_plan`` of ``parallelize_module``, with the module names of the base
            model as keys.

    Returns:
        ``model``.

    Raises:
        AdapterStateError: An adapter is merged.
        UnsupportedLayerError: A layer is sharded in a way that adapters do not support. The model
            may then be partly sharded and must be created again.
    """
    from torch.distributed.tensor.parallel import parallelize_module

    base = model.get_base_model()
    layers = {
        n: m for n, m in named_modules_outside_adapters(base) if isinstance(m, FastLoraLinear)
    }
    for name, layer in layers.items():
        if layer.merged:
            raise AdapterStateError(f"{name!r} has merged adapters; call unmerge_adapter() first")
    try:
        for name, layer in layers.items():
            base.set_submodule(name, layer.to_linear())
        parallelize_module(base, device_mesh, plan)
        split = {
            name: _move_adapters_to_sharded_layer(base.get_submodule(name), m)
            for name, m in layers.items()
        }
    except BaseException:
        for name, layer in layers.items():
            base.set_submodule(name, layer)
        raise
    for name, module in split.items():
        base.set_submodule(name, module)
    model.base_model._routed = None
    return model


def _move_adapters_to_sharded_layer(base_layer: nn.Module, layer: FastLoraLinear) -> LoraLayer:
    """Move a layer's adapters to a LoRA layer that wraps the sharded base layer.

    Returns the LoRA layer, which is a new `TensorParallelLoraLinear`. If the base layer is not
    sharded, ``layer`` itself is returned.
    """
    if tensor_parallel_style(base_layer) is None:
        return layer
    split = TensorParallelLoraLinear(base_layer)
    split.move_adapters_from(layer)
    return split

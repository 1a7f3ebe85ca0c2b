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
from fastlora.layers.bases import parallel_style
from fastlora.layers.tensor_parallel import TensorParallelLora
from fastlora.model import LoraModel
from fastlora.model.walk import outer_modules
from fastlora.sharding import clip_with_norm_, total_norm
from fastlora.validation import AdapterStateError


def clip_grad_norm_(parameters: Iterable[torch.Tensor], max_norm: float) -> torch.Tensor:
    """Clip gradients as `torch.nn.utils.clip_grad_norm_` does, also with DTensors among them.

    Plain tensors and DTensors may be mixed. Every process must call this function.

    Args:
        parameters: Parameters to clip. Those without a gradient are skipped.
        max_norm: Largest norm of the gradients.

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
    clip_with_norm_(chosen, max_norm, norm)
    return norm


def tensor_parallel(model: LoraModel, device_mesh: Any, plan: dict[str, Any]) -> LoraModel:
    """Shard a model that already has adapters, together with the adapters, in place.

    `torch.distributed.tensor.parallel.parallelize_module` cannot shard a LoRA layer. If it shards
    the base model first, this function is not needed: `fastlora.get_peft_model` then adds sharded
    adapters.

    Args:
        model: A model with adapters, equal in every process.
        device_mesh: A one-dimensional device mesh.
        plan: As for ``parallelize_module``, by module names of the base model.

    Returns:
        ``model``.

    Raises:
        AdapterStateError: An adapter is merged.
        UnsupportedLayerError: A layer is sharded in a way that adapters do not support. The model
            may then be partly sharded and must be created again.
    """
    from torch.distributed.tensor.parallel import parallelize_module

    base = model.get_base_model()
    layers = {n: m for n, m in outer_modules(base) if isinstance(m, FastLoraLinear)}
    for name, layer in layers.items():
        if layer.merged:
            raise AdapterStateError(f"{name!r} has merged adapters; call unmerge_adapter() first")
    try:
        for name, layer in layers.items():
            base.set_submodule(name, layer.to_linear())
        parallelize_module(base, device_mesh, plan)
        split = {name: _split_like(base.get_submodule(name), m) for name, m in layers.items()}
    except BaseException:
        for name, layer in layers.items():
            base.set_submodule(name, layer)
        raise
    for name, module in split.items():
        base.set_submodule(name, module)
    model.base_model._routed = None
    return model


def _split_like(linear: nn.Module, layer: FastLoraLinear) -> LoraLayer:
    """Return a LoRA layer with the adapters of ``layer``, over a base layer that may be sharded."""
    if parallel_style(linear) is None:
        return layer
    split = TensorParallelLora(linear)
    split.take_adapters(layer)
    return split

"""Adapters over several processes: what torch.distributed does not know about LoRA layers.

DDP and FSDP2 (`fully_shard`) take models with adapters as they are; docs/distributed.md says how.
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
    """`torch.nn.utils.clip_grad_norm_` where some parameters are DTensors and some are not.

    Every process must call it.

    Args:
        parameters: Those without a gradient are left out.
        max_norm: Norm to clip to.

    Returns:
        The norm of all gradients before clipping, without dimensions.

    Raises:
        ValueError: max_norm is not positive, or there is no gradient.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm is {max_norm}, expected more than 0")
    chosen = [parameter for parameter in parameters if parameter.grad is not None]
    if not chosen:
        raise ValueError("no parameter has a gradient, expected a backward before")
    norm = total_norm([p.grad for p in chosen if p.grad is not None])
    clip_with_norm_(chosen, max_norm, norm)
    return norm


def tensor_parallel(model: LoraModel, device_mesh: Any, plan: dict[str, Any]) -> LoraModel:
    """Splits a model that has adapters already, in place, and its adapters along.

    `torch.distributed.tensor.parallel.parallelize_module` cannot split a LoRA layer. A base model
    that it has split takes adapters through `fastlora.get_peft_model` without this function.

    Args:
        model: With adapters; every process has the same.
        device_mesh: Of one dimension.
        plan: As for ``parallelize_module``, by module names of the base model.

    Raises:
        AdapterStateError: An adapter is merged.
        UnsupportedLayerError: A layer is split in a way that adapters cannot follow: the model may
            then be split in part, build it anew.
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
    """Returns a layer over a base layer that may have been split since it was this one's."""
    if parallel_style(linear) is None:
        return layer
    split = TensorParallelLora(linear)
    split.take_adapters(layer)
    return split

"""Plain linears in place of quantised ones, one after the other."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fastlora.layers.base import LoraLayer
from fastlora.layers.bases import dense_weight, linear_features
from fastlora.layers.quantised import quantised
from fastlora.validation import UnsupportedLayerError

# What transformers notes on a quantised model, beside `quantization_config` in its config.
_MARKS = ("hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit")


def dense_dtype(model: nn.Module) -> torch.dtype:
    """Returns what a model's linears are in once they are dequantised.

    That of its first parameter that is not quantised, which is what its layers hand on; else what
    its first quantised linear computes in.
    """
    linears = [module for module in model.modules() if is_quantised(module)]
    codes = {id(module._parameters.get("weight")) for module in linears}
    for parameter in model.parameters():
        wide = parameter.is_floating_point() and parameter.itemsize >= 2
        if wide and id(parameter) not in codes:
            return parameter.dtype
    own: Any = linears[0] if linears else None
    weight: Any = getattr(own, "weight", None)
    compute = getattr(own, "compute_dtype", None) or getattr(weight, "dtype", None)
    return compute if compute is not None and compute.is_floating_point else torch.float32


def is_quantised(module: object) -> bool:
    """Returns whether a module is itself a linear over a quantised weight."""
    if not isinstance(module, nn.Module) or linear_features(module) is None:
        return False
    own = module._parameters.keys() & {"weight", "W_q"}  # HQQ's; what wraps one has none of its own
    return bool(own) and quantised(module) is not None


@contextlib.contextmanager
def as_if_plain(layer: nn.Module, with_values: bool) -> Iterator[None]:
    """For checks: inside, the base layer of an adapted one is plain; without values, on no device.

    Raises:
        UnsupportedLayerError: It is quantised in a way that nobody knows.
    """
    own: Any = getattr(layer, "base_layer", None)
    if not (isinstance(layer, LoraLayer) and is_quantised(own)):
        yield
        return
    layer.base_layer = _plain(own, torch.float32 if with_values else None)
    try:
        yield
    finally:
        layer.base_layer = own


def make_plain(layer: nn.Module) -> bool:
    """Gives an adapted layer over a quantised linear a plain one in fp32; says whether it did.

    What is merged into it is taken out before, where that gives the codes back exactly, and merged
    again behind it.
    """
    own: Any = getattr(layer, "base_layer", None)
    if not (isinstance(layer, LoraLayer) and is_quantised(own)):
        return False
    merged = list(layer.merged_adapters) if layer._unmerged is not None else []
    if merged:
        layer.unmerge()
    layer.base_layer = _plain(own, torch.float32)
    layer.merge_error = None
    if merged:
        layer.merge(adapter_names=merged, keep_base=False)
    return True


def dequantise(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Puts plain linears in the place of every quantised one, and takes the notes of it away.

    Returns the model, or the linear that takes its place.
    """
    made: dict[nn.Module, nn.Linear] = {}  # one that has several names keeps them all
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if is_quantised(module):
            if module not in made:
                made[module] = _plain(module, dtype)
            if not name:
                return made[module]
            model.set_submodule(name, made[module])
    own: Any = model
    for name in _MARKS:
        if name in own.__dict__:
            delattr(own, name)
    if hasattr(getattr(own, "config", None), "quantization_config"):
        del own.config.quantization_config
    if hasattr(own, "is_quantized"):
        own.is_quantized = False
    return model


@torch.no_grad()
def _plain(module: nn.Module, dtype: torch.dtype | None) -> nn.Linear:
    """Returns a linear with a module's weight, in ``dtype``; on the meta device for None."""
    k, n = linear_features(module) or (0, 0)
    bias: Any = getattr(module, "bias", None)
    made = nn.Linear(k, n, bias is not None, device="meta").requires_grad_(False)
    if dtype is not None:
        made.weight = nn.Parameter(_wide(module).detach().to(dtype), requires_grad=False)
        if bias is not None:
            made.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=bias.requires_grad)
    return made.train(module.training)


def _wide(module: nn.Module) -> torch.Tensor:
    found = quantised(module)
    if found is not None:
        try:
            return found.wide()
        except UnsupportedLayerError:
            pass  # it can be read, and not written
    return dense_weight(module).float()

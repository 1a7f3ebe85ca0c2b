"""The weight behind a base layer as one dense matrix: what DoRA's norm needs of it."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn

from fastlora.validation import UnsupportedLayerError


def dense_weight(base: Any) -> torch.Tensor:
    """Returns the weight ``[N, K]`` of a linear-like module, dequantised where it is quantised.

    Knows `nn.Linear` and its subclasses, Conv1D of transformers (whose weight is transposed, as a
    view), bitsandbytes' 4-bit and 8-bit linears, HQQ's, and torchao's weights.

    Raises:
        UnsupportedLayerError: The module's weight is of none of these kinds.
    """
    own = base._parameters.get("weight") if isinstance(base, nn.Module) else None
    if type(own) is nn.Parameter and type(base).__name__ != "Conv1D" and _is_dense(own):
        return own  # at once: it is asked in every forward
    if hasattr(base, "W_q") and callable(getattr(base, "dequantize", None)):  # HQQ
        return base.dequantize()
    weight: Any = getattr(base, "weight", None)
    kind = type(weight).__name__
    if kind == "Params4bit":
        functional = importlib.import_module("bitsandbytes.functional")
        if getattr(weight.quant_state, "packing_format_for_cpu", False):
            return _through(base, weight.device)
        return functional.dequantize_4bit(weight.data, weight.quant_state)
    if kind == "Int8Params":
        functional = importlib.import_module("bitsandbytes.functional")
        # The row scales move from the parameter to the module's state with the first forward.
        scales = base.state.SCB if base.state.SCB is not None else weight.SCB
        return functional.int8_vectorwise_dequant(weight.data, scales.to(weight.device))
    if type(weight).__module__.startswith("torchao."):
        return weight.dequantize()
    if not isinstance(weight, torch.Tensor) or not _is_dense(weight):
        raise UnsupportedLayerError(
            f"DoRA needs the base weight for its norm, and that of a {type(base).__name__} is "
            f"{'missing' if weight is None else f'a {kind} of {weight.dtype}'}; expected a "
            "floating-point matrix, or one quantised by bitsandbytes, HQQ or torchao"
        )
    return weight.t() if type(base).__name__ == "Conv1D" else weight


@torch.no_grad()
def _through(base: Any, device: torch.device) -> torch.Tensor:
    """Returns the weight that a layer computes with: what it makes of the unit vectors.

    For 4-bit weights that an evaluation on a CPU has repacked, which cannot be dequantised.
    """
    columns = base(torch.eye(base.in_features, device=device))
    return (columns if base.bias is None else columns - base.bias).t()


def _is_dense(weight: torch.Tensor) -> bool:
    known = type(weight) in (nn.Parameter, torch.Tensor)
    return known and weight.dim() == 2 and weight.is_floating_point() and weight.itemsize >= 2

"""Small models over quantized linears, and the same over the matrices that these stand for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from fastlora.layers.base_layers import dense_weight
from tests.support.tiny import Gated

# Those that kernels read, by the loader that does.
QUANTIZED = {
    "nf4": "table4",
    "nf4 nested": "table4_nested",
    "fp4": "table4",
    "torchao int8": "int8",
    "torchao float8": "float8_e4m3",
    "torchao float8 tensor": "float8_e4m3",
}


def quantize_linear(
    linear: nn.Linear, kind: str, compute_dtype: torch.dtype | None = None
) -> nn.Linear:
    """Returns a linear with a quantized weight of one of these kinds, int8 of bitsandbytes too."""
    if kind.startswith("torchao"):
        library: Any = pytest.importorskip("torchao.quantization")
        configs = {
            "torchao intx": lambda: library.IntxWeightOnlyConfig(weight_dtype=torch.int4),
            "torchao int8": lambda: library.Int8WeightOnlyConfig(version=2),
            "torchao float8": library.Float8WeightOnlyConfig,
            "torchao float8 tensor": library.Float8WeightOnlyConfig,
        }
        made = copy.deepcopy(linear)
        library.quantize_(made, configs[kind]())
        if kind.endswith("tensor"):
            weight: Any = made.weight
            again = type(weight).from_hp(linear.weight.detach(), granularity=library.PerTensor())
            made.weight = nn.Parameter(again, requires_grad=False)
        return made
    library = pytest.importorskip("bitsandbytes").nn
    k, n, bias = linear.in_features, linear.out_features, linear.bias is not None
    if kind == "int8":
        made = library.Linear8bitLt(k, n, bias=bias, has_fp16_weights=False)
    else:
        made = library.Linear4bit(
            *(k, n, bias),
            compute_dtype=compute_dtype or linear.weight.dtype,
            quant_type=kind[:3],
            compress_statistics="nested" in kind,
        )
    made.to(linear.weight.dtype).load_state_dict(linear.state_dict())
    return made.to("cpu")


def gated(kind: str, dtype: torch.dtype = torch.float32, width: int = 64) -> Any:
    """Two linears fed by one tensor and one behind them, all quantized; the same at every call."""
    torch.manual_seed(0)
    model = Gated(width, 2 * width, called=False).to(dtype)
    for name in ("gate", "up", "down"):
        setattr(model, name, quantize_linear(getattr(model, name), kind))
    return loaded_as(kind, model)


def loaded_as(kind: str, model: Any) -> Any:
    """The model with the marks that transformers' loader sets."""
    model.is_loaded_in_8bit, model.is_loaded_in_4bit = kind == "int8", kind[:3] in ("nf4", "fp4")
    return model


def dequantized(model: nn.Module) -> Any:
    """The same model in float64, over plain linears of the very matrices."""
    made = copy.deepcopy(model)
    for name, module in list(made.named_modules()):
        if isinstance(module, nn.Linear) and type(module.weight) is not nn.Parameter:
            plain = nn.Linear(module.in_features, module.out_features, module.bias is not None)
            plain.weight = nn.Parameter(dense_weight(module).detach().double())
            if module.bias is not None:
                plain.bias = nn.Parameter(module.bias.detach().double())
            made.set_submodule(name, plain)
    made.is_loaded_in_8bit = made.is_loaded_in_4bit = False  # type: ignore[assignment]  # as above
    return made.double()


def layers_of(model: nn.Module) -> list[Any]:
    """The LoRA layers of a model."""
    return [module for module in model.modules() if hasattr(module, "lora_A")]


def cached_weight(layer: Any) -> Any:
    """The weight for kernels that a layer has cached, or None."""
    _, _, found = layer._kernel_weights._of
    codes = [] if found is None else [c for c in found[1].values() if not isinstance(c, str)]
    return codes[-1].weight if codes else None

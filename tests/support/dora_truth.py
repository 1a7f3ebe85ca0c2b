"""DoRA in a few lines of plain PyTorch, dense norm and all, and layers to compare with it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from fastlora import FastLoraLinear
from fastlora.layers import FastLoraWrapper
from fastlora.ops.torch import reference

SEED = 1234


class Problem(NamedTuple):
    """The operands of one DoRA linear.

    Attributes:
        x: ``[M, K]``.
        weight: ``[N, K]``.
        bias: ``[N]`` or None.
        lora_a: ``[R, K]``.
        lora_b: ``[N, R]``.
        magnitude: ``[N]``.
    """

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    lora_a: torch.Tensor
    lora_b: torch.Tensor
    magnitude: torch.Tensor

    def to(self, dtype: torch.dtype) -> Problem:
        """The same in another dtype, with gradients wanted for all."""
        return Problem(*(_leaf(t, dtype) for t in self))


def _leaf(tensor: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    return None if tensor is None else tensor.detach().to(dtype).requires_grad_(True)


def make_problem(
    m: int, n: int, k: int, r: int, dtype: torch.dtype, bias: bool = True, seed: int = 0
) -> Problem:
    """Random operands; the update is as large as the weight, and magnitudes are not its norms."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    tensors = (
        rand(m, k),
        rand(n, k),
        rand(n) if bias else None,
        rand(r, k) / r**0.5,
        rand(n, r),
        1.5 * k**0.5 * (1 + 0.3 * rand(n)),
    )
    # Rounded first, so that the truth starts from the very numbers.
    return Problem(*(t if t is None else t.to(dtype) for t in tensors))


def keep_mask(rows: int, k: int, p: float) -> torch.Tensor:
    """Which elements the eager path keeps under `SEED`, over ``1 - p``."""
    ones = torch.ones(rows, k, dtype=torch.float64)
    seed = torch.tensor([SEED])
    return reference.lora_dropout(ones, seed, p)


def dora(problem: Problem, scaling: float, mask: torch.Tensor | None = None) -> torch.Tensor:
    """PEFT's formula, with its detached norm; a row whose norm is 0 gives its bias."""
    x, weight, bias, lora_a, lora_b, magnitude = problem
    norm = (weight + scaling * lora_b @ lora_a).norm(dim=1).detach()
    scale = torch.where(norm == 0, 0.0, magnitude / norm)
    dropped = x if mask is None else x * mask.to(x.dtype)
    update = scaling * (dropped @ lora_a.t()) @ lora_b.t()
    if mask is None:
        y = scale * (x @ weight.t() + update)
    else:
        y = x @ weight.t() + (scale - 1) * (dropped @ weight.t()) + scale * update
    return y if bias is None else y + bias


def fixed_seed(x: torch.Tensor, impl: str) -> torch.Tensor:
    """Takes the place of `ops.draw_dropout_seed`."""
    return torch.tensor([SEED], device=x.device if impl == "triton" else "cpu")


def layer_of(problem: Problem, alpha: float, p: float, wrapped: bool = False) -> Any:
    """A layer that holds the operands, all of them trainable."""
    n, k = problem.weight.shape
    r = problem.lora_a.shape[0]
    linear = nn.Linear(k, n, bias=problem.bias is not None, dtype=problem.weight.dtype)
    options = {"r": r, "lora_alpha": alpha, "lora_dropout": p, "use_dora": True}
    if wrapped:
        layer = FastLoraWrapper(linear)
        layer.add_adapter("default", **options)
        layer.set_adapter("default")
    else:
        layer = FastLoraLinear.from_linear(linear, **options)
    base = layer.get_base_layer()
    with torch.no_grad():
        for parameter, value in zip(parameters_of(layer), problem[1:], strict=True):
            if parameter is not None:
                parameter.copy_(value)
    base.weight.requires_grad_(True)
    if base.bias is not None:
        base.bias.requires_grad_(True)
    return layer


def parameters_of(layer: Any) -> list[nn.Parameter | None]:
    """Weight, bias, lora_A, lora_B, magnitude."""
    base = layer.get_base_layer()
    return [
        base.weight,
        base.bias,
        layer.lora_A["default"].weight,
        layer.lora_B["default"].weight,
        layer.lora_magnitude_vector["default"].weight,
    ]

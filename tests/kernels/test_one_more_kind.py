"""One more kind of quantized base is one class and one loader: a format of two bits, all here.

Nothing else in the package, nor in the tests' support, knows of it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("triton", reason="triton is not installed")

import triton
import triton.language as tl

import fastlora
from fastlora.kernels.weights import (
    Tile,
    WeightLoader,
    load_groups,
    load_tile,
    part,
    register_weight_loader,
    scaled,
)
from fastlora.layers.base_layers import dense_weight
from fastlora.layers.merge_target import Fingerprint, bit_sums
from fastlora.layers.quantized import (
    BaseQuantizedWeight,
    KernelsCannotReadError,
    address_tensor,
    qualified_class_name,
    register_quantized_weight,
)
from fastlora.quantized_tensor import QuantizedData, QuantizedTensor
from fastlora.testing import assert_within_budget
from tests.support.quantized import cached_weight

pytestmark = pytest.mark.usefixtures("on_the_labs_device")
BLOCK = 16


class TwoBits(nn.Module):
    """A linear of two bits a weight: ``(code - 1.5) * scale``, a scale for each 16 along K."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.bias, self.calls = linear.bias, 0
        self.register_buffer("codes", None)
        self.register_buffer("bits", None)  # of the scales, which ``half()`` is to leave alone
        self.store(linear.weight.detach())

    def store(self, weight: torch.Tensor) -> None:
        """Rounds a matrix."""
        blocks = weight.float().reshape(-1, BLOCK)
        scales = blocks.abs().amax(1).clamp(min=1e-8) / 1.5
        codes = (blocks / scales[:, None] + 1.5).round().clamp(0, 3).to(torch.uint8).view(-1, 4)
        shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=codes.device)
        self.codes, self.bits = (
            (codes << shifts).sum(1, dtype=torch.uint8),
            scales.view(torch.int32),
        )

    @property
    def scales(self) -> torch.Tensor:
        """fp32, one of each block."""
        return self.bits.view(torch.float32)

    def matrix(self) -> torch.Tensor:
        """Returns it in fp32."""
        shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=self.codes.device)
        codes = ((self.codes[:, None] >> shifts) & 3).view(-1, BLOCK)
        made = (codes.float() - 1.5) * self.scales[:, None]
        return made.view(self.out_features, self.in_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As `nn.Linear`."""
        self.calls += 1
        return F.linear(x, self.matrix().to(x.dtype), self.bias)


@register_quantized_weight
class TwoBitWeight(BaseQuantizedWeight):
    """Its weight."""

    modules = (qualified_class_name(TwoBits(nn.Linear(BLOCK, 1))),)
    fresh_output = True

    @staticmethod
    def stored_weight_of(module: Any) -> Any:
        return module.codes

    @classmethod
    def matches(cls, module: object) -> bool:
        return isinstance(module, TwoBits)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def compute_dtype(self) -> None:
        return None

    def tensor_dependencies(self) -> Sequence[torch.Tensor]:
        return self.base.codes, self.base.bits

    def read_for_kernels(
        self, dtype: torch.dtype
    ) -> tuple[QuantizedData, tuple[torch.Tensor, ...]]:
        n, k = self.shape
        if k % BLOCK:
            raise KernelsCannotReadError(
                f"blocks of {BLOCK} weights do not divide its {k} in_features"
            )
        codes, scales = self.base.codes, self.base.scales
        return QuantizedData("two bits", codes, address_tensor(scales), n, k, BLOCK), (
            codes,
            scales,
        )

    def dense(self) -> torch.Tensor:
        return self.base.matrix()

    def write(self, dense: torch.Tensor) -> None:
        self.base.store(dense)
        self.weight = self.base.codes

    def snapshot(self) -> object:
        return self.base.codes.clone(), self.base.bits.clone()

    def restore(self, snapshot: Any) -> None:
        self.base.codes, self.base.bits = (part.clone() for part in snapshot)
        self.weight = self.base.codes

    def fingerprint(self) -> Fingerprint:
        return (*bit_sums(self.base.codes), *bit_sums(self.base.bits))


@triton.jit
def load_two_bits(codes_ptr, parts_ptr, tile, DTYPE: tl.constexpr, POLICY: tl.constexpr):
    """Codes: four in a byte, the lowest bits first. Parts: a scale, fp32, of each BLOCK."""
    first, rows, column, row = tile.first_row, tile.num_rows, tile.first_column, tile.num_columns
    BYTES: tl.constexpr = tile.COLUMNS // 4
    EVEN: tl.constexpr = tile.EVEN_COLUMNS
    packed = load_tile(
        codes_ptr,
        Tile(first, column // 4, rows, row // 4, tile.ROWS, BYTES, 1, tile.EVEN_ROWS, EVEN),
        POLICY,
    ).to(tl.int32)
    even, odd = tl.interleave(packed, packed >> 4), tl.interleave(packed >> 2, packed >> 6)
    codes = tl.interleave(even, odd) & 3
    scales = load_groups(part(parts_ptr, 0, tl.float32), tile)
    return scaled(codes.to(tl.float32) - 1.5, scales, DTYPE)


register_weight_loader("two bits", WeightLoader(load_two_bits))


class Gated(nn.Module):
    """Two linears fed by one tensor, and one behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(48, 80), nn.Linear(48, 80)
        self.down = nn.Linear(80, 40, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps ``[..., 48]`` to ``[..., 40]``."""
        return self.down(self.gate(x).tanh() * self.up(x))


def models(dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """A model with two adapters over two bits, and over its matrices in ``dtype`` and float64."""
    torch.manual_seed(0)
    stored = Gated()
    for name in ("gate", "up", "down"):
        setattr(stored, name, TwoBits(getattr(stored, name)))
    plain = Gated()
    for name in ("gate", "up", "down"):
        own: Any = getattr(stored, name)
        getattr(plain, name).weight = nn.Parameter(dense_weight(own))
        if own.bias is not None:
            getattr(plain, name).bias = nn.Parameter(own.bias.detach().clone())
    made: list[Any] = []
    for base in (stored, plain, copy.deepcopy(plain)):
        torch.manual_seed(1)
        config = fastlora.LoraConfig(
            r=4, target_modules=["gate", "up", "down"], init_lora_weights=False
        )
        model: Any = fastlora.get_peft_model(base, config, "a")
        model.add_adapter("b", config)
        made.append(model.double() if len(made) == 2 else model.to(dtype))
    for module in made[0].modules():
        if hasattr(module, "lora_A"):
            module.impl = "triton"
    return made[0], made[1], made[2]


def step(model: Any, x: torch.Tensor, ids: Any) -> list[torch.Tensor]:
    """Output, and the gradients of x and of every factor that has any."""
    x = x.clone().requires_grad_()
    factors = [p.requires_grad_() for n, p in sorted(model.named_parameters()) if "lora_" in n]
    if ids is None:
        y = model(x)
    else:
        with fastlora.adapters(model, ids):
            y = model(x)
    found = torch.autograd.grad(y.pow(2).sum(), [x, *factors], allow_unused=True)
    return [y.detach(), *(torch.zeros(()) if grad is None else grad for grad in found)]


@pytest.mark.parametrize("ids", [None, ["a", None, "b", "b", "a"]], ids=["one", "mixed"])
def test_values_and_gradients(dtype: torch.dtype, ids: Any) -> None:
    """Through the kernels, which decode it; the module is not called."""
    ours, near, exact = models(dtype)
    x = torch.randn(5, 48).to(dtype)
    truth, other = step(exact, x.double(), ids), step(near, x, ids)
    for _ in range(2):
        for results in zip(step(ours, x, ids), other, truth, strict=True):
            assert_within_budget(*results[:2], results[2].double())
    layers = [module for module in ours.modules() if hasattr(module, "lora_A")]
    assert [layer.base_layer.calls for layer in layers] == [0, 0, 0]
    assert all(type(cached_weight(layer)) is QuantizedTensor for layer in layers)
    assert fastlora.fusion_report(ours).fused == 3


@pytest.mark.filterwarnings("ignore:merged into")
def test_all_else() -> None:
    """Without kernels the module is called; it merges, and unmerges to the bit."""
    ours, near, exact = models(torch.float32)
    x, layers = torch.randn(5, 48), [m for m in ours.modules() if hasattr(m, "lora_A")]
    for layer in layers:
        layer.impl = "eager"
    for own, other, truth in zip(
        step(ours, x, None), step(near, x, None), step(exact, x.double(), None), strict=True
    ):
        assert_within_budget(own, other, truth.double())
    assert [layer.base_layer.calls for layer in layers] == [1, 1, 1]
    before = [layer.base_layer.codes.clone() for layer in layers]
    ours.merge_adapter()
    assert not any(map(torch.equal, before, (layer.base_layer.codes for layer in layers)))
    ours.unmerge_adapter()
    assert all(map(torch.equal, before, (layer.base_layer.codes for layer in layers)))
    assert {status.quantization_backend for status in ours.get_layer_status()} == {None}

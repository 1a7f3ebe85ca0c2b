"""DoRA on one layer: values and every gradient, what is refused, what is saved for backward."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastlora import FastLoraLinear
from fastlora.layers import FastLoraWrapper
from fastlora.ops import schema as ops
from fastlora.testing import assert_within_budget
from fastlora.validation import ConfigError, UnsupportedLayerError
from tests.support.dora_truth import (
    dora,
    fixed_seed,
    keep_mask,
    layer_of,
    make_problem,
    parameters_of,
)

peft = pytest.importorskip("peft", reason="compares with PEFT")

NAMES = ("x", "weight", "bias", "lora_a", "lora_b", "magnitude")


def gradients(
    y: torch.Tensor, tensors: list[torch.Tensor | None], dy: torch.Tensor
) -> list[torch.Tensor]:
    """Of those tensors that are there."""
    return list(torch.autograd.grad(y, [t for t in tensors if t is not None], dy.to(y.dtype)))


# ------------------------------------------------------------------------------- values, gradients


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("rslora", [False, True])
def test_one_layer_is_pefts(monkeypatch: pytest.MonkeyPatch, p: float, rslora: bool) -> None:
    """Values and gradients of PEFT's layer, the mask made explicit on both sides."""
    monkeypatch.setattr(ops, "draw_seed", fixed_seed)
    problem = make_problem(19, 24, 20, 4, torch.float32)
    layer = layer_of(problem, 6, p)
    layer.use_rslora["default"] = rslora
    layer.set_scale("default", 1.0)
    config = peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, use_rslora=rslora)
    linear = nn.Linear(20, 24)
    theirs = peft.tuners.lora.Linear(linear, "default", config, r=4, lora_alpha=6)
    if p:

        class Masked(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x * keep_mask(19, 20, p).float()

        theirs.lora_dropout["default"] = Masked()
    with torch.no_grad():
        for mine, other in zip(parameters_of(layer), parameters_of(theirs), strict=True):
            other.copy_(mine)
            other.requires_grad_(True)
    dy = torch.randn(19, 24)
    results = []
    for module in (layer, theirs):
        x = problem.x.detach().requires_grad_(True)
        y = module(x)
        results.append([y.detach(), *gradients(y, [x, *parameters_of(module)], dy)])
    for name, mine, other in zip(("y", *NAMES), *results, strict=True):
        torch.testing.assert_close(mine, other, msg=lambda m, name=name: f"{name}: {m}")
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(problem.x), theirs.eval()(problem.x))


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("hooked", [False, True])
def test_a_hooked_factor_is_called(
    monkeypatch: pytest.MonkeyPatch, wrapped: bool, hooked: bool
) -> None:
    """Where modules must be called the numbers are the same, with dropout too."""
    monkeypatch.setattr(ops, "draw_seed", fixed_seed)
    problem = make_problem(9, 24, 20, 4, torch.float64)
    layer = layer_of(problem, 6, 0.3, wrapped)
    calls = []
    if hooked:
        layer.lora_A["default"].register_forward_hook(lambda *_: calls.append(1))

        class Masked(nn.Dropout):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x * keep_mask(9, 20, 0.3) if self.training else x

        layer.lora_dropout["default"] = Masked(0.3)
    for training in (True, False):
        x = problem.x.detach().requires_grad_(True)
        y = layer.train(training)(x)
        dy = torch.randn(9, 24, dtype=torch.float64)
        operands = problem.to(torch.float64)
        truth = dora(operands, 1.5, keep_mask(9, 20, 0.3) if training else None)
        torch.testing.assert_close(y, truth)
        for mine, other in zip(
            gradients(y, [x, *parameters_of(layer)], dy),
            gradients(truth, list(operands), dy),
            strict=True,
        ):
            torch.testing.assert_close(mine, other)
    assert len(calls) == (2 if hooked else 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_autocast_computes_in_its_dtype(dtype: torch.dtype) -> None:
    """Wider parameters under bf16 autocast: as a bf16 layer, and the norm as that of theirs."""
    problem = make_problem(12, 24, 20, 4, torch.bfloat16)
    layer = layer_of(problem.to(dtype), 6, 0.0)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(problem.x.float())
    assert y.dtype == torch.bfloat16
    same = dora(problem, 1.5)
    truth = dora(problem.to(torch.float64), 1.5)
    assert_within_budget(y.detach(), same, truth)
    y.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == dtype for p in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_zero_row_gives_zero(dtype: torch.dtype) -> None:
    """A row of the adapted weight that is 0 gives 0 and finite gradients, where PEFT gives NaN."""
    problem = make_problem(7, 6, 5, 2, dtype, bias=False)
    problem.weight[2], problem.lora_b[2], problem.magnitude[2] = 0, 0, 0
    problem.magnitude[4] = 0
    for p in (0.0, 0.5):
        layer = layer_of(problem, 2, p)
        x = problem.x.detach().requires_grad_(True)
        y = layer(x)
        if not p:
            assert (y[:, [2, 4]] == 0).all()
        found = gradients(y, [x, *parameters_of(layer)], torch.ones_like(y))
        assert all(bool(torch.isfinite(t).all()) for t in (y, *found))
        assert found[-1][2] == 0 and found[-1][4] != 0


def test_training_starts_at_the_base_layer() -> None:
    """The first magnitude is the norm of each row, as in PEFT, so the layer is its base layer."""
    linear = nn.Linear(20, 24)
    expected = linear(torch.ones(3, 20))
    layer = FastLoraLinear.from_linear(linear, r=4, use_dora=True)
    magnitude = layer.lora_magnitude_vector["default"].weight
    torch.testing.assert_close(magnitude, linear.weight.norm(dim=1))
    assert magnitude.requires_grad and magnitude.dtype == torch.float32
    torch.testing.assert_close(layer(torch.ones(3, 20)), expected)
    random = FastLoraLinear.from_linear(linear, r=4, use_dora=True, init_lora_weights=False)
    weight = linear.weight + random.get_delta_weight("default")
    torch.testing.assert_close(
        random.lora_magnitude_vector["default"].weight.detach(), weight.detach().norm(dim=1)
    )


def test_small_changes_of_a_16_bit_magnitude_count() -> None:
    """g is 1 + 3 * 2**-9 in bf16, where it would be rounded to 1 + 2**-7."""
    layer = FastLoraLinear(64, 2048, bias=False, r=1, use_dora=True, dtype=torch.bfloat16)
    layer.lora_magnitude_vector.float()
    x = torch.randn(256, 64, dtype=torch.bfloat16)
    truth = x.double() @ layer.weight.double().t()
    norms = layer.weight.double().norm(dim=1)
    with torch.no_grad():
        layer.lora_magnitude_vector["default"].weight.copy_(norms * (1 + 3 * 2**-9))
        ratio = (layer(x).double() * truth).sum() / truth.square().sum()
    assert abs(ratio - 1 - 3 * 2**-9) < 2**-11


def test_what_is_refused() -> None:
    """lora_bias beside DoRA, and a weight that cannot be read; nothing has changed then."""
    layer = FastLoraLinear(4, 4)
    with pytest.raises(ConfigError, match="lora_bias=True is not supported for DoRA"):
        layer.add_adapter("a", use_dora=True, lora_bias=True)

    class Opaque(nn.Module):
        in_features = out_features = 4

    wrapper = FastLoraWrapper(Opaque())
    with pytest.raises(UnsupportedLayerError, match="that of a Opaque is missing"):
        wrapper.add_adapter("a", use_dora=True)
    assert list(layer.lora_A) == ["default"] and not wrapper.lora_A and not wrapper.r


# ------------------------------------------------------------------------------- what is saved


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("magnitude_trains", [True, False])
def test_what_is_saved_for_backward(p: float, magnitude_trains: bool) -> None:
    """x, s, parameters, N-sized numbers; and one ``[M, N]`` only where the magnitude trains."""
    m, n, k, r = 64, 24, 20, 4
    layer = layer_of(make_problem(m, n, k, r, torch.float32), 6, p)
    layer.weight.requires_grad_(False)
    layer.bias.requires_grad_(False)
    layer.lora_magnitude_vector.requires_grad_(magnitude_trains)
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    x = torch.randn(m, k)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    known = {x.data_ptr(), *(p.data_ptr() for p in layer.parameters())}
    shapes = [tuple(t.shape) for t in saved if t.data_ptr() not in known and t.numel() > n]
    # s where it is not made again
    assert set(shapes) - {(m, r)} == ({(m, n)} if magnitude_trains else set())
    assert shapes.count((m, n)) == magnitude_trains


def test_second_derivatives_raise() -> None:
    """As for LoRA."""
    layer = layer_of(make_problem(3, 6, 5, 2, torch.float32), 2, 0.0)
    x = torch.randn(3, 5, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()

"""DoRA on one layer: values and every gradient, what is refused, what is saved for backward."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastlora import FastLoraLinear
from fastlora.layers import FastLoraWrapper
from fastlora.ops import schema as ops
from fastlora.testing import assert_within_budget
from fastlora.validation import ConfigError, UnsupportedLayerError
from tests.support.dora_truth import (
    SEED,
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

# Rows, outputs and inputs off the tile, ranks: taken pairwise.
CASES = [
    (0, 33, 20, 3, torch.float32, 0.0),
    (1, 64, 48, 1, torch.float32, 0.0),
    (15, 33, 100, 4, torch.float32, 0.3),
    (16, 130, 72, 16, torch.float32, 0.0),
    (17, 96, 31, 24, torch.bfloat16, 0.0),
    (127, 80, 65, 8, torch.bfloat16, 0.3),
    (2000, 48, 33, 3, torch.bfloat16, 0.0),
    (127, 40, 33, 64, torch.float16, 0.0),
    (16, 48, 65, 8, torch.float16, 0.3),
    (2000, 33, 48, 128, torch.float32, 0.3),
    (17, 20, 31, 8, torch.float64, 0.0),
    (15, 31, 20, 4, torch.float64, 0.3),
]


@pytest.mark.parametrize("layout", ["plain", "strided", "expanded"])
@pytest.mark.parametrize(("m", "n", "k", "r", "dtype", "p"), CASES, ids=str)
def test_values_and_every_gradient(
    monkeypatch: pytest.MonkeyPatch,
    m: int,
    n: int,
    k: int,
    r: int,
    dtype: torch.dtype,
    p: float,
    layout: str,
) -> None:
    """Against float64, for x, weight, bias, A, B and magnitude, and a gradient of any layout."""
    monkeypatch.setattr(ops, "draw_seed", fixed_seed)
    alpha = 0.75 * r
    problem = make_problem(m, n, k, r, dtype, bias=m != 16)
    dy = torch.randn(m, n).to(dtype)
    if layout == "strided":
        dy = torch.randn(n, m).to(dtype).t()
        problem = problem._replace(x=torch.randn(m, 2 * k).to(dtype)[:, ::2])
    elif layout == "expanded":
        dy = torch.randn(1, 1).to(dtype).expand(m, n)
    layer = layer_of(problem, alpha, p, wrapped=layout == "strided")
    x = problem.x.detach().requires_grad_(True)
    y = layer(x)
    mine = [y, *gradients(y, [x, *parameters_of(layer)], dy)]

    mask = keep_mask(m, k, p) if p else None
    results = []
    for other in (dtype, torch.float64):
        operands = problem.to(other)
        y = dora(operands, 0.75, mask)
        results.append([y.detach(), *gradients(y, list(operands), dy)])
    names = ["y", *(name for name, t in zip(NAMES, problem, strict=True) if t is not None)]
    for name, own, same_dtype, truth in zip(names, mine, *results, strict=True):
        assert own.dtype == dtype
        if dtype == torch.float64:  # in the truth's own dtype there is no budget
            torch.testing.assert_close(own.detach(), truth)
        else:
            assert_within_budget(own.detach(), same_dtype, truth, name)


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


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    """Either kind gives the plain run's outputs and gradients, with dropout."""
    layer = layer_of(make_problem(9, 24, 20, 4, torch.float32), 6, 0.3)
    x = torch.randn(9, 20)
    results = []
    for function in (layer, lambda t: checkpoint(layer, t, use_reentrant=reentrant)):
        torch.manual_seed(SEED)
        own = x.clone().requires_grad_(True)
        y = function(own)
        layer.zero_grad()
        y.sum().backward()
        grads = [t.grad for t in (own, *parameters_of(layer))]
        results.append([y.detach(), *(g.clone() for g in grads)])
    for plain, mine in zip(*results, strict=True):
        assert torch.equal(plain, mine)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_compile(p: float) -> None:
    """One graph, forward and backward, in training and in inference."""
    torch.compiler.reset()
    layer = layer_of(make_problem(9, 24, 20, 4, torch.float32), 6, p)
    model = nn.Sequential(layer, nn.SiLU(), FastLoraLinear(24, 8, r=2, use_dora=True))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    exact, inputs = copy.deepcopy(model).double(), torch.randn(9, 20)
    results = []
    for function, owner in ((compiled, model), (model, model), (exact, exact)):
        torch.manual_seed(SEED)
        x = inputs.to(next(owner.parameters()).dtype).requires_grad_()
        trained = [p for p in owner.parameters() if p.requires_grad]
        y = function(x)
        results.append([y.detach(), *torch.autograd.grad(y.pow(2).sum(), [x, *trained])])
        with torch.no_grad():
            results[-1].append(function(x))
    for mine, plain, truth in zip(*results, strict=True):
        assert_within_budget(mine, plain, truth)


def test_second_derivatives_raise() -> None:
    """As for LoRA."""
    layer = layer_of(make_problem(3, 6, 5, 2, torch.float32), 2, 0.0)
    x = torch.randn(3, 5, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()

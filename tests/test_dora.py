"""DoRA on one layer: values and every gradient, the norm and what is kept of it, what is saved."""

from __future__ import annotations

import copy
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).parent))
from dora_truth import SEED, Problem, dora, fixed_seed, keep_mask, make_problem

import fastlora.layers.dora as dora_layer
from fastlora import FastLoraLinear, ops
from fastlora.dora import adapted_squares, scale_of, square_norms
from fastlora.layers import FastLoraWrapper
from fastlora.measure import peak_step_bytes
from fastlora.testing import assert_within_budget
from fastlora.validation import AdapterStateError, ConfigError, UnsupportedLayerError

peft = pytest.importorskip("peft", reason="compares with PEFT")

NAMES = ("x", "weight", "bias", "lora_a", "lora_b", "magnitude")


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


def test_autocast_computes_in_its_dtype() -> None:
    """fp32 parameters under bf16 autocast: as a bf16 layer, and the norm as an fp32 one's."""
    problem = make_problem(12, 24, 20, 4, torch.bfloat16)
    layer = layer_of(problem.to(torch.float32), 6, 0.0)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(problem.x.float())
    assert y.dtype == torch.bfloat16
    same = dora(problem, 1.5)
    truth = dora(problem.to(torch.float64), 1.5)
    assert_within_budget(y.detach(), same, truth)
    y.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())


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


# ------------------------------------------------------------------------------- norms


@pytest.mark.parametrize(
    ("n", "k", "r", "dtype"),
    [
        (33, 20, 3, torch.float32),
        (1, 300, 16, torch.float32),
        (2100, 130, 4, torch.bfloat16),
        (64, 96, 8, torch.float16),
        (40, 31, 64, torch.float64),
    ],
    ids=str,
)
def test_norms_in_factored_form(n: int, k: int, r: int, dtype: torch.dtype) -> None:
    """Against the dense norm in float64; the error of a factored one is that of its terms."""
    problem = make_problem(1, n, k, r, dtype)
    squares = adapted_squares(
        problem.weight, square_norms(problem.weight), problem.lora_a, problem.lora_b, 0.75
    )
    wide = problem.to(torch.float64)
    update = 0.75 * wide.lora_b @ wide.lora_a
    truth = (wide.weight + update).square().sum(1)
    terms = (wide.weight.norm(dim=1) + update.norm(dim=1)).square()
    error = (squares.double() - truth).abs() / terms
    assert error.max() <= 2 * torch.finfo(dtype).eps
    assert squares.dtype == torch.promote_types(dtype, torch.float32)


def test_norms_of_nothing_and_of_what_is_not_finite() -> None:
    """Of a zero row g is 0; a NaN in a row stays in that row."""
    weight, zeros = torch.eye(3), torch.zeros(3, 1)
    weight[1], weight[2, 2] = 0, float("nan")
    for scaling in (2.0, torch.tensor(2.0)):
        squares = adapted_squares(weight, square_norms(weight), zeros.t(), zeros, scaling)
        scale = scale_of(torch.tensor([0.5, 3.0, 1.0]), squares)
        assert scale[0] == 0.5 and scale[1] == 0 and scale[2].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_norm_makes_no_weight_sized_temporary(dtype: torch.dtype) -> None:
    """The peak of a norm is a fraction of the weight's bytes."""
    problem = make_problem(1, 3000, 1024, 4, dtype)

    def norm() -> None:
        squares = square_norms(problem.weight)
        adapted_squares(problem.weight, squares, problem.lora_a, problem.lora_b, 0.75)

    norm()
    assert peak_step_bytes(norm) < problem.weight.nbytes / 2


def counted(monkeypatch: pytest.MonkeyPatch, name: str) -> list[int]:
    """Counts calls of a function that layers make norms with."""
    calls: list[int] = []
    before = getattr(dora_layer, name)

    def call(*args: Any) -> torch.Tensor:
        calls.append(1)
        return before(*args)

    monkeypatch.setattr(dora_layer, name, call)
    return calls


def test_when_norms_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The base's once; an adapter's in every training forward, and once while only inferring."""
    layer = layer_of(make_problem(5, 24, 20, 4, torch.float32), 6, 0.0)
    layer.weight.requires_grad_(False)
    layer.refresh()
    base, adapter = counted(monkeypatch, "square_norms"), counted(monkeypatch, "adapted_squares")
    x = torch.randn(5, 20)
    for _ in range(3):
        layer(x)
    assert (len(base), len(adapter)) == (1, 3)
    with torch.no_grad():
        for _ in range(3):
            layer(x)
    assert (len(base), len(adapter)) == (1, 4)
    layer(x)  # an optimizer that moves no version may step behind this
    with torch.no_grad():
        layer(x)
    assert (len(base), len(adapter)) == (1, 6)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
    with torch.no_grad():
        torch.testing.assert_close(copied(x), layer(x))
    assert (len(base), len(adapter)) == (2, 7)


def changes() -> dict[str, Any]:
    """What may change a norm, and must be seen."""

    def data(layer: Any) -> None:
        layer.weight.data.mul_(2)
        layer.refresh()

    def load(layer: Any) -> None:
        layer.load_state_dict({n: 2 * t for n, t in layer.state_dict().items()})

    def assign(layer: Any) -> None:
        state = {n: 2 * t for n, t in layer.state_dict().items()}
        layer.load_state_dict(state, assign=True)

    def merge(layer: Any) -> None:
        layer.merge()
        layer.weight.data.mul_(2)
        layer.unmerge()

    return {
        "in place": lambda layer: layer.weight.mul_(2),
        "lora_A": lambda layer: layer.lora_A["default"].weight.mul_(2),
        "lora_B": lambda layer: layer.lora_B["default"].weight.mul_(2),
        "magnitude": lambda layer: layer.lora_magnitude_vector["default"].weight.mul_(2),
        "scaling": lambda layer: layer.set_scale("default", 2.0),
        ".data and refresh": data,
        "load_state_dict": load,
        "load_state_dict(assign=True)": assign,
        "merge": merge,
        "to": lambda layer: layer.to(torch.float64).to(torch.float32),
    }


@pytest.mark.parametrize("change", changes())
def test_a_change_is_seen(change: str) -> None:
    """After it, outputs are those of a layer that never kept a norm."""
    layer = layer_of(make_problem(5, 24, 20, 4, torch.float32), 6, 0.0)
    x = torch.randn(5, 20)
    with torch.no_grad():
        layer(x)
        changes()[change](layer)
        fresh = copy.deepcopy(layer)  # copies keep nothing
        assert torch.equal(layer(x), fresh(x))
    assert torch.equal(layer(x), fresh(x))


def test_a_base_weight_that_trained() -> None:
    """An optimizer may step behind a training forward without moving a version."""
    layer = layer_of(make_problem(5, 24, 20, 4, torch.float32), 6, 0.0)
    x = torch.randn(5, 20)
    for trains in (False, True, False):
        layer.weight.requires_grad_(trains)
        with torch.set_grad_enabled(trains):
            y = layer(x)
        if trains:
            layer.weight.data.mul_(2)
    assert torch.equal(y, copy.deepcopy(layer)(x))


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
    trained = [p for p in model.parameters() if p.requires_grad]
    results = []
    for function in (compiled, model):
        torch.manual_seed(SEED)
        x = torch.randn(9, 20, requires_grad=True)
        y = function(x)
        results.append([y.detach(), *torch.autograd.grad(y.pow(2).sum(), [x, *trained])])
        with torch.no_grad():
            results[-1].append(function(x))
    for mine, plain in zip(*results, strict=True):
        torch.testing.assert_close(mine, plain)


def test_second_derivatives_raise() -> None:
    """As for LoRA."""
    layer = layer_of(make_problem(3, 6, 5, 2, torch.float32), 2, 0.0)
    x = torch.randn(3, 5, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# ------------------------------------------------------------------------------- several, merging

KINDS = [
    ["dora", "dora"],
    ["plain", "dora"],
    ["dora", "plain", "plain", "dora"],
    ["biased", "dora"],
    ["biased", "dora", "biased"],
]


def several(kinds: list[str], wrapped: bool = False) -> tuple[Any, Any]:
    """A layer of ours and PEFT's with the same active adapters, in float64."""
    linear = nn.Linear(20, 24).double()
    names = [f"{kind}{i}" for i, kind in enumerate(kinds)]
    options = [
        {"r": i + 2, "lora_alpha": 3, "use_dora": k == "dora", "lora_bias": k == "biased"}
        for i, k in enumerate(kinds)
    ]
    layer: Any = FastLoraLinear.from_linear(copy.deepcopy(linear), adapter_name=None)
    if wrapped:
        layer = FastLoraWrapper(copy.deepcopy(linear))
    for name, option in zip(names, options, strict=True):
        layer.add_adapter(name, **option)
    first, *rest = [peft.LoraConfig(**option) for option in options]
    theirs = peft.tuners.lora.Linear(linear, names[0], first, r=2, lora_alpha=3)
    for name, config in zip(names[1:], rest, strict=True):
        theirs.update_layer(name, config.r, config.lora_alpha, config=config)
    own = dict(layer.named_parameters())
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.copy_(1 + torch.randn(parameter.shape) / 2)
                own[name].copy_(parameter)
    layer.set_adapter(names)
    theirs.set_adapter(names)
    return layer, theirs


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("kinds", KINDS, ids="-".join)
def test_several_active_adapters_are_pefts(kinds: list[str], wrapped: bool) -> None:
    """One after the other: DoRA scales what came before it."""
    layer, theirs = several(kinds, wrapped)
    x = torch.randn(5, 20, dtype=torch.float64, requires_grad=True)
    results = []
    for module in (layer, theirs):
        y = module(x)
        named = dict(module.named_parameters())
        trained = [named[n] for n in sorted(named) if named[n].requires_grad and "lora_" in n]
        results.append([y.detach(), *torch.autograd.grad(y.pow(2).sum(), [x, *trained])])
        with torch.no_grad():
            results[-1].append(module(x))
    assert len(results[0]) == len(results[1]) > 2 + 3 * kinds.count("dora")
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("keep_base", [True, False])
@pytest.mark.parametrize("kinds", [["dora"], *KINDS], ids="-".join)
def test_merging(kinds: list[str], keep_base: bool) -> None:
    """The merged layer is the layer, biases too; and unmerging gives the weight back."""
    layer, theirs = several(kinds)
    x = torch.randn(5, 20, dtype=torch.float64)
    before, bias = layer.weight.clone(), layer.bias.clone()
    expected = layer(x)
    for name in layer.active_adapters:  # one by one: norms are those of the unmerged weight
        layer.merge(safe_merge=True, adapter_names=[name], keep_base=keep_base)
    torch.testing.assert_close(layer(x), expected)
    assert layer.merged_adapters == layer.active_adapters
    if "biased" not in kinds:  # PEFT's merge forgets to scale a lora_bias that came before
        theirs.merge()
        torch.testing.assert_close(layer.weight, theirs.base_layer.weight)
    layer.unmerge()
    if keep_base:
        assert torch.equal(layer.weight, before) and torch.equal(layer.bias, bias)
    torch.testing.assert_close(layer.weight, before)
    torch.testing.assert_close(layer.bias, bias)
    torch.testing.assert_close(layer(x), expected)


def test_merging_in_16_bits_and_into_conv1d() -> None:
    """bf16 rounds once, and Conv1D of transformers has its weight the other way round."""
    conv = pytest.importorskip("transformers.pytorch_utils").Conv1D(24, 20).double()
    layer = FastLoraWrapper(conv)
    layer.add_adapter("a", r=3, use_dora=True, init_lora_weights=False)
    layer.set_adapter("a")
    nn.init.uniform_(layer.lora_magnitude_vector["a"].weight, 0.5, 2.0)
    x = torch.randn(5, 20, dtype=torch.float64)
    weight, delta = conv.weight.t().double(), layer.get_delta_weight("a").double()
    magnitude = layer.lora_magnitude_vector["a"].weight.double()
    norms = (weight + delta).norm(dim=1)
    truth = (magnitude / norms)[:, None] * (weight + delta)
    torch.testing.assert_close(layer(x), x @ truth.t() + conv.bias)
    layer.merge()
    torch.testing.assert_close(conv.weight.t(), truth)
    layer.unmerge()
    half = layer.bfloat16()
    half.merge()
    assert (conv.weight.t().double() - truth).abs().max() < 2**-7 * truth.abs().max()


def test_merges_that_are_refused() -> None:
    """A result that is not finite; a row scaled by 0 that would have to be computed back."""
    layer, _ = several(["dora"])
    name = layer.active_adapters[0]
    magnitude = layer.lora_magnitude_vector[name].weight
    before = layer.weight.clone()
    with torch.no_grad():
        magnitude[3] = float("inf")
    with pytest.raises(AdapterStateError, match="not finite"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.weight, before) and not layer.merged
    with torch.no_grad():
        magnitude[3] = 0
    layer.merge()
    layer.unmerge()
    assert torch.equal(layer.weight, before)
    layer.merge(keep_base=False)
    merged = layer.weight.clone()
    with pytest.raises(AdapterStateError, match="0 in a row"):
        layer.unmerge()
    assert layer.merged and torch.equal(layer.weight, merged)


def test_delete_and_freeze() -> None:
    """A deleted adapter leaves nothing; set_adapter decides which magnitudes train."""
    layer, _ = several(["dora", "dora"])
    layer.set_adapter("dora1")
    assert not layer.lora_magnitude_vector["dora0"].weight.requires_grad
    assert layer.lora_magnitude_vector["dora1"].weight.requires_grad
    layer.delete_adapter("dora1")
    assert list(layer.lora_magnitude_vector) == ["dora0"]
    assert not any("dora1" in name for name in layer.state_dict())

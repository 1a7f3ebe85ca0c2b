"""Quantized bases on the kernels: no module is called, and values and gradients are PEFT's.

bitsandbytes and torchao run on the CPU here, beside the interpreter.
"""

from __future__ import annotations

import copy
import functools
import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton", reason="triton is not installed")

import fastlora
from fastlora.layers import quantized_base
from fastlora.layers.quantized import quantized_weight_of
from fastlora.quantized_tensor import QuantizedTensor
from fastlora.testing import assert_within_budget, run_with_largest_error
from tests.support.quantized import (
    QUANTIZED,
    cached_weight,
    dequantized,
    gated,
    layers_of,
    quantize_linear,
)
from tests.support.sums import in_orders
from tests.support.tiny import randomize

peft = pytest.importorskip("peft", reason="compares with PEFT")
TARGETS = ["gate", "up", "down"]
WIDTH = 64
NAMES = ("a", "b", "c", "d")
IDS = ["b", None, "d", "a", "c", "b", None]


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[nn.Module]]:
    """Quantized modules of layers on kernels that are called, where none is to be."""
    if torch.cuda.is_available():
        pytest.skip("bitsandbytes and torchao run on the CPU, and kernels in the interpreter")
    seen: list[nn.Module] = []
    plain = nn.Module.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "on_kernels" in self.__dict__:
            seen.append(self)
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "__call__", call)
    yield seen
    assert not seen


def on_kernels(model: Any) -> Any:
    """The model, whose quantized modules are not to be called."""
    for layer in layers_of(model):
        layer.impl = "triton"
        layer.base_layer.__dict__["on_kernels"] = True
    return model


def adapted(base: nn.Module, library: Any = fastlora, names: Any = ("a",), **config: Any) -> Any:
    """A model with random adapters of different ranks."""
    torch.manual_seed(1)
    options = {"lora_alpha": 2, "target_modules": TARGETS, **config}
    model = library.get_peft_model(base, library.LoraConfig(r=4, **options), names[0])
    for rank, name in enumerate(names[1:], 2):
        model.add_adapter(name, library.LoraConfig(r=rank, **options))
    randomize(model)
    return model


def inputs(rows: int, dtype: torch.dtype) -> torch.Tensor:
    """x, the same at every call."""
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(2)).to(dtype)


def step(model: Any, x: torch.Tensor, ids: Any = None) -> list[torch.Tensor]:
    """Output, and the gradients of x and of every factor."""
    x = x.clone().requires_grad_()
    factors = sorted((n, p) for n, p in model.named_parameters() if "lora_" in n)
    trained = [p.requires_grad_() for _, p in factors]
    if ids is None:
        y = model(x)
    else:
        with fastlora.adapters(model, ids):
            y = model(x)
    found = torch.autograd.grad(y.pow(2).sum(), [x, *trained], allow_unused=ids is not None)
    return [y.detach(), *(torch.zeros(()) if grad is None else grad for grad in found)]


def compared(made: Any, nears: list[Any], truth: Any) -> None:
    """Each result is as near to the truth as PyTorch's."""
    for number, (own, exact, *near) in enumerate(zip(made, truth, *nears, strict=True)):
        assert_within_budget(
            own, run_with_largest_error(near, exact), exact.double(), what=f"result {number}"
        )


CASES = [
    *((kind, torch.float32, {}) for kind in QUANTIZED),
    *((kind, torch.float16, {}) for kind in ("nf4 nested", "torchao float8")),
    ("nf4 nested", torch.float32, {"use_dora": True}),
    ("torchao int8", torch.float16, {"lora_bias": True}),
]


@pytest.mark.drawn(1 / 3)
@pytest.mark.parametrize(("kind", "dtype", "options"), CASES, ids=str)
def test_one_adapter(kind: str, dtype: torch.dtype, options: Any) -> None:
    """Siblings in one node of the graph, or one by one; against PEFT over the called modules."""
    base = gated(kind, dtype)
    exact = adapted(dequantized(base), peft, **options).double()
    near = [copy.deepcopy(exact).to(dtype)]
    if "lora_bias" not in options:  # PEFT has none over quantized layers
        near.append(adapted(copy.deepcopy(base), peft, **options))
    ours, x = on_kernels(adapted(base, **options)), inputs(5, dtype)
    truth, nears = step(exact, x.double()), [step(model, x) for model in near]
    for _ in range(2):  # siblings are known from the second on
        compared(step(ours, x), nears, truth)
    assert all(isinstance(cached_weight(layer), QuantizedTensor) for layer in layers_of(ours))
    with torch.no_grad():
        compared([ours.eval()(x)], [near[0][:1] for near in nears], truth[:1])


def test_a_patched_model(dtype: torch.dtype) -> None:
    """PEFT's layers over 4 bits, patched: the same, and back to PEFT's own."""
    base = gated("nf4", dtype)
    exact, plain = adapted(dequantized(base), peft).double(), adapted(copy.deepcopy(base), peft)
    patched, x = adapted(base, peft), inputs(5, dtype)
    report = fastlora.patch(patched)
    assert report.fused == 3
    on_kernels(patched)
    truth, near = step(exact, x.double()), step(plain, x)
    for _ in range(2):
        compared(step(patched, x), [near, step(copy.deepcopy(exact).to(dtype), x)], truth)
    fastlora.unpatch(patched)
    assert not any("_kernel_weights" in layer.__dict__ for layer in layers_of(patched))


class Masked(nn.Module):
    """Dropout with the kernels' mask of a seed."""

    def __init__(self, seed: torch.Tensor, p: float) -> None:
        super().__init__()
        self.seed, self.p = seed, p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Drops."""
        ones = torch.ones(x.shape, dtype=torch.float32)
        return x * torch.ops.fastlora.lora_dropout(ones, self.seed, self.p).to(x.dtype)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=str)
def test_dropout(options: Any) -> None:
    """With an explicit mask it is PEFT's over the same base."""
    base, p, x = gated("nf4 nested"), 0.25, inputs(5, torch.float32)
    config = {"lora_dropout": p, **options}
    theirs = adapted(copy.deepcopy(base), peft, **config).train()
    exact = adapted(dequantized(base), peft, **config).double().train()
    ours = on_kernels(adapted(base, **config)).train()
    torch.manual_seed(5)
    found = step(ours, x)
    torch.manual_seed(5)
    for layers in zip(layers_of(theirs), layers_of(exact), strict=True):
        mask = Masked(torch.randint(0, 2**62, (1,), dtype=torch.int64), p)
        for layer in layers:
            layer.lora_dropout["a"] = mask
    compared(found, [step(theirs, x)], step(exact, x.double()))


@pytest.mark.drawn(1 / 3)
@pytest.mark.parametrize(
    ("kind", "dtype", "options"),
    [
        ("nf4 nested", torch.float32, {"use_dora": True}),
        ("nf4", torch.float16, {}),
        ("torchao int8", torch.float32, {}),
    ],
    ids=str,
)
def test_mixed_batches(kind: str, dtype: torch.dtype, options: Any) -> None:
    """Rows of four adapters and of none, with gradients and without."""
    base = gated(kind, dtype)
    exact = adapted(dequantized(base), names=NAMES, **options).double()
    near, x = copy.deepcopy(exact).to(dtype), inputs(len(IDS), dtype)
    plain = copy.deepcopy(near)
    for layer in layers_of(near):
        layer.impl = "eager"
    for layer in layers_of(plain):
        layer.impl = "triton"
    ours = on_kernels(adapted(base, names=NAMES, **options))
    truth = step(exact, x.double(), IDS)
    nears = [
        run for each in (near, plain) for run in in_orders(functools.partial(step, each, x, IDS))
    ]
    compared(step(ours, x, IDS), nears, truth)
    with torch.no_grad():
        for _ in range(2):
            with fastlora.adapters(ours.eval(), IDS):
                compared([ours(x)], [each[:1] for each in nears], truth[:1])


def test_a_pool(dtype: torch.dtype, tmp_path: Path) -> None:
    """Adapters of a pool over a 4-bit base."""
    base, x = gated("nf4", dtype), inputs(len(IDS), dtype)
    exact = adapted(dequantized(base), names=NAMES).double().eval()
    near = copy.deepcopy(exact).to(dtype)
    near.save_pretrained(str(tmp_path))
    pool = fastlora.AdapterPool(base, target_modules=TARGETS, max_rank=5, dtype=dtype)
    pool.register_folder(tmp_path)
    on_kernels(base)
    with torch.no_grad():
        with fastlora.adapters(exact, IDS):
            truth = exact(x.double())
        with fastlora.adapters(near, IDS):
            expected = near(x)
        for _ in range(2):
            with fastlora.adapters(pool, IDS):
                compared([base(x)], [[expected]], [truth])
    for layer in layers_of(base):
        del layer.base_layer.__dict__["on_kernels"]
    pool.close()


def test_autocast() -> None:
    """4-bit layers compute in their own dtype and return x's, as bitsandbytes does."""
    base = gated("nf4", torch.float16)
    for layer in (base.gate, base.up, base.down):
        layer.bias = None if layer.bias is None else nn.Parameter(layer.bias.float())
    theirs, x = adapted(copy.deepcopy(base), peft), inputs(5, torch.float32)
    exact = adapted(dequantized(base), peft).double()
    ours, results = on_kernels(adapted(base)), []
    with torch.autocast("cpu", torch.float16):
        for model in (ours, theirs):
            results.append(step(model, x))
    assert all(torch.equal(a.isfinite(), b.isfinite()) for a, b in zip(*results, strict=True))
    assert [t.dtype for t in results[0]] == [t.dtype for t in results[1]]
    assert results[0][0].dtype is torch.float32
    compared(results[0], results[1:], step(exact, x.double()))
    bias = layers_of(ours)[0].base_layer.bias
    assert bias.dtype is torch.float16  # as bitsandbytes leaves it


# -------------------------------------------------------------------------------- never stale


def check(ours: Any, x: torch.Tensor) -> list[torch.Tensor]:
    """Compares a model with its twins over the matrices that its base has now."""
    twin = copy.deepcopy(ours)
    for layer in layers_of(twin):
        base = layer.base_layer
        plain = nn.Linear(base.in_features, base.out_features, base.bias is not None)
        plain.weight = nn.Parameter(quantized_of(base).dense().detach().float())
        if base.bias is not None:
            plain.bias = nn.Parameter(base.bias.detach().float())
        layer.base_layer, layer.impl = plain, "eager"
    found = step(ours, x)
    compared(found, [step(twin, x)], step(twin.double(), x.double()))
    return found


def quantized_of(base: nn.Module) -> Any:
    """The kind of a module's weight."""
    found = quantized_weight_of(base)
    assert found is not None
    return found


def remade(ours: Any, kind: str) -> None:
    """Gives the base other values, through a loaded state or a new weight."""
    for number, layer in enumerate(layers_of(ours)):
        base = layer.base_layer
        torch.manual_seed(10 + number)
        plain = nn.Linear(base.in_features, base.out_features, base.bias is not None)
        other = quantize_linear(plain, kind)
        if kind.startswith("torchao"):
            with torch.no_grad():
                for name in base.weight.tensor_data_names:
                    getattr(base.weight, name).copy_(getattr(other.weight, name))
        else:
            base.weight = other.weight


CHANGES: dict[str, Any] = {
    "merge and unmerge": lambda ours, kind: (ours.merge_adapter(), ours.unmerge_adapter()),
    "write": lambda ours, kind: [
        quantized_of(layer.base_layer).write(torch.randn(layer.out_features, layer.in_features))
        for layer in layers_of(ours)
    ],
    "to": lambda ours, kind: ours.to(torch.float32).to("cpu"),
    "other weights": remade,
    "modes": lambda ours, kind: ours.eval().train(),
}


@pytest.mark.drawn(1 / 3)
@pytest.mark.filterwarnings("ignore:merged into")
@pytest.mark.parametrize(
    ("kind", "change"),
    [
        *(("nf4 nested", change) for change in CHANGES),
        *(("torchao int8", change) for change in ("merge and unmerge", "other weights")),
        ("torchao float8 tensor", "write"),
    ],
)
def test_what_is_cached_is_never_stale(kind: str, change: str) -> None:
    """Whatever happens to the weight between two forwards, and what a forward has is used again."""
    ours, x = on_kernels(adapted(gated(kind))), inputs(5, torch.float32)
    first = step(ours, x)
    kept = [cached_weight(layer) for layer in layers_of(ours)]
    step(ours, x)
    assert all(cached_weight(layer) is w for layer, w in zip(layers_of(ours), kept, strict=True))
    CHANGES[change](ours, kind)
    now = check(ours, x)
    assert torch.allclose(now[0], first[0]) == (change not in ("write", "other weights"))


def test_a_write_between_forward_and_backward() -> None:
    """Raises where the backward would read other codes; old 4-bit ones are still there."""
    for kind in ("torchao int8", "nf4"):
        ours, x = on_kernels(adapted(gated(kind))), inputs(5, torch.float32).requires_grad_()
        expected = torch.autograd.grad(ours(x).sum(), x)[0]
        y = ours(x)
        CHANGES["write"](ours, kind)
        if kind == "nf4":
            torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], expected)
        else:
            with pytest.raises(RuntimeError, match="modified .* and its backward pass"):
                y.sum().backward()


def test_codes_written_between_forward_and_backward() -> None:
    """In place, 4-bit ones too: a loaded state writes so."""
    ours, x = on_kernels(adapted(gated("nf4"))), inputs(5, torch.float32).requires_grad_()
    y = ours(x)
    with torch.no_grad():
        layers_of(ours)[0].base_layer.weight.zero_()
    with pytest.raises(RuntimeError, match="modified .* and its backward pass"):
        y.sum().backward()


@pytest.mark.parametrize("kind", ["nf4", "torchao int8"])
def test_a_write_to_the_second_layer(kind: str) -> None:
    """The first, whose weight is as it was, computes both with what the second has now."""
    ours, x = on_kernels(adapted(gated(kind))), inputs(5, torch.float32)
    before = [step(ours, x) for _ in range(2)][1]
    weight: Any = layers_of(ours)[1].base_layer.weight
    with torch.no_grad():
        (weight.quant_state.absmax if kind == "nf4" else weight.qdata).mul_(-1)
    assert not torch.allclose(check(ours, x)[0], before[0])


def test_what_a_captured_graph_reads_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """At its address, whatever a layer forgets, until `fastlora.clear_caches`."""
    ours, x = on_kernels(adapted(gated("nf4"))), inputs(5, torch.float32)
    step(ours, x)
    with monkeypatch.context() as patch:
        patch.setattr(quantized_base, "is_capturing_cuda_graph", lambda tensor: True)
        step(ours, x)
    read = [weakref.ref(cached_weight(layer).quantized_data.parts) for layer in layers_of(ours)]
    ours.eval().train().to("cpu")
    step(ours, x)
    assert all(parts() is not None for parts in read)
    assert all(
        cached_weight(layer).quantized_data.parts is not parts()
        for layer, parts in zip(layers_of(ours), read, strict=True)
    )
    fastlora.clear_caches(ours)
    gc.collect()
    assert all(parts() is None for parts in read)


def test_copies_do_not_share_codes() -> None:
    """A copied model, and one that was pickled, makes its own."""
    ours, x = on_kernels(adapted(gated("nf4"))), inputs(5, torch.float32)
    expected = step(ours, x)
    twin = copy.deepcopy(ours)
    assert not any(cached_weight(layer) is not None for layer in layers_of(twin))
    CHANGES["write"](ours, "nf4")
    torch.testing.assert_close(step(twin, x), expected)


# ------------------------------------------------------------------------------------ saved


@pytest.mark.drawn(1 / 3)
@pytest.mark.parametrize(
    ("options", "reentrant"),
    [
        ({}, None),
        ({}, False),
        ({}, True),
        ({"use_dora": True}, False),
        ({"use_dora": True, "lora_dropout": 0.5}, None),
    ],
    ids=str,
)
def test_no_matrix_is_saved(options: Any, reentrant: bool | None) -> None:
    """Nor with activation checkpointing, of both kinds, which changes no gradient."""
    ours, x = on_kernels(adapted(gated("nf4 nested"), **options)).train(), inputs(5, torch.float32)
    torch.manual_seed(3)
    step(ours, x)
    torch.manual_seed(3)
    expected = step(ours, x)
    matrices: list[torch.Size] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if type(tensor) is not QuantizedTensor and tensor.numel() >= 2 * WIDTH * WIDTH:
            matrices.append(tensor.shape)
        return tensor

    body = ours.base_model.model
    plain = body.forward
    if reentrant is not None:
        body.forward = lambda x: checkpoint(plain, x, use_reentrant=reentrant)
    torch.manual_seed(3)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        found = step(ours, x) if reentrant is not True else backward_of(ours, x)
    assert not matrices
    torch.testing.assert_close(found, expected)


def backward_of(model: Any, x: torch.Tensor) -> list[torch.Tensor]:
    """`step` through ``backward``, which is all that reentrant checkpointing takes."""
    x = x.clone().requires_grad_()
    y = model(x)
    y.pow(2).sum().backward()
    factors = sorted((n, p) for n, p in model.named_parameters() if "lora_" in n)
    found = [y.detach(), x.grad, *(p.grad for _, p in factors)]
    model.zero_grad()
    return found

"""What kernels read of quantized weights and when modules are called; the report; norms; training.

Here modules are called, as on any CPU; tests/kernels/test_quantized.py runs kernels over them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fastlora
from fastlora.layers import FastLoraWrapper, quantized_base
from fastlora.layers.dora_norms import base_weight_rows
from fastlora.layers.quantized import ProductWithRepackedCopy, quantized_weight_of
from fastlora.layers.quantized_base import (
    KernelWeightCache,
    fallback_reason_base_called,
    quantized_base_of_layer,
)
from fastlora.ops.torch.dora import squared_row_norms, squared_row_norms_with_update
from fastlora.quantized_tensor import QuantizedTensor
from fastlora.testing import assert_within_budget
from tests.support.peak_bytes import peak_bytes
from tests.support.peft_twins import peft
from tests.support.quantized import QUANTIZED, gated, quantize_linear
from tests.support.tiny import adapted, tiny_llama, trainable

TARGETS = ["gate", "up", "down"]


def layer_over(module: nn.Module) -> Any:
    """A LoRA layer over a module."""
    layer = FastLoraWrapper(module)
    layer.add_adapter("a", r=4)
    layer.set_adapter("a")
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kind", QUANTIZED)
def test_what_kernels_read(kind: str, dtype: torch.dtype) -> None:
    """The loader, and a tensor that is the matrix to PyTorch, bit for bit the library's."""
    module = quantize_linear(nn.Linear(128, 48).to(dtype), kind)
    base, found = quantized_base_of_layer(layer_over(module)), quantized_weight_of(module)
    assert base is not None and found is not None and isinstance(base.weight, QuantizedTensor)
    assert base.weight.quantized_data.kind == QUANTIZED[kind] and base.bias is module.bias
    assert (base.weight.shape, base.weight.dtype) == ((48, 128), dtype)
    x = torch.randn(3, 128, dtype=dtype)
    assert torch.equal(x @ base.weight.t(), x @ found.dense().to(dtype).t())
    assert torch.equal(torch.cat(list(found.dequantized_rows())), found.dense())


def test_codes_in_another_storage() -> None:
    """4-bit codes that FSDP is to shard as bf16, with larger blocks, are the same codes."""
    library: Any = pytest.importorskip("bitsandbytes").nn
    module = library.Linear4bit(
        *(256, 48), compute_dtype=torch.float32, quant_type="nf4", quant_storage=torch.bfloat16
    )
    module.weight.blocksize = 128
    module = module.to("cpu")
    base, found = quantized_base_of_layer(layer_over(module)), quantized_weight_of(module)
    assert base is not None and found is not None and isinstance(base.weight, QuantizedTensor)
    data = base.weight.quantized_data
    assert (data.kind, data.block) == ("table4_nested", 128)
    assert (data.codes.dtype, data.codes.numel()) == (torch.uint8, 48 * 128)
    assert torch.equal(base.weight @ torch.eye(256), found.dense())


# ------------------------------------------------------------------------------------ refusals


def _library(name: str) -> Any:
    return pytest.importorskip(name)


def _with_state(**fields: Any) -> Callable[[Any], None]:
    def change(module: Any) -> None:
        for name, value in fields.items():
            state = module.weight.quant_state
            setattr(state, name, value(getattr(state, name)) if callable(value) else value)

    return change


def _without_code(module: Any) -> None:
    del module.weight.quant_state.code


def _hooked(module: Any) -> None:
    module.register_forward_hook(lambda module, args, y: y * 2)


def _replaced(module: Any) -> None:
    plain = module.forward
    module.forward = lambda x: plain(x) * 2


def _unaligned(module: Any) -> None:
    codes = module.weight.data
    module.weight.data = torch.empty(codes.numel() + 1, dtype=codes.dtype)[1:].view_as(codes)
    module.weight.data.copy_(codes)


def _subclassed(module: Any) -> None:
    module.__class__ = type("Own", (type(module),), {})


# Of an NF4 layer: what is done to it, and what is said.
CALLED: dict[str, tuple[Callable[[Any], None], str]] = {
    "unknown quant type": (
        _with_state(quant_type="af4"),
        "quant_type is 'af4', expected 'nf4' or 'fp4'",
    ),
    "state elsewhere": (
        _with_state(absmax=lambda t: t.to("meta")),
        "quant_state.absmax is on meta, but the quantized values are on cpu",
    ),
    "other dtype": (
        _with_state(absmax=lambda t: t.half()),
        r"bitsandbytes [\d.]+: quant_state.absmax is torch.float16, expected torch.float32",
    ),
    "other size": (_with_state(absmax=lambda t: t[1:]), "absmax has 95 elements.* expect 96"),
    "other shape": (
        _with_state(shape=torch.Size([128, 48])),
        r"quant_state.shape is \(128, 48\), expected \(48, 128\)",
    ),
    "block size": (
        _with_state(blocksize=48),
        "block size of 48 is not a power of 2 that divides in_features=128",
    ),
    "small blocks": (_with_state(blocksize=8), "block size is 8, but the kernels need at least 16"),
    "a field that moved": (_without_code, r"bitsandbytes [\d.]+: .*no attribute 'code'"),
    "another table": (
        _with_state(code=lambda t: t.flip(0)),
        r"bitsandbytes [\d.]+: a Params4bit does not dequantize to the values that fastlora",
    ),
    "within a word": (_unaligned, "values of its base weight are not aligned to 4 bytes"),
    "hook": (_hooked, "its base layer has forward hooks"),
    "forward": (_replaced, "its base layer's forward was replaced"),
    "subclass": (_subclassed, "its base layer is Own, which the kernels do not support"),
}


@pytest.mark.parametrize("case", CALLED)
def test_4_bit_layers_that_are_called(case: str) -> None:
    """The report says why, and nothing of the layer has changed."""
    change, match = CALLED[case]
    torch.manual_seed(0)
    module: Any = quantize_linear(nn.Linear(128, 48), "nf4")
    change(module)
    codes, state = module.weight.data.clone(), dict(vars(module.weight.quant_state))
    layer = layer_over(module)
    assert quantized_base_of_layer(layer) is None
    assert torch.equal(module.weight.data, codes)
    now = vars(module.weight.quant_state)
    assert all(now[name] is value for name, value in state.items())
    fused, why = layer.fusion()
    assert not fused
    pytest.raises(ValueError, _raise, why).match(match)


def _raise(text: str) -> None:
    raise ValueError(text)


def test_other_layers_that_are_called() -> None:
    """Not quantized yet, no compute dtype yet, blocks over rows, int8 with x, made in inference."""
    bitsandbytes = _library("bitsandbytes").nn
    raw = layer_over(bitsandbytes.Linear4bit(128, 48, compute_dtype=torch.float32))
    assert "not quantized yet" in fallback_reason_base_called(
        raw
    ) and "model.to(device)" in fallback_reason_base_called(raw)

    unset = layer_over(bitsandbytes.Linear4bit(128, 48, compute_dtype=None).to("cpu"))
    assert "in its first forward pass" in fallback_reason_base_called(unset)
    unset.train()(torch.randn(2, 128))
    assert fallback_reason_base_called(unset) == ""
    assert quantized_base_of_layer(unset).weight.dtype is torch.float32  # type: ignore[union-attr]  # there

    odd = layer_over(quantize_linear(nn.Linear(96, 48), "nf4"))
    assert (
        "block size of 64 is not a power of 2 that divides in_features=96"
        in fallback_reason_base_called(odd)
    )

    eight: Any = quantize_linear(nn.Linear(128, 48), "int8")
    assert "also quantizes x to int8" in fallback_reason_base_called(layer_over(eight))
    eight.state.threshold = 6.0
    assert "columns with values above 6.0" in fallback_reason_base_called(layer_over(eight))

    with torch.inference_mode():
        early = quantize_linear(nn.Linear(128, 48), "nf4")
    assert "inference mode" in fallback_reason_base_called(layer_over(early))

    other: Any = quantize_linear(nn.Linear(128, 64), "nf4")
    assert quantized_base_of_layer(layer_over(other)) is not None
    repacked = layer_over(other).eval()
    with torch.no_grad():
        repacked(torch.randn(2, 128))
    if getattr(other.weight.quant_state, "packing_format_for_cpu", False):
        assert "repacked" in fallback_reason_base_called(repacked)


def test_what_was_found_is_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    """By dtype, refusals too; over modules of no known kind as well."""
    seen: list[str] = []

    def watch(owner: Any, name: str) -> None:
        plain = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args: seen.append(name) or plain(*args))

    module: Any = quantize_linear(nn.Linear(128, 48).half(), "nf4")
    watch(type(quantized_weight_of(module)), "tensor_or_fallback_reason")
    watch(quantized_base, "fallback_reason_not_plain_linear")
    kept = KernelWeightCache()

    def found(dtype: torch.dtype | None) -> Any:
        code = kept.weight_or_fallback_reason(module, dtype)
        return code if isinstance(code, str) else code.weight

    first = found(torch.float16)
    assert isinstance(first, QuantizedTensor)
    for _ in range(3):
        assert found(torch.float16) is first is found(None)
        assert "computes in torch.float16, but x has dtype torch.float32" in found(torch.float32)
    assert seen == ["tensor_or_fallback_reason"] * 2
    module.weight.quant_state.absmax.mul_(2)
    assert found(torch.float16) is not first
    assert seen == ["tensor_or_fallback_reason"] * 3

    conv = pytest.importorskip("transformers.pytorch_utils").Conv1D(48, 128)
    for _ in range(3):
        assert (
            kept.weight_or_fallback_reason(conv, torch.float32)
            == "its base layer is Conv1D, which the kernels do not support"
        )
    assert seen[3:] == ["fallback_reason_not_plain_linear"]
    assert isinstance(found(torch.float16), QuantizedTensor)


def test_a_write_ends_a_copy_of_the_codes() -> None:
    """Of the product that evaluates on a CPU; here on any CPU, which may have no such product."""
    module: Any = quantize_linear(nn.Linear(128, 48).half(), "nf4")
    kept = KernelWeightCache()
    kept._cache_entries_if_cacheable(module)
    kept.repacked = made = ProductWithRepackedCopy(module)
    kept._cache_entries_if_cacheable(module)
    assert kept.repacked is made
    module.weight.quant_state.absmax.mul_(2)
    kept._cache_entries_if_cacheable(module)
    assert kept.repacked is None


def test_another_thread_may_forget_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between a look at the weight and its use, as a change of mode in another thread does."""
    module: Any = quantize_linear(nn.Linear(128, 48).half(), "nf4")
    kept, look = KernelWeightCache(), KernelWeightCache._cache_entries_if_cacheable

    def looks(self: KernelWeightCache, module: nn.Module) -> Any:
        found = look(self, module)
        self.clear()
        return found

    with monkeypatch.context() as patch:
        patch.setattr(KernelWeightCache, "_cache_entries_if_cacheable", looks)
        assert not isinstance(kept.weight_or_fallback_reason(module, torch.float16), str)
    assert not isinstance(kept.weight_or_fallback_reason(module, torch.float16), str)


def test_an_error_of_our_own_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what reads a library's fields may lack one."""
    module = quantize_linear(nn.Linear(128, 48), "nf4")
    monkeypatch.setattr(
        type(quantized_weight_of(module)),
        "make_dequantizer",
        lambda self, dtype: self.no_such_field,
    )
    with pytest.raises(AttributeError, match="no_such_field"):
        KernelWeightCache().weight_or_fallback_reason(module, torch.float32)


def test_refresh_leaves_others_alone() -> None:
    """A module of somebody else's may have an attribute of the same name."""
    module: Any = nn.Linear(2, 2)
    module._kernel_weights = "theirs"
    fastlora.clear_caches(nn.Sequential(module))
    assert module._kernel_weights == "theirs"


def test_weights_of_torchao_that_are_called() -> None:
    """Of which each says what is other about it."""
    library = _library("torchao.quantization")
    configs = {
        "also rounds x": library.Int8DynamicActivationInt8WeightConfig(version=2),
        r"one scale per block of shape \[1, 32\]": library.Int8WeightOnlyConfig(
            version=2, granularity=library.PerGroup(32)
        ),
        "torchao IntxUnpackedToInt8Tensor, which the kernels": library.IntxWeightOnlyConfig(),
    }
    for match, config in configs.items():
        module = nn.Linear(128, 48)
        library.quantize_(module, config)
        pytest.raises(ValueError, _raise, fallback_reason_base_called(layer_over(module))).match(
            match
        )
    for change, match in (
        (
            lambda w: setattr(w, "zero_point", torch.ones_like(w.zero_point)),
            "has nonzero zero points",
        ),
        (lambda w: setattr(w, "scale", w.scale.half()), r"torchao [\d.+a-z]+: scale is torch.flo"),
        (lambda w: delattr(w, "block_size"), r"torchao [\d.+a-z]+: .*block_size"),
        (lambda w: setattr(w, "act_pre_scale", torch.ones(128)), "has an act_pre_scale"),
    ):
        module = quantize_linear(nn.Linear(128, 48), "torchao int8")
        change(module.weight)
        pytest.raises(ValueError, _raise, fallback_reason_base_called(layer_over(module))).match(
            match
        )


@pytest.mark.parametrize("threshold", [0.0, 2.0])
def test_int8_with_outliers_in_training(threshold: float) -> None:
    """It is called, and gives PEFT's values and gradients."""
    results = []
    for library in (fastlora, peft):
        base = gated("int8", torch.float32)
        for name in TARGETS:
            getattr(base, name).state.threshold = threshold
        model, x = (
            adapted(library, base=base, target_modules=TARGETS),
            torch.randn(5, 64, generator=torch.Generator().manual_seed(2)),
        )
        y = model.train()(x.requires_grad_())
        results.append([y.detach(), *torch.autograd.grad(y.sum(), [x, *trainable(model)])])
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected)


def test_hqq() -> None:
    """Called; DoRA reads it; PEFT's values and gradients, also through PEFT's layer patched."""
    library = _library("hqq.core.quantize")

    def base() -> Any:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(128, 48))
        model[0] = library.HQQLinear(
            *(model[0], library.BaseQuantizeConfig(nbits=4, group_size=64)),
            compute_dtype=torch.float32,
            device="cpu",
        )
        return model

    for options in ({}, {"use_dora": True}):
        results, x = [], torch.randn(3, 128)
        for library_ in (fastlora, peft, peft):
            model = adapted(library_, base=base(), target_modules=["0"], **options)
            if len(results) == 2:
                assert not fastlora.patch(model).fused
            y = model(x)
            results.append([y.detach(), *torch.autograd.grad(y.sum(), trainable(model))])
            if not results[1:]:
                (row,) = fastlora.fusion_report(model).rows
                assert (
                    not row.fused
                    and row.reason
                    == "its base layer is HQQLinear, which the kernels do not support"
                )
                (status,) = model.get_layer_status()
                assert status.module_type == "lora.HqqLoraLinear"
                with pytest.raises(fastlora.FastLoraError, match="cannot merge into HQQLinear"):
                    model.merge_adapter()
        for other in results[1:]:
            for mine, expected in zip(results[0], other, strict=True):
                torch.testing.assert_close(mine, expected)


# -------------------------------------------------------------------------------------- report


def test_the_report_of_a_4_bit_model() -> None:
    """Which layers kernels would read, how they run here, and which are called wherever."""
    model = tiny_llama(attention_bias=False)
    for layer in model.model.layers:
        for holder, names in ((layer.self_attn, "qkvo"), (layer.mlp, ("gate", "up", "down"))):
            for name in names:
                linear = getattr(holder, f"{name}_proj")
                setattr(holder, f"{name}_proj", quantize_linear(linear, "nf4 nested"))
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: None)
    ours = fastlora.get_peft_model(model, fastlora.LoraConfig(r=4, target_modules="all-linear"))
    report = fastlora.fusion_report(ours)
    assert (report.fused, len(report.rows)) == (13, 14)
    assert {row.reads for row in report.rows if row.fused} == {"nf4 nested, float32"}
    assert {report.runs_as(row) for row in report.rows} == {"base layer and separate LoRA"}
    text = str(report)
    assert "13 of them have a quantized base weight, which only the kernels read" in text
    assert "its base layer has forward hooks" in text and "nf4 nested" in text
    on_kernels = fastlora.FusionReport(report.rows, "triton", "")
    assert [on_kernels.runs_as(row) for row in report.rows].count("Triton kernels") == 13


# --------------------------------------------------------------------------------------- norms


@pytest.mark.parametrize("kind", ["nf4", "nf4 nested", "int8", "torchao int8", "torchao float8"])
def test_norms_make_no_matrix(kind: str) -> None:
    """The values of the dense weight, from some rows at a time; kept while nothing is written."""
    n, k = 4096, 1024
    layer = layer_over(quantize_linear(nn.Linear(k, n).to(torch.bfloat16), kind))
    lora_a, lora_b = torch.randn(4, k), torch.randn(n, 4)
    found = quantized_weight_of(layer.base_layer)
    assert found is not None
    dense = found.dense()
    expected = squared_row_norms_with_update(dense, squared_row_norms(dense), lora_a, lora_b, 0.5)
    truth = squared_row_norms_with_update(
        *(dense.double(), squared_row_norms(dense.double()), lora_a.double(), lora_b.double(), 0.5)
    )
    del dense
    weight = base_weight_rows(layer)

    def sums() -> torch.Tensor:
        return squared_row_norms_with_update(weight, squared_row_norms(weight), lora_a, lora_b, 0.5)

    assert_within_budget(sums(), expected, truth)
    assert peak_bytes(sums) < n * k * 4 / 2  # of one in fp32


@pytest.mark.parametrize("kind", ["nf4", "torchao int8"])
def test_norms_are_cached(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the base from forward to forward, until the weight is another one."""
    layer = layer_over(quantize_linear(nn.Linear(128, 48), kind))
    layer.add_adapter("d", r=4, use_dora=True, init_lora_weights=False)
    layer.set_adapter("d")
    found: Any = quantized_weight_of(layer.base_layer)
    seen: list[int] = []
    monkeypatch.setattr(
        "fastlora.layers.dora_norms.squared_row_norms",
        lambda weight, **_: seen.append(1) or squared_row_norms(weight),
    )
    x = torch.randn(3, 128)
    for _ in range(3):
        layer(x).sum().backward()
    assert not seen  # since the adapter was made
    found.write(2.0 * found.dense())
    y = layer(x)
    assert len(seen) == 1
    twin = copy.deepcopy(layer)
    torch.testing.assert_close(twin(x), y)


def test_dropped_dora_saves_no_matrix() -> None:
    """Where the module is called too: only what the layer has is saved, or less."""
    options = {"target_modules": TARGETS, "use_dora": True, "lora_dropout": 0.5}
    model, x = adapted(base=gated("nf4"), **options).train(), torch.randn(5, 64)
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if type(tensor) is not QuantizedTensor:
            saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    assert saved and all(tensor.numel() < 64 * 128 for tensor in saved)
    y.sum().backward()
    assert all(parameter.grad is not None for parameter in trainable(model))


# ------------------------------------------------------------------------------------ training


def test_prepared_by_peft_and_trained_by_bitsandbytes() -> None:
    """`prepare_model_for_kbit_training` of PEFT, gradient checkpointing, an optimizer in 8 bits."""
    optimizers = _library("bitsandbytes").optim
    losses: list[list[float]] = []
    ids = torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(0))
    for library in (fastlora, peft):
        model = tiny_llama()
        for layer in model.model.layers:
            layer.mlp.up_proj = quantize_linear(layer.mlp.up_proj, "nf4 nested")
            layer.self_attn.q_proj = quantize_linear(layer.self_attn.q_proj, "nf4 nested")
        model.is_loaded_in_4bit = True
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=True)
        model = adapted(library, base=model, target_modules=["q_proj", "up_proj"]).train()
        steps = optimizers.PagedAdamW32bit(trainable(model), lr=1e-2)
        losses.append([])
        for _ in range(4):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            steps.step()
            steps.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0][-1] < losses[0][0]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)

"""Merging into quantized base layers: dequantize, add, quantize again; and exactly back."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastlora
from fastlora.layers.base_layers import dense_weight
from fastlora.layers.quantized import quantized_weight_of
from fastlora.validation import AdapterStateError, UnsupportedLayerError
from tests.support import tiny
from tests.support.peak_bytes import peak_bytes
from tests.support.peft_twins import peft
from tests.support.quantized import loaded_as, quantize_linear
from tests.support.tiny import randomize, tiny_llama

N, K = 64, 128
BITSANDBYTES = ["nf4", "nf4 nested", "fp4", "int8"]
TORCHAO = ["torchao int8", "torchao float8"]


class One(nn.Module):
    """A linear, which is to be quantized, and nothing else."""

    def __init__(self, n: int = N, k: int = K, bias: bool = True) -> None:
        super().__init__()
        self.q = nn.Linear(k, n, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps ``[..., k]`` to ``[..., n]``."""
        return self.q(x)


def one(kind: str, n: int = N, k: int = K, dtype: torch.dtype = torch.float32) -> Any:
    """A model whose linear is quantized; the same one at every call."""
    torch.manual_seed(0)
    model = One(n, k).to(dtype)
    model.q = quantize_linear(model.q, kind, torch.float32)
    return loaded_as(kind, model)


def adapted(kind: str, library: Any = fastlora, **config: Any) -> Any:
    """That model with a random adapter."""
    options = {"lora_alpha": 1, "target_modules": ["q"], **config}
    return tiny.adapted(library, base=one(kind), **options).train()


def q_of(model: Any) -> Any:
    """The layer."""
    return model.base_model.model.q


def bits_of(model: Any) -> list[torch.Tensor]:
    """All tensors that the base layer's weight is stored in."""
    weight = q_of(model).base_layer.weight
    if hasattr(weight, "quant_state"):
        return [weight.data.clone(), *(t.clone() for t in tensors_of(weight.quant_state))]
    if hasattr(weight, "SCB"):
        kept: Any = quantized_weight_of(q_of(model).base_layer)
        return list(kept.snapshot())
    return [getattr(weight, name).clone() for name in weight.tensor_data_names]


def tensors_of(state: Any) -> list[torch.Tensor]:
    """The tensors of a quant state."""
    found = [value for value in vars(state).values() if isinstance(value, torch.Tensor)]
    inner = getattr(state, "state2", None)
    return found + (tensors_of(inner) if inner is not None else [])


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("kind", BITSANDBYTES)
def test_merged_weights_are_those_of_peft(kind: str, dora: bool) -> None:
    """But for what rounding decides: values at the bound of two codes, and a block's largest."""
    ours, theirs = (adapted(kind, library, use_dora=dora) for library in (fastlora, peft))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for model in (ours, theirs):
            model.merge_adapter()
    mine, other = (dense_weight(q_of(model).get_base_layer()).float() for model in (ours, theirs))
    assert (mine - other).norm() < 0.01 * other.norm()
    before = dense_weight(one(kind).q).float()
    assert (mine - before).abs().max() > 0.1 * before.abs().max()
    # In training: in evaluation bitsandbytes rounds the scales of both to bf16.
    x = torch.randn(5, K, generator=torch.Generator().manual_seed(3))
    y, expected = (model.train()(x).detach() for model in (ours, theirs))
    assert (y - expected).norm() < 0.02 * expected.norm()
    assert torch.equal(ours.unload()(x), y)  # which keeps what is merged (R4)


@pytest.mark.parametrize("kind", BITSANDBYTES + TORCHAO)
def test_unmerge_gives_the_bits_back(kind: str) -> None:
    """Again and again, with an evaluation in which bitsandbytes repacks 4-bit weights."""
    model = adapted(kind)
    x = torch.randn(5, K, generator=torch.Generator().manual_seed(3))
    before = bits_of(model)
    y = model.train()(x).detach()
    for round_ in range(4):
        with pytest.warns(UserWarning, match="merged into 1 quantized weights"):
            model.merge_adapter()
        merged = model(x).detach() if round_ % 2 else model.eval()(x).detach()
        assert (merged - y).norm() < 0.2 * y.norm()
        model.unmerge_adapter()
        model.train()
        assert all(map(torch.equal, bits_of(model), before))
    assert q_of(model).merge_error is None
    torch.testing.assert_close(model(x).detach(), y, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["nf4", "nf4 nested"])
def test_weights_that_an_evaluation_has_repacked(kind: str) -> None:
    """They merge too, and come back as they were packed."""
    model = adapted(kind, lora_alpha=4).eval()
    x = torch.randn(5, K, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        y = model(x)
        if not getattr(q_of(model).base_layer.weight.quant_state, "packing_format_for_cpu", False):
            pytest.skip("this processor has no product of packed weights")
        before = bits_of(model)
        with pytest.warns(UserWarning, match="merged into 1 quantized weights"):
            model.merge_adapter()
        assert (model(x) - y).norm() < 0.2 * y.norm()
        model.unmerge_adapter()
        assert all(map(torch.equal, bits_of(model), before))
        torch.testing.assert_close(model(x), y, rtol=0, atol=0)


@pytest.mark.parametrize("kind", BITSANDBYTES + TORCHAO)
def test_the_error_is_reported(kind: str) -> None:
    """As a share of what the merge changes; the base model that comes out has it."""
    model = adapted(kind)
    layer = q_of(model)
    before = dense_weight(layer.base_layer).double()
    delta = layer.get_delta_weight("default").double()
    with pytest.warns(UserWarning, match=r"Rounding lost [\d.]+% of the merged update"):
        base = model.merge_and_unload()
    lost = dense_weight(base.q).double() - before - delta
    assert layer.merge_error == pytest.approx(float(lost.norm() / delta.norm()), rel=1e-3)
    assert 0.0 < layer.merge_error < 1.0
    assert not hasattr(base.q, "base_layer")


@pytest.mark.parametrize("kind", ["nf4 nested", "int8", "torchao int8"])
def test_without_a_saved_copy_and_after_a_write(kind: str) -> None:
    """Then the update is subtracted from what is there, and rounded once more."""
    for keep_base in (False, True):
        model = adapted(kind, lora_alpha=4)
        layer = q_of(model)
        before = dense_weight(layer.base_layer).clone()
        delta = layer.get_delta_weight("default")
        layer.merge(keep_base=keep_base)
        if keep_base:  # somebody else writes: the copy is not what the weight came from
            kind_of = quantized_weight_of(layer.base_layer)
            assert kind_of is not None
            kind_of.write(kind_of.dense().float() + 0.1)
        layer.unmerge()
        now = dense_weight(layer.base_layer)
        expected = before + 0.1 if keep_base else before
        assert (now - expected).norm() < 0.5 * delta.norm()
        assert not torch.equal(now, before)


def test_safe_merge_and_errors_change_nothing() -> None:
    """A factor that is not finite; a weight not quantized yet; a kind that nothing can make."""
    model = adapted("nf4")
    before = bits_of(model)
    with torch.no_grad():
        q_of(model).lora_A["default"].weight[1, 2] = float("nan")
    with pytest.raises(AdapterStateError, match="not finite"):
        model.merge_adapter(safe_merge=True)
    with pytest.raises(AdapterStateError, match="not finite"):
        model.merge_and_unload(safe_merge=True)
    assert all(map(torch.equal, bits_of(model), before))
    assert not q_of(model).merged

    library = pytest.importorskip("bitsandbytes").nn
    raw = One()
    raw.q = library.Linear4bit(K, N)
    early = fastlora.get_peft_model(raw, fastlora.LoraConfig(target_modules=["q"]))
    with pytest.raises(UnsupportedLayerError, match=r"not quantized yet.*model\.to\(device\)"):
        early.merge_adapter()

    library = pytest.importorskip("torchao.quantization")
    other = One()
    library.quantize_(other.q, library.IntxWeightOnlyConfig())
    model = fastlora.get_peft_model(other, fastlora.LoraConfig(target_modules=["q"]))
    with pytest.raises(UnsupportedLayerError, match="expected one of Int8Tensor, Float8Tensor"):
        model.merge_and_unload()


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True}], ids=str)
@pytest.mark.parametrize("kind", BITSANDBYTES + TORCHAO + ["torchao intx"])
def test_merged_into_a_plain_model(kind: str, options: dict[str, Any]) -> None:
    """With `dequantize`: a linear in the model's dtype, which has what the layer computed."""
    model = adapted(kind, **options)
    layer = q_of(model)
    before = dense_weight(layer.base_layer).double()
    x = torch.randn(5, K, generator=torch.Generator().manual_seed(3))
    layer.base_layer.train()
    expected = model(x).detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is rounded again
        base = model.merge_and_unload(dequantize=True, safe_merge=True)
    assert type(base.q) is nn.Linear and base.q.weight.dtype == torch.float32
    if not options:
        exact = before + layer.get_delta_weight("default").double()
        assert (base.q.weight.double() - exact).norm() <= 2**-23 * exact.norm()
    # LLM.int8 rounds x too.
    assert (base(x) - expected).norm() < (0.02 if kind == "int8" else 1e-5) * expected.norm()
    assert not any(name.startswith("is_loaded") for name in vars(base))


def test_a_plain_model_of_merged_and_bare_layers() -> None:
    """What was merged is taken out exactly first; layers without an adapter become plain too."""
    torch.manual_seed(0)
    layers = [one("nf4 nested", K, K, torch.bfloat16).q for _ in range(3)]
    before = [dense_weight(layer).double() for layer in layers]
    model = nn.Sequential(*layers, nn.LayerNorm(K).bfloat16())
    adapted = fastlora.get_peft_model(model, fastlora.LoraConfig(r=4, target_modules=["0", "1"]))
    randomize(adapted)
    deltas = [adapted.base_model.model[i].get_delta_weight("default").double() for i in range(2)]
    with pytest.warns(UserWarning, match="merged into 2 quantized weights"):
        adapted.merge_adapter()
    base: Any = adapted.merge_and_unload(dequantize=True)
    for i, weight in enumerate(before):
        assert type(base[i]) is nn.Linear and base[i].weight.dtype == torch.bfloat16
        # bitsandbytes' own matrix is rounded to bf16 before the update is added.
        exact = weight + deltas[i] if i < 2 else weight
        assert (base[i].weight.double() - exact).norm() < 2**-8 * exact.norm()
    assert base(torch.randn(3, K).bfloat16()).dtype == torch.bfloat16
    ahead = fastlora.get_peft_model(
        nn.Sequential(one("nf4", K, K, torch.bfloat16).q, nn.LayerNorm(K).bfloat16()),
        fastlora.LoraConfig(r=4, target_modules=["0"]),
    )
    base = ahead.merge_and_unload(dequantize=True)  # not the dtype of the factors, fp32
    assert {p.dtype for p in base.parameters()} == {torch.bfloat16}
    bare = fastlora.get_peft_model(one("int8"), fastlora.LoraConfig(target_modules=["q"]))
    own = dense_weight(q_of(bare).base_layer)
    assert torch.equal(bare.unload(dequantize=True).q.weight, own)


@pytest.mark.parametrize("saved_quantized", [False, True])
def test_a_plain_model_is_saved_as_one(tmp_path: Path, saved_quantized: bool) -> None:
    """Of transformers': it has no mark of a quantized one left, and loads as any other."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    tiny_llama().bfloat16().save_pretrained(tmp_path / "base")
    bits = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    quantized_model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=bits, device_map={"": "cpu"}
    )
    if saved_quantized:
        quantized_model.save_pretrained(tmp_path / "quantized")
        quantized_model = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "quantized", device_map={"": "cpu"}
        )
    config = fastlora.LoraConfig(r=4, target_modules=["q_proj", "up_proj"])
    model = fastlora.get_peft_model(quantized_model, config)
    randomize(model)
    ids = torch.arange(9)[None]
    expected = model.train()(input_ids=ids).logits.detach()
    merged = model.merge_and_unload(dequantize=True)
    assert merged.dtype == torch.bfloat16
    merged.save_pretrained(tmp_path / "merged")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(again.model.layers[0].self_attn.q_proj) is nn.Linear
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    found = again(input_ids=ids).logits.detach()
    assert torch.equal(found, merged.train()(input_ids=ids).logits)
    assert (found - expected).norm() < 0.03 * expected.norm()


def test_a_merged_layer_is_copied_and_moved() -> None:
    """The kept weight goes along, and keeps its dtype where the model's changes."""
    model = adapted("nf4")
    before = bits_of(model)
    q_of(model).merge()
    twin = copy.deepcopy(model).to(torch.float64).to(torch.float32)
    for each in (twin, model):
        each.unmerge_adapter()
        assert all(map(torch.equal, bits_of(each), before))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_merge_and_unload_goes_layer_by_layer(dtype: torch.dtype, options: Any) -> None:
    """At most two fp32 copies of the largest weight are there beside the model, checks included."""
    torch.manual_seed(0)
    layers = [nn.Linear(300, 500), nn.Linear(500, 400), *(nn.Linear(400, 400) for _ in range(4))]
    base = nn.Sequential(*layers).to(dtype)
    largest = max(layer.weight.numel() for layer in layers) * 4
    config = fastlora.LoraConfig(r=4, target_modules="all-linear", **options)
    model = fastlora.get_peft_model(base, config)
    randomize(model)
    assert peak_bytes(lambda: model.merge_and_unload(safe_merge=True)) < 2 * largest


@pytest.mark.parametrize("dequantize", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "nf4 nested", "int8", "torchao int8"])
def test_quantized_layers_go_layer_by_layer(kind: str, dequantize: bool) -> None:
    """So they do where weights are quantized again; or beside the bf16 ones that are made."""
    layers = [one(kind, 512, 256, torch.bfloat16).q for _ in range(6)]
    config = fastlora.LoraConfig(r=4, target_modules=["0", "1", "2", "3"])
    model = fastlora.get_peft_model(nn.Sequential(*layers, nn.LayerNorm(512).bfloat16()), config)
    randomize(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peak = peak_bytes(lambda: model.merge_and_unload(dequantize=dequantize))
    assert peak < 2 * 512 * 256 * 4 + dequantize * 6 * 512 * 256 * 2


def test_a_linear_of_two_names_is_dequantized_once() -> None:
    """Under both it is the same plain one."""
    model: Any = one("nf4")
    model.other = nn.ModuleList([one("nf4").q] * 2)
    model = fastlora.get_peft_model(model, fastlora.LoraConfig(r=4, target_modules=["q"]))
    plain = model.merge_and_unload(dequantize=True)
    first, second = plain.other
    assert first is second and type(first) is type(plain.q) is nn.Linear

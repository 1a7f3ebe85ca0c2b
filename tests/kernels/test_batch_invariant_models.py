"""The batch-invariant mode in models and pools, and what it refuses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

import fastlora
from fastlora.model import adapter_state
from fastlora.ops.execution_mode import is_batch_invariant
from fastlora.validation import ImplementationError
from tests.support.kernels.mixed_models import use_impl
from tests.support.quantized import dequantized, quantize_linear
from tests.support.tiny import Gated, with_adapters

pytest.importorskip("triton", reason="triton is not installed")


def build(lab: Any, dtype: torch.dtype, ranks: Sequence[int]) -> Any:
    """A model with random adapters ``a0``, ``a1``, ...; a factor does not depend on the others."""
    torch.manual_seed(0)
    configs = {
        f"a{index}": fastlora.LoraConfig(
            r=r,
            target_modules=["gate", "up", "down"],
            init_lora_weights=False,
            lora_bias=index == 1,
        )
        for index, r in enumerate(ranks)
    }
    model = with_adapters(Gated(48, 64, called=False), configs, autocast_adapter_dtype=False)
    for index, name in enumerate(configs):
        torch.manual_seed(index)
        for key, parameter in model.named_parameters():
            if f".{name}." in key:
                torch.nn.init.normal_(parameter, std=0.2)
    return model.to(lab.device, dtype).eval()


def run(model: Any, x: torch.Tensor, ids: Sequence[str | None]) -> torch.Tensor:
    with torch.no_grad(), fastlora.batch_invariant(), fastlora.adapters(model, ids):
        return model(x)


@pytest.mark.drawn(1 / 2)
@pytest.mark.usefixtures("dots")
def test_a_model(lab: Any, dtype: torch.dtype) -> None:
    """Alone and among others, per token, and after an adapter of a larger rank was added."""
    model, larger = build(lab, dtype, (8, 16, 3)), build(lab, dtype, (8, 16, 3, 40))
    names = ["a1", None, "a0", "a2", "a1", "a1", None, "a2", "a0"]
    x = lab.rand(9, 2, 48, dtype=dtype)
    y = run(model, x, names)
    for _ in range(2):  # siblings are known the second time
        for rows in ([0], [3], [1, 0, 2], [8, 7, 6, 5, 4, 3, 2, 1, 0]):
            own = [names[row] for row in rows]
            assert torch.equal(run(model, x[rows], own), y[rows])
            assert torch.equal(run(larger, x[rows], own), y[rows])
            assert torch.equal(run(larger, x[rows, :1], own), y[rows, :1])
        everybody = [*names, *["a3"] * 9]
        assert torch.equal(run(larger, torch.cat([x, 2 * x]), everybody)[:9], y)


@pytest.mark.usefixtures("dots")
def test_a_model_with_one_adapter(lab: Any, dtype: torch.dtype) -> None:
    model, x = build(lab, dtype, (8,)), lab.rand(70, 48, dtype=dtype)
    with torch.no_grad(), fastlora.batch_invariant():
        y = model(x)
        for rows in ([0], [69, 3], range(40, 60)):
            assert torch.equal(model(x[list(rows)]), y[list(rows)])


@pytest.mark.usefixtures("dots")
def test_a_quantized_model() -> None:
    """Codes have one plan too, on both sides of 64 rows."""
    if torch.cuda.is_available():
        pytest.skip("bitsandbytes runs on the CPU, and kernels in the interpreter")
    block = Gated(64, 64, called=False).eval()
    block.gate, block.up = (
        quantize_linear(linear, "nf4 nested") for linear in (block.gate, block.up)
    )
    targets = ["gate", "up", "down"]
    config = fastlora.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    model = with_adapters(block, {"a": config, "b": config}).eval()
    exact, x = dequantized(model), torch.randn(66, 64)
    ids = ["a", None, "b", *["a", "b"] * 31, None]
    with torch.no_grad(), fastlora.batch_invariant(), pytest.MonkeyPatch.context() as patched:
        patched.setattr(type(block.gate.base_layer), "forward", None)  # it is not called
        y, mixed = model(x), run(model, x, ids)
        for rows in ([64, 3], [*range(40, 57)]):
            assert torch.equal(model(x[rows]), y[rows])
            assert torch.equal(run(model, x[rows], [ids[row] for row in rows]), mixed[rows])
    with torch.no_grad():
        torch.testing.assert_close(y, exact(x.double()).float())


def test_a_pool(lab: Any) -> None:
    """Slots and neighbors of an adapter come and go; its rows stay."""
    torch.manual_seed(0)
    base = Gated(48, 64, called=False).to(lab.device).eval()
    pool = fastlora.AdapterPool(base, target_modules=["gate", "up", "down"], max_adapters=2)
    model = build(lab, torch.float32, (4, 24, 16))

    def load(name: str) -> None:
        state = adapter_state.adapter_file_state_dict(model, name, model.state_dict(), False)
        pool.load(name, state, config=model.peft_config[name])

    load("a0")
    x = lab.rand(5, 48)
    y = run(base, x, ["a0"] * 5)
    load("a1")
    assert torch.equal(run(base, x, ["a1", "a0", None, "a0", "a0"])[[1, 3, 4]], y[[1, 3, 4]])
    pool.unload("a0")
    load("a2")
    pool.unload("a1")
    load("a0")
    assert torch.equal(run(base, x, ["a2", "a2", "a0", "a0", None])[2:4], y[2:4])


def test_compile(lab: Any, dtype: torch.dtype) -> None:
    """One trace inside of the mode and one outside, without a break."""
    from fastlora.ops.triton import forward

    model, x = build(lab, dtype, (8,)), lab.rand(7, 48, dtype=dtype)
    use_impl(model, "triton")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    plans: list[str] = []
    original = forward.linear

    def watched(*args: Any) -> Any:
        plans.append(args[-1])
        return original(*args)

    with pytest.MonkeyPatch.context() as patched, torch.no_grad():
        patched.setattr(forward, "linear", watched)
        compiled(x)
        with fastlora.batch_invariant():
            assert torch.equal(compiled(x), model(x))
        compiled(x)
    assert plans == [*["auto"] * 3, *["invariant"] * 6, *["auto"] * 3]


# ----------------------------------------------------------------------------------- refusals


def check_raises(model: Any, x: torch.Tensor, ids: Sequence[str | None] | None, match: str) -> None:
    with pytest.raises(ImplementationError, match=match), fastlora.batch_invariant():
        if ids is None:
            model(x)
        else:
            with fastlora.adapters(model, ids):
                model(x)
    assert not is_batch_invariant()


def test_errors_of_mixed_batches(lab: Any) -> None:
    model, x = build(lab, torch.float32, (8, 16)), lab.rand(2, 48)
    ids = ["a0", "a1"]
    layer = r"FastLoraLinear with base layer FastLoraLinear \(48 to 64 features\) cannot run"
    check_raises(model, x, ids, f"{layer}.*choose their tiles by batch")
    with torch.no_grad():
        with torch.autocast(lab.device.type, torch.bfloat16):
            check_raises(model, x, ids, "autocast is on; convert the model to torch.bfloat16")
        check_raises(model.train(), x, ids, "choose their tiles by batch")
        hook = model.base_model.model.gate.lora_A["a0"].register_forward_hook(lambda *_: None)
        check_raises(model.eval(), x, ids, "a factor that has hooks")
        hook.remove()
        check_raises(model.double(), x.double(), ids, "the kernels support fp16, bf16 and fp32")
        use_impl(model.float(), "eager")
        check_raises(model, x, ids, "impl='eager' cannot run in batch-invariant mode")
        with fastlora.adapters(model, ids):
            assert model(x).isfinite().all()


def test_errors_of_one_adapter(lab: Any) -> None:
    config = fastlora.LoraConfig(r=4, target_modules=["gate"], lora_dropout=0.5)
    model = fastlora.get_peft_model(Gated(48, 64, called=False).to(lab.device), config)
    x = lab.rand(2, 48)
    check_raises(
        model.train(), x, None, "dropout_p=0.5 is not supported .* its position in the batch"
    )
    model.eval()
    with model.disable_adapter():
        check_raises(
            model,
            x,
            None,
            "no adapter is active; for rows without an adapter, pass None in fastlora.adapters",
        )
    hook = model.base_model.model.gate.lora_A["default"].register_forward_hook(lambda *_: None)
    check_raises(model, x, None, "a factor with hooks")
    hook.remove()


def test_errors_of_wrapped_layers(lab: Any) -> None:
    """A base layer that is called as it is: named, before it runs."""

    class Own(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise AssertionError("the base layer ran")

    block = Gated(48, 64, called=False).to(lab.device)
    block.gate = Own(48, 64, device=lab.device)
    config = fastlora.LoraConfig(r=4, target_modules=["gate", "up", "down"])
    model = fastlora.get_peft_model(block, config).eval()
    x = lab.rand(2, 48)
    match = r"FastLoraWrapper with base layer Own \(48 to 64 features\).*its base layer's own GEMM"
    with torch.no_grad():
        check_raises(model, x, None, match)
        check_raises(model, x, ["default", None], match)

"""`fastlora.patch`: a PEFT model stays one in every way, next to an unpatched twin."""

from __future__ import annotations

import contextlib
import copy
import inspect
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastlora
from fastlora.validation import UnsupportedLayerError
from tests.support.tiny import TwoLayers, randomize, tiny_llama

peft = pytest.importorskip("peft", reason="patches PEFT models")
LoraLayer = peft.tuners.lora.LoraLayer
pytest.importorskip("transformers", reason="uses a Llama")

IDS = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(1))


def peft_model(**config: Any) -> Any:
    """A PEFT model with one random adapter, in float64: equal then means equal in every digit."""
    torch.manual_seed(1)
    config = {"r": 4, "target_modules": ["q_proj", "v_proj", "up_proj"], **config}
    model = peft.get_peft_model(tiny_llama().double(), peft.LoraConfig(**config))
    randomize(model)
    return model


def logits(model: Any) -> torch.Tensor:
    """Logits in evaluation mode."""
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def assert_same(model: Any, twin: Any) -> None:
    """Equal state and outputs, to float64 rounding (torch's own tolerances)."""
    mine, theirs = model.state_dict(), twin.state_dict()
    assert list(mine) == list(theirs)
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[name], msg=name)
    torch.testing.assert_close(logits(model), logits(twin))


def test_methods_have_the_signatures_of_pefts() -> None:
    """diffusers looks for ``adapter_names`` among the parameters of ``merge``."""
    model, twin = peft_model(), peft_model()
    fastlora.patch(model)
    pairs = [(model.base_model, twin.base_model)]
    for own, theirs in zip(model.modules(), twin.modules(), strict=True):
        if isinstance(theirs, LoraLayer):
            pairs.append((own, theirs))
    overridden = 0
    for own, theirs in pairs:
        for cls in type(own).__mro__[: type(own).__mro__.index(type(theirs))]:
            for name in vars(cls):
                method = getattr(theirs, name, None)
                if not name.startswith("_") and name != "forward" and inspect.ismethod(method):
                    found = inspect.signature(getattr(own, name)).parameters
                    assert [*found] == [*inspect.signature(method).parameters], name
                    overridden += 1
    assert overridden > 10


def test_training_goes_on_behind_a_patch() -> None:
    """Parameters and the optimizer's state stay, and modules that are adapted later are fused."""
    model, twin = peft_model(), peft_model()
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, twin)]

    def step() -> None:
        for m, optimizer in zip((model, twin), optimizers, strict=True):
            m.train()
            m(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    step()
    parameters = {n: id(p) for n, p in model.named_parameters()}
    report = fastlora.patch(model)
    assert report.fused == len(report.rows) == 6
    assert isinstance(model, peft.PeftModel)
    assert {n: id(p) for n, p in model.named_parameters()} == parameters
    step()
    assert_same(model, twin)
    for m in (model, twin):
        torch.manual_seed(5)
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj"], use_rslora=True)
        m.add_adapter("b", config)
        m.base_model.set_adapter(["default", "b"])
        randomize(m, seed=3)
    assert fastlora.fusion_report(model).fused == 8
    assert_same(model, twin)


def test_copies_and_unpatch() -> None:
    """deepcopy and pickle keep the patch; unpatch gives PEFT's classes back."""
    model = peft_model()
    classes = [type(m) for m in model.modules()]
    state = {n: t.clone() for n, t in model.state_dict().items()}
    fastlora.patch(model)
    expected = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert fastlora.fusion_report(other).fused == 6
        assert torch.equal(logits(other), expected)
    fastlora.patch(model)  # again: nothing more to do
    fastlora.unpatch(model)
    assert [type(m) for m in model.modules()] == classes
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert fastlora.fusion_report(model).fused == 0
    assert "call fastlora.patch(model) to fuse it" in str(fastlora.fusion_report(model))


def test_equal_lines_of_the_report_fold() -> None:
    """From two layers on; a line without an equal keeps the layer's full name."""
    model = fastlora.get_peft_model(tiny_llama(), fastlora.LoraConfig(target_modules="all-linear"))
    report = fastlora.fusion_report(model)
    names = [line.split("  ")[0] for line in str(report).splitlines()[2:]]
    assert len(report.rows) == 14 and len(names) == 7
    assert all(name.startswith("*.") and name.endswith(" (2)") for name in names)
    layer = model.base_model.model.model.layers[1].mlp.up_proj
    layer.lora_A["default"].register_forward_hook(lambda *_: None)
    lines = str(fastlora.fusion_report(model)).splitlines()[2:]
    apart = [line for line in lines if "has a factor with hooks" in line]
    assert len(lines) == 8 and ".layers.1.mlp.up_proj" in apart[0].split("  ")[0]


def test_scalings_of_a_patched_model() -> None:
    """Tensors beside them follow the layers' dtype; unpatched it has numbers."""
    model = peft_model()
    fastlora.patch(model)
    model.add_adapter("late", peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    randomize(model, seed=4)
    model.base_model.set_adapter(["default", "late"])
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    kinds = [m.scaling.tensors["late"].dtype for m in layers if "late" in m.scaling]
    assert kinds == [torch.float64] * 4
    assert {m.scaling.tensors["default"].dtype for m in layers} == {torch.float64}
    model.float()
    assert {m.scaling.tensors["default"].dtype for m in layers} == {torch.float32}
    expected = logits(model)
    fastlora.unpatch(model)
    assert {type(layer.scaling) for layer in layers} == {dict}
    torch.testing.assert_close(logits(model), expected)


def test_scalings_of_an_adapter_that_was_made_on_the_meta_device(tmp_path: Path) -> None:
    """PEFT loads it there and puts the file's weights in place: graphs find the scaling."""
    torch._dynamo.reset()
    peft_model(lora_alpha=3).save_pretrained(str(tmp_path))
    model = peft_model()
    fastlora.patch(model)
    model.load_adapter(str(tmp_path), "late", low_cpu_mem_usage=True)
    model.set_adapter("late")
    layer = next(m for m in model.modules() if isinstance(m, LoraLayer))
    assert layer.scaling.tensors["late"] == 0.75
    compiled = torch.compile(model.base_model.model, backend="eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled), logits(model))


def test_a_layer_whose_class_has_changed_is_not_unpatched() -> None:
    """Before anything else is."""
    model = peft_model()
    fastlora.patch(model)
    layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
    layers[-1].__class__ = type("Changed", (type(layers[-1]),), {})
    with pytest.raises(UnsupportedLayerError, match="to Changed, .* subclass of FastPeftLinear"):
        fastlora.unpatch(model)
    assert all(type(layer.scaling).__name__ == "Scalings" for layer in layers)


def hook(model: Any) -> None:
    """A hook on one base layer."""
    model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.register_forward_hook(
        lambda *_: None
    )


@pytest.mark.parametrize(
    ("config", "change", "fused", "reason"),
    [
        ({"use_dora": True}, None, 6, None),
        ({"use_dora": True}, hook, 5, "its base layer has forward hooks"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, None, 2, "PEFT Embedding layer"),
        ({}, hook, 5, "its base layer has forward hooks"),
        ({"lora_dropout": 0.1, "lora_bias": True}, None, 6, None),
    ],
)
def test_what_is_not_fused_says_why(
    config: dict[str, Any],
    change: Callable[[Any], None] | None,
    fused: int,
    reason: str | None,
) -> None:
    """A layer that cannot be fused runs as PEFT's or around its base, and the report says so."""
    model, twin = peft_model(**config), peft_model(**config)
    for m in (model, twin):
        if change is not None:
            change(m)
    report = fastlora.patch(model)
    assert report.fused == fused
    reasons = {row.reason for row in report.rows if not row.fused}
    assert (not reasons) if reason is None else any(reason in r for r in reasons)
    assert_same(model, twin)
    model.train()(input_ids=IDS, labels=IDS).loss.backward()


def test_nothing_to_patch() -> None:
    """A model without PEFT layers is refused and named."""
    with pytest.raises(UnsupportedLayerError, match="this TwoLayers has none"):
        fastlora.patch(TwoLayers())
    fastlora.unpatch(nn.Linear(2, 2))  # harmless


def mixed_models() -> tuple[Any, Any]:
    """A patched PEFT model with three adapters, and its unpatched twin."""
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        model = peft.get_peft_model(
            tiny_llama(), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), "a"
        )
        model.add_adapter("b", peft.LoraConfig(r=8, use_rslora=True, target_modules="all-linear"))
        model.add_adapter("c", peft.LoraConfig(r=4, lora_bias=True, target_modules=["k_proj"]))
        randomize(model)
        models.append(model.double().eval())
    fastlora.patch(models[0])
    return models[0], models[1]


def test_mixed_batches_are_pefts() -> None:
    """`adapter_names=` and `fastlora.adapters` on a patched model give PEFT's results."""
    patched, twin = mixed_models()
    ids = torch.randint(0, 97, (5, 6))
    names = ["b", "__base__", "a", "c", "b"]
    with torch.no_grad():
        expected = twin(input_ids=ids, adapter_names=names).logits
        for _ in range(3):
            torch.testing.assert_close(patched(input_ids=ids, adapter_names=names).logits, expected)
            with fastlora.adapters(patched, names):
                torch.testing.assert_close(patched(input_ids=ids).logits, expected)
        copied = copy.deepcopy(patched)
        torch.testing.assert_close(copied(input_ids=ids, adapter_names=names).logits, expected)
    with pytest.raises(ValueError, match="non-existing adapter"):
        patched(input_ids=ids, adapter_names=["d"] * 5)
    with patched.disable_adapter(), twin.disable_adapter():
        assert torch.equal(logits(patched), logits(twin))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_dropout_modules_that_train_in_evaluation_draw_other_masks_in_each_pass(
    context: Callable[[], contextlib.AbstractContextManager[None]],
) -> None:
    """Monte Carlo dropout with `adapter_names=`, and in blocks."""
    model = peft.get_peft_model(
        tiny_llama(), peft.LoraConfig(target_modules=["q_proj"], lora_dropout=0.5), "a"
    )
    randomize(model)
    fastlora.patch(model.eval())
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.train()
    ids, found = torch.randint(0, 97, (2, 6)), []
    with context():
        for _ in range(2):
            found.append(model(input_ids=ids, adapter_names=["a", "__base__"]).logits)
            with fastlora.adapters(model, ["a", None]):
                found += [model(input_ids=ids).logits for _ in range(2)]
    assert all(torch.equal(y[1], found[0][1]) for y in found)
    assert not any(torch.equal(y, x) for n, y in enumerate(found) for x in found[:n])


def test_mixed_batches_that_cannot_be_routed_are_pefts_own() -> None:
    """Modules to save: `adapter_names=` goes PEFT's way, `adapters` refuses."""
    patched, _ = mixed_models()
    patched.add_adapter(
        "d", peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    )
    ids = torch.randint(0, 97, (2, 6))
    raises_error = pytest.raises(fastlora.FastLoraError, match="lm_head.*adapter_names=")
    with raises_error, fastlora.adapters(patched, ["a", "b"]):
        patched(input_ids=ids)
    with pytest.raises(TypeError, match="got Linear"), fastlora.adapters(nn.Linear(2, 2), ["a"]):
        pass

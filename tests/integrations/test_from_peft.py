"""Names that scripts import from PEFT, imported from fastlora."""

from __future__ import annotations

import copy
import inspect
import pickle
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastlora
from fastlora.integrations import from_peft
from fastlora.integrations.from_peft import AS_IN_PEFT, AUTO_CLASSES, NAMES
from fastlora.routing.active import is_checking_rows
from fastlora.testing import assert_within_budget
from fastlora.validation import (
    AdapterNotFoundError,
    AdapterStateError,
    ConfigError,
    UnsupportedLayerError,
)
from tests.support.peft_twins import peft
from tests.support.programs import ROOT, python
from tests.support.tiny import TwoLayers, adapted, randomize, tiny_llama

X = torch.randn(5, 16, generator=torch.Generator().manual_seed(3))
IDS = torch.arange(6)[None]
BATCH = torch.arange(12).view(2, 6)


def test_the_import_of_a_qlora_script() -> None:
    from fastlora import (  # noqa: F401
        AutoPeftModelForCausalLM,
        LoraConfig,
        LoraRuntimeConfig,
        PeftConfig,
        PeftModel,
        PeftType,
        TaskType,
        cast_mixed_precision_params,
        get_peft_model,
        get_peft_model_state_dict,
        inject_adapter_in_model,
        prepare_model_for_kbit_training,
        set_peft_model_state_dict,
    )

    assert isinstance(LoraConfig(), PeftConfig)
    assert PeftType.LORA == peft.PeftType.LORA and hash(PeftType.LORA) == hash(peft.PeftType.LORA)
    config = LoraConfig(runtime_config=LoraRuntimeConfig(ephemeral_gpu_offload=True))
    assert config.runtime_config.ephemeral_gpu_offload


def test_every_name() -> None:
    """PEFT's own object where it works on fastlora models; `dir` lists all of them."""
    assert set(NAMES) <= set(dir(fastlora)) and len(set(NAMES)) == len(NAMES)
    for name in NAMES:
        if hasattr(peft, name):
            assert (getattr(fastlora, name) is getattr(peft, name)) == (name in AS_IN_PEFT)
    for name in AUTO_CLASSES:
        assert issubclass(getattr(fastlora, name), getattr(peft, name))
        assert getattr(fastlora, name) is getattr(fastlora, name)
    with pytest.raises(AttributeError, match="module 'fastlora' has no attribute 'nonsense'"):
        _ = fastlora.nonsense  # type: ignore[attr-defined]
    with pytest.raises(ImportError, match="cannot import name 'nonsense'"):
        from fastlora import nonsense  # type: ignore[attr-defined]  # noqa: F401


def test_without_peft(tmp_path: Path) -> None:
    """The error says what to install, and no name is listed that cannot be imported."""
    code = """
import sys
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "peft" else find(name, *rest)
import fastlora
assert "peft" not in sys.modules
sys.modules["peft"] = None
for name in dir(fastlora):
    getattr(fastlora, name)
try:
    from fastlora import prepare_model_for_kbit_training
except ImportError as error:
    print(error)
from fastlora import LoraRuntimeConfig, PeftType
"""
    assert python(code, tmp_path, PYTHONPATH=str(ROOT)) == (
        "fastlora.prepare_model_for_kbit_training is provided by PEFT, which is not installed; "
        "install it with: pip install peft\n"
    )


def test_an_older_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(peft, "load_peft_weights")
    with pytest.raises(ImportError, match=f"PEFT {peft.__version__} does not include it; upgrade"):
        from_peft.import_from_peft("load_peft_weights")


@pytest.mark.parametrize("library", [fastlora, peft], ids=["ours", "theirs"])
def test_state_dicts(library: Any) -> None:
    """Of a model of either library: what is saved of one is set in another."""
    model, other = adapted(library, seed=1), adapted(library, seed=2)
    expected = model(X).detach()
    assert not torch.equal(other(X), expected)
    state = fastlora.get_peft_model_state_dict(model)
    assert {*state} == {*peft.get_peft_model_state_dict(adapted(peft))}
    fastlora.set_peft_model_state_dict(other, state)
    torch.testing.assert_close(other(X), expected)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter that names its base model."""
    pytest.importorskip("transformers")
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    config = fastlora.LoraConfig(
        target_modules=["q_proj"],
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(tmp_path / "base"),
    )
    model = fastlora.get_peft_model(base, config)
    randomize(model)
    model.eval().save_pretrained(tmp_path / "adapter")
    torch.save(model(IDS).logits.detach(), tmp_path / "logits")
    return tmp_path


def test_an_auto_class_loads_a_model_of_fastlora(folder: Path) -> None:
    """With the options of the base model, which PEFT's class passes on to the adapter too."""
    model = fastlora.AutoPeftModelForCausalLM.from_pretrained(
        folder / "adapter", is_trainable=True, dtype=torch.float32, device_map=None
    )
    assert type(model) is fastlora.LoraModel
    torch.testing.assert_close(model.eval()(IDS).logits, torch.load(folder / "logits"))
    assert any(p.requires_grad for p in model.parameters())
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(folder / "adapter")
    assert not isinstance(theirs, fastlora.LoraModel)
    with pytest.raises(ValueError, match="Expected target PEFT class: PeftModelForCausalLM"):
        fastlora.AutoPeftModelForSeq2SeqLM.from_pretrained(folder / "adapter")


def test_a_config_from_a_folder_is_accepted(folder: Path) -> None:
    config = fastlora.PeftConfig.from_pretrained(folder / "adapter")
    model = fastlora.get_peft_model(tiny_llama(), config)
    assert type(model) is fastlora.LoraModel
    weights = fastlora.load_peft_weights(str(folder / "adapter"))
    fastlora.set_peft_model_state_dict(model, weights)
    torch.testing.assert_close(model.eval()(IDS).logits, torch.load(folder / "logits"))


@pytest.mark.parametrize("library", [fastlora, peft], ids=["ours", "theirs"])
def test_injected_adapters_are_patched(library: Any) -> None:
    """As PEFT's own injection computes, with a config of either library."""
    config = library.LoraConfig(r=4, target_modules=["q", "v"], init_lora_weights=False)
    torch.manual_seed(0)
    model = fastlora.inject_adapter_in_model(config, TwoLayers())
    torch.manual_seed(0)
    theirs = peft.inject_adapter_in_model(
        peft.LoraConfig(r=4, target_modules=["q", "v"], init_lora_weights=False), TwoLayers()
    )
    assert type(model) is TwoLayers and len(fastlora.fusion_report(model).rows) == 2
    torch.testing.assert_close(model(X), theirs(X))
    more = fastlora.inject_adapter_in_model(config, model, "more")
    assert more is model and set(model.q.lora_A) == {"default", "more"}


@pytest.fixture
def injected() -> Any:
    """A Llama into which a LoRA and a DoRA adapter were injected."""
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = tiny_llama()
    for name, config in (
        ("a", peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])),
        ("b", peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], use_dora=True)),
    ):
        fastlora.inject_adapter_in_model(config, model, name)
    randomize(model)
    return model.eval()


def apply_only(model: nn.Module, name: str | None) -> None:
    """Activate one adapter, or disable all of them."""
    for module in model.modules():
        if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
            module.enable_adapters(name is not None)
            if name is not None:
                module.set_adapter(name)


def alone(model: Any, name: str | None, row: int) -> dict[str, torch.Tensor]:
    """The logits of one row with one adapter, and the gradients of the adapter."""
    apply_only(model, name)
    logits = model(BATCH[row : row + 1]).logits
    if name is not None:
        logits.square().sum().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {"logits": logits[0].detach(), **found}


@pytest.mark.parametrize(
    "made", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_mixed_batches_of_injected_adapters(injected: Any, made: Any) -> None:
    """Values and gradients are those of each adapter alone, also in copies."""
    with fastlora.adapters(injected, ["a", "b"]):
        injected(BATCH)
    model = made(injected)
    assert model.generate.__wrapped__ == type(model).generate.__get__(model)
    assert inspect.signature(model.generate) == inspect.signature(
        type(model).generate.__get__(model)
    )
    expected = [alone(model, name, row) for row, name in enumerate(["b", None])]
    apply_only(model, "b")  # its parameters require gradients again
    with fastlora.adapters(model, ["b", None]):
        logits = model(BATCH).logits
    logits[0].square().sum().backward()
    for row, single in enumerate(expected):
        torch.testing.assert_close(logits[row], single.pop("logits"))
        for name, gradient in single.items():
            torch.testing.assert_close(model.get_parameter(name).grad, gradient, msg=name)
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {*expected[0]} and trained
    with (
        pytest.raises(ValueError, match="2 samples .* and 3 adapter ids"),
        fastlora.adapters(model, ["a", "b", None]),
    ):
        model(BATCH)


def test_rows_of_injected_models_are_tracked_once(injected: Any) -> None:
    """Row tracking intercepts every operator, so later batches must go without it."""
    tracked = []
    for _ in range(3):
        with fastlora.adapters(injected, ["a", "b"]):
            injected(BATCH)
            tracked.append(is_checking_rows())
    assert tracked == [True, False, False]


def test_the_life_of_injected_adapters_with_mixed_batches(injected: Any) -> None:
    """Generation, adapters that are added and deleted, and the end of the patch."""
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    apply_only(injected, "b")
    greedy = injected.generate(BATCH, **options)[1]
    beams = injected.generate(BATCH, num_beams=2, **options)[1]
    with fastlora.adapters(injected, ["a", "b"]):
        torch.testing.assert_close(injected.generate(BATCH, **options)[1], greedy)
        found = injected.generate(BATCH, num_beams=2, **options)[1]
        torch.testing.assert_close(found, beams)
        with pytest.raises(AdapterStateError, match="delete_adapter"):
            injected.model.layers[0].self_attn.q_proj.delete_adapter("a")
    with (
        pytest.raises(ValueError, match="2 samples and 12 adapter ids; generate"),
        fastlora.adapters(injected, ["a", "b"] * 6),
    ):
        injected.generate(BATCH, **options)
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["o_proj"]), injected, "c")
    with (
        pytest.raises(UnsupportedLayerError, match="o_proj' was added .* fastlora.patch"),
        fastlora.adapters(injected, ["a", "c"]),
    ):
        pass
    fastlora.patch(injected)
    randomize(injected, seed=2)
    expected = alone(injected.eval(), "c", 1)["logits"]
    with fastlora.adapters(injected, ["a", "c"]):
        torch.testing.assert_close(injected(BATCH).logits[1], expected)
    fastlora.unpatch(injected)
    assert not injected._forward_pre_hooks
    assert not {"_fastlora_router", "generate"} & {*vars(injected)}
    with (
        pytest.raises(TypeError, match="expects a LoraModel"),
        fastlora.adapters(injected, ["a", "b"]),
    ):
        pass


def rows_alone(model: Any, names: list[str | None]) -> torch.Tensor:
    """Logits of each row, with a block for its adapter alone."""
    rows = []
    for row, name in enumerate(names):
        with torch.no_grad(), fastlora.adapters(model, [name]):
            rows.append(model(BATCH[row : row + 1]).logits)
    return torch.cat(rows)


def assert_routed(model: Any, names: list[str | None], expected: torch.Tensor) -> None:
    with torch.no_grad(), fastlora.adapters(model, names):
        torch.testing.assert_close(model(BATCH).logits, expected)


def test_models_that_share_layers_take_turns() -> None:
    """A PeftModel, its base model, a shallow copy, and a layer that was patched again."""
    pytest.importorskip("transformers")
    outer = peft.get_peft_model(
        tiny_llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="a"
    )
    outer.add_adapter("b", peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    randomize(outer)
    fastlora.patch(outer.eval())
    inner = outer.get_base_model()
    expected = rows_alone(copy.deepcopy(outer), ["b", "a"])
    shallow = copy.copy(inner)
    for model in (outer, inner, shallow, outer, copy.deepcopy(outer), inner, shallow):
        assert_routed(model, ["b", "a"], expected)
    for model, other in ((outer, shallow), (shallow, inner)):
        with fastlora.adapters(model, ["b", "a"]):
            with (
                pytest.raises(AdapterStateError, match="open for another model"),
                fastlora.adapters(other, ["a", "b"]),
            ):
                pass
            torch.testing.assert_close(model(BATCH).logits, expected)
    with fastlora.adapters(inner, ["b", "a"]):
        assert_routed(outer, ["a", "b"], rows_alone(copy.deepcopy(outer), ["a", "b"]))
        torch.testing.assert_close(outer(BATCH).logits, expected)
        with pytest.raises(AdapterStateError, match="merge_adapter"):
            outer.merge_adapter()
    layer = inner.model.layers[0].self_attn.q_proj
    fastlora.unpatch(layer)
    fastlora.patch(layer)
    assert_routed(outer, ["b", "a"], expected)


class Wrapper(nn.Module):
    """A model with a ``peft_config`` of its own, as a trainer's wrapper may have."""

    def __init__(self, model: Any, peft_config: Any) -> None:
        super().__init__()
        self.inner, self.peft_config = model, peft_config
        self.first = nn.ModuleList([model.get_base_model().model.layers[0].self_attn.q_proj])

    def forward(self, ids: torch.Tensor) -> Any:
        return self.inner(ids)


@pytest.mark.parametrize("peft_config", [{}, {"a": 1}, {"policy": peft.LoraConfig()}, None])
def test_wrappers_of_a_peft_model(peft_config: Any) -> None:
    """Names and slots are those of the PeftModel, and the layers may be referred to twice."""
    pytest.importorskip("transformers")
    model = peft.get_peft_model(
        tiny_llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="a"
    )
    model.add_adapter("b", peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    randomize(model)
    fastlora.patch(model.eval())
    expected = rows_alone(model, ["b", "a"])
    wrapper = Wrapper(model, peft_config)
    assert_routed(wrapper, ["b", "a"], expected)
    with torch.no_grad(), fastlora.adapters(wrapper, torch.tensor([1, 0])):
        torch.testing.assert_close(wrapper(BATCH).logits, expected)
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["o_proj"]), model.get_base_model())
    with (
        pytest.raises(UnsupportedLayerError, match="o_proj' was added"),
        fastlora.adapters(model, ["b", "a"]),
    ):
        pass


def test_threads_open_blocks_of_one_injected_model(injected: Any) -> None:
    """A search of the modules by one thread is never seen unfinished by another."""
    interval, errors = sys.getswitchinterval(), list[BaseException]()

    def run() -> None:
        try:
            for _ in range(150):
                with fastlora.adapters(injected, ["a", "b"]):
                    pass
        except Exception as error:  # noqa: BLE001  # any of them
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    try:
        sys.setswitchinterval(1e-6)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert errors == []


def test_a_patch_after_the_last_adapter_was_deleted(injected: Any) -> None:
    """As transformers deletes adapters: layer by layer, and then the config."""
    with fastlora.adapters(injected, ["a", "b"]):
        injected(BATCH)
    for module in injected.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            for name in [*module.lora_A]:
                module.delete_adapter(name)
    del injected.peft_config
    fastlora.patch(injected)
    with (
        pytest.raises(TypeError, match="expects a LoraModel"),
        fastlora.adapters(injected, ["a"]),
    ):
        pass


def test_mixed_batches_after_unload() -> None:
    """Nothing of the router stays on the base model, and new adapters must be patched."""
    pytest.importorskip("transformers")
    base, config = tiny_llama(), peft.LoraConfig(r=2, target_modules=["q_proj"])
    before = {*vars(base)}
    for unload in ("unload", "merge_and_unload"):
        model = peft.get_peft_model(base, config, adapter_name="a")
        fastlora.patch(model.eval())
        for used in (model, model.get_base_model(), model):
            with fastlora.adapters(used, ["a", None]):
                used(BATCH)
        assert getattr(model, unload)() is base
        assert {*vars(base)} - {"peft_config"} == before and not base._forward_pre_hooks
        again = peft.get_peft_model(base, config, adapter_name="a")
        for used in (again, base, model):
            with (
                pytest.raises((TypeError, UnsupportedLayerError), match="patched|adapters"),
                fastlora.adapters(used, ["a", None]),
            ):
                pass
        again.unload()


def test_layers_that_are_replaced_in_the_base_model() -> None:
    """A call for the base model searches its modules again, also after calls with a tuner."""
    pytest.importorskip("transformers")
    model = peft.get_peft_model(
        tiny_llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="a"
    )
    randomize(model)
    fastlora.patch(model.eval())
    base = model.get_base_model()
    expected = rows_alone(model, ["a", None])
    attention = base.model.layers[0].self_attn
    attention.q_proj = copy.deepcopy(attention.q_proj)
    assert_routed(base, ["a", None], expected)
    model.peft_config["b"] = model.peft_config["a"]
    model.base_model.peft_config = {"b": model.peft_config["a"], "a": model.peft_config["a"]}
    with torch.no_grad(), fastlora.adapters(model, torch.tensor([1, -1])):
        torch.testing.assert_close(model(BATCH).logits, expected)
    fastlora.unpatch(attention.q_proj)
    with (
        pytest.raises(UnsupportedLayerError, match="is not patched"),
        fastlora.adapters(model, ["a", None]),
    ):
        pass


def test_copies_track_rows_again(injected: Any) -> None:
    with fastlora.adapters(injected, ["a", "b"]):
        injected(BATCH)
    for made in (copy.deepcopy(injected), pickle.loads(pickle.dumps(injected))):
        tracked = []
        for _ in range(2):
            with fastlora.adapters(made, ["a", "b"]):
                made(BATCH)
                tracked.append(is_checking_rows())
        assert tracked == [True, False]


def test_adapters_that_cannot_be_routed_raise(injected: Any) -> None:
    """Other methods, layers outside the model, and an adapter without layers."""
    other = copy.deepcopy(injected)
    with (
        pytest.raises(UnsupportedLayerError, match="layers outside its LlamaForCausalLM"),
        fastlora.adapters(nn.ModuleList([injected, other]), ["a", "b"]),
    ):
        pass
    for module in other.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.delete_adapter("b")
    with (
        pytest.raises(AdapterNotFoundError, match="no LoRA layer has the adapter 'b'"),
        fastlora.adapters(other, ["a", "b"]),
    ):
        pass
    with (
        pytest.raises(AdapterNotFoundError, match="no LoRA layer has the adapter 'b'"),
        fastlora.adapters(other, torch.tensor([0, 1])),
    ):
        pass
    config = peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    peft.inject_adapter_in_model(config, injected, "c")
    with (
        pytest.raises(UnsupportedLayerError, match="k_proj' is a PEFT Linear of peft.tuners.ia3"),
        fastlora.adapters(injected, ["a", "b"]),
    ):
        pass


def test_generate_of_a_compiled_and_of_a_wrapped_model(injected: Any) -> None:
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    compiled = torch.compile(injected, backend="eager")
    with fastlora.adapters(compiled, ["a", "b"]):
        expected = injected.generate(BATCH, **options)
        assert compiled.generate(BATCH, **options).equal(expected)
    apply_only(injected, "a")
    before, generate = injected.generate(BATCH, **options), injected.generate
    assert compiled.generate(BATCH, **options).equal(before)
    injected.generate = lambda *args, **kwargs: generate(*args, **kwargs)
    fastlora.unpatch(injected)
    assert injected.generate(BATCH, **options).equal(before)


def test_injections_that_raise() -> None:
    """They leave the model as it was."""
    model = adapted()
    names = [name for name, _ in model.named_modules()]
    config = fastlora.LoraConfig(target_modules=["q"])
    with pytest.raises(AdapterStateError, match="add_adapter"):
        fastlora.inject_adapter_in_model(config, model)
    assert [name for name, _ in model.named_modules()] == names
    base = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ConfigError, match="peft_type is 'IA3'; expected 'LORA'"):
        fastlora.inject_adapter_in_model(
            peft.IA3Config(target_modules=["0"], feedforward_modules=[]), base
        )
    assert type(base[0]) is nn.Linear


def test_preparation_for_kbit_training() -> None:
    """A frozen base in fp32, over which adapters train."""
    pytest.importorskip("transformers")
    base = tiny_llama().to(torch.bfloat16)
    prepared = fastlora.prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    assert prepared is base and not any(p.requires_grad for p in base.parameters())
    model = fastlora.get_peft_model(prepared, fastlora.LoraConfig(target_modules=["q_proj"]))
    model(input_ids=IDS, labels=IDS).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {n for n, p in model.named_parameters() if "lora_" in n}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision(dtype: torch.dtype) -> None:
    """What trains is in fp32, the base in 16 bits, and the output follows the new weights."""
    model = adapted()
    model(X)
    fastlora.cast_mixed_precision_params(model, dtype)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if "lora_" in name else dtype), name
    twin = adapted(peft)
    peft.cast_mixed_precision_params(twin, dtype)
    truth = copy.deepcopy(twin).double()(X.to(dtype).double())
    assert_within_budget(model(X.to(dtype)), twin(X.to(dtype)), truth)

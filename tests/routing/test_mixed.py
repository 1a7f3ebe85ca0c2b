"""Batches that mix adapters: PEFT's outputs, solo gradients and runs, and nothing leaks."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import adapters
from fastlora.routing.in_force import current_routing
from fastlora.testing import assert_within_budget
from fastlora.validation import AdapterNotFoundError, AdapterStateError
from tests.support.tiny import TwoLayers, randomise

peft = pytest.importorskip("peft", reason="compares with PEFT")

CONFIGS: dict[str, dict[str, Any]] = {
    "a": {"r": 1, "target_modules": ["q", "v"]},
    "b": {"r": 3, "lora_alpha": 16, "use_rslora": True, "target_modules": ["q"]},
    "c": {"r": 16, "lora_bias": True, "target_modules": ["q", "v"]},
    "d": {"r": 64, "lora_alpha": 5, "target_modules": ["v"], "modules_to_save": ["head"]},
}
NAMES = ["b", "__base__", "a", "d", "c", "b", "a", None]


def build(library: Any, base: nn.Module, configs: dict[str, dict[str, Any]] = CONFIGS) -> Any:
    """A model with every adapter of CONFIGS, factors at random."""
    model = None
    for name, config in configs.items():
        torch.manual_seed(5)
        if model is None:
            model = library.get_peft_model(base, library.LoraConfig(**config), adapter_name=name)
        else:
            model.add_adapter(name, library.LoraConfig(**config))
    randomise(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.1)
    return model


def ours() -> Any:
    """Ours, over TwoLayers."""
    torch.manual_seed(0)
    return build(fastlora, TwoLayers())


def alone(model: Any, x: torch.Tensor, name: str | None) -> torch.Tensor:
    """A row's output with its adapter alone."""
    if name in (None, "__base__"):
        with model.disable_adapter():
            return model(x)
    model.set_adapter(name)
    return model(x)


@pytest.mark.parametrize("seed", range(4))
def test_outputs_are_pefts(seed: int) -> None:
    """Random mixes, ranks 1 to 64, rsLoRA, lora_bias and base rows among them."""
    # In a mixed batch PEFT fails on a module of modules_to_save that some adapter does not own.
    configs = {n: {**c, "modules_to_save": None} for n, c in CONFIGS.items()}
    torch.manual_seed(0)
    model = build(fastlora, TwoLayers(), configs).eval()
    torch.manual_seed(0)
    twin = build(peft, TwoLayers(), configs).eval()
    theirs = dict(twin.named_parameters())
    generator = torch.Generator().manual_seed(seed)
    choice = torch.randint(0, 5, (9,), generator=generator).tolist()
    names = ["__base__" if i == 4 else "abcd"[i] for i in choice]
    x = torch.randn(9, 7, 16, generator=generator)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                theirs[name].copy_(parameter)
        actual, expected = (m(x, adapter_names=names) for m in (model, twin))
        exact = twin.double()(x.double(), adapter_names=names)
        assert_within_budget(actual, expected, exact)


def test_outputs_are_each_rows_alone() -> None:
    """Own heads included: every row's output is its adapter's alone."""
    model = ours().double().eval()
    x = torch.randn(len(NAMES), 7, 16).double()
    y = model(x, adapter_names=NAMES)
    for i, name in enumerate(NAMES):
        torch.testing.assert_close(y[i : i + 1], alone(model, x[i : i + 1], name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_adapters_of_one_rank(dtype: torch.dtype) -> None:
    """The batched products give each row what its adapter gives alone, NaN of others included."""
    configs: dict[str, dict[str, Any]] = {
        f"a{i}": {"r": 4, "lora_alpha": 2 * i, "lora_bias": i % 2 == 0, "target_modules": ["q"]}
        for i in range(1, 9)
    }
    model = build(fastlora, TwoLayers().to(dtype), configs).eval()
    names: list[str | None] = [f"a{1 + (5 * i) % 8}" if i % 5 else None for i in range(20)]
    x = torch.randn(20, 3, 16).to(dtype)
    with torch.no_grad():
        for name in configs:
            up = model.base_model.model.q.lora_B[name]
            if up.bias is not None:
                up.bias.normal_()
        model.base_model.model.q.lora_A["a3"].weight.fill_(float("nan"))
        y, exact = model(x, adapter_names=names), copy.deepcopy(model).double()
        for i, name in enumerate(names):
            if name == "a3":
                assert torch.isnan(y[i]).all()
                continue
            own = x[i : i + 1]
            truth = alone(exact, own.double(), name)
            assert_within_budget(y[i : i + 1], alone(model, own, name), truth, f"row {i}")


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """Gradients by name, and clears them."""
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def test_gradients_are_the_solo_runs() -> None:
    """Every adapter's gradients, and the input's, equal those of its rows alone (float64)."""
    model = ours().double()
    for key, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in key or "modules_to_save" in key)
    x = torch.randn(len(NAMES), 5, 16, dtype=torch.float64, requires_grad=True)
    w = torch.randn(len(NAMES), 5, 5, dtype=torch.float64)
    with adapters(model, NAMES):
        y = model(x)
    (y * w).sum().backward()
    dx, mixed = x.grad.clone(), gradients(model)
    x.grad = None
    expected: dict[str, torch.Tensor] = {}
    for i, name in enumerate(NAMES):
        (alone(model, x[i : i + 1], name) * w[i : i + 1]).sum().backward()
        for key, gradient in gradients(model).items():
            expected[key] = expected.get(key, 0) + gradient
    assert set(mixed) == {k for k, g in expected.items() if g.abs().sum() > 0}
    for key, gradient in mixed.items():
        torch.testing.assert_close(gradient, expected[key], msg=key)
    torch.testing.assert_close(dx, x.grad)


def test_backward_inside_autocast() -> None:
    """A mixed forward outside autocast can have its backward inside, in the forward's dtype."""
    layer_model = ours()
    layer_model.set_adapter(["a", "b", "c"])
    x = torch.randn(len(NAMES), 16)
    with adapters(layer_model, NAMES):
        y = layer_model.base_model.model.q(x)
    with torch.autocast("cpu", torch.bfloat16):
        y.sum().backward()
    inside = gradients(layer_model)
    with adapters(layer_model, NAMES):
        layer_model.base_model.model.q(x).sum().backward()
    outside = gradients(layer_model)
    assert set(inside) == set(outside) != set()
    assert all(torch.equal(gradient, outside[key]) for key, gradient in inside.items())


def test_factors_on_another_device_are_refused() -> None:
    """Never garbage: a factor left on the meta device raises in a mixed batch too."""
    model = ours()
    model.base_model.model.q.lora_A["a"].to("meta")
    with pytest.raises(ValueError, match="lora_a is on meta, expected cpu"):
        model(torch.randn(1, 16), adapter_names=["a"])


def test_joint_training_is_solo_training() -> None:
    """20 steps of four adapters, dropout, uneven rows: each adapter ends where it does alone."""
    configs = {
        name: {"r": r, "lora_dropout": 0.1, "target_modules": ["q", "v"]}
        for name, r in (("a", 2), ("b", 4), ("c", 8), ("d", 4))
    }
    generator = torch.Generator().manual_seed(0)
    steps = []
    for _ in range(20):
        rows = torch.randint(0, 4, (7,), generator=generator).tolist()
        names = ["abcd"[i] for i in rows]
        steps.append((names, torch.randn(7, 16, generator=generator).double()))

    def train(only: str | None) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        # In float64, so that equal means equal in every digit that AdamW could blow up.
        model = build(fastlora, TwoLayers().double(), configs).train()
        model.set_adapter(list(configs))
        optimizers = {
            name: torch.optim.AdamW(
                [p for n, p in model.named_parameters() if f".{name}." in n], lr=1e-2
            )
            for name in configs
        }
        for step, (names, x) in enumerate(steps):
            keep = [i for i, name in enumerate(names) if only in (None, name)]
            present = sorted({names[i] for i in keep})
            if not keep:
                continue
            seeds = {name: 1000 * step + ord(name) for name in present}
            with adapters(model, [names[i] for i in keep], seeds=seeds):
                y = model(x[keep])
            y.pow(2).sum().backward()
            for name in present:  # AdamW moves on zero gradients: no rows, no step
                optimizers[name].step()
                optimizers[name].zero_grad()
        return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}

    joint = train(None)
    for name in configs:
        solo = train(name)
        for key in (k for k in joint if f".{name}." in k):
            torch.testing.assert_close(joint[key], solo[key], msg=key)


def test_nothing_leaks_between_rows() -> None:
    """NaN in one adapter's factors, or in one row, reaches no other row and no other gradient."""
    model = ours()
    model.set_adapter(["a", "b", "c"])
    x = torch.randn(8, 3, 16)
    with adapters(model, NAMES):
        expected = model(x)
    with torch.no_grad():
        model.base_model.model.q.lora_A["b"].weight.fill_(float("nan"))
        x[2] = float("inf")  # a row of "a"
    with adapters(model, NAMES):
        y = model(x)
    touched = [i for i, name in enumerate(NAMES) if name == "b" or i == 2]
    clean = [i for i in range(8) if i not in touched]
    torch.testing.assert_close(y[clean], expected[clean])
    assert not torch.isfinite(y[touched]).all(dim=(1, 2)).any()
    y[clean].sum().backward()
    c = model.base_model.model.v.lora_A["c"].weight.grad
    assert torch.isfinite(c).all()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoints_outside_the_block_and_in_another_thread(use_reentrant: bool) -> None:
    """A recomputed forward has its own routing, also when two with different ones are pending."""
    model = ours()
    model.set_adapter(["a", "b", "c"])
    for layer in (model.base_model.model.q, model.base_model.model.v):
        for name in layer.lora_dropout:
            layer.lora_dropout[name] = nn.Dropout(0.3)
    x = torch.randn(8, 3, 16, requires_grad=True)
    mixes = [NAMES, NAMES[::-1]]

    def run(kind: str) -> dict[str, torch.Tensor]:
        torch.manual_seed(2)
        outputs = []
        for names in mixes:
            with adapters(model, names):
                if kind == "plain":
                    outputs.append(model(x))
                else:
                    outputs.append(checkpoint(model, x, use_reentrant=use_reentrant))
        loss = sum(y.pow(2).sum() for y in outputs)
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
        return gradients(model)

    expected, found = run("plain"), run("checkpoint")
    assert set(found) == set(expected)
    for key, gradient in found.items():
        assert torch.equal(gradient, expected[key]), key


def test_state_is_always_restored() -> None:
    """Nested blocks, exceptions and threads: each has its own routing, and none stays behind."""
    model, other = ours(), ours()
    x = torch.randn(2, 16)
    with pytest.raises(RuntimeError), adapters(model, ["a", "b"]):
        with adapters(model, ["b", "b"]):
            inner = model(x)
        seen = []
        thread = threading.Thread(target=lambda: seen.append(current_routing()))
        thread.start()
        thread.join()
        assert seen == [None]
        outer, untouched = model(x), other(x)
        raise RuntimeError
    assert current_routing() is None
    torch.testing.assert_close(inner[1], outer[1])
    assert not torch.allclose(inner[0], outer[0])
    assert torch.equal(untouched, other(x))  # another model in the block uses its active adapter


def test_copies_keep_their_routing() -> None:
    """A copied or unpickled model takes part in its own blocks."""
    model, x = ours(), torch.randn(8, 16)
    expected = model(x, adapter_names=NAMES)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x, adapter_names=NAMES), expected)


def test_ids_per_token_and_slots() -> None:
    """An int tensor gives slots, for each sample or each token, -1 for the base."""
    model = ours()
    x = torch.randn(3, 4, 16)
    slots = torch.tensor([1, 0, -1])
    expected = model(x, adapter_names=["b", "a", None])
    with adapters(model, slots):
        assert torch.equal(model(x), expected)
    with adapters(model, slots.repeat_interleave(4)):
        assert torch.equal(model(x), expected)


def test_wrapped_base_layers() -> None:
    """GPT-2's Conv1D takes part like any other."""
    pytest.importorskip("transformers")
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=2)
    base = GPT2LMHeadModel(config).double().eval()
    configs = {
        "a": {"r": 2, "target_modules": ["c_attn"]},
        "b": {"r": 4, "target_modules": ["c_proj"]},
    }
    model = build(fastlora, base, configs).eval()
    ids = torch.randint(0, 50, (3, 6))
    y = model(input_ids=ids, adapter_names=["b", None, "a"]).logits
    for i, name in enumerate(("b", None, "a")):
        with torch.no_grad():
            expected = alone(model, ids[i : i + 1], name).logits
        torch.testing.assert_close(y[i : i + 1], expected)


def test_generate_with_beams(fresh_smollm2: Callable[..., Any], smollm2_tokenizer: Any) -> None:
    """On SmolLM2, mixed generation gives PEFT's tokens, greedy and with beam search."""
    configs = {
        "a": {"r": 8, "target_modules": ["q_proj", "v_proj"]},
        "b": {"r": 3, "target_modules": "all-linear", "use_rslora": True},
    }
    model, twin = build(fastlora, fresh_smollm2(), configs), build(peft, fresh_smollm2(), configs)
    theirs = dict(twin.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                theirs[name].copy_(parameter.mul_(0.1))
    prompts = ["The sea is", "My cat is called", "Paris is"]
    smollm2_tokenizer.padding_side = "left"
    prompt = smollm2_tokenizer(prompts, return_tensors="pt", padding=True)
    names = ["b", "__base__", "a"]
    for beams in (1, 2):
        arguments = {**prompt, "max_new_tokens": 6, "do_sample": False, "num_beams": beams}
        tokens = [m.eval().generate(**arguments, adapter_names=names) for m in (model, twin)]
        assert torch.equal(*tokens)


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "name": (["a", "bb"], AdapterNotFoundError, r"no adapter 'bb'.*close names: b"),
    "slot": (torch.tensor([0, 4]), AdapterNotFoundError, "slot 4; expected -1 for none or 0 to 3"),
    "negative": (torch.tensor([0, -2]), AdapterNotFoundError, "slot -2"),
    "empty": ([], ValueError, "ids is empty"),
    "length": (["a", "b", "c"], ValueError, "2 samples .2 tokens. and 3 adapter ids"),
    "string": ("ab", TypeError, "is the string 'ab'"),
    "dtype": (torch.tensor([0.5, 1.0]), TypeError, "torch.float32, expected integers"),
    "shape": (torch.zeros(1, 2, dtype=torch.int64), ValueError, "expected one dimension"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    """Wrong ids raise one clear error and leave no routing behind."""
    ids, error, message = REFUSED[case]
    model = ours()
    with pytest.raises(error, match=message), adapters(model, ids):
        model(torch.randn(2, 16))
    assert current_routing() is None


def test_merged_adapters_are_refused() -> None:
    """Merged weights are every row's, so mixing is refused before any work."""
    model = ours()
    model.merge_adapter(["a"])
    with pytest.raises(AdapterStateError, match=r"\['a'\] are merged"):
        model(torch.randn(1, 16), adapter_names=["b"])

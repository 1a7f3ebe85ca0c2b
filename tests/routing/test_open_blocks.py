"""Open blocks of `fastlora.adapters` while adapters come, and calls that used to go wrong late."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import LoraConfig, adapters
from fastlora.validation import AdapterNotFoundError, AdapterStateError, UnsupportedLayerError
from tests.support import programs
from tests.support.tiny import tiny_llama, unchanged

X = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
MIX = ["a", "b", None, "b"]


class Three(nn.Module):
    """k, q and v in sequence, and h, which is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.k, self.q, self.v, self.h = (nn.Linear(32, 32, bias=False) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps ``[..., 32]`` to ``[..., 32]``."""
        return self.v(self.q(self.k(x)).sin())


def config(*targets: str, **more: Any) -> dict[str, Any]:
    """Fields of a config with random factors."""
    return {"r": 4, "target_modules": list(targets), "init_lora_weights": False, **more}


def ours(*targets: str, base: nn.Module | None = None) -> Any:
    """Our model with adapters a and b."""
    torch.manual_seed(0)
    base = Three() if base is None else base
    model = fastlora.get_peft_model(base, LoraConfig(**config(*targets)), "a").eval()
    model.add_adapter("b", LoraConfig(**config(*targets)))
    return model


def patched(*targets: str, base: nn.Module | None = None) -> Any:
    """PEFT's model with adapters a and b, patched."""
    peft = pytest.importorskip("peft", reason="patches PEFT's models")
    torch.manual_seed(0)
    made = peft.LoraConfig(**config(*targets))
    model = peft.get_peft_model(Three() if base is None else base, made, "a").eval()
    model.add_adapter("b", made)
    fastlora.patch(model)
    return model


def add(model: Any, name: str, *targets: str) -> None:
    """Adds an adapter to either kind of model."""
    kind = type(next(iter(model.peft_config.values())))
    model.add_adapter(name, kind(**config(*targets)))
    model.eval()


@pytest.mark.parametrize("make", [ours, patched])
def test_an_adapter_added_within_a_block(make: Any) -> None:
    """On layers before those of the block, made active and used in a block of its own."""
    model = make("q", "v")
    with torch.no_grad(), adapters(model, MIX):
        before = model(X)
        add(model, "c", "k", "q")
        model.base_model.set_adapter("c")
        within = [model(X)]
        with adapters(model, ["c"] * 4):
            other = model(X)
        within.append(model(X))
    for found in within:
        torch.testing.assert_close(before, found)
    assert not torch.allclose(before, other)
    with torch.no_grad():
        torch.testing.assert_close(model(X, adapter_names=["a", "b", "a", "b"])[1], before[1])


def test_an_adapter_that_cannot_be_routed_within_a_block() -> None:
    """It makes the next batch raise, and open blocks go on with all layers that come later."""
    model = patched("q", "v")
    with torch.no_grad(), adapters(model, MIX):
        before = model(X)
        model.add_adapter("c", type(model.peft_config["a"])(**config("q", modules_to_save=["h"])))
        with pytest.raises(UnsupportedLayerError), adapters(model, MIX):
            pass
        add(model, "d", "k")
        model.base_model.set_adapter("d")
        torch.testing.assert_close(model(X), before)


OPERATIONS = {
    "delete_adapter": lambda model: model.delete_adapter("b"),
    "merge_adapter": lambda model: model.merge_adapter(),
    "merge_and_unload": lambda model: model.merge_and_unload(),
    "unload": lambda model: model.unload(),
    "disable_adapter_layers": lambda model: model.base_model.disable_adapter_layers(),
}


def check_raises(model: Any, operation: str) -> None:
    """An operation raises and names itself, and changes nothing."""
    with (
        unchanged(model),
        pytest.raises(AdapterStateError, match=rf"{operation}\(\) cannot be called while"),
    ):
        OPERATIONS[operation](model)


# PEFT's context manager `disable_adapter` calls `disable_adapter_layers` and is allowed in a block.
RAISING = [
    (make, operation)
    for make in (ours, patched)
    for operation in OPERATIONS
    if make is ours or operation != "disable_adapter_layers"
]


@pytest.mark.parametrize(("make", "operation"), RAISING)
def test_operations_that_would_change_an_open_block_raise(make: Any, operation: str) -> None:
    """Rows must not lose their adapters while a block of the model is open in any thread (R7)."""
    model, other = make("q", "v"), make("q", "v")
    with torch.no_grad(), adapters(model, MIX):
        before = model(X)
        check_raises(model, operation)
        with adapters(model, ["a"] * 4):
            check_raises(model, operation)
        check_raises(model, operation)
        torch.testing.assert_close(model(X), before)
        OPERATIONS[operation](other)  # another model has no open block
        thread = ThreadPoolExecutor(1)
        thread.submit(check_raises, model, operation).result(60)
    with pytest.raises(KeyError), adapters(model, MIX):
        raise KeyError
    OPERATIONS[operation](model)


@pytest.mark.parametrize("make", [ours, patched])
def test_a_layers_own_deletion_within_an_open_block_raises(make: Any) -> None:
    """As the model's does; a new scaling is used in the next forward pass."""
    model, other = make("q", "v"), make("q", "v")
    layer = model.base_model.model.q
    with torch.no_grad(), adapters(model, MIX):
        before = model(X)
        with unchanged(model), pytest.raises(AdapterStateError, match=r"delete_adapter\(\) cannot"):
            layer.delete_adapter("b")
        torch.testing.assert_close(model(X), before)
        other.base_model.model.q.delete_adapter("b")  # another model has no open block
        layer.set_scale("b", 3.0)
        assert not torch.allclose(model(X), before)
    layer.delete_adapter("b")
    assert set(layer.lora_A) == {"a"}


def test_a_copy_of_a_module_is_not_deleted_within_an_open_block() -> None:
    model = fastlora.get_peft_model(
        Three(), LoraConfig(target_modules=["q"], modules_to_save=["v"]), "a"
    )
    wrapper: Any = model.base_model.model.v
    with torch.no_grad(), adapters(model, ["a"] * 4):
        before = model(X)
        with pytest.raises(AdapterStateError, match=r"delete_adapter\(\) cannot"):
            wrapper.delete_adapter("a")
        torch.testing.assert_close(model(X), before)
    wrapper.delete_adapter("a")
    assert not wrapper.adapter_names


def test_a_failed_addition_within_an_open_block_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The half-added adapter is removed, and the block keeps its rows."""
    model = ours("q", "v")
    layer = model.base_model.model.v

    prepare = type(layer)._on_factors_added

    def fail(placed: Any, name: str) -> None:
        if placed is layer:  # the second one
            raise RuntimeError("no memory")
        prepare(placed, name)

    with torch.no_grad(), adapters(model, MIX):
        before = model(X)
        monkeypatch.setattr(type(layer), "_on_factors_added", fail)
        with unchanged(model), pytest.raises(RuntimeError, match="no memory"):
            add(model, "c", "q", "v")
        monkeypatch.undo()
        torch.testing.assert_close(model(X), before)
        assert "c" not in layer.lora_A and "c" not in model.peft_config


@pytest.mark.parametrize("replace", ["load_adapter", "hotswap_adapter"])
def test_other_weights_for_a_loaded_adapter_within_a_block_raise(
    replace: str, tmp_path: Path
) -> None:
    """Rows keep the weights that they began with, in any thread; a new name is allowed (R7)."""
    model = ours("q", "v")
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        for parameter in model.parameters():  # both adapters have other values than their files
            parameter.mul_(1.5)

    def put() -> None:
        if replace == "load_adapter":
            model.load_adapter(tmp_path / "a", "b")
        else:
            fastlora.hotswap_adapter(model, tmp_path / "a", "b")

    def check_put_raises() -> None:
        match = rf"'b' is already loaded: {replace}\(\) cannot be called while .*: 1\).* are in use"
        with unchanged(model), pytest.raises(AdapterStateError, match=match):
            put()

    with torch.no_grad(), adapters(model, MIX):
        before = model(X)
        check_put_raises()
        ThreadPoolExecutor(1).submit(check_put_raises).result(60)
        model.load_adapter(tmp_path / "a", "c")
        torch.testing.assert_close(model(X), before)
    put()
    with torch.no_grad(), adapters(model, MIX):
        assert not torch.allclose(model(X)[1], before[1])


@pytest.mark.parametrize("make", [ours, patched])
def test_operations_within_a_call_with_names_raise(make: Any) -> None:
    """`adapter_names=` opens a block for its call (R7)."""
    model, seen = make("q", "v"), []
    model.base_model.model.v.register_forward_hook(lambda *_: check_raises_here())

    def check_raises_here() -> None:
        for operation in ("delete_adapter", "merge_adapter", "unload"):
            with pytest.raises(AdapterStateError, match="adapter_names= is in progress"):
                OPERATIONS[operation](model)
            seen.append(operation)

    with torch.no_grad():
        model(X, adapter_names=["a", "b", "__base__", "b"])
    assert len(seen) == 3


@pytest.mark.parametrize("make", [ours, patched])
def test_the_base_model_within_a_block(make: Any) -> None:
    """The context manager `disable_adapter` is allowed in a block, and ends with itself."""
    model = make("q", "v")
    with torch.no_grad(), model.disable_adapter():
        base = model(X)
    with torch.no_grad(), adapters(model, MIX):
        before = model(X)
        with model.disable_adapter():
            torch.testing.assert_close(model(X), base)
        torch.testing.assert_close(model(X), before)
    assert not torch.allclose(before, base)


def test_another_thread_adds_an_adapter_and_serves_it() -> None:
    model = patched("q")
    began, served, found = threading.Event(), threading.Event(), []

    def serve() -> None:
        with torch.no_grad(), adapters(model, ["b"] * 4):
            found.append(model(X))
            began.set()
            assert served.wait(60)
            found.append(model(X))

    thread = threading.Thread(target=serve)
    thread.start()
    assert began.wait(60)
    add(model, "c", "q")
    with torch.no_grad():
        model(X, adapter_names=["c"] * 4)
    served.set()
    thread.join()
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("names", [["__base__"] * 4, ["b", "__base__", "b", "a"]])
def test_names_within_the_block_of_others(names: list[str]) -> None:
    model = patched("q")
    with torch.no_grad():
        expected = model(X, adapter_names=names)
        with adapters(model, ["a"] * 4):
            torch.testing.assert_close(model(X, adapter_names=names), expected)


class Checkpointed(nn.Module):
    """One linear behind an activation checkpoint of either kind."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(32, 32)
        self.reentrant: bool | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps ``[..., 32]`` to ``[..., 32]``."""
        if self.reentrant is None:
            return self.q(x).tanh()
        return checkpoint(lambda x: self.q(x).tanh(), x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_and_names_of_a_patched_model(reentrant: bool) -> None:
    """The backward, which runs behind the call, has its rows."""
    base = Checkpointed()
    model = patched("q", base=base)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    grads = []
    for kind in (reentrant, None):
        base.reentrant = kind
        model.zero_grad()
        x = X.clone().requires_grad_()
        model(x, adapter_names=["b"] * 4).square().sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and all(".b." in name for name in grads[0])
    for name, found in grads[0].items():
        torch.testing.assert_close(found, grads[1][name])


@pytest.mark.parametrize("kind", ["ours", "patched", "unpickled"])
def test_a_checkpoint_before_the_first_block_of_a_process(kind: str, tmp_path: Path) -> None:
    """Its activations are recomputed inside a block, with the adapter of the forward pass."""
    made = f'{kind}("q", base=Checkpointed())'
    if kind == "unpickled":
        made = f"torch.load({str(tmp_path / 'model')!r}, weights_only=False)"
        torch.save(ours("q", base=Checkpointed()), tmp_path / "model")
    code = f"""
import torch, fastlora
from tests.routing.test_open_blocks import Checkpointed, X, ours, patched
model = {made}
base = model.base_model.model
model.base_model.set_adapter("a")
inputs = [X.clone().requires_grad_() for _ in range(3)]
outputs = []
for base.reentrant, x in zip((True, False, None), inputs):
    outputs.append(model(x))
with fastlora.adapters(model, ["b"] * 4):
    for y in outputs:
        y.square().sum().backward()
for x in inputs:
    torch.testing.assert_close(x.grad, inputs[-1].grad)
"""
    done = programs.run("-c", code, cwd=programs.ROOT)
    assert done.returncode == 0, done.stderr[-2000:]


def test_factors_made_in_inference_mode() -> None:
    """Ours can train afterwards; PEFT's, which cannot, still serve, packed anew in every block."""
    model = ours("q")
    with torch.inference_mode():
        add(model, "c", "q", "k")
        found = [model(X, adapter_names=["a", "c", None, "c"]) for _ in range(4)]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])
    model.base_model.set_adapter("c")
    model(X).sum().backward()
    assert model.base_model.model.q.lora_B["c"].weight.grad is not None

    with torch.inference_mode():
        theirs = patched("q")
        found = [theirs(X, adapter_names=["a", "b", "__base__", "b"]) for _ in range(4)]
        theirs.base_model.model.q.lora_B["b"].weight.mul_(2)
        changed = theirs(X, adapter_names=["a", "b", "__base__", "b"])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])
    torch.testing.assert_close(changed[0], found[0][0])
    assert not torch.allclose(changed[1], found[0][1])


class Generates(NamedTuple):
    """A Llama of one layer, an adapter's tensors for it, and how to generate."""

    base: Any
    state: dict[str, torch.Tensor]
    ids: torch.Tensor
    more: dict[str, Any]


@pytest.fixture
def small() -> Generates:
    """In float64, so that no order of summation shows."""
    base = tiny_llama(num_hidden_layers=1).double().eval()
    where = "base_model.model.model.layers.0.self_attn.q_proj"
    shapes = {"lora_A.weight": (4, 64), "lora_B.weight": (64, 4)}
    state = {f"{where}.{key}": torch.randn(shape) for key, shape in shapes.items()}
    more = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2, "pad_token_id": 0}
    return Generates(base, state, torch.tensor([[1, 50, 27], [27, 28, 9]]), more)


def test_generate_with_beams_is_pefts() -> None:
    """Mixed generation gives PEFT's tokens, greedy and with beam search."""
    peft = pytest.importorskip("peft", reason="compares with PEFT")
    models = []
    for library in (fastlora, peft):
        torch.manual_seed(1)
        made = [library.LoraConfig(**config(*t)) for t in (("q_proj", "v_proj"), ("up_proj",))]
        model = library.get_peft_model(tiny_llama(), made[0], "a")
        model.add_adapter("b", made[1])
        models.append(model.double().eval())
    ids, names = torch.randint(1, 97, (3, 5)), ["b", "__base__", "a"]
    for beams in (1, 2):
        more = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
        tokens = [model.generate(input_ids=ids, adapter_names=names, **more) for model in models]
        assert torch.equal(*tokens)
        assert not torch.equal(tokens[0], tiny_llama().double().eval().generate(ids, **more))


def test_slots_of_tokens_cannot_generate(small: Generates) -> None:
    """The model will see other tokens than these."""
    base, state, ids, more = small
    model = fastlora.get_peft_model(base, LoraConfig(**config("q_proj")), "a").eval()
    slots = torch.tensor([0, -1, -1, 0, 0, 0])
    check_raises = pytest.raises(ValueError, match="generate\\(\\) expects one id")
    with adapters(model, slots), check_raises:
        model.generate(input_ids=ids, **more)
    with adapters(model, slots[:2]):
        model.generate(input_ids=ids, **more)
    with fastlora.AdapterPool(model.unload(), target_modules=["q_proj"]) as pool:
        pool.load("b", state, config=config("q_proj"))
        with adapters(pool, slots), check_raises:
            base.generate(input_ids=ids, **more)


def test_names_of_a_pools_model(small: Generates) -> None:
    """`adapter_names=` on forward and generate, as in PEFT's models; unknown names are refused."""
    base, state, ids, more = small
    forward, generate = base.forward, base.generate
    names = ["b", "__base__"]
    with fastlora.AdapterPool(base, target_modules=["q_proj"]) as pool, torch.no_grad():
        pool.load("b", state, config=config("q_proj"))
        with adapters(pool, ["b", None]):
            expected = base(input_ids=ids).logits, base.generate(input_ids=ids, **more)
        plain = base(input_ids=ids).logits
        found = base(input_ids=ids, adapter_names=names).logits
        torch.testing.assert_close(found, expected[0])
        assert not torch.allclose(found[0], plain[0])
        torch.testing.assert_close(found[1], plain[1])
        made = base.generate(input_ids=ids, adapter_names=names, **more)
        assert torch.equal(made, expected[1])
        for call in (base, base.generate):
            with pytest.raises(AdapterNotFoundError, match="nope"):
                call(input_ids=ids, adapter_names=["nope", None])
            with pytest.raises(ValueError, match="2 samples"):
                call(input_ids=ids, adapter_names=["b"] * 3)
        assert pool.stats().leases == 0
    assert (base.forward, base.generate) == (forward, generate)

"""What ends caches of weights, and what leaves them: steps, replaced tensors, moves of a model.

That everything kept of weights ends in time is held in `tests/conformance`.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

import fastlora
from fastlora.weights_version import (
    ProcessWeightsVersions,
    TensorStamp,
    _storage_id,
    stamp_tensors,
    weights_versions,
)
from tests.support.kinds import KINDS
from tests.support.tiny import (
    TwoLayers,
    quantized_two_layers,
    randomize,
    trainable,
    two_layers,
    with_adapters,
)

X = torch.randn(4, 16, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def model() -> Iterator[Any]:
    """A DoRA adapter that trains, in evaluation."""
    torch.compiler.reset()
    config = fastlora.LoraConfig(r=4, target_modules=["q", "v"], use_dora=True)
    made = fastlora.get_peft_model(TwoLayers(), config)
    randomize(made)
    yield made.eval()
    torch.compiler.reset()


@pytest.mark.parametrize("kind", ["fused", "foreach"])
def test_our_part_of_a_compiled_step_compiles_once(model: Any, kind: str) -> None:
    """Other marks are no reason to compile an optimizer's step again."""
    optimizer = torch.optim.AdamW(trainable(model), lr=0.1, **{kind: True})
    model(X).square().sum().backward()
    with torch.no_grad():
        model(X)
    step = torch.compile(optimizer.step, backend="aot_eager")
    step()
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(3):
            mark = weights_versions.trained
            step()
            assert weights_versions.trained is not mark


def test_norms_of_a_frozen_base_weight_stay_through_steps(model: Any) -> None:
    """A step of the adapters leaves them as they are; computing them anew costs a read of W."""
    optimizer = torch.optim.AdamW(trainable(model), lr=0.1, fused=True)
    with torch.no_grad():
        model(X)
    kept = model.base_model.model.q._dora_norms.entries[None]
    model(X).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        model(X)
    assert model.base_model.model.q._dora_norms.entries[None] is kept


class Cached(NamedTuple):
    """A model in evaluation, and a forward that fills its caches.

    Attributes:
        make: Makes the model, with two adapters.
        x: Its input.
        mixed: Whether the rows of a batch use both in turn.
    """

    make: Callable[[], Any]
    x: torch.Tensor
    mixed: bool

    def run(self, model: Any) -> torch.Tensor:
        """Returns the output."""
        ids = ["en", "de"] * (len(self.x) // 2)
        block = fastlora.adapters(model, ids) if self.mixed else contextlib.nullcontext()
        x = self.x.to(next(model.parameters()).dtype) if self.x.is_floating_point() else self.x
        with torch.no_grad(), block:
            return model(x)


def two_adapters(
    base: Callable[[], Any], targets: list[str], dora: bool, library: str = "fastlora"
) -> Any:
    """A model in evaluation with two random adapters; ``patched`` is PEFT's, patched."""
    source: Any = pytest.importorskip("peft") if library == "patched" else fastlora
    torch.manual_seed(0)
    fields = {"r": 4, "target_modules": targets, "use_dora": dora}
    configs = {name: source.LoraConfig(**fields) for name in ("en", "de")}
    model = with_adapters(base(), configs, source)
    randomize(model)
    if library == "patched":
        fastlora.patch(model)
    return model.eval()


def linears(dora: bool, mixed: bool, library: str = "fastlora") -> Cached:
    """A case over two linears."""
    return Cached(lambda: two_adapters(two_layers, ["q", "v"], dora, library), X, mixed)


def kind(name: str) -> Cached:
    """A case over another kind of layer, with DoRA."""
    case = KINDS[name]
    return Cached(lambda: two_adapters(case.make, ["kind", "lin"], True), case.x(4), False)


CACHED = {
    "DoRA": linears(True, False),
    "DoRA, mixed": linears(True, True),
    "packed": linears(False, True),
    "patched DoRA": linears(True, False, "patched"),
    "patched DoRA, mixed": linears(True, True, "patched"),
    "patched, packed": linears(False, True, "patched"),
    "embedding": kind("embedding"),
    "conv2d": kind("conv2d"),
}


def replaced_twice(model: Any, step: int) -> Iterator[None]:
    """Replaces each parameter twice before a forward."""
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.5
        parameter.data = parameter.data * 0.75
    yield


def mezo(model: Any, step: int) -> Iterator[None]:
    """MeZO's writes: a step restores what the last one has left, adds noise, and subtracts it."""
    draws = []
    for seed in (step - 1, step):
        torch.manual_seed(seed)
        draws.append([torch.randn_like(parameter) for parameter in model.parameters()])
    for parameter, last, noise in zip(model.parameters(), *draws, strict=True):
        if step:
            parameter.data = parameter.data.add(last, alpha=0.1)
        parameter.data = parameter.data.add(noise, alpha=0.1)
    yield
    for parameter, noise in zip(model.parameters(), draws[1], strict=True):
        parameter.data = parameter.data.add(noise, alpha=-0.2)
    yield


@pytest.mark.parametrize(
    ("way", "dtype"),
    [(replaced_twice, torch.float32), (mezo, torch.bfloat16)],
    ids=["replaced twice", "MeZO"],
)
@pytest.mark.parametrize("name", CACHED)
def test_replaced_parameters_are_seen(
    name: str, way: Callable[[Any, int], Iterator[None]], dtype: torch.dtype
) -> None:
    """A cache detects a parameter that was replaced and got an earlier address again (R5)."""
    case = CACHED[name]
    model = case.make().to(dtype)
    for _ in range(3):  # packed factors are made at the second block
        case.run(model)
    before = [parameter.data_ptr() for parameter in model.parameters()]
    reused = 0
    for step in range(5):
        for _ in way(model, step):
            now = [parameter.data_ptr() for parameter in model.parameters()]
            reused += sum(a == b for a, b in zip(now, before, strict=True))
            before = now
            # A copy starts with empty caches.
            torch.testing.assert_close(case.run(model), case.run(copy.deepcopy(model)))
            case.run(model)
    assert reused > 0


def test_threads_that_share_caches_see_replaced_parameters() -> None:
    """Threads that serve one model detect a replaced tensor as one thread does."""
    case = CACHED["DoRA, mixed"]
    model = case.make()
    case.run(model)
    for step in range(3):
        for _ in replaced_twice(model, step):
            expected = case.run(copy.deepcopy(model))
            with ThreadPoolExecutor(4) as threads:
                for y in threads.map(case.run, [model] * 8):
                    torch.testing.assert_close(y, expected)


def test_replaced_scales_of_a_4_bit_weight_are_seen() -> None:
    """DoRA's norms follow scales that were replaced and lie where earlier ones lay (R5)."""
    config = fastlora.LoraConfig(r=4, target_modules=["q"], use_dora=True)
    model = fastlora.get_peft_model(quantized_two_layers("bitsandbytes"), config)
    randomize(model.eval())
    state = model.base_model.model.q.weight.quant_state.state2  # of nested scales
    memory = state.code.numpy().copy()
    with torch.no_grad():
        for number in range(6):
            state.code = None
            memory *= 1.5 if number % 2 else 1 / 1.5
            state.code = torch.from_numpy(memory)  # a new tensor at the address of the freed one
            torch.testing.assert_close(model(X), copy.deepcopy(model)(X))


def live_storages() -> dict[int, int]:
    """Bytes of every storage that a tensor uses, by its identity, but for a few numbers."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some objects warn when they are asked for their class
        tensors = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.layout is torch.strided]
    return {storage._cdata: storage.nbytes() for storage in storages if storage.nbytes() >= 64}


def memory_of(parameters: Iterable[torch.Tensor]) -> list[StorageWeakRef]:
    """Weak references to the memory of parameters."""
    return [StorageWeakRef(parameter.untyped_storage()) for parameter in parameters]


@pytest.mark.drawn(1 / 3)
@pytest.mark.parametrize("name", ["DoRA, mixed", "packed", "patched, packed"])
def test_caches_keep_no_memory_of_earlier_weights(name: str) -> None:
    """Once a model has moved, the memory in use is the model's."""
    case = CACHED[name]
    case.run(case.make())  # Constants that all models share are cached.
    before = live_storages()
    model = case.make()
    for dtype in (torch.bfloat16, torch.float32):
        for _ in range(3):
            case.run(model)
        model.to(dtype)
        left = {key: size for key, size in live_storages().items() if key not in before}
        own = {p.untyped_storage()._cdata: p.untyped_storage().nbytes() for p in model.parameters()}
        assert left == {key: size for key, size in own.items() if size >= 64}
    for _ in range(3):
        case.run(model)
    named = dict(model.named_parameters())
    bases = memory_of(p for name, p in named.items() if "lora_" not in name)
    factors = memory_of(p for name, p in named.items() if "lora_" in name)
    for parameter in model.parameters():
        parameter.data = parameter.data * 2
    assert all(memory.expired() for memory in bases)
    case.run(model)
    assert all(memory.expired() for memory in factors)


def test_a_cache_of_a_torchao_weight_does_not_stop_a_move() -> None:
    """PyTorch swaps the weight's tensor for the moved one, and takes none with a weak reference."""
    config = fastlora.LoraConfig(r=4, target_modules=["q"], use_dora=True)
    model = fastlora.get_peft_model(quantized_two_layers("torchao"), config).eval()
    with torch.no_grad():
        expected = model(X)
        torch.testing.assert_close(model.to(torch.float64)(X.double()).float(), expected)


CHANGES: dict[str, Callable[[torch.Tensor], Any]] = {
    "a write": lambda weight: weight.mul_(2),
    "other memory": lambda weight: setattr(weight, "data", weight.data.clone()),
    "another storage at its address": lambda weight: setattr(
        weight, "data", torch.from_numpy(weight.data.numpy())
    ),
    "fewer rows": lambda weight: setattr(weight, "data", weight.data[:2]),
    "a transpose": lambda weight: setattr(weight, "data", weight.data.t()),
    "another dtype": lambda weight: setattr(weight, "data", weight.data.half()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_stamp_detects(change: str) -> None:
    """Each change alone; a stamp of the changed tensor holds."""
    weight = torch.nn.Parameter(torch.randn(4, 4), requires_grad=False)
    stamp = TensorStamp((weight,), (1,))
    assert stamp.matches((weight,), (1,)) and not stamp.matches((weight,), (2,))
    CHANGES[change](weight)
    assert not stamp.matches((weight,), (1,))
    assert TensorStamp((weight,)).matches((weight,))


def test_a_stamp_and_inference_tensors() -> None:
    """They count no versions, so no stamp holds for them."""
    with torch.inference_mode():
        weight = torch.ones(2)
    assert stamp_tensors((weight,)) is None
    assert not TensorStamp((torch.ones(2),)).matches((weight,))


def test_an_optimizer_over_another_view_of_a_base_weight_ends_its_norms(model: Any) -> None:
    """The optimizer's tensor need not be the layer's: it is enough that they share memory."""
    weight = model.base_model.model.q.weight
    with torch.no_grad():
        model(X)
    flat = torch.nn.Parameter(weight.detach().view(-1))
    flat.grad = torch.full_like(flat, 0.5)
    torch.optim.SGD([flat], lr=1.0, fused=True).step()
    with torch.no_grad():
        torch.testing.assert_close(model(X), copy.deepcopy(model)(X))


def test_freed_base_weights_are_watched_no_longer() -> None:
    """A process that loads models for days does not collect what it knew of each weight."""
    own = ProcessWeightsVersions()
    own._hooked = True  # no second hook for the whole process
    kept = [torch.ones(1) for _ in range(8)]
    for weight in kept:
        own.version_of_base_weight(weight)
    for _ in range(5000):
        own.version_of_base_weight(torch.ones(1))
    assert len(own._watched) <= 1024
    assert all(_storage_id(weight) in own._watched for weight in kept)

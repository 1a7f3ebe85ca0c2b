"""What a shared-input group holds: each thread's own results, and no longer than its forward."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile

pytest.importorskip("triton", reason="triton is not installed")

import fastlora
from fastlora import adapters
from fastlora.layers.shared_input import known_group, observe_call
from tests.support.kernels.mixed_models import use_impl
from tests.support.tiny import with_adapters

pytestmark = pytest.mark.usefixtures("on_the_labs_device")

THREADS = 6
MIXES = [[f"a{number % 3}", None, f"a{(number + 1) % 3}"] for number in range(THREADS)]


class Attention(nn.Module):
    """q, k and v fed by one tensor, and o; ``between`` runs before each of the last three."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(32, 48), nn.Linear(32, 16)
        self.v, self.o = nn.Linear(32, 16), nn.Linear(80, 32)
        self.between: Callable[[], None] = lambda: None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps ``[..., 32]`` to ``[..., 32]``."""
        made = [self.q(x)]
        for layer in (self.k, self.v):
            self.between()
            made.append(layer(x))
        self.between()
        y: torch.Tensor = self.o(torch.cat(made, -1))
        return y


def model_of(train: bool, library: str = "fastlora") -> Any:
    """Three random adapters on the kernels; siblings are known. ``patched`` is PEFT's, patched."""
    torch.manual_seed(0)
    source: Any = pytest.importorskip("peft") if library == "patched" else fastlora
    config = source.LoraConfig(r=4, target_modules=["q", "k", "v", "o"], init_lora_weights=False)
    model = with_adapters(Attention(), {f"a{i}": config for i in range(3)}, source)
    if library == "patched":
        fastlora.patch(model)
    use_impl(model.train(train), "triton")
    for _ in range(2):
        model(torch.randn(2, 32))
    return model


class Turns:
    """Lets several threads run by turns, one at a time: the interpreter is not thread-safe."""

    def __init__(self, count: int) -> None:
        self._waiting, self._next = list(range(count)), 0
        self._changed = threading.Condition()
        self._own = threading.local()

    def run(self, number: int, work: Callable[[], None]) -> None:
        """Does the work of a thread, in its turns."""
        self._own.number = number
        with self._changed:
            self._changed.wait_for(lambda: self._next == number)
        try:
            work()
        finally:
            self._hand_on(leaves=True)

    def hand_on(self) -> None:
        """Lets each other thread run, up to where it hands on, too."""
        self._hand_on(leaves=False)
        with self._changed:
            self._changed.wait_for(lambda: self._next == self._own.number)

    def _hand_on(self, leaves: bool) -> None:
        with self._changed:
            place = self._waiting.index(self._own.number)
            following = self._waiting[(place + 1) % len(self._waiting)]
            if leaves:
                self._waiting.remove(self._own.number)
            self._next = following
            self._changed.notify_all()


def in_turns(model: Any, works: list[Callable[[], torch.Tensor]]) -> list[torch.Tensor]:
    """What each thread's work returns, where layers of all threads are called by turns."""
    turns, found = Turns(len(works)), dict[int, torch.Tensor]()
    model.base_model.model.between = turns.hand_on

    def work(number: int) -> None:
        found[number] = works[number]()

    threads = [
        threading.Thread(target=turns.run, args=(number, lambda number=number: work(number)))
        for number in range(len(works))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    model.base_model.model.between = lambda: None
    return [found[number] for number in range(len(works))]


@pytest.mark.drawn(1 / 3)
@pytest.mark.parametrize("same", [False, True], ids=["inputs of their own", "one input"])
@pytest.mark.parametrize("kind", ["one adapter", "decode", "training"])
def test_threads_neither_take_nor_lose_results(launches: Any, kind: str, same: bool) -> None:
    """As many launches as the threads' forwards one after the other, and the same bits."""
    train = kind != "decode"
    model, inputs = model_of(train), torch.randn(THREADS, 3, 32).unbind()
    device = inputs[0].device

    def work(number: int) -> Callable[[], torch.Tensor]:
        x = inputs[0] if same else inputs[number]

        def call() -> torch.Tensor:
            with torch.device(device), torch.set_grad_enabled(train):
                if kind == "one adapter":
                    y: torch.Tensor = model(x)
                    return y
                with adapters(model, MIXES[number]):
                    y = model(x)
                return y

        return call

    works = [work(number) for number in range(THREADS)]
    for each in works:
        each()
    launches.clear()
    expected = [each() for each in works]
    made = sorted(launches)
    assert any(launch.endswith(" 3") for launch in made)
    launches.clear()
    for found, alone in zip(in_turns(model, works), expected, strict=True):
        assert torch.equal(found, alone)
    assert sorted(launches) == made


@pytest.mark.parametrize("kind", ["one adapter", "decode", "training"])
def test_a_profiler_changes_no_launch(launches: Any, kind: str) -> None:
    train = kind == "training"
    model, x = model_of(train), torch.randn(3, 32)

    def call() -> list[str]:
        launches.clear()
        with torch.set_grad_enabled(train):
            if kind == "one adapter":
                model(x)
            else:
                with adapters(model, MIXES[0]):
                    model(x)
                    launches.clear()
                    model(x)
        return list(launches)

    call()
    expected = call()
    assert expected[0].endswith("shrink 3")
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        found = call()
    assert found == expected
    group = "grouped_forward" if kind == "one adapter" else "mixed_grouped_forward"
    expected_name = "fastlora::lora_shrink" if train else f"fastlora::{group}"
    assert expected_name in {event.key for event in recorded.key_averages()}


class GivenUp(Exception):
    """Ends a forward between siblings."""


@pytest.mark.parametrize("mixed", [False, True])
def test_a_forward_that_is_given_up_holds_nothing(mixed: bool) -> None:
    """Neither its input nor the graph before it: y and s of the others are dropped."""
    model = model_of(train=True)
    attention, held = model.base_model.model, list[weakref.ref[torch.Tensor]]()

    def give_up() -> None:
        raise GivenUp

    def call() -> None:
        hidden = torch.randn(3, 32, requires_grad=True) * 1.0
        held.append(weakref.ref(hidden))
        if mixed:
            with adapters(model, MIXES[0]):
                model(hidden)
        else:
            model(hidden)

    call()
    attention.between = give_up
    with pytest.raises(GivenUp):
        call()
    gc.collect()
    assert [ref() for ref in held] == [None, None]


def test_a_block_that_ends_drops_what_nobody_took() -> None:
    """Layers are called by themselves, in no forward of the model."""
    model = model_of(train=True)
    hidden = torch.randn(3, 32, requires_grad=True) * 1.0
    with adapters(model, MIXES[0]):
        model.base_model.model.q(hidden.detach())
        model.base_model.model.q(hidden)
    held = weakref.ref(hidden)
    del hidden
    gc.collect()
    assert held() is None


def test_a_group_has_the_layers_that_one_thread_called() -> None:
    """Another thread's call with the same tensor is no part of it, and x is not kept for it."""
    first, second, other, last = (nn.Linear(2, 2) for _ in range(4))
    x = torch.ones(1, 2)
    observe_call(first, x)
    thread = threading.Thread(target=observe_call, args=(other, x))
    thread.start()
    thread.join()
    observe_call(second, x)
    held = weakref.ref(x)
    del x
    assert held() is None
    observe_call(last, torch.ones(1, 2))  # with what came before both threads are through
    for members in ((first, second), (other,)):
        for layer in members:
            group = known_group(layer)
            assert group is not None
            assert [member() for member in group.members] == [*members]


@pytest.mark.parametrize("library", ["fastlora", "patched"])
@pytest.mark.parametrize("train", [False, True])
def test_a_deleted_adapter_leaves_no_memory_behind(train: bool, library: str) -> None:
    """What the first of siblings found for its next call holds the factors of the others too."""
    model = model_of(train, library)
    (name,) = model.active_adapters
    with torch.set_grad_enabled(train):
        model(torch.randn(3, 32))
    factors = [each for key, each in model.named_parameters() if f".{name}." in key]
    held = [StorageWeakRef(each.untyped_storage()) for each in factors]
    assert len(held) == 8
    del factors
    model.delete_adapter(name)
    gc.collect()
    assert all(memory.expired() for memory in held)


class Named(nn.Module):
    """Four linears, of which a forward calls those that it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.Linear(16, 16) for name in "qkgu"})

    def forward(self, x: torch.Tensor, names: str) -> dict[str, torch.Tensor]:
        """Returns the output of each."""
        return {name: self.layers[name](x) for name in names}


@pytest.mark.parametrize("whole", [True, False], ids=["a model", "its base called"])
def test_an_input_that_is_written_between_two_forwards(whole: bool) -> None:
    """Inference tensors count no writes: what two groups left for k and u is not taken later."""
    torch.manual_seed(0)
    config = fastlora.LoraConfig(r=4, target_modules=list("qkgu"), init_lora_weights=False)
    model = use_impl(fastlora.get_peft_model(Named(), config).eval(), "triton")
    call = model if whole else model.base_model.model
    with torch.inference_mode():
        for names in ("qk", "gu") * 2:  # two groups
            model(torch.randn(8, 16), names)
        for _ in range(2):
            model(torch.randn(8, 16), "qkgu")
        x, h = torch.randn(2, 8, 16)
        call(x, "qg") if whole else (call(x, "q"), call(h, "gu"))
        x.copy_(torch.randn(8, 16))
        names = "ku" if whole else "k"
        found, expected = call(x, names), call(x.clone(), names)
    for name in names:
        torch.testing.assert_close(found[name], expected[name])

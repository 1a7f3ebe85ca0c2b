"""How many Python calls, and into how many files, a forward and a load take; counted, not timed.

Counts do not depend on the machine. Each ceiling is what the code takes today.
"""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import fastlora
from fastlora import FastLoraLinear, LoraConfig, LoraModel, get_peft_model
from fastlora.testing import stubbed_launches

OURS = str(Path(fastlora.__file__).parent) + "/"
STUBS = OURS + "testing/"


class Budget(NamedTuple):
    """Ceilings of a layer's forward, or of a load.

    Attributes:
        calls: Python calls of functions of the package.
        files: Files of the package that they are in.
    """

    calls: int
    files: int


BUDGETS = {
    "one adapter, few rows": Budget(13, 7),
    "one adapter": Budget(25, 11),
    "mixed training": Budget(49, 15),
    "mixed decode": Budget(15, 8),
    "kernels": Budget(27, 11),
    "served token": Budget(20, 17),
}

# Loading an adapter of three linears of 8 x 8 into a model: the second load of a process.
LOAD = Budget(771, 45)
# SmolLM2's load takes at most so many times PEFT's calls.
MOST_OF_PEFTS = 1.5

# Files that ask what surrounds a forward, at most; others read `fastlora.ops.execution_mode`. What
# models and the trainer ask is another matter.
ASKED = {
    "resolve_impl(": 1,
    "is_compiling(": 3,
    "_batch_invariant_state.invariant": 1,  # the batch-invariant mode
    "is_batch_invariant(": 1,
    "is_autocast_enabled(": 3,
}
ELSEWHERE = ("model", "train")


@pytest.mark.parametrize("question", ASKED)
def test_what_surrounds_a_forward_is_asked_in_few_files(question: str) -> None:
    found = [
        str(path.relative_to(OURS))
        for path in Path(OURS).rglob("*.py")
        if path.relative_to(OURS).parts[0] not in ELSEWHERE and question in path.read_text()
    ]
    assert 0 < len(found) <= ASKED[question], found


class Count:
    """Calls into a package, and the files that they are in; `note` is a thread's profiler."""

    def __init__(self, package: str = OURS) -> None:
        self.package, self.calls, self.files = package, 0, set[str]()

    def note(self, frame: FrameType, event: str, _: Any) -> None:
        """Counts a call of the package."""
        path = frame.f_code.co_filename
        if event == "call" and path.startswith(self.package) and not path.startswith(STUBS):
            self.calls += 1
            self.files.add(path.removeprefix(self.package))


def counted(run: Callable[[], Any], package: str = OURS) -> tuple[int, set[str]]:
    """Calls into a package while something runs, and the files that they are in."""
    count = Count(package)
    before = sys.getprofile()
    sys.setprofile(count.note)
    try:
        run()
    finally:
        sys.setprofile(before)
    return count.calls, count.files


def adapted(names: str, train: bool) -> Any:
    """A model of one linear with adapters of rank 4."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(64, 48)), config, adapter_name=names[0]
    )
    for name in names[1:]:
        model.add_adapter(name, config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(train and "lora_" in name)
    return model.train(train)


def layer_alone(rows: int, impl: str = "auto") -> Callable[[], Any]:
    """A training forward of one adapter."""
    layer, x = FastLoraLinear(64, 48, r=4), torch.randn(rows, 64)
    layer.impl = impl
    return lambda: layer(x)


def mixed(train: bool) -> tuple[int, set[str]]:
    """A later forward of one layer in an open block: two adapters and none, or decode of four."""
    names = "ab" if train else "abcd"
    model = adapted(names, train)
    layer, x = model.base_model.model[0], torch.randn(7 if train else 11, 64)
    with torch.set_grad_enabled(train):
        for _ in range(2):
            with fastlora.adapters(model, [*names, None] * 2 + [None]):
                for _ in range(3):
                    layer(x)
                found = counted(lambda: layer(x))
    return found


class Letters:
    """A tokenizer with a letter for each token, and no end token."""

    eos_token_id = None

    def decode(self, tokens: list[int], **_: Any) -> str:
        """The text of some tokens."""
        return "".join(chr(65 + token) for token in tokens)


def served_token(folder: Path) -> tuple[float, set[str]]:
    """A token of four requests: calls for each of the 42 linears of a Llama of six blocks.

    Two requests have one adapter, one has another, one has none. Counted over eight tokens in the
    engine's thread, with all that the engine does between two forwards.
    """
    pytest.importorskip("transformers", reason="serves models of transformers")
    from fastlora.serve.adapters import ServedAdapters
    from fastlora.serve.engine import Engine
    from fastlora.serve.sampling import SamplingParams
    from tests.support.tiny import randomize, tiny_llama

    base = tiny_llama(num_hidden_layers=6, eos_token_id=None).eval()
    for seed, name in enumerate("ab"):
        config = LoraConfig(r=4, target_modules="all-linear")
        model = get_peft_model(copy.deepcopy(base), config)
        randomize(model, seed)
        model.save_pretrained(folder / name)
    adapters = ServedAdapters(fastlora.AdapterPool(base, max_adapters=2), folder, reserved=())
    adapters.sync_with_folder()
    for name in "ab":  # read before, or the requests would come in at different times
        read = threading.Event()
        adapters.read_in_background(adapters.acquire_version(name), read.set)
        assert read.wait(60)
    engine = Engine(base, Letters(), adapters, rows=4, length=64)
    submitted, count = threading.Event(), Count()
    turn, turns = engine._running.prefill_and_decode, 0

    def counting() -> None:
        nonlocal turns
        assert submitted.wait(60)
        turns += len(engine._running.jobs) == 4
        if turns == 5:
            sys.setprofile(count.note)
        elif turns == 13:
            sys.setprofile(None)
        turn()

    engine._running.prefill_and_decode = counting  # type: ignore[method-assign]
    for name in ("a", "b", "a", None):
        engine.submit([1, 2, 3], name, SamplingParams(20, 0), lambda piece: None)
    submitted.set()
    engine.close()
    assert engine.stats.requests_finished == 4
    assert turns >= 13
    return count.calls / 8 / len(adapters.pool.modules), count.files


@pytest.mark.parametrize("what", BUDGETS)
def test_a_forward_keeps_its_budget(what: str, tmp_path: Path) -> None:
    budget = BUDGETS[what]
    calls: float
    if what == "served token":
        calls, files = served_token(tmp_path)
    elif what.startswith("mixed"):
        calls, files = mixed(train=what == "mixed training")
    elif what == "kernels":
        pytest.importorskip("triton", reason="compiles kernels")
        with stubbed_launches():
            run = layer_alone(8, "triton")
            for _ in range(3):
                run()
            calls, files = counted(run)
    else:
        run = layer_alone(8 if what.endswith("few rows") else 2048)
        for _ in range(3):
            run()
        calls, files = counted(run)
    assert calls <= budget.calls
    assert len(files) <= budget.files, sorted(files)


def second_load(library: Any, base: nn.Module, folder: Path, package: str) -> tuple[int, set[str]]:
    """Calls of the second of two loads of an adapter, each into a model of its own."""
    library.from_pretrained(copy.deepcopy(base), folder)
    model = copy.deepcopy(base)
    return counted(lambda: library.from_pretrained(model, folder), package)


def test_a_load_keeps_its_budget(tmp_path: Path) -> None:
    base = nn.Sequential(*[nn.Linear(8, 8) for _ in range(3)])
    config = LoraConfig(r=4, target_modules=["0", "1", "2"])
    get_peft_model(copy.deepcopy(base), config).save_pretrained(tmp_path)
    calls, files = second_load(LoraModel, base, tmp_path, OURS)
    assert calls <= LOAD.calls
    assert len(files) <= LOAD.files, sorted(files)


def test_a_load_takes_few_more_calls_than_pefts(
    fresh_smollm2: Callable[[], Any], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    base = fresh_smollm2()
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(copy.deepcopy(base), config).save_pretrained(tmp_path)
    ours, _ = second_load(LoraModel, base, tmp_path, OURS)
    theirs, _ = second_load(peft.PeftModel, base, tmp_path, str(Path(peft.__file__).parent) + "/")
    assert theirs > 0
    assert ours <= MOST_OF_PEFTS * theirs, (ours, theirs)

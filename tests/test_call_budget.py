"""How many Python calls, and into how many files, a forward and a load take; counted, not timed.

Counts do not depend on the machine. Each ceiling is what the code takes today.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import fastlora
from fastlora import FastLoraLinear, LoraConfig, LoraModel, get_peft_model

OURS = str(Path(fastlora.__file__).parent) + "/"


class Budget(NamedTuple):
    """Ceilings of one forward, or of one load.

    Attributes:
        calls: Python calls of functions of the package.
        files: Files of the package that they are in.
    """

    calls: int
    files: int


BUDGETS = {
    "one adapter, few rows": Budget(14, 7),
    "one adapter": Budget(27, 12),
    "mixed training": Budget(54, 15),
    "mixed decode": Budget(19, 8),
}

# Loading an adapter of three linears of 8 x 8 into a model: the second load of a process.
LOAD = Budget(709, 41)
# SmolLM2's load takes at most so many times PEFT's calls.
MOST_OF_PEFTS = 1.5

# Files that ask what surrounds a forward, at most; others read `fastlora.ops.conditions`. What
# models and the trainer ask is another matter.
ASKED = {
    "resolve_impl(": 1,
    "is_compiling(": 3,
    "_thread.invariant": 1,  # the batch-invariant mode
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


def counted(run: Callable[[], Any], package: str = OURS) -> tuple[int, set[str]]:
    """Calls into a package while something runs, and the files that they are in."""
    calls, files = 0, set()

    def note(frame: FrameType, event: str, _: Any) -> None:
        nonlocal calls
        if event == "call" and frame.f_code.co_filename.startswith(package):
            calls += 1
            files.add(frame.f_code.co_filename.removeprefix(package))

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(before)
    return calls, files


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


def layer_alone(rows: int) -> Callable[[], Any]:
    """A training forward of one adapter."""
    layer, x = FastLoraLinear(64, 48, r=4), torch.randn(rows, 64)
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


@pytest.mark.parametrize("what", BUDGETS)
def test_a_forward_keeps_its_budget(what: str) -> None:
    budget = BUDGETS[what]
    if what.startswith("mixed"):
        calls, files = mixed(train=what == "mixed training")
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

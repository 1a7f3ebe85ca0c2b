"""`warn`: a warning names the line of the caller's code, however deep the code that warns is."""

from __future__ import annotations

import ast
import warnings
from pathlib import Path

import torch
from torch import nn

import fastlora
from fastlora.user_warnings import warn

PACKAGE = Path(fastlora.__file__).parent


def test_adding_adapters_names_each_line() -> None:
    """Two calls on two lines, of which one is several frames deeper, are two warnings."""
    config = fastlora.LoraConfig(r=2, target_modules=["0", "missing"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            model = fastlora.get_peft_model(nn.Sequential(nn.Linear(4, 4)), config)
            model.add_adapter("b", config)
    assert [Path(each.filename) for each in caught] == [Path(__file__)] * 2
    lines = Path(__file__).read_text(encoding="utf8").splitlines()
    said = [lines[each.lineno - 1] for each in caught]
    assert "get_peft_model" in said[0] and "add_adapter" in said[1]


def test_the_frames_of_torch_are_skipped() -> None:
    """A layer that warns in its forward pass names the call of the model."""
    names = {"__name__": "fastlora.somewhere", "warn": warn}
    exec("def forward(self, x):\n    warn('said')\n    return x\n", names)
    layer = type("Layer", (nn.Module,), {"forward": names["forward"]})()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        nn.Sequential(layer)(torch.ones(1))
    assert [Path(each.filename) for each in caught] == [Path(__file__)]
    assert caught[0].category is UserWarning


def test_no_file_counts_frames() -> None:
    """`warnings.warn` with a `stacklevel` is wrong as soon as a function is moved."""
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf8"))
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        assert not [call.lineno for call in calls if ast.unparse(call.func) == "warnings.warn"], (
            path
        )

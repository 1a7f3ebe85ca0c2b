"""Old public names still work, and each gives one warning; `docs/dev/renamed.md` lists them."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastlora
from fastlora import pool, testing, validation
from fastlora.train.run import open_run, train

PAGE = Path(__file__).parent.parent / "docs" / "dev" / "renamed.md"


def _model() -> Any:
    config = fastlora.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    return fastlora.get_peft_model(nn.Sequential(nn.Linear(4, 4)), config).eval()


def _layer() -> Any:
    return fastlora.FastLoraLinear(4, 4, r=2)


def _in_block(**arguments: Any) -> torch.Tensor:
    model = _model()
    with torch.no_grad(), fastlora.adapters(model, ["default", None], **arguments):
        found: torch.Tensor = model(torch.ones(2, 4))
    return found


def _config(**arguments: Any) -> fastlora.LoraConfig:
    peft = pytest.importorskip("peft")
    return fastlora.LoraConfig.from_peft(peft.LoraConfig(r=3), **arguments)


def _pool() -> fastlora.AdapterPool:
    return fastlora.AdapterPool(nn.Sequential(nn.Linear(4, 4)), target_modules=["0"], max_rank=4)


def _of_pool(name: str) -> object:
    made = _pool()
    try:
        return getattr(made, name)
    finally:
        made.close()


def _of_report(name: str) -> str:
    (row,) = fastlora.fusion_report(_model()).rows
    found: str = getattr(row, name)
    return found


def _messages(function: Callable[..., Any], name: str) -> str:
    with pytest.raises(AttributeError) as raised:
        function(object(), **{name: print})
    return str(raised.value)


# The old and the new name as the page writes them, and how each is used.
NAMES: tuple[tuple[str, str, Callable[[], object], Callable[[], object]], ...] = (
    (
        "fastlora.refresh",
        "fastlora.clear_caches",
        lambda: fastlora.refresh,
        lambda: fastlora.clear_caches,
    ),
    (
        "fastlora.validation.InitialisationError",
        "fastlora.validation.InitializationError",
        lambda: validation.InitialisationError,
        lambda: validation.InitializationError,
    ),
    (
        "fastlora.pool.Resident",
        "fastlora.pool.LoadedAdapter",
        lambda: pool.Resident,
        lambda: pool.LoadedAdapter,
    ),
    (
        "fastlora.testing.farthest",
        "fastlora.testing.run_with_largest_error",
        lambda: testing.farthest,
        lambda: testing.run_with_largest_error,
    ),
    (
        "fastlora.testing.summed_otherwise",
        "fastlora.testing.random_summation_order",
        lambda: testing.summed_otherwise,
        lambda: testing.random_summation_order,
    ),
    (
        "LoraLayer.refresh",
        "LoraLayer.clear_caches",
        lambda: _layer().refresh(),
        lambda: _layer().clear_caches(),
    ),
    (
        "LoraLayer.knows_siblings",
        "LoraLayer.has_shared_input_group",
        lambda: _layer().knows_siblings(),
        lambda: _layer().has_shared_input_group(),
    ),
    (
        "LoraLayer.note_compiled",
        "LoraLayer.record_compiled_fallback",
        lambda: _layer().note_compiled(""),
        lambda: _layer().record_compiled_fallback(""),
    ),
    (
        "LoraLayer.record_compiled_fallback(why=)",
        "LoraLayer.record_compiled_fallback(reason=)",
        lambda: _layer().record_compiled_fallback(why=""),
        lambda: _layer().record_compiled_fallback(reason=""),
    ),
    (
        "adapters(absent_gradients=)",
        "adapters(unused_gradients=)",
        lambda: _in_block(absent_gradients=False).shape,
        lambda: _in_block(unused_gradients=False).shape,
    ),
    (
        "LoraConfig.from_peft(initialised=)",
        "LoraConfig.from_peft(initialized=)",
        lambda: _config(initialised=True),
        lambda: _config(initialized=True),
    ),
    (
        "AdapterPool.resident",
        "AdapterPool.loaded_names",
        lambda: _of_pool("resident"),
        lambda: _of_pool("loaded_names"),
    ),
    *(
        (
            f"AdapterPool.{old}",
            f"AdapterPool.{new}",
            lambda old=old: _of_pool(old).__func__,  # type: ignore[misc]
            lambda new=new: _of_pool(new).__func__,  # type: ignore[misc]
        )
        for old, new in (
            ("lease_resident", "lease_loaded"),
            ("load_entry", "load_registered"),
            ("register_entry", "register_adapter"),
            ("remake_scales", "recompute_scales"),
        )
    ),
    (
        "Lease.residents",
        "Lease.loaded_adapters",
        lambda: pool.Lease((), print).residents,
        lambda: pool.Lease((), print).loaded_adapters,
    ),
    (
        "Lease(residents=)",
        "Lease(loaded_adapters=)",
        lambda: pool.Lease(residents=(), release=print).loaded_adapters,  # type: ignore[call-arg]
        lambda: pool.Lease(loaded_adapters=(), release=print).loaded_adapters,
    ),
    (
        "LayerFusion.siblings",
        "LayerFusion.shared_input",
        lambda: _of_report("siblings"),
        lambda: _of_report("shared_input"),
    ),
    (
        "train(say=)",
        "train(on_message=)",
        lambda: _messages(train, "say"),
        lambda: _messages(train, "on_message"),
    ),
    (
        "open_run(say=)",
        "open_run(on_message=)",
        lambda: _messages(lambda *a, **k: open_run(*a, **k).__enter__(), "say"),
        lambda: _messages(lambda *a, **k: open_run(*a, **k).__enter__(), "on_message"),
    ),
)


@pytest.mark.parametrize(("old", "new", "before", "after"), NAMES, ids=[name[0] for name in NAMES])
def test_an_old_name_works_and_warns_once(
    old: str, new: str, before: Callable[[], object], after: Callable[[], object]
) -> None:
    """It gives what the new name gives; the new name gives no warning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = before()
        expected = after()
    ours = [str(w.message) for w in caught if "is deprecated and will be removed" in str(w.message)]
    assert len(ours) == 1 and found == expected
    words = re.findall(r"\w+", new)[-1]
    assert words in ours[0]


def test_tools_that_read_all_attributes_get_no_warning() -> None:
    """They find the new names; an old one can be called on the class, but not set."""
    layer, made = _layer(), _pool()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for value in (layer, type(layer), made, type(made), pool.Lease((), print), pool.Lease):
            names = dict(inspect.getmembers(value))
            assert ("refresh" in names) == (value is type(layer))
    made.close()
    with pytest.warns(FutureWarning, match="use FastLoraLinear.clear_caches"):
        type(layer).refresh(layer)
    with pytest.raises(AttributeError, match="'refresh' is a deprecated name and cannot be set"):
        layer.refresh = print


def test_an_old_method_takes_the_old_name_of_its_argument() -> None:
    """The method and the argument were renamed together; each gives a warning."""
    layer = _layer()
    with pytest.warns(FutureWarning) as caught:
        layer.note_compiled(why="alone")
    assert layer._compiled_fallback_reason == "alone"
    assert [str(w.message).partition("; ")[2] for w in caught] == [
        "use FastLoraLinear.record_compiled_fallback",
        "use 'reason'",
    ]


def test_both_names_of_an_argument_raise() -> None:
    """Nothing has begun by then."""
    with pytest.raises(TypeError, match="both 'unused_gradients' and its old name"):
        _in_block(absent_gradients=True, unused_gradients=True)


def test_the_page_lists_every_old_name() -> None:
    """And no other, in its first table."""
    table = PAGE.read_text(encoding="utf-8").split("\n## ")[1]
    listed = re.findall(r"^\| `(.+?)` \| `(.+?)` \|$", table, re.M)
    assert listed == [(old, new) for old, new, *_ in NAMES]

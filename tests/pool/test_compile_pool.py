"""A pool's adapters in compiled graphs: mixes, loads, evictions and hot swaps compile nothing."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

import fastlora
from fastlora import AdapterPool
from fastlora.pool import pool_of
from fastlora.testing import assert_within_budget
from tests.support.compiled import graph_count
from tests.support.pool_adapters import Blocks, make_folder

pytestmark = pytest.mark.usefixtures("fresh_compiler")

COUNT = 8


def make(root: Path, dtype: torch.dtype, **limits: Any) -> tuple[Blocks, AdapterPool]:
    """A model, and its pool with adapters of several ranks, targets and biases registered."""
    if not (root / "a0").exists():
        for i in range(COUNT):
            targets = ["q", "v"] if i % 2 else ["q"]
            fields = {"r": (1, 3, 4, 8)[i % 4], "lora_bias": i % 4 == 1, "target_modules": targets}
            make_folder(root / f"a{i}", seed=i, **fields)
    torch.manual_seed(0)
    model = Blocks().to(dtype).eval()
    pool = AdapterPool(model, target_modules=["q", "v"], **limits)
    pool.register_folder(root)
    return model, pool


def test_fifty_mixes_over_a_pool_compile_nothing(tmp_path: Path) -> None:
    """Three of eight adapters fit, so that mixes evict; one is swapped; every row is right."""
    model, pool = make(tmp_path, torch.float32, max_adapters=3)
    exact, _ = make(tmp_path, torch.float64)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    chosen = random.Random(0)
    tokens = torch.randint(0, 11, (6, 4))
    with torch.no_grad():
        for step in range(51):
            some = chosen.sample([None, *(f"a{i}" for i in range(COUNT))], 3)
            names = [chosen.choice(some) for _ in range(6)]
            with fastlora.adapters(pool, names):
                mine = compiled(tokens)
            if step % 5 == 0:
                with fastlora.adapters(pool, names):
                    plain = model(tokens)
                with fastlora.adapters(exact, names):
                    truth = exact(tokens)
                assert_within_budget(mine, plain, truth)
            if step == 25:
                make_folder(tmp_path / "a0", seed=99, r=4)
                for each in (pool, pool_of(exact)):
                    each.load("a0", tmp_path / "a0")
    assert pool.stats().evictions > 10
    assert graph_count() == 1


def test_pools_that_graphs_cannot_have(tmp_path: Path) -> None:
    """In float64, whose scalings tables do not hold, the graph breaks and the rows are right."""
    make_folder(tmp_path / "dora", seed=9, use_dora=True)
    model, pool = make(tmp_path, torch.float64)
    tokens, names = torch.randint(0, 11, (3, 4)), ["a1", None, "dora"]
    with torch.no_grad(), fastlora.adapters(pool, names):
        expected = model(tokens)
        found = torch.compile(model, backend="eager")(tokens)
    error = (found - expected).norm()
    assert error <= 16 * torch.finfo(torch.float64).eps * expected.norm()

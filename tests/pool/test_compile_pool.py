"""A pool's adapters in compiled graphs, plain and DoRA, against PEFT's formula in float64."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastlora
from fastlora import AdapterPool, LoraConfig
from fastlora.testing import assert_within_budget
from tests.support.compiled import graph_count
from tests.support.pool_adapters import Blocks, make_folder, saved_factors

pytestmark = pytest.mark.usefixtures("fresh_compiler")

PLAIN = ("p0", "p1")
DORA: dict[str, dict[str, Any]] = {
    "d0": {"r": 2},
    "d1": {"r": 4, "target_modules": ["v"], "use_rslora": True},
    "d2": {"r": 1, "target_modules": ["q"]},
    "d3": {"r": 3, "lora_alpha": 5},
}


def make(root: Path, dtype: torch.dtype, *names: str, **limits: Any) -> tuple[Blocks, AdapterPool]:
    """A model of which one target is called as it is, and its pool, with adapters registered."""
    for seed, name in enumerate((*PLAIN, *DORA)):
        fields = {"use_dora": True, **DORA[name]} if name in DORA else {"r": 3}
        make_folder(root / name, seed, **fields)
    torch.manual_seed(0)
    model = Blocks().to(dtype).eval()
    model.layers[1].q.register_forward_hook(lambda *_: None)
    pool = AdapterPool(model, target_modules=["q", "v"], **limits)
    for name in names:
        pool.register(name, root / name)
    return model, pool


def merged(model: Blocks, folder: Path | None, dtype: torch.dtype) -> nn.Module:
    """The base model with an adapter in its weights, in the pool's rounding of its factors."""
    base = Blocks()
    weights = {key.replace("base_layer.", ""): value for key, value in model.state_dict().items()}
    base.load_state_dict(weights)
    base.double()
    if folder is not None:
        config = LoraConfig.from_pretrained(folder)
        for name, module in base.named_modules():
            saved = saved_factors(folder, name) if isinstance(module, nn.Linear) else {}
            if saved:
                a, b = (saved[f"lora_{side}.weight"].to(dtype).double() for side in "AB")
                weight = module.weight.data + config.scaling_for(name) * b @ a
                if "lora_magnitude_vector" in saved:
                    magnitude = saved["lora_magnitude_vector"].double()
                    weight = (magnitude / weight.norm(dim=1))[:, None] * weight
                module.weight.data = weight
    return base


def truth(model: Blocks, root: Path, names: list[str | None], tokens: torch.Tensor) -> torch.Tensor:
    """Every sample by a model of its own, in float64."""
    dtype = model.embed.weight.dtype
    kinds = {name: merged(model, None if name is None else root / name, dtype) for name in names}
    return torch.cat([kinds[name](tokens[i : i + 1]) for i, name in enumerate(names)])


def check(
    compiled: Any, model: Blocks, pool: AdapterPool, root: Path, names: list[str | None]
) -> None:
    """Compares the graph with float64, and so closely as eager PyTorch comes."""
    tokens = torch.randint(0, 11, (len(names), 4))
    with torch.no_grad():
        with fastlora.adapters(pool, names):
            found = compiled(tokens)
        with fastlora.adapters(pool, names):
            plain = model(tokens)
        assert_within_budget(found, plain, truth(model, root, names, tokens))


@pytest.mark.drawn(1 / 3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_any_mix_is_one_graph(tmp_path: Path, dtype: torch.dtype) -> None:
    """Four of six adapters fit, so that mixes evict; one is swapped, and a base weight changed."""
    everybody = (*PLAIN, *DORA)
    model, pool = make(tmp_path, dtype, *everybody, max_adapters=4)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    chosen = random.Random(0)
    for step in range(21 if dtype == torch.float32 else 9):
        some = chosen.sample([None, *everybody], 3)
        names = [chosen.choice(some) for _ in range(5)]
        if step % 3 == 1:
            names[0] = "d0"
        check(compiled, model, pool, tmp_path, names)
        if step == 3:
            make_folder(tmp_path / "d0", seed=99, r=4, use_dora=True)
            pool.load("d0", tmp_path / "d0")
        if step == 6:
            with torch.no_grad():
                model.layers[0].q.weight.mul_(1.5)
                model.layers[1].q.weight[3].add_(0.5)
    assert pool.stats().evictions > 3
    assert graph_count() == 1


def test_a_pool_pays_with_its_first_dora_adapter(tmp_path: Path) -> None:
    """Until then graphs have no scales; it compiles one graph, and nothing after it does."""
    model, pool = make(tmp_path, torch.float32, *PLAIN, max_adapters=3)
    called: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        called[:] = [str(node.target) for node in graph.graph.nodes]
        return graph

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    check(compiled, model, pool, tmp_path, ["p0", None, "p1"])
    assert not any("lora_scale_" in target for target in called)
    assert not pool.tables.scale_address.any()
    for name in DORA:
        pool.load(name, tmp_path / name)
        check(compiled, model, pool, tmp_path, [name, "p0", None, name])
    assert sum("lora_scale_" in target for target in called) == len(pool.modules)
    pool.unload("d0")
    check(compiled, model, pool, tmp_path, ["p1", "p0"] * 2)
    # The first check of three samples, those of four after it.
    assert graph_count() <= 3


def test_pools_that_graphs_cannot_have(tmp_path: Path) -> None:
    """In float64, whose scalings tables do not hold, the graph breaks and the rows are right."""
    model, pool = make(tmp_path, torch.float64, "p0", "d0")
    layer, x = model.layers[0].v, torch.randn(3, 4, 14, dtype=torch.float64)
    with torch.no_grad(), fastlora.adapters(pool, ["p0", None, "d0"]):
        expected = layer(x)
        found = torch.compile(layer, backend="eager")(x)
    error = (found - expected).norm()
    assert error <= 16 * torch.finfo(torch.float64).eps * expected.norm()

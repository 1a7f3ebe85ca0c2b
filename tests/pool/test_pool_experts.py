"""A pool over the experts and the routers of a model: each row as with its adapter alone."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import fastlora
from fastlora import AdapterPool, LoraConfig
from fastlora.layers.experts import FastLoraExperts
from fastlora.model.adapter_files import CONFIG_NAME, WEIGHTS_NAME
from fastlora.model.adapter_folder import OpenAdapterFolder
from fastlora.pool.reader import _config_and_header_limits
from fastlora.pool.router import graph_capture_routing
from fastlora.routing.active import activate_routing
from fastlora.validation import CheckpointError, UnsupportedLayerError
from tests.support.moe_models import copy_random_factors, moe_model, stacks_of
from tests.support.pool_adapters import check_pool, state

KIND = "qwen3_moe"
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
# What adapter number i adapts is entry i % 5, of rank 1 + i % 4.
TARGETS: list[dict[str, Any]] = [
    {"target_modules": ["o_proj"], "target_parameters": BOTH},
    {"target_modules": [], "target_parameters": ["experts.down_proj"]},
    {"target_modules": [], "target_parameters": ["1.mlp.experts.gate_up_proj"]},
    {"target_modules": ["o_proj"]},  # no experts
    {"target_modules": ["q_proj"], "target_parameters": [*BOTH, "mlp.gate.weight"]},
]
NAMES = [f"a{number}" for number in range(64)]
STACK = "base_model.model.model.layers.1.mlp.experts"


def base_model(dtype: torch.dtype = torch.float64) -> Any:
    return moe_model(KIND, dtype, "eager")


def tokens(rows: int) -> torch.Tensor:
    return torch.randint(1, 32, (rows, 3), generator=torch.Generator().manual_seed(rows))


def logits(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        made: torch.Tensor = model(ids, **options).logits
    return made


class Adapters:
    """64 adapters in folders, and the logits of each of them alone."""

    def __init__(self, root: Path) -> None:
        self.root, self.model = root, None
        for number, name in enumerate(NAMES):
            rank = 1 + number % 4
            config = LoraConfig(r=rank, lora_alpha=3, **TARGETS[number % len(TARGETS)])
            if self.model is None:
                self.model = fastlora.get_peft_model(base_model(), config, name)
            else:
                self.model.add_adapter(name, config)
            copy_random_factors([self.model], name, seed=number)
        self.model.eval().save_pretrained(root)

    def alone(self, name: str | None, ids: torch.Tensor) -> torch.Tensor:
        """The logits of samples with one adapter, or without any."""
        assert self.model is not None
        if name is None:
            with self.model.disable_adapter():
                return logits(self.model, ids)
        self.model.set_adapter(name)
        return logits(self.model, ids)

    def check(self, pool: AdapterPool, rows: list[str | None]) -> None:
        """Compares the samples of one mixed batch with their adapters alone."""
        ids = tokens(len(rows))
        found = logits(pool._model, ids, adapter_names=rows)
        check_pool(pool)
        for row, name in enumerate(rows):
            alone = self.alone(name, ids[row : row + 1])[0]
            torch.testing.assert_close(found[row], alone, rtol=0, atol=1e-7)  # fp32 routers


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    return Adapters(tmp_path_factory.mktemp("experts"))


@pytest.fixture
def pool(saved: Adapters) -> Iterator[AdapterPool]:
    """A pool with room for four adapters."""
    with AdapterPool(base_model(), max_adapters=4, max_rank=4) as made:
        made.register_folder(saved.root)
        yield made


def test_64_adapters_in_one_batch_are_each_alone(saved: Adapters) -> None:
    """Samples of two tokens each, in an order that mixes adapters and base rows."""
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0)).tolist()
    names = [NAMES[number] for number in order]
    with AdapterPool(base_model()) as pool:
        pool.register_folder(saved.root)
        saved.check(pool, [*names[:20], None, *names[20:], None, names[3]])
        assert len(pool.loaded_names) == 64
        stacks = [m for m in pool.modules if m.num_matrices > 1]
        assert len(stacks) == 4 and {m.num_matrices for m in stacks} == {4}


def test_eviction_reload_and_hot_swap(saved: Adapters, pool: AdapterPool) -> None:
    for start in (0, 3, 0, 7):
        saved.check(pool, [NAMES[start], None, *NAMES[start + 1 : start + 4], NAMES[start]])
    assert pool.stats().evictions >= 8
    with pool.lease([NAMES[7]]) as lease:
        slot = lease.loaded_adapters[0].slot
    ids = tokens(2)
    pool.load(NAMES[7], saved.root / NAMES[4])
    assert pool.slot_of(NAMES[7]) == slot
    found = logits(pool._model, ids, adapter_names=[NAMES[7], None])
    torch.testing.assert_close(found[:1], saved.alone(NAMES[4], ids[:1]), rtol=0, atol=1e-7)
    pool.load(
        "given",
        load_file(saved.root / "a0" / WEIGHTS_NAME),
        config=LoraConfig(r=1, lora_alpha=3, **TARGETS[0]),
    )
    found = logits(pool._model, ids, adapter_names=["given", None])
    torch.testing.assert_close(found[:1], saved.alone("a0", ids[:1]), rtol=0, atol=1e-7)


def test_factors_are_read_in_place_and_freed(saved: Adapters, pool: AdapterPool) -> None:
    """Rank rows of lora_b are views of the image, and nothing else keeps an evicted image."""
    saved.check(pool, ["a0", "a1", None])
    experts: Any = pool._model.get_submodule("model.layers.0.mlp.experts")
    with pool.lease(["a0"]) as lease:
        loaded = lease.loaded_adapters[0]
        for layer in experts.adapted_parameters():
            lora_a, rank_rows = layer.rank_rows("a0", loaded.factors(layer.table_row))
            assert lora_a.shape[:2] == rank_rows.shape[:2] == (4, 1)
            for factor in (lora_a, rank_rows):
                assert factor.untyped_storage().data_ptr() == loaded.image.data_ptr()
    image = StorageWeakRef(loaded.image.untyped_storage())
    del lease, loaded, lora_a, rank_rows, factor
    pool.unload("a0")
    gc.collect()
    assert image.expired()


def test_nan_stays_in_the_rows_of_its_adapter(saved: Adapters) -> None:
    """Also in a router, and for samples of one batch with rows on the same experts."""
    config = LoraConfig.from_pretrained(saved.root / "a4")
    tensors = load_file(saved.root / "a4" / WEIGHTS_NAME)
    with AdapterPool(base_model()) as pool:
        pool.load("nan", {k: t.fill_(float("nan")) for k, t in tensors.items()}, config=config)
        pool.load("a0", saved.root / "a0")
        pool.load("a9", saved.root / "a9")
        rows = ["a0", "nan", None, "a9", "nan"]
        found = logits(pool._model, tokens(5), adapter_names=rows)
        for row, name in enumerate(rows):
            if name == "nan":
                assert found[row].isnan().all()
            else:
                alone = saved.alone(name, tokens(5)[row : row + 1])[0]
                torch.testing.assert_close(found[row], alone, rtol=0, atol=1e-7)


def test_slots_tokens_and_no_tokens(saved: Adapters, pool: AdapterPool) -> None:
    """Row ids that are slots, one for each token; and a batch without tokens."""
    ids = tokens(2)
    with pool.lease(["a0", "a4"]) as lease, torch.no_grad():
        first, second = (loaded.slot for loaded in lease.loaded_adapters)
        with fastlora.adapters(pool, torch.tensor([first, -1])):
            by_slot = logits(pool._model, ids)
        torch.testing.assert_close(by_slot[:1], saved.alone("a0", ids[:1]), rtol=0, atol=1e-7)
        experts = pool._model.get_submodule("model.layers.1.mlp.experts")
        x = torch.randn(4, 16, dtype=torch.float64)
        index, weights = torch.tensor([[0, 3], [3, 0], [2, 3], [3, 1]]), torch.rand(4, 2).double()
        with fastlora.adapters(pool, torch.tensor([first, second, -1, first])):
            whole = experts(x, index, weights)
        for slot, rows in ((first, [0, 3]), (second, [1]), (-1, [2])):
            with fastlora.adapters(pool, torch.tensor([slot])):
                alone = experts(x[rows], index[rows], weights[rows])
            torch.testing.assert_close(whole[rows], alone, rtol=0, atol=1e-12)
        with fastlora.adapters(pool, torch.tensor([first])):
            assert experts(x[:0], index[:0], weights[:0]).shape == (0, 16)
        with (
            fastlora.adapters(pool, torch.tensor([first])),
            pytest.raises(ValueError, match="top_k_index contains 4, expected .* 4 experts"),
        ):
            experts(x[:1], torch.tensor([[1, 4]]), weights[:1])


def test_sentinels_of_expert_parallelism(saved: Adapters, pool: AdapterPool) -> None:
    """Rows of experts of other processes add nothing to their tokens."""
    experts: Any = pool._model.get_submodule("model.layers.1.mlp.experts")
    x, weights = torch.randn(3, 16, dtype=torch.float64), torch.rand(3, 2).double()
    experts.base_layer._is_expert_parallel = True
    with torch.no_grad(), fastlora.adapters(pool, ["a0", None, "a4"]):
        found = experts(x, torch.tensor([[1, 4], [4, 0], [4, 4]]), weights)
        zeroed = weights.masked_fill(torch.tensor([[0, 1], [1, 0], [1, 1]], dtype=torch.bool), 0)
        expected = experts(x, torch.tensor([[1, 0], [0, 0], [0, 0]]), zeroed)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert not found[2].any() and found[:2].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pools_of_other_dtypes(saved: Adapters, dtype: torch.dtype) -> None:
    """The same values as a model with the factors in the dtype of the pool."""
    ids, rows = tokens(4), ["a0", None, "a1", "a4"]
    model = fastlora.LoraModel.from_pretrained(
        base_model(dtype), saved.root / "a0", "a0", autocast_adapter_dtype=False
    )
    for name in ("a1", "a4"):
        model.load_adapter(saved.root / name, name, autocast_adapter_dtype=False)
    with AdapterPool(base_model(dtype)) as pool:
        pool.register_folder(saved.root)
        found = logits(pool._model, ids, adapter_names=rows)
    expected = logits(model.eval(), ids, adapter_names=rows)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_dora_on_linears_beside_experts(saved: Adapters, tmp_path: Path) -> None:
    """Its scales follow the base weights; on a stack it is refused."""
    config = LoraConfig(r=2, target_modules=["o_proj"], use_dora=True, init_lora_weights=False)
    fastlora.get_peft_model(base_model(), config).save_pretrained(tmp_path)
    model, ids = base_model(), tokens(3)
    with AdapterPool(model) as pool:
        pool.load("dora", tmp_path)
        pool.load("a0", saved.root / "a0")
        for factor in (1.0, 1.5):
            twin = base_model()
            for each in (model, twin):
                weight = each.get_submodule("model.layers.1.self_attn.o_proj").weight
                weight.data.copy_(twin.model.layers[1].self_attn.o_proj.weight * factor)
            fastlora.clear_caches(model)
            alone = fastlora.LoraModel.from_pretrained(twin, tmp_path)
            found = logits(model, ids, adapter_names=["dora", "a0", None])
            torch.testing.assert_close(found[:1], logits(alone, ids[:1]), rtol=0, atol=1e-7)
        assert "Experts" in str(fastlora.fusion_report(model))


def test_gradients_flow_through_experts_of_a_pool(saved: Adapters, pool: AdapterPool) -> None:
    """To what comes before them; the factors of a pool have none."""
    embedded = pool._model.get_input_embeddings()(tokens(3)).detach().requires_grad_()
    rows = ["a0", None, "a4"]
    pool._model(inputs_embeds=embedded, adapter_names=rows).logits.square().sum().backward()
    assert embedded.grad is not None
    for row, name in enumerate(rows):
        own = embedded.detach()[row : row + 1].requires_grad_()
        assert saved.model is not None
        with saved.model.disable_adapter() if name is None else torch.enable_grad():
            if name is not None:
                saved.model.set_adapter(name)
            saved.model(inputs_embeds=own).logits.square().sum().backward()
        torch.testing.assert_close(embedded.grad[row : row + 1], own.grad, rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------- refusals


def edit(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def edited(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS_NAME)
        change(tensors)
        save_file(tensors, folder / WEIGHTS_NAME)

    return edited


def configure(**fields: Any) -> Callable[[Path], None]:
    def edited(folder: Path) -> None:
        path = folder / CONFIG_NAME
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return edited


def rename(tensors: dict[str, torch.Tensor]) -> None:
    for key in [key for key in tensors if "layers.1.mlp" in key]:
        tensors[key.replace("layers.1.mlp.experts", "layers.1.mlp.others")] = tensors.pop(key)


def drop(tensors: dict[str, torch.Tensor]) -> None:
    for key in [key for key in tensors if key.startswith(f"{STACK}.base_layer")]:
        del tensors[key]


def of_five_experts(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{STACK}.lora_A.weight"] = torch.ones(10, 8)
    tensors[f"{STACK}.lora_B.weight"] = torch.ones(16, 10)


def of_rank_4(tensors: dict[str, torch.Tensor]) -> None:
    at = "base_model.model.model.layers.0.self_attn.o_proj"
    tensors[f"{at}.lora_A.weight"] = torch.ones(4, 16)
    tensors[f"{at}.lora_B.weight"] = torch.ones(16, 4)


# Changes to the files of an adapter of rank 2 on a linear layer and both stacks of each layer.
DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "other experts": (
        edit(of_five_experts),
        r"experts\.lora_A\.weight' has shape \(10, 8\), but this model's 'model\.layers\.1\.mlp\."
        r"experts\.down_proj' expects shape \(8, 8\) for rank 2 on each of its 4 matrices",
    ),
    "other width": (
        edit(lambda t: t.update({f"{STACK}.base_layer.lora_B.weight": torch.ones(15, 8)})),
        r"\(15, 8\), but .* 'model\.layers\.1\.mlp\.experts\.gate_up_proj' expects shape \(16, 8\)",
    ),
    "other rank of a linear layer": (
        edit(of_rank_4),
        r"o_proj\.lora_A\.weight' has shape \(4, 16\), but .*expects shape \(2, 16\) for rank 2",
    ),
    "other rank": (
        configure(rank_pattern={"1.mlp.experts.down_proj": 4}),
        r"\(8, 8\), but this model's '.*experts\.down_proj' expects shape \(16, 8\) for rank 4",
    ),
    "other names": (edit(rename), "no module 'model.layers.1.mlp.others"),
    "one stack is missing": (
        edit(drop),
        r"missing for 1 of the 6 modules .* as 'model\.layers\.1\.mlp\.experts\.gate_up_proj'",
    ),
    "DoRA": (configure(use_dora=True), "lora_magnitude_vector"),
    "order of Unsloth": (configure(lora_B_layout="grouped_by_expert"), "grouped_by_expert"),
    "no such parameter": (configure(target_parameters=["experts.w"]), "not among|no module"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_an_adapter_that_raises_changes_nothing(
    damage: str, saved: Adapters, pool: AdapterPool, tmp_path: Path
) -> None:
    change, message = DAMAGE[damage]
    config = LoraConfig(r=2, target_modules=["o_proj"], target_parameters=BOTH)
    fastlora.get_peft_model(base_model(), config).save_pretrained(tmp_path / "a")
    pool.load("a", tmp_path / "a")
    pool.load("a0", saved.root / "a0")
    change(tmp_path / "a")
    before = state(pool)
    with pytest.raises(CheckpointError, match=message) as error:
        pool.load("a", tmp_path / "a")
    assert str(tmp_path / "a") in str(error.value)
    assert state(pool) == before


def test_limits_of_a_pool_count_the_rank_of_one_matrix(saved: Adapters) -> None:
    with AdapterPool(base_model(), max_rank=2) as pool:
        pool.load("a1", saved.root / "a1")  # rank 2, 8 rows of lora_A
        with pytest.raises(CheckpointError, match="r=3 exceeds the pool's max_rank=2"):
            pool.load("a2", saved.root / "a2")


def test_limits_of_a_pool_are_checked_before_a_tensor_is_read(
    saved: Adapters, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = AdapterPool(base_model(), max_rank=3)
    monkeypatch.setattr(OpenAdapterFolder, "load", mock.Mock(side_effect=AssertionError))
    with pytest.raises(CheckpointError, match="max_rank=3"):
        pool.load("a", saved.root / "a3")
    pool.close()


def test_replaced_stacks_are_freed(saved: Adapters) -> None:
    """What a pool remembers of the targets of its adapters keeps no parameter of the model."""
    model = base_model().requires_grad_(False)
    pool = AdapterPool(model)
    pool.load("a0", saved.root / "a0")
    layer = model.model.layers[1].mlp.experts
    before = weakref.ref(layer.base_layer.down_proj)
    layer.base_layer.down_proj = nn.Parameter(layer.base_layer.down_proj.detach().clone())
    gc.collect()
    assert before() is None
    pool.load("again", saved.root / "a0")
    ids = tokens(2)
    with fastlora.adapters(pool, ["a0", "again"]):
        made = logits(model, ids[:1].repeat(2, 1))
    torch.testing.assert_close(made[0], made[1])
    pool.close()


def test_a_header_with_factors_of_single_experts_fits() -> None:
    """A file of transformers 4 for 48 layers of 128 experts, as large as a Qwen3-30B-A3B has."""
    layers, experts = range(48), range(128)
    stacks = [f"model.layers.{n}.mlp.{stack}" for n in layers for stack in BOTH]
    place = {"dtype": "BF16", "shape": [128, 2048], "data_offsets": [10**10, 10**10]}
    header = {
        f"base_model.model.model.layers.{n}.mlp.experts.{expert}.{end}.lora_{side}.weight": place
        for n in layers
        for expert in experts
        for end in ("gate_proj", "up_proj", "down_proj")
        for side in "AB"
    }
    limits = _config_and_header_limits(dict.fromkeys(stacks, len(experts)))
    size = len(json.dumps(header))
    assert size <= limits.header <= 2 * size


def test_parameters_that_a_pool_does_not_adapt(saved: Adapters) -> None:
    """A pool over some parameters, named in target_parameters."""
    with AdapterPool(
        base_model(), target_modules=["o_proj"], target_parameters=["experts.down_proj"]
    ) as pool:
        assert len(pool.modules) == 4
        pool.load("a1", saved.root / "a1")
        saved.check(pool, ["a1", None])
        with pytest.raises(
            CheckpointError,
            match=r"experts\.gate_up_proj' is not among .*target_parameters matched",
        ):
            pool.load("a0", saved.root / "a0")
    with (
        AdapterPool(base_model(), target_modules=["o_proj"]) as pool,
        pytest.raises(CheckpointError, match=r"experts\.down_proj' is not among"),
    ):
        pool.load("a1", saved.root / "a1")


def test_closing_gives_back_the_experts(saved: Adapters) -> None:
    model = base_model()
    experts, ids = model.get_submodule("model.layers.0.mlp.experts"), tokens(2)
    before = logits(model, ids)
    with AdapterPool(model) as pool:
        assert isinstance(model.get_submodule("model.layers.0.mlp.experts"), FastLoraExperts)
        assert not any(parameter.requires_grad for parameter in experts.parameters())
        pool.register_folder(saved.root)
        saved.check(pool, ["a0", None])
        assert torch.equal(logits(model, ids), before)  # without a block
    assert model.get_submodule("model.layers.0.mlp.experts") is experts
    assert torch.equal(logits(model, ids), before)
    assert all(parameter.requires_grad for parameter in experts.parameters())


def test_graphs_break_at_experts_of_a_pool(pool: AdapterPool) -> None:
    """With fullgraph=True they raise, and CUDA graphs are refused by name."""
    torch._dynamo.reset()
    experts = pool._model.get_submodule("model.layers.1.mlp.experts")
    inputs = torch.randn(2, 16).double(), torch.tensor([[0, 1], [2, 3]]), torch.rand(2, 2).double()
    with torch.no_grad(), fastlora.adapters(pool, ["a0", "a4"]):
        expected = experts(*inputs)
        with pytest.raises(torch._dynamo.exc.Unsupported, match="disable"):
            torch.compile(experts, backend="eager", fullgraph=True)(*inputs)
        found = torch.compile(experts, backend="eager")(*inputs)
    assert torch.equal(found, expected)
    with (
        activate_routing(graph_capture_routing(pool, torch.tensor([0]))),
        pytest.raises(
            UnsupportedLayerError, match=r"'model\.layers\.1\.mlp\.experts'.* CUDA graphs"
        ),
    ):
        experts(*inputs)


def test_the_router_of_llama_4(tmp_path: Path) -> None:
    """It returns two tensors. Without an adapter on it, it runs in a pool over all linears."""
    kind, ids = "llama4_text", tokens(3)
    config = LoraConfig(
        r=2, target_modules=[], target_parameters=[*stacks_of(moe_model(kind)), "router.weight"]
    )
    model = fastlora.get_peft_model(moe_model(kind, torch.float64, "eager"), config)
    copy_random_factors([model])
    model.eval().save_pretrained(tmp_path)
    base = moe_model(kind, torch.float64, "eager")
    with AdapterPool(base) as pool:
        with pytest.raises(CheckpointError, match=r"router\.weight' is not among the modules"):
            pool.load("a", tmp_path)
        assert torch.equal(logits(base, ids, adapter_names=[None] * 3), logits(base, ids))
    targets = config.target_parameters
    with AdapterPool(base, target_modules=["q_proj"], target_parameters=targets) as pool:
        pool.load("a", tmp_path)
        found = logits(base, ids, adapter_names=["a", None, "a"])
    torch.testing.assert_close(found[[0, 2]], logits(model, ids[[0, 2]]), rtol=0, atol=1e-7)
    torch.testing.assert_close(found[1], logits(base, ids)[1], rtol=0, atol=1e-7)


class Table(nn.Module):
    """A module with a parameter, and outputs that are not rows."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.table).sum(0)


def test_modules_with_other_outputs_are_refused_by_name() -> None:
    """Only if an adapter of the batch is on them."""
    model = nn.Sequential(Table())
    tensors = {
        "base_model.model.0.lora_A.weight": torch.randn(2, 4),
        "base_model.model.0.lora_B.weight": torch.randn(4, 2),
    }
    config = LoraConfig(r=2, target_modules=[], target_parameters=["0.table"])
    with AdapterPool(model, target_modules=[], target_parameters=["0.table"]) as pool:
        pool.load("a", tensors, config=config)
        x = torch.randn(3, 4)
        with fastlora.adapters(pool, [None] * 3):
            assert torch.equal(model(x), (x @ model[0].base_layer.table).sum(0))
        with (
            fastlora.adapters(pool, ["a", None, None]),
            pytest.raises(UnsupportedLayerError, match=r"module '0' .*'table'.* each input row"),
        ):
            model(x)

"""Each method of the wrapper on vLLM's own layers, compared with a loop over rows."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.lora.request import LoRARequest
from vllm.v1.worker.gpu.lora_utils import LoraState

from fastlora.integrations.vllm import layers
from fastlora.testing import assert_within_budget
from tests.engine import vllm_layers
from tests.engine.vllm_layers import ADAPTERS, MIX, SLOTS, VOCABULARY, K

pytestmark = pytest.mark.usefixtures("one_process")
MIXES = {
    "mixed": MIX,
    "one row": (9,),
    "one row without an adapter": (0,),
    "one adapter": (7,) * 17,
    "no adapter": (0,) * 17,
    "long samples": (7,) * 24 + (0,) * 16 + (3,) * 24,
}


def _run(case: vllm_layers.Case, x: torch.Tensor, ids: tuple[int, ...]) -> torch.Tensor:
    own = vllm_layers.wrapper(128)
    case.layer.set_mapping(own)
    vllm_layers.start_batch(own, ids)
    with torch.inference_mode():
        result = case.layer(x.clone())
    return result[0] if isinstance(result, tuple) else result


def _check(case: vllm_layers.Case, ids: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(len(ids), K, dtype=dtype)
    slots = vllm_layers.slots_of(ids)
    y = _run(case, x, ids)
    with torch.inference_mode():
        base = case.layer.base_layer(x.clone())
    base = base[0] if isinstance(base, tuple) else base
    truth = base.double() + vllm_layers.updates(x, case, slots, torch.float64)
    same = (base + vllm_layers.updates(x, case, slots, dtype)).to(dtype)
    assert_within_budget(y, same, truth)
    for row, slot in enumerate(slots):
        if slot < 0:
            assert torch.equal(y[row], base[row])


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("name", vllm_layers.LINEAR)
def test_linear_layers(name: str, mix: str) -> None:
    _check(vllm_layers.linear_case(name), MIXES[mix], torch.float32)


def test_bf16() -> None:
    case = vllm_layers.linear_case("MergedQKVParallelLinearWithLoRA", torch.bfloat16)
    _check(case, MIX, torch.bfloat16)


@pytest.mark.parametrize("change", ["reload", "evict"])
def test_a_slot_changes(change: str) -> None:
    """An adapter of another rank replaces one, or one is removed, after factors were packed."""
    case = vllm_layers.linear_case("MergedColumnParallelLinearWithLoRA")
    _check(case, MIX, torch.float32)
    if change == "reload":
        vllm_layers.set_adapter(case, 0, 5)
    else:
        case.layer.reset_lora(0)
        del case.factors[0]
    _check(case, MIX, torch.float32)


@pytest.mark.parametrize("through_views", [False, True])
@pytest.mark.parametrize("factor", ["lora_a", "lora_b"])
def test_nan_stays_in_the_rows_of_its_adapter(factor: str, through_views: bool) -> None:
    """A slot with a NaN, loaded by vLLM or written into vLLM's stack after a forward."""
    case = vllm_layers.linear_case("MergedQKVParallelLinearWithLoRA")
    x, slots = torch.randn(len(MIX), K), vllm_layers.slots_of(MIX)
    before = _run(case, x, MIX)
    bad = ADAPTERS.index(9)
    if through_views:
        getattr(case.layer, f"{factor}_stacked")[0][bad, 0, 2, 1] = float("nan")
    else:
        down, up, scaling = case.factors[bad][0]  # type: ignore[misc]
        (down if factor == "lora_a" else up)[2, 1] = float("nan")
        own = [[each[i].clone() for each in case.factors[bad]] for i in (0, 1)]  # type: ignore
        case.layer.set_lora(bad, *own)
    after = _run(case, x, MIX)
    for row, slot in enumerate(slots):
        if slot == bad:
            assert after[row].isnan().any()
        else:
            assert not after[row].isnan().any()
            torch.testing.assert_close(after[row], before[row])


def test_stacks_are_views_of_the_slots() -> None:
    """What vLLM reads under its own names is what was loaded, at multiples of 16 bytes."""
    case = vllm_layers.linear_case("MergedQKVParallelLinearWithLoRA")
    layer = case.layer
    slots = layer.lora_b_stacked[0].fastlora_slots
    for index, size in enumerate(case.sizes):
        assert layer.lora_a_stacked[index].shape == (SLOTS, 1, vllm_layers.MAX_RANK, K)
        assert layer.lora_b_stacked[index].shape == (SLOTS, 1, size, vllm_layers.MAX_RANK)
        for slot, own in case.factors.items():
            if own[index] is not None:
                down, up, _ = own[index]  # type: ignore[misc]
                rank = down.shape[0]
                assert torch.equal(layer.lora_a_stacked[index][slot, 0, :rank], down)
                assert torch.equal(layer.lora_b_stacked[index][slot, 0, :, :rank], up)
        for slot in range(SLOTS):
            assert slots.lora_a[index][slot].data_ptr() % 16 == 0
            assert slots.lora_b[index][slot].data_ptr() % 16 == 0
    addresses = [each.data_ptr() for each in (*layer.lora_a_stacked, *layer.lora_b_stacked)]
    vllm_layers.set_adapter(case, 2, 11)
    stacks = (*layer.lora_a_stacked, *layer.lora_b_stacked)
    assert [each.data_ptr() for each in stacks] == addresses


def test_blocks_of_odd_sizes_are_aligned() -> None:
    case = vllm_layers.linear_case("MergedColumnParallelLinearVariableSliceWithLoRA")
    slots = case.layer.lora_b_stacked[0].fastlora_slots
    for tensors in (slots.lora_b, slots.lora_a):
        assert all(own.data_ptr() % 16 == 0 for each in tensors for own in each)


def test_scaling_is_apart_and_in_fp32() -> None:
    """The scaling is not folded into lora_b, and ranks are those of the adapters."""
    case = vllm_layers.linear_case("MergedQKVParallelLinearWithLoRA", torch.bfloat16)
    products = case.layer.lora_b_stacked[0].fastlora_slots.linear[0]
    _, _, rank, scaling = products.tables
    assert rank.tolist() == [[8, 3, 0, 16, 1], [8, 0, 0, 16, 1], [8, 3, 0, 16, 1]]
    assert scaling.dtype is torch.float32
    for slot, own in case.factors.items():
        for index, each in enumerate(own):
            if each is not None:
                assert scaling[index, slot] == torch.tensor(each[2])


def test_embedding() -> None:
    layer, base = vllm_layers.embedding_case()
    factors: dict[int, tuple[torch.Tensor, torch.Tensor, float]] = {}
    for slot, rank in ((0, 4), (1, 16), (3, 1)):
        lora_a, lora_b = torch.randn(rank, VOCABULARY), torch.randn(K, rank)
        factors[slot] = lora_a, lora_b, 0.5 + slot
        layer.set_lora(slot, lora_a.clone(), vllm_layers.scaled(lora_b.clone(), 0.5 + slot))
    own = vllm_layers.wrapper()
    layer.set_mapping(own)
    vllm_layers.start_batch(own, MIX)
    tokens, slots = torch.randint(0, VOCABULARY, (len(MIX),)), vllm_layers.slots_of(MIX)
    plain = base(tokens)
    y = layer(tokens)
    truth, same = plain.double(), plain.clone()
    for row, slot in enumerate(slots):
        if slot in factors:
            lora_a, lora_b, scaling = factors[slot]
            s = lora_a[:, tokens[row]]
            truth[row] += scaling * (lora_b.double() @ s.double())
            same[row] += scaling * (lora_b @ s)
        else:
            assert torch.equal(y[row], plain[row])
    assert_within_budget(y, same, truth)
    layer.reset_lora(1)
    assert not layer.lora_a_stacked[1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits(dtype: torch.dtype) -> None:
    """The rows are those that are sampled. Logits may have more columns, and another dtype."""
    layer, head = vllm_layers.logits_case(dtype)
    case = vllm_layers.Case(layer, (VOCABULARY,))
    vllm_layers.set_adapter(case, 0, 4)
    vllm_layers.set_adapter(case, 3, 16)
    own = vllm_layers.wrapper()
    layer.set_mapping(own)
    sampled = (9, 0, 7, 3, 9)
    vllm_layers.start_batch(own, MIX, sampled)
    x = torch.randn(len(sampled), K, dtype=dtype)
    plain = torch.nn.functional.linear(x, head.weight[:VOCABULARY]).float()
    y = torch.nn.functional.pad(plain, (0, 24)).clone()
    padding = y[:, VOCABULARY:].clone()
    own.add_lora_logits(y, x, layer.lora_a_stacked, layer.lora_b_stacked, 1.0)
    slots = vllm_layers.slots_of(sampled)
    truth = plain.double() + vllm_layers.updates(x, case, slots, torch.float64)
    same = plain + vllm_layers.updates(x, case, slots, torch.float32)
    assert_within_budget(y[:, :VOCABULARY], same, truth)
    assert torch.equal(y[:, VOCABULARY:], padding)


def test_prompt_logits_use_the_adapter_of_their_request() -> None:
    """Also if the prompt has as many rows as there are sampled rows, with other adapters."""
    layer, head = vllm_layers.logits_case()
    case = vllm_layers.Case(layer, (VOCABULARY,))
    vllm_layers.set_adapter(case, 0, 4)
    vllm_layers.set_adapter(case, 3, 16)
    own = vllm_layers.wrapper()
    vllm_layers.start_batch(own, MIX, (9, 7))
    for adapter, m in ((9, 2), (7, 2), (9, 6), (0, 3)):
        x, slots = torch.randn(m, K), vllm_layers.slots_of((adapter,) * m)
        plain = torch.nn.functional.linear(x, head.weight[:VOCABULARY])
        y = plain.clone()
        with own.logits_of_one_request(adapter, ADAPTERS):
            own.add_lora_logits(y, x, layer.lora_a_stacked, layer.lora_b_stacked, 1.0)
        truth = plain.double() + vllm_layers.updates(x, case, slots, torch.float64)
        same = plain + vllm_layers.updates(x, case, slots, torch.float32)
        assert_within_budget(y, same, truth)
    y = torch.zeros(6, VOCABULARY)
    with pytest.raises(ValueError, match="got 6 rows, expected the 2 sampled rows"):
        own.add_lora_logits(y, torch.randn(6, K), layer.lora_a_stacked, layer.lora_b_stacked, 1.0)


@pytest.mark.parametrize("parts", [1, 2])
def test_factors_that_cover_several_slices(parts: int) -> None:
    """One lora_b for all seven slices, or one for the first three and one for the others."""
    case = vllm_layers.linear_case("MergedColumnParallelLinearVariableSliceWithLoRA")
    groups = [case.sizes] if parts == 1 else [case.sizes[:3], case.sizes[3:]]
    downs, ups, own = [], [], list[Any]()
    for index, sizes in enumerate(groups):
        lora_a, lora_b, scaling = torch.randn(5, K), torch.randn(sum(sizes), 5), 0.5 + index
        own += [(lora_a, part, scaling) for part in lora_b.split(list(sizes))]
        downs.append(lora_a.clone())
        ups.append(vllm_layers.scaled(lora_b.clone(), scaling))
    case.factors[0] = own
    if parts == 1:
        case.layer.set_lora(0, downs[0], ups[0])
    else:
        case.layer.set_lora(0, downs, ups)
    _check(case, MIX, torch.float32)


def test_sharded_ranks_in_two_shards() -> None:
    """add_shrink on each shard, the ranks put together, and add_expand give the whole update."""
    from fastlora.integrations.vllm.slots import LayerSlots

    rank, sizes, shards = vllm_layers.MAX_RANK, (12, 8), 2
    local = rank // shards
    parts = [
        LayerSlots(torch.empty(SLOTS, 1, local, K), [torch.empty(SLOTS, 1, n, rank) for n in sizes])
        for _ in range(shards)
    ]
    case = vllm_layers.Case(None, sizes)
    for slot, own_rank in enumerate((8, 3, 0, 16, 11)):
        own = [(torch.randn(own_rank, K), torch.randn(n, own_rank), 0.5 + slot) for n in sizes]
        case.factors[slot] = list(own)
        for shard, part in enumerate(parts):
            rows = slice(shard * local, (shard + 1) * local)
            down, up = [a[rows] for a, _, _ in own], [b for _, b, _ in own]
            part.write(slot, down, up, [scaling for _, _, scaling in own])
    wrapper = vllm_layers.wrapper()
    vllm_layers.start_batch(wrapper, MIX)
    x, slots = torch.randn(len(MIX), K), vllm_layers.slots_of(MIX)
    buffers = []
    for part in parts:
        buffers.append(torch.zeros(len(sizes), len(MIX), local))
        wrapper.add_shrink(buffers[-1], x, part.stacked_factors()[0], 1.0)
    y = torch.zeros(len(MIX), 3 + sum(sizes))
    s = torch.cat(buffers, -1)
    wrapper.add_expand(y, s, parts[0].stacked_factors()[1], sizes, offset_start=3, add_input=True)
    truth = vllm_layers.updates(x, case, slots, torch.float64)
    assert_within_budget(
        y[:, 3:], vllm_layers.updates(x, case, slots, torch.float32).float(), truth
    )
    assert not y[:, :3].any()


@pytest.mark.parametrize(
    "name",
    [
        "ColumnParallelLinearWithShardedLoRA",
        "QKVParallelLinearWithShardedLoRA",
        "MergedColumnParallelLinearWithShardedLoRA",
        "MergedQKVParallelLinearWithShardedLoRA",
        "RowParallelLinearWithShardedLoRA",
    ],
)
def test_fully_sharded_layers(name: str) -> None:
    """vLLM's fully sharded layers, in one process."""
    _check(vllm_layers.linear_case(name, fully_sharded_loras=True), MIX, torch.float32)


def test_classification_head() -> None:
    """Adapters with a head of their own replace their rows; others add an update."""
    from vllm.lora.layers import ClassificationHeadWithLoRA
    from vllm.model_executor.layers.linear import ReplicatedLinear

    base = ReplicatedLinear(K, 3, bias=True, params_dtype=torch.float32)
    for parameter in base.parameters():
        parameter.data.normal_()
    base.quant_method.process_weights_after_loading(base)
    layer = ClassificationHeadWithLoRA(base)
    layer.create_lora_weights(SLOTS, vllm_layers.config(max_lora_cls_labels=4))
    case = vllm_layers.Case(layer, (3,))
    vllm_layers.set_adapter(case, 0, 8)
    weight, bias = torch.randn(4, K), torch.randn(4)
    layer.set_module_to_save(3, weight, bias)
    own = vllm_layers.wrapper()
    layer.set_mapping(own)
    ids = (9, 0, 7, 3)
    slots = vllm_layers.slots_of(ids)
    vllm_layers.start_batch(own, ids, ids)
    layer.set_output_mapping(tuple(slots))
    x = torch.randn(len(ids), K)
    rows = layer(x)
    plain = base(x)[0]
    expected = plain + vllm_layers.updates(x, case, slots, torch.float64).float()
    torch.testing.assert_close(rows[0], torch.nn.functional.linear(x[0], weight, bias))
    for row in (1, 2, 3):
        torch.testing.assert_close(rows[row], expected[row])


def test_wrappers_of_a_multimodal_model_have_batches_of_their_own() -> None:
    """A model has up to three wrappers. A batch of one does not change the rows of another."""
    names = (
        "ColumnParallelLinearWithLoRA",
        "RowParallelLinearWithLoRA",
        "QKVParallelLinearWithLoRA",
    )
    mixes = (MIX, (7, 0, 9), (4,) * 5)
    cases, wrappers = [vllm_layers.linear_case(name) for name in names], []
    for case, ids in zip(cases, mixes, strict=True):
        wrappers.append(vllm_layers.wrapper())
        case.layer.set_mapping(wrappers[-1])
        vllm_layers.start_batch(wrappers[-1], ids)
    for case, ids, own in zip(cases, mixes, wrappers, strict=True):
        x, slots = torch.randn(len(ids), K), vllm_layers.slots_of(ids)
        y = case.layer(x.clone())[0]
        vllm_layers.start_batch(own, (0,) * len(ids))
        base = case.layer(x.clone())[0]
        truth = base.double() + vllm_layers.updates(x, case, slots, torch.float64)
        assert_within_budget(y, base + vllm_layers.updates(x, case, slots, torch.float32), truth)


@pytest.mark.parametrize("name", ["add_lora_fused_moe", "add_lora_w13", "add_lora_w2"])
def test_lora_on_moe_layers_gets_vllms_own_error(name: str) -> None:
    from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase

    own = getattr(vllm_layers.wrapper(), name)
    assert own.__func__ is getattr(PunicaWrapperBase, name)
    required = [
        each
        for each in inspect.signature(own).parameters.values()
        if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD
    ]
    with pytest.raises(NotImplementedError):
        own(*[None for _ in required])


def test_none_of_vllms_operators_runs(monkeypatch: Any) -> None:
    """Neither vLLM's PyTorch operators nor its Triton ones are called."""
    import vllm.lora.ops.torch_ops.lora_ops as torch_ops
    import vllm.lora.punica_wrapper.punica_cpu as punica_cpu
    from vllm.triton_utils import HAS_TRITON

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("vLLM's operator was called")

    modules = [torch_ops, punica_cpu]
    if HAS_TRITON:
        modules.append(importlib.import_module("vllm.lora.ops.triton_ops"))
    own, patched = ("bgmv", "sgmv", "lora_shrink", "lora_expand"), []
    for module in modules:
        for name in [each for each in vars(module) if each.startswith(own)]:
            if callable(getattr(module, name)):
                monkeypatch.setattr(module, name, fail)
                patched.append(name)
    assert {"bgmv_shrink", "bgmv_expand", "bgmv_expand_slice"} <= {*patched}
    _check(vllm_layers.linear_case("MergedQKVParallelLinearWithLoRA"), MIX, torch.float32)
    test_embedding()
    test_logits(torch.float32)
    test_fully_sharded_layers("RowParallelLinearWithShardedLoRA")
    test_classification_head()


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern", "lora_bias"])
def test_a_field_that_vllm_ignores_is_refused(monkeypatch: Any, tmp_path: Path, field: str) -> None:
    """As in vLLM 0.31."""
    config = {"r": 8, field: True if field == "lora_bias" else {"q_proj": 4}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    older = dataclasses.make_dataclass("PEFTHelper", ["r", "lora_alpha"])
    monkeypatch.setattr("vllm.lora.peft_helper.PEFTHelper", older)
    with pytest.raises(ValueError, match=f"adapter 'a': this version of vLLM ignores {field}"):
        layers.check_no_config_fields_vllm_ignores(str(tmp_path), "a")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 8, field: None}))
    layers.check_no_config_fields_vllm_ignores(str(tmp_path), "a")


def test_model_runner_v2_tells_requests_apart_by_adapter_id() -> None:
    state = LoraState(4)
    for index in range(2):
        state.add_request(f"r{index}", index, LoRARequest("same", 200 + index, f"/{index}"))
    state.add_request("base", 2, None)
    found = state.get_activate_loras(["r0", "r1", "base", "r0"])
    assert [each.lora_int_id for each in found] == [200, 201]

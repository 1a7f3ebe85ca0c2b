"""Mixed batches from packed factors: the same results, and never from factors that changed."""

from __future__ import annotations

import copy
import gc
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest import mock

import peft
import pytest
import torch
from peft.helpers import rescale_adapter_scale
from torch import nn
from torch.profiler import ProfilerActivity, profile

import fastlora
from fastlora import adapters
from fastlora.layers import packed_factors
from fastlora.ops.torch import packed_choice, packed_plans, products
from fastlora.ops.torch.packed import first_fit_layout
from fastlora.ops.torch.packed_plans import (
    DensePlan,
    PaddedRowBlocksPlan,
    PerAdapterPlan,
    PerSamplePlan,
    RowUpdateTerms,
)
from fastlora.testing import assert_within_budget
from tests.support.tiny import randomize, with_adapters

RANKS = (1, 3, 8, 16, 64)
CPU = [ProfilerActivity.CPU]


class Attention(nn.Module):
    """Three layers fed by one tensor, and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(48, 40), nn.Linear(48, 24), nn.Linear(48, 40)
        self.o = nn.Linear(40, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps ``[..., 48]`` to ``[..., 48]``."""
        return self.o(self.q(x) * self.k(x).repeat_interleave(2, -1)[..., :40].tanh() + self.v(x))


def build(ranks: list[int], dtype: torch.dtype = torch.float32, *, everywhere: bool = False) -> Any:
    """A model with adapters ``a0``, ``a1``, ... of these ranks, random, in evaluation.

    Every fifth, from the first on, lacks k and v, unless ``everywhere``.
    """
    torch.manual_seed(0)
    configs = {
        f"a{i}": fastlora.LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            use_rslora=i % 3 == 1,
            lora_bias=i % 4 == 2,
            target_modules=["q", "k", "v", "o"] if i % 5 or everywhere else ["q", "o"],
        )
        for i, rank in enumerate(ranks)
    }
    model = with_adapters(Attention(), configs, autocast_adapter_dtype=False)
    randomize(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(0.1)
    return model.to(dtype).eval()


def alone(model: Any, x: torch.Tensor, names: list[str | None]) -> torch.Tensor:
    """Each row's output with its adapter alone."""
    rows = []
    for i, name in enumerate(names):
        if name is None:
            with model.disable_adapter():
                rows.append(model(x[i : i + 1]))
        else:
            model.set_adapter(name)
            rows.append(model(x[i : i + 1]))
    return torch.cat(rows)


def random_mix(adapters_count: int, batch: int, seed: int) -> list[str | None]:
    """Names for a batch, base rows among them."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(-1, adapters_count, (batch,), generator=generator).tolist()
    return [None if i < 0 else f"a{i}" for i in drawn]


def steps(model: Any, x: torch.Tensor, names: list[str | None], count: int = 3) -> list[Any]:
    """Outputs of several equal forwards: the factors are packed from the second on."""
    with torch.no_grad():
        found = []
        for _ in range(count):
            with adapters(model, names):
                found.append(model(x))
    return found


def assert_alone(
    outputs: list[torch.Tensor], model: Any, x: torch.Tensor, names: list[str | None]
) -> None:
    """Each row is what its adapter alone gives it, as near to float64; not finite where that is."""
    with torch.no_grad():
        expected = alone(model, x, names)
        exact = alone(copy.deepcopy(model).double(), x.double(), names)
    finite = exact.isfinite()
    for y in outputs:
        assert torch.equal(y.isfinite(), finite)
        assert_within_budget(y[finite], expected[finite], exact[finite])


def packed_bytes(model: Any) -> int:
    """Bytes that the model keeps packed."""
    return model.base_model.group.packs.packed_factors_nbytes


def matrix_unit(has: bool) -> Any:
    """Within it the processor has a matrix unit for bf16, or has none, whatever it is."""
    return mock.patch.object(
        packed_choice, "_MATRIX_UNIT", frozenset([torch.bfloat16] if has else [])
    )


PLANS = {
    # adapters, rank, samples of each on average, tokens, dtype, matrix unit: what must be chosen
    "one": (1, 8, 6, 1, torch.float32, False, DensePlan),
    "two": (2, 16, 4, 1, torch.float32, False, DensePlan),
    "few, fp32": (4, 16, 4, 1, torch.float32, False, PaddedRowBlocksPlan),
    "two, bf16": (2, 16, 4, 1, torch.bfloat16, False, DensePlan),
    "few, bf16": (4, 16, 4, 1, torch.bfloat16, False, PaddedRowBlocksPlan),
    "few, bf16, amx": (4, 16, 4, 1, torch.bfloat16, True, DensePlan),
    "more, bf16": (16, 16, 4, 1, torch.bfloat16, False, PaddedRowBlocksPlan),
    "more, bf16, amx": (16, 16, 4, 1, torch.bfloat16, True, DensePlan),
    "many, fp32": (16, 16, 1, 1, torch.float32, False, PaddedRowBlocksPlan),
    "many, bf16": (32, 16, 1, 1, torch.bfloat16, True, PaddedRowBlocksPlan),
    "low ranks, fp32": (8, 2, 2, 1, torch.float32, False, DensePlan),
    "more of low rank, fp32": (17, 2, 2, 1, torch.float32, False, PaddedRowBlocksPlan),
    "low ranks, many, fp32": (17, 4, 64, 1, torch.float32, False, PaddedRowBlocksPlan),
    "low ranks, many, bf16": (9, 16, 64, 1, torch.bfloat16, False, PaddedRowBlocksPlan),
    "tokens, fp32": (4, 16, 80, 1, torch.float32, False, PaddedRowBlocksPlan),
    "tokens of one, fp32": (1, 16, 320, 1, torch.float32, False, DensePlan),
    "tokens, bf16, amx": (16, 16, 20, 1, torch.bfloat16, True, DensePlan),
    "prefill of two": (2, 16, 8, 20, torch.float32, False, DensePlan),
    "prefill, fp32": (4, 16, 5, 16, torch.float32, False, PaddedRowBlocksPlan),
    "prefill, bf16": (16, 16, 2, 16, torch.bfloat16, False, PaddedRowBlocksPlan),
    "prefill, bf16, amx": (16, 16, 2, 16, torch.bfloat16, True, DensePlan),
    "prefill of many, bf16, amx": (17, 16, 2, 16, torch.bfloat16, True, PaddedRowBlocksPlan),
    "uneven prefill, fp32": (4, 16, 4.5, 16, torch.float32, False, PerSamplePlan),
    "uneven prefill, bf16": (16, 16, 1.5, 16, torch.bfloat16, False, PerSamplePlan),
    "uneven prefill, bf16, amx": (17, 16, 1.5, 16, torch.bfloat16, True, PerSamplePlan),
    "prefill of four, bf16, amx": (4, 16, 5, 16, torch.bfloat16, True, DensePlan),
    "short samples, high rank": (4, 32, 5, 16, torch.float32, False, PaddedRowBlocksPlan),
}


@pytest.mark.drawn(1 / 3)
@pytest.mark.parametrize("case", PLANS)
def test_plans(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each plan is chosen where it is meant to be, and all give the same results."""
    count, rank, samples, tokens, dtype, amx, kind = PLANS[case]
    model = build([rank] * count, dtype, everywhere=True)
    names: list[str | None] = [f"a{i % count}" for i in range(int(count * samples))]
    x = torch.randn(len(names), tokens, 48).to(dtype)
    chosen = []
    original = packed_plans.cached_plan

    def spy(*args: Any) -> Any:
        chosen.append(original(*args))
        return chosen[-1]

    has_amx = matrix_unit(amx)
    monkeypatch.setattr(packed_choice, "_HAS_FAST_SUMS", True)
    spied = mock.patch.object(packed_plans, "cached_plan", spy)
    with has_amx, spied:
        outputs = steps(model, x, names)
        assert_alone(outputs, model, x, names)
    assert {type(plan) for plan in chosen} == {kind}
    if kind in (PaddedRowBlocksPlan, DensePlan):
        expected = dtype == torch.float32 and 1 < count <= len(x) * tokens <= 8 * count
        assert {plan.terms is not None for plan in chosen} == {expected}
    if case == "many, bf16":
        assert all(plan.coalesced == 4 for plan in chosen)


@pytest.mark.parametrize(
    ("dtype", "amx"),
    [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)],
    ids=str,
)
def test_calls_do_not_grow_with_the_adapters(
    dtype: torch.dtype, amx: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A packed forward: two products and at most five other calls a layer, for any mix.

    The second product may be a sum of rank rows. Two of the five are lora_bias's. How long a
    forward takes is what ``bench/mixed.py`` measures.
    """
    monkeypatch.setattr(products, "EMULATED", {})  # there a product is several
    units = frozenset([torch.bfloat16] if amx else [])
    monkeypatch.setattr(packed_choice, "_MATRIX_UNIT", units)
    x = torch.randn(64, 48).to(dtype)
    kinds = {"aten::mm", "aten::bmm", "aten::addmm_", "aten::baddbmm_", "aten::embedding_bag"}
    for count in (2, 16, 32, 64):
        model = build([16] * count, dtype, everywhere=True)
        names: list[str | None] = [f"a{i % count}" for i in range(64)]
        steps(model, x, names)
        with torch.no_grad(), model.disable_adapter(), profile(activities=CPU) as plain:
            model(x)
        with torch.no_grad(), adapters(model, names):
            model(x)  # the plan is made
            with profile(activities=CPU) as mixed:
                model(x)
        added = {
            key: calls(mixed)[key] - calls(plain)[key]
            for key in calls(mixed)
            if calls(mixed)[key] != calls(plain)[key]
        }
        assert sum(added.get(key, 0) for key in kinds) == 2 * 4, (count, added)
        moved = {"aten::masked_fill_", "aten::index_select", "aten::take", "aten::add_"}
        assert sum(added.get(key, 0) for key in moved) <= 5 * 4, (count, added)


def calls(found: Any) -> Counter[str]:
    """How often each operator was called, but for what a batched product is made of.

    On a processor without bf16 instructions that is a product for each block.
    """
    return Counter(event.name for event in found.events() if not within_batched(event))


def within_batched(event: Any) -> bool:
    """Whether a batched product made the call."""
    parent = event.cpu_parent
    return parent is not None and ("bmm" in parent.name or within_batched(parent))


@pytest.mark.parametrize(
    ("dtype", "amx", "kind"),
    [
        (torch.float32, False, PerSamplePlan),
        (torch.bfloat16, False, PerSamplePlan),
        (torch.bfloat16, True, DensePlan),
    ],
    ids=str,
)
def test_samples_of_many_tokens(dtype: torch.dtype, amx: bool, kind: type) -> None:
    """Mixed ranks that share units, absent modules, lora_bias, base rows, and one row of NaN."""
    model = build([RANKS[i % 4] for i in range(9)], dtype)
    names = random_mix(9, 24, seed=2)
    names[:2] = [None, "a3"]
    x = torch.randn(24, 20, 48).to(dtype)
    x[5, 3], x[0, 4] = float("nan"), float("inf")
    with (
        matrix_unit(amx),
        mock.patch.object(packed_plans, "cached_plan", wraps=packed_plans.cached_plan) as plans,
    ):
        outputs = steps(model, x, names)
    with matrix_unit(amx):
        found = {type(packed_plans.cached_plan(*call.args)) for call in plans.call_args_list}
    assert found == {kind}
    assert_alone(outputs, model, x, names)


def test_few_rows_of_mixed_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The terms of adapters that share units, absent modules, lora_bias, base rows, and NaN."""
    monkeypatch.setattr(packed_choice, "_HAS_FAST_SUMS", True)
    model = build([RANKS[i % 4] for i in range(9)])
    names = random_mix(9, 24, seed=2)
    names[:2] = [None, "a3"]
    x = torch.randn(24, 48)
    x[5], x[0, 4] = float("nan"), float("inf")
    with (
        matrix_unit(False),
        mock.patch.object(packed_plans, "cached_plan", wraps=packed_plans.cached_plan) as plans,
    ):
        outputs = steps(model, x, names)
    found = [packed_plans.cached_plan(*call.args) for call in plans.call_args_list]
    assert {(type(plan), type(plan.terms)) for plan in found} == {
        (PaddedRowBlocksPlan, RowUpdateTerms)
    }
    assert_alone(outputs, model, x, names)


def test_batches_of_a_set_share_its_packs() -> None:
    """A decode, a prefill and a batch of tokens: one copy where all want the same, else two."""
    for dtype, ranks, copies in (
        (torch.bfloat16, [16] * 16, 1),
        (torch.float32, [16] * 2, 1),
        (torch.float32, [16] * 16, 1),
        (torch.bfloat16, [16] * 17, 2),  # few rows coalesce units, and have more of them
    ):
        model = build(ranks, dtype, everywhere=True)
        names: list[str | None] = [f"a{i}" for i in range(len(ranks))]
        sizes, found = [], []
        for count, tokens in ((4, 1), (20, 20), (320, 1)):
            x = torch.randn(len(names) * count, tokens, 48).to(dtype)
            with matrix_unit(False):
                outputs = steps(model, x, names * count)
            found.append((outputs[-1][: len(names)], x[: len(names)]))
            sizes.append(packed_bytes(model))
        for output, x in found:  # last: moving the model that gives the truth ends packs
            assert_alone([output], model, x, names)
        assert sizes[1] == sizes[2] <= copies * sizes[0]
        assert (sizes[1] > sizes[0]) == (copies > 1)


@pytest.mark.parametrize(("most", "rows"), [(60, 1), (420, 2)], ids=["few", "many"])
def test_uneven_rows_are_not_padded(most: int, rows: int) -> None:
    """One adapter with nearly all rows: blocks as long as it would waste more than they save."""
    model = build([16] * 32, everywhere=True)
    names: list[str | None] = ["a0"] * most + [f"a{i}" for i in range(1, 32)] * rows
    x = torch.randn(len(names), 48)
    with mock.patch.object(packed_plans, "cached_plan", wraps=packed_plans.cached_plan) as plans:
        outputs = steps(model, x, names)
    found = [packed_plans.cached_plan(*call.args) for call in plans.call_args_list]
    assert {type(plan) for plan in found} == {PerAdapterPlan}
    # Only the rows of the adapter with adjacent rows stay where they are.
    assert {len(plan.gather) for plan in found} == {31 * rows if rows > 1 else 0}
    assert_alone(outputs[-1:], model, x, names)


def test_layout_holds_every_rank_row_once() -> None:
    """Places don't overlap, stay within a unit, and leave less than a unit free on average."""
    ranks = (3, 64, 0, 8, 16, 1, 8, 64, 16, 3, 3)
    layout = first_fit_layout(ranks)
    taken = [0] * layout.rank_rows
    assert layout.ranks == ranks
    for first, rank in zip(layout.firsts, ranks, strict=True):
        for row in range(first, first + rank):
            taken[row] += 1
        if rank:
            assert first // layout.unit == (first + rank - 1) // layout.unit
    assert max(taken) == 1
    assert sum(taken) == sum(ranks)
    assert layout.units == 3  # 64, 64, and all the others together


def test_an_adapter_that_another_layer_gets() -> None:
    """The set of adapters is the same, and what was packed of it is not."""
    model = build([8, 8])  # k lacks a0
    x, names = torch.randn(4, 48), list[str | None](["a0", "a1", None, "a0"])
    before = steps(model, x, names)[-1]
    model.base_model.model.k.add_adapter("a0", r=8, init_lora_weights=False)
    after = steps(model, x, names)[-1]
    with torch.enable_grad(), adapters(model, names):  # nothing is kept
        expected = model(x).detach()
    torch.testing.assert_close(after, expected)
    assert not torch.allclose(before, expected)


def _rescale(layer: Any) -> None:
    layer.scaling = {name: 3 * scaling for name, scaling in layer.scaling.items()}


def _replace_lora_b(layer: Any) -> None:
    layer.lora_B = copy.deepcopy(layer.lora_B)
    layer.lora_B["a0"].weight.data.mul_(3)


SCALING_CHANGES: dict[str, Callable[[Any], None]] = {
    "set_scale": lambda layer: layer.set_scale("a0", 3.0),
    "scale_layer": lambda layer: layer.scale_layer(3.0),
    "an item": lambda layer: layer.scaling.update(a0=7.0),
    "another dict": _rescale,
}


def peft_build() -> Any:
    """`build` with two adapters of PEFT in a patched model."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=8, target_modules=["q", "k", "v", "o"])
    model = peft.get_peft_model(Attention(), config, "a0")
    model.add_adapter("a1", config)
    fastlora.patch(model)
    randomize(model.eval())
    return model


@pytest.mark.parametrize("in_block", [False, True])
@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("change", SCALING_CHANGES)
def test_a_changed_scaling_is_used(change: str, patched: bool, in_block: bool) -> None:
    """Of fastlora's and of patched layers, from the next forward on."""
    model = peft_build() if patched else build([8, 8], everywhere=True)
    x, names = torch.randn(4, 48), list[str | None](["a0", "a1", None, "a0"])
    before = steps(model, x, names)[-1]
    if in_block:
        with torch.no_grad(), adapters(model, names):
            model(x), model(x)
            SCALING_CHANGES[change](model.base_model.model.q)
            after = model(x)
    else:
        SCALING_CHANGES[change](model.base_model.model.q)
        after = steps(model, x, names)[-1]
    with torch.enable_grad(), adapters(model, names):  # nothing is kept
        expected = model(x).detach()
    torch.testing.assert_close(after, expected)
    assert not torch.allclose(before, expected)


@pytest.mark.parametrize("patched", [False, True])
def test_pefts_rescale_adapter_scale_in_mixed_batches(patched: bool) -> None:
    """Packed before its block and packed in it."""
    model = peft_build() if patched else build([8, 8], everywhere=True)
    x, names = torch.randn(4, 48), list[str | None](["a0", "a1", None, "a0"])
    before = steps(model, x, names)[-1]
    with torch.no_grad(), adapters(model, [None] * 4):
        base = model(x)
    with rescale_adapter_scale(model, 0.0):
        torch.testing.assert_close(steps(model, x, names)[-1], base)
    torch.testing.assert_close(steps(model, x, names)[-1], before)
    assert not torch.allclose(before, base)


def _add_by_hand(layer: Any) -> None:
    layer.lora_A["a0"] = nn.Linear(48, 8, bias=False).eval()
    layer.lora_B["a0"] = nn.Linear(8, 24, bias=False).eval()
    layer.lora_dropout["a0"] = nn.Identity().eval()
    layer.scaling["a0"], layer.r["a0"] = 2.0, 8


def test_modules_that_replace_factors_are_used() -> None:
    """In the place of a layer's ModuleDict, and added by hand to a layer without the adapter."""
    x, names = torch.randn(4, 48), list[str | None](["a0", "a1", None, "a0"])
    for change, layer in ((_replace_lora_b, "q"), (_add_by_hand, "k")):
        model = build([8, 8])  # k lacks a0
        before = steps(model, x, names)[-1]
        change(model.base_model.model.get_submodule(layer))
        after = steps(model, x, names)[-1]
        with torch.enable_grad(), adapters(model, names):  # nothing is kept
            expected = model(x).detach()
        torch.testing.assert_close(after, expected)
        assert not torch.allclose(before, expected)


def test_a_block_finds_its_factors_once() -> None:
    """Each layer looks for them in its first forward, and where another number of rows comes."""
    model = build([8, 8], everywhere=True)
    x, names = torch.randn(4, 48), list[str | None](["a1", "a0", None, "a1"])
    longer = x.unsqueeze(1).repeat(1, 3, 1)
    expected = steps(model, x, names)[-1]
    with torch.no_grad(), adapters(model, names):
        found = [model(x), model(x)]
        with mock.patch.object(
            packed_factors, "get_packed_factors", wraps=packed_factors.get_packed_factors
        ) as looked:
            found += [model(x), model(longer)[:, 1], model(longer)[:, 2], model(x)]
    assert looked.call_count == 2 * 4
    for y in found:
        assert_within_budget(y, expected, expected.double())


def test_only_the_last_sets_stay() -> None:
    """Memory does not grow with the number of different batches."""
    model = build([8] * 6)
    x = torch.randn(2, 48)
    sizes = []
    for i in range(6):
        steps(model, x, [f"a{i}", f"a{(i + 1) % 6}"])
        sizes.append(packed_bytes(model))
    assert max(sizes) <= 2 * max(sizes[0], sizes[1])


@pytest.mark.parametrize("captured", [False, True])
def test_what_a_captured_graph_reads_stays(captured: bool) -> None:
    """Packs, and how to multiply with them, stay where a replay finds them."""
    x, names = torch.randn(2, 48), ["a0", "a1"]
    model = build([8] * 6)
    steps(model, x, names)
    read, find = list[weakref.ref[torch.Tensor]](), packed_factors.get_packed_factors

    def noted(*given: Any) -> Any:
        found: Any = find(*given)
        read.extend(weakref.ref(t) for t in (*found[0], *found[1]) if is_tensor(t))
        return found

    with (
        mock.patch.object(packed_factors, "is_capturing_cuda_graph", lambda _: captured),
        mock.patch.object(packed_factors, "get_packed_factors", noted),
    ):
        steps(model, x, names, count=1)
    assert len(read) > 4
    for i in range(6):
        steps(model, x, [f"a{i}", f"a{(i + 2) % 6}"])
    for rows in range(3, 14):  # batches of the same set
        steps(model, torch.randn(rows, 48), ["a0", "a1"] + ["a1"] * (rows - 2))
    model.train().eval()
    gc.collect()
    assert {reference() is not None for reference in read} == {captured}
    fastlora.clear_caches(model)
    gc.collect()
    assert {reference() is not None for reference in read} == {False}


def test_a_capture_within_an_open_block_pins_what_it_reads() -> None:
    """Also where the block's forward before it has found everything."""
    x, names = torch.randn(2, 48), ["a0", "a1"]
    model = build([8] * 2)
    steps(model, x, names)
    with torch.no_grad(), adapters(model, names):
        model(x)
        assert not model.base_model.group.packs._captured
        with mock.patch.object(packed_factors, "is_capturing_cuda_graph", lambda _: True):
            model(x)
    assert model.base_model.group.packs._captured


def is_tensor(value: Any) -> bool:
    """Whether it is a tensor."""
    return isinstance(value, torch.Tensor)

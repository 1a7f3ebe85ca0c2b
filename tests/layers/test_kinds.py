"""Every kind of layer beside linears against PEFT: values, gradients, files, merges, batches."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastlora
from fastlora.layers import FastLoraWrapper, LoraLayer
from fastlora.validation import AdapterStateError, ImplementationError, UnsupportedLayerError
from tests.support.kinds import KINDS, KindCase, Pictures
from tests.support.tiny import with_adapters

peft = pytest.importorskip("peft", reason="compares with PEFT")

FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "gaussian": {"init_lora_weights": "gaussian"},
    "dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
}


def _has(case: KindCase, feature: str) -> bool:
    return {"dora": case.dora, "lora_bias": case.lora_bias}.get(feature, True)


# Kinds that PyTorch computes, kernels or not.
IN_PYTORCH = {name: case for name, case in KINDS.items() if not case.linear}

EVERY = [
    pytest.param(case, FEATURES[feature], id=f"{name}-{feature}")
    for name, case in KINDS.items()
    for feature in FEATURES
    if _has(case, feature)
]
DORA = [p for p in EVERY if "use_dora" in p.values[1] or not p.values[1]]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _model(library: Any, case: KindCase, names: tuple[str, ...] = ("one",), **config: Any) -> Any:
    """A model with adapters whose factors are random, the same ones for either library."""
    torch.manual_seed(0)
    base = case.make()
    fields = {"r": 4, "target_modules": ["kind", "lin"], **case.config, **config}
    torch.manual_seed(1)
    model = with_adapters(base, {n: library.LoraConfig(**fields) for n in names}, library)
    _randomize(model)
    return case.mend(model) if library is peft else model


def _randomize(model: Any) -> Any:
    """Adds to every factor a value that follows from its name in files."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                seed = sum(map(ord, name))
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
                parameter += 0.1 * noise
    return model


def _gradients(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def _run(model: Any, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    y = model(x)
    model.zero_grad()
    y.square().sum().backward()
    return y.detach(), _gradients(model)


def _close(ours: torch.Tensor, theirs: torch.Tensor, rtol: float = 1e-4) -> None:
    ours, theirs = ours.detach(), theirs.detach()
    atol = 1e-5 * max(1.0, theirs.abs().max().item())
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


def _layer(model: Any) -> Any:
    return model.base_model.model.kind


@pytest.mark.parametrize(("case", "config"), EVERY)
def test_values_and_gradients_are_pefts(case: KindCase, config: dict[str, Any]) -> None:
    torch.manual_seed(1)
    fresh = _layer(_model(fastlora, case, **config)).state_dict()
    for name, tensor in _layer(_model(peft, case, **config)).state_dict().items():
        assert torch.equal(fresh[name], tensor), name  # drawn alike from one seed
    x = case.x(3)
    (y, grads), (expected, theirs) = (
        _run(_model(library, case, **config), x) for library in (fastlora, peft)
    )
    _close(y, expected)
    ours = {name for name in grads if ".kind." in name}
    assert ours == {name for name in theirs if ".kind." in name} and ours
    for name in ours:
        _close(grads[name], theirs[name])


@pytest.mark.parametrize(("case", "config"), EVERY)
def test_files_go_both_ways(case: KindCase, config: dict[str, Any], tmp_path: Path) -> None:
    x = case.x(3)
    for writer, reader in ((fastlora, peft.PeftModel), (peft, fastlora.LoraModel)):
        model, folder = _model(writer, case, ("default",), **config).eval(), tmp_path / str(reader)
        model.save_pretrained(folder)
        torch.manual_seed(0)
        loaded = reader.from_pretrained(case.make(), folder)
        loaded = case.mend(loaded) if reader is peft.PeftModel else loaded
        _close(loaded(x), model(x))


@pytest.mark.parametrize(("case", "config"), [p for p in EVERY if p.values[0].merges])
def test_merging_is_exact_and_undone_bit_for_bit(case: KindCase, config: dict[str, Any]) -> None:
    x, model = case.x(3), _model(fastlora, case, ("one", "two"), **config).eval()
    model.set_adapter(["one", "two"])
    theirs = _model(peft, case, ("one", "two"), **config).eval()
    theirs.base_model.set_adapter(["one", "two"])
    expected = model(x)
    _close(expected, theirs(x))
    for name in ("one", "two"):
        delta = _layer(model).get_delta_weight(name)
        _close(delta, _layer(theirs).get_delta_weight(name))
    before = copy.deepcopy(_layer(model).get_base_layer().state_dict())
    model.merge_adapter(safe_merge=True)
    _close(model(x), expected)
    with pytest.raises(AdapterStateError, match="merged"), fastlora.adapters(model, ["one"] * 3):
        model(x)
    _close(copy.deepcopy(model).unload()(x), expected)
    with model.disable_adapter():
        torch.manual_seed(0)
        _close(model(x), case.make().eval()(x))
    model.unmerge_adapter()
    after = _layer(model).get_base_layer().state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    _close(model(x), expected)
    bare = model.merge_and_unload()
    assert not any(isinstance(module, LoraLayer) for module in bare.modules())
    _close(bare(x), expected)


@pytest.mark.parametrize(("case", "config"), [p for p in EVERY if p.values[0].mixes])
@pytest.mark.parametrize("each", ["sample", "token"])
def test_a_mixed_batch_trains_each_adapter_on_its_rows(
    case: KindCase, config: dict[str, Any], each: str
) -> None:
    x, ids = case.x(4), ["two", None, "one", "two"]
    model = _model(fastlora, case, ("one", "two"), **config)
    model.base_model.set_adapter(["one", "two"])
    model.train()
    routed: Any = ids
    if each == "token":
        if x.dtype.is_floating_point:
            pytest.skip("its samples have no tokens")
        slots = torch.tensor([1, -1, 0, 1])
        routed = slots.repeat_interleave(x.shape[1])
    with fastlora.adapters(model, routed):
        y, grads = _run(model, x)
    for name in ("one", "two"):
        own = _model(fastlora, case, ("one", "two"), **config)
        own.set_adapter(name)
        rows = [index for index, each in enumerate(ids) if each == name]
        expected, theirs = _run(own, x[rows])
        _close(y[rows], expected)
        found = {key: grad for key, grad in grads.items() if f".{name}" in key}
        assert found.keys() == theirs.keys()
        for key, grad in theirs.items():
            _close(found[key], grad)
    torch.manual_seed(0)
    _close(y[1], case.make()(x)[1].detach())


@pytest.mark.parametrize("case", [p for p in KINDS.values() if p.mixes])
def test_adapter_names_are_pefts(case: KindCase) -> None:
    x, names = case.x(4), ["two", "__base__", "one", "two"]
    ours, theirs = (_model(library, case, ("one", "two")).eval() for library in (fastlora, peft))
    with torch.no_grad():
        _close(ours(x, adapter_names=names), theirs(x, adapter_names=names))


@pytest.mark.parametrize(("case", "config"), [p for p in DORA if p.values[0].mixes])
def test_absent_adapters_get_zeros_where_processes_wait(
    case: KindCase, config: dict[str, Any]
) -> None:
    model = _model(fastlora, case, ("one", "two"), **config)
    model.base_model.set_adapter(["one", "two"])
    with fastlora.adapters(model, ["one"] * 2, unused_gradients=True):
        _, grads = _run(model, case.x(2))
    absent = {name: grad for name, grad in grads.items() if ".kind." in name and ".two" in name}
    assert absent and not any(grad.any() for grad in absent.values())


@pytest.mark.drawn(1 / 2)
@pytest.mark.parametrize(
    ("kind", "feature", "mixed"),
    [
        ("embedding", "plain", False),
        ("embedding", "dora", True),
        ("conv1d", "plain", True),
        ("conv2d", "dora", False),
    ],
)
def test_a_graph_is_full(kind: str, feature: str, mixed: bool) -> None:
    case, config = KINDS[kind], FEATURES[feature]
    torch._dynamo.reset()
    x, model = case.x(3), _model(fastlora, case, ("one", "two"), **config)
    model.base_model.set_adapter(["one", "two"])
    found = []
    for run in (
        model.base_model,
        torch.compile(model.base_model, backend="aot_eager", fullgraph=True),
    ):
        with fastlora.adapters(model, ["two", "one", None]) if mixed else nullcontext():
            y = run(x)
            model.zero_grad()
            y.square().sum().backward()
        found.append((y, {name: grad.clone() for name, grad in _gradients(model).items()}))
    (expected, theirs), (y, grads) = found
    _close(y, expected)
    assert grads.keys() == theirs.keys()
    for name, grad in theirs.items():
        _close(grads[name], grad)


@pytest.mark.parametrize(("case", "config"), DORA)
def test_a_base_of_16_bits_keeps_its_dtype(case: KindCase, config: dict[str, Any]) -> None:
    x, found = case.x(3), []
    for library in (fastlora, peft):
        torch.manual_seed(0)
        base, fields = case.make().to(torch.bfloat16), {"r": 4, "target_modules": ["kind"]}
        model = library.get_peft_model(base, library.LoraConfig(**fields, **case.config, **config))
        model = case.mend(_randomize(model).eval()) if library is peft else _randomize(model).eval()
        assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if "lora_" in n)
        y = model(x.to(torch.bfloat16) if x.dtype.is_floating_point else x)
        assert y.dtype == torch.bfloat16
        found.append(y.float())
    torch.testing.assert_close(*found, rtol=3e-2, atol=3e-2 * found[1].abs().max().item())


@pytest.mark.parametrize("case", IN_PYTORCH.values(), ids=IN_PYTORCH)
def test_the_report_says_what_computes_it(case: KindCase) -> None:
    rows = {row.name: row for row in fastlora.fusion_report(_model(fastlora, case)).rows}
    row = next(row for name, row in rows.items() if name.endswith("model.kind"))
    assert not row.fused and "PyTorch" in row.reason and not row.shared_input


@pytest.mark.parametrize("case", IN_PYTORCH.values(), ids=IN_PYTORCH)
def test_kernels_alone_raise(case: KindCase) -> None:
    model = _model(fastlora, case).eval()
    _layer(model).impl = "triton"
    with pytest.raises(ImplementationError, match="triton"):
        model(case.x(2))
    del _layer(model).impl
    with fastlora.batch_invariant(), pytest.raises(ImplementationError, match="batch-invariant"):
        _layer(model)(case.x(2))


@pytest.mark.parametrize("case", IN_PYTORCH.values(), ids=IN_PYTORCH)
def test_a_pool_takes_linears_only(case: KindCase) -> None:
    with pytest.raises(UnsupportedLayerError, match="'kind'.*supports only linear layers"):
        fastlora.AdapterPool(case.make(), target_modules=["kind", "lin"], max_rank=4)


@pytest.mark.parametrize("case", [KINDS["embedding"]])
def test_a_lora_bias_raises_where_it_has_no_place(case: KindCase) -> None:
    model = case.make()
    with pytest.raises(UnsupportedLayerError, match="'kind'.*lora_bias"):
        fastlora.get_peft_model(
            model, fastlora.LoraConfig(target_modules=["lin", "kind"], lora_bias=True)
        )
    assert not any(isinstance(module, LoraLayer) for module in model.modules())


@pytest.mark.parametrize("case", KINDS.values(), ids=KINDS)
def test_adapters_come_and_go(case: KindCase) -> None:
    x, model = case.x(2), _model(fastlora, case, ("one", "two"))
    layer = _layer(model)
    model.set_adapter("two")
    trains = {n for n, p in layer.named_parameters() if p.requires_grad}
    assert trains and all(".two" in name for name in trains)
    expected = model(x)
    layer.set_scale("two", 2.0)
    assert not torch.equal(model(x), expected)
    layer.unscale_layer()
    _close(model(x), expected)
    model.delete_adapter("two")
    assert list(layer.r) == ["one"] and not any(".two" in n for n, _ in layer.named_parameters())
    copied = copy.deepcopy(model)
    _close(copied(x), model(x))
    assert not any(isinstance(module, LoraLayer) for module in model.unload().modules())


@pytest.mark.parametrize("case", KINDS.values(), ids=KINDS)
def test_adapters_add_up(case: KindCase) -> None:
    x, sums = case.x(2), []
    for library in (fastlora, peft):
        model = _model(library, case, ("one", "two"), use_rslora=False).eval()
        model.add_weighted_adapter(["one", "two"], [0.5, -2.0], "sum", combination_type="linear")
        model.set_adapter("sum")
        sums.append(model(x))
    _close(*sums)
    if case.merges:
        model = _model(fastlora, case, ("one", "two"))
        layer = _layer(model)
        model.add_weighted_adapter(["one", "two"], [0.5, -2.0], "sum", combination_type="cat")
        wanted = 0.5 * layer.get_delta_weight("one") - 2.0 * layer.get_delta_weight("two")
        _close(layer.get_delta_weight("sum"), wanted)


@pytest.mark.parametrize("case", KINDS.values(), ids=KINDS)
def test_status_is_pefts(case: KindCase) -> None:
    found = []
    for library in (fastlora, peft):
        rows = _model(library, case, ("one", "two")).get_layer_status()
        found.append(
            {(r.name, tuple(r.active_adapters), tuple(r.available_adapters)) for r in rows}
        )
    assert found[0] == found[1]


DROPS = [p for p in DORA if p.values[0].drops]


@pytest.mark.parametrize(("case", "config"), DROPS)
def test_dropout_is_pefts(case: KindCase, config: dict[str, Any]) -> None:
    """Of one adapter the masks too are PEFT's; in a batch they follow from the adapter's seed."""
    x, runs = case.x(3), []
    for library in (fastlora, peft):
        config = {**config, "target_modules": ["kind"], "lora_dropout": 0.5}
        model = _model(library, case, ("one", "two"), **config)
        torch.manual_seed(3)
        runs.append(_run(model.train(), x))
    (y, grads), (expected, theirs) = runs
    _close(y, expected)
    assert grads.keys() == theirs.keys()
    for name, grad in theirs.items():
        _close(grads[name], grad)
    model = _model(fastlora, case, ("one", "two"), **config).train()
    found = []
    for ids in (["one", "two", "one"], ["one", "one"]):
        with fastlora.adapters(model, ids, seeds={"one": 5}):
            rows = [0, 2] if len(ids) == 3 else [0, 1]
            found.append(model(x if len(ids) == 3 else x[[0, 2]])[rows])
    _close(*found)
    assert not torch.allclose(found[0], model.eval()(x[[0, 2]]))


@pytest.mark.parametrize(
    "options",
    [
        {"dilation": 2},
        {"padding": "same", "dilation": 2},
        {"padding_mode": "circular"},
        {"padding_mode": "reflect", "groups": 2},
    ],
    ids=str,
)
def test_the_update_is_that_of_the_merged_convolution(options: dict[str, Any]) -> None:
    """PEFT's lora_A has neither dilation nor padding mode: its forward differs from its merge."""
    case = KindCase(functools.partial(Pictures, 2, **options), KINDS["conv2d"].x)
    x, model = case.x(2), _model(fastlora, case).eval()
    expected = model(x)
    if "groups" in options:
        with pytest.raises(UnsupportedLayerError, match="groups=2.*unmerged"):
            model.merge_adapter()
        return
    model.merge_adapter()
    _close(model(x), expected)
    theirs = _model(peft, case).eval()
    if options == {"dilation": 2}:
        with pytest.raises(RuntimeError, match="size of tensor"):
            theirs(x)
    else:
        assert not torch.allclose(theirs(x), expected, rtol=1e-2)
    _close(theirs.merge_and_unload()(x), expected)


def test_a_convolution_with_channels_last() -> None:
    case = KINDS["conv2d"]
    x, model = case.x(2), _model(fastlora, case, use_dora=True).eval()
    expected, delta = model(x), _layer(model).get_delta_weight("one")
    model.to(memory_format=torch.channels_last)
    weight = _layer(model).weight
    assert not weight.is_contiguous()
    _close(_layer(model).get_delta_weight("one"), delta)
    before = weight.clone()
    model.merge_adapter()
    _close(model(x), expected)
    model.unmerge_adapter()
    assert torch.equal(weight, before)
    _close(model.merge_and_unload()(x), expected)


def test_a_convolution_of_one_sample_without_a_batch() -> None:
    case = KINDS["conv1d"]
    x, model = case.x(1), _model(fastlora, case, ("one", "two"))
    layer = _layer(model)
    _close(layer(x[0]), layer(x)[0])
    with fastlora.adapters(model, ["two"]):
        mixed = layer(x[0])
    model.set_adapter("two")
    _close(mixed, layer(x)[0])


def test_an_init_of_linears_raises_on_a_convolution() -> None:
    model = KINDS["conv2d"].make()
    config = fastlora.LoraConfig(target_modules=["lin", "kind"], r=4, init_lora_weights="pissa")
    with pytest.raises(UnsupportedLayerError, match="'kind'.*'pissa' is supported only for"):
        fastlora.get_peft_model(model, config)
    assert type(model.lin) is nn.Linear
    config = fastlora.LoraConfig(target_modules=["kind"], r=4, init_lora_weights="lora_ga")
    fastlora.get_peft_model(model, config)  # starts as any, as in PEFT


def test_a_rank_that_groups_do_not_divide_raises() -> None:
    config = fastlora.LoraConfig(target_modules=["kind"], r=3)
    with pytest.raises(UnsupportedLayerError, match="rank 3 .*groups=2"):
        fastlora.get_peft_model(KINDS["conv2d in groups"].make(), config)


@pytest.mark.parametrize("turned", [False, True])
def test_fan_in_fan_out_is_what_the_layer_says(turned: bool, tmp_path: Path) -> None:
    """Whatever the config says, as in PEFT, on a Conv1D and on the linear beside it."""
    case = KINDS["Conv1D of transformers"]
    x, models = case.x(2), []
    for library in (fastlora, peft):
        models.append(_model(library, case, ("default",), fan_in_fan_out=turned, use_dora=True))
    _close(*(model(x) for model in models))
    models[0].save_pretrained(tmp_path)
    torch.manual_seed(0)
    _close(peft.PeftModel.from_pretrained(case.make(), tmp_path)(x), models[0](x))
    _close(*(model.merge_and_unload()(x) for model in models))


def test_an_embedding_of_positions_shares_no_batch() -> None:
    """Its rows are those of no sample, also where their number is a multiple of the ids'."""
    model = _model(fastlora, KINDS["embedding"])
    positions = torch.arange(4).unsqueeze(0)
    with (
        fastlora.adapters(model, ["one", None]),
        pytest.raises(ValueError, match="position embedding"),
    ):
        _layer(model)(positions)
    with fastlora.adapters(model, torch.tensor([0, -1, 0, -1])):
        _layer(model)(positions)
        model(positions)


@pytest.mark.parametrize("tokens", [3, 4])
def test_an_embedding_of_positions_raises_for_as_many_tokens_as_ids(tokens: int) -> None:
    """The ids of 4 samples are not those of the 4 positions."""

    class WithPositions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wpe = nn.Embedding(8, 6)

        def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            made: torch.Tensor = x + self.wpe(positions)
            return made

    config = fastlora.LoraConfig(r=2, target_modules=["wpe"], init_lora_weights=False)
    model = fastlora.get_peft_model(WithPositions(), config)
    x, positions = torch.zeros(4, tokens, 6), torch.arange(tokens).unsqueeze(0)
    with fastlora.adapters(model, ["default", None] * 2):
        with pytest.raises(ValueError, match="position embedding"):
            model(x, positions)
        y = model(x, positions.expand(4, -1))
        if tokens == 4:  # outside the model's forward, these may be ids of tokens
            model.base_model.model.wpe(positions)
    assert torch.equal(y[:1], model(x[:1], positions))


def test_a_sparse_embedding_trains() -> None:
    """PEFT's backward fails: it transposes the sparse gradient of a factor stored by rank."""
    case = KINDS["embedding"]
    x, dense = case.x(2), _run(_model(fastlora, case), case.x(2))
    sparse = KindCase(lambda: case.make(sparse=True), case.x)  # type: ignore[call-arg]
    y, grads = _run(_model(fastlora, sparse), x)
    _close(y, dense[0])
    assert all(torch.equal(grads[name], grad) for name, grad in dense[1].items())
    with pytest.raises(RuntimeError, match="sparse"):
        _run(_model(peft, sparse), x)


def test_a_forward_writes_into_no_factor() -> None:
    """PEFT renormalizes lora_embedding_A in place where the embedding has max_norm."""
    case = KINDS["embedding"]
    bounded = KindCase(lambda: case.make(max_norm=0.01), case.x)  # type: ignore[call-arg]
    for library, same in ((fastlora, True), (peft, False)):
        model = _model(library, bounded)
        factor = _layer(model).lora_embedding_A["one"]
        before = factor.detach().clone()
        with torch.no_grad():
            model(case.x(2))
        assert torch.equal(factor, before) is same


def test_dropout_that_does_nothing_is_said() -> None:
    config = fastlora.LoraConfig(target_modules=["kind"], lora_dropout=0.5)
    with pytest.warns(UserWarning, match="lora_dropout=0.5 has no effect on 'kind'"):
        fastlora.get_peft_model(KINDS["embedding"].make(), config)


def test_an_embedding_of_another_kind_raises_with_what_does_it() -> None:
    model = nn.ModuleDict({"bag": nn.EmbeddingBag(4, 4)})
    with pytest.raises(UnsupportedLayerError, match=r"peft.get_peft_model.*fastlora.patch"):
        fastlora.get_peft_model(model, fastlora.LoraConfig(target_modules=["bag"]))


class _TwiceLora(FastLoraWrapper):
    """A user's LoRA layer over a module of the user's."""


class _Twice(nn.Linear):
    """A module of the user's."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Twice a linear."""
        return 2.0 * super().forward(input)


def test_a_class_of_the_users(tmp_path: Path) -> None:
    """It is made for the module's class, and saved and loaded with the config that names it."""
    config = fastlora.LoraConfig(target_modules=["one"], init_lora_weights=False)
    config._register_custom_module({_Twice: _TwiceLora})
    base = nn.ModuleDict({"one": _Twice(3, 4)})
    model = fastlora.get_peft_model(copy.deepcopy(base), config)
    layer, x = model.base_model.model["one"], torch.randn(2, 3)
    assert type(layer) is _TwiceLora
    model.save_pretrained(tmp_path)
    loaded = fastlora.LoraModel.from_pretrained(base, tmp_path, config=config)
    assert type(loaded.base_model.model["one"]) is _TwiceLora
    _close(loaded.base_model.model["one"](x), layer(x))
    config._register_custom_module({_Twice: peft.tuners.lora.Linear})
    with pytest.raises(UnsupportedLayerError, match=r"not a subclass of.*fastlora.patch"):
        fastlora.get_peft_model(nn.ModuleDict({"one": _Twice(3, 4)}), config)


# --------------------------------------------------------------------------------- attention


def _tokens(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(8))


@pytest.mark.parametrize(
    ("options", "call"),
    [
        ({}, {"need_weights": True}),
        ({"batch_first": False}, {"need_weights": True, "average_attn_weights": False}),
        ({"bias": False}, {"attn_mask": torch.triu(torch.ones(5, 5, dtype=torch.bool), 1)}),
        ({"add_bias_kv": True, "add_zero_attn": True}, {}),
        ({}, {"key_padding_mask": torch.tensor([[False] * 4 + [True]] * 2)}),
        ({}, {"cross": True}),
    ],
    ids=str,
)
def test_attention_in_every_way_it_is_called(options: dict[str, Any], call: dict[str, Any]) -> None:
    """As PEFT's, and in evaluation, where PyTorch takes another way, as in training."""
    case, call = KINDS["attention"], dict(call)
    other, x = _tokens(2, 5, 8) if call.pop("cross", False) else None, case.x(2)
    results = []
    for library in (fastlora, peft):
        made = KindCase(functools.partial(case.make, **options), case.x, mend=case.mend)
        layer = _layer(_model(library, made))
        layer.train()
        key = x if other is None else other
        trained = layer(x, key, key, **call)
        layer.eval()
        with torch.no_grad():
            results.append((trained, layer(x, key, key, **call)))
        if library is fastlora:
            ours = layer
    for (y, weights), (expected, theirs) in zip(*results, strict=True):
        _close(y, expected)
        assert (weights is None) is (theirs is None)
        if weights is not None:
            _close(weights, theirs)
    assert type(ours.base_layer.in_proj_weight) is nn.Parameter


def test_attention_writes_into_no_weight() -> None:
    """PEFT merges into the module in every forward, which another thread would see."""
    model = _model(fastlora, KINDS["attention"])
    base = _layer(model).get_base_layer()
    weights = base.in_proj_weight, base.out_proj.weight
    before = [(id(w), w._version, w.detach().clone()) for w in weights]
    seen: list[Any] = []
    base.register_forward_pre_hook(lambda module, args: seen.append(module))
    _run(model, KINDS["attention"].x(2))
    assert seen and seen[0] is not base  # hooks are called, on what stands in for it
    for weight, (identity, version, value) in zip(
        (base.in_proj_weight, base.out_proj.weight), before, strict=True
    ):
        assert id(weight) == identity and weight._version == version
        assert torch.equal(weight, value)


def test_peft_adds_the_update_of_out_proj_twice(tmp_path: Path) -> None:
    case = KINDS["attention"]
    x, ours = case.x(2), _model(fastlora, case).eval()
    theirs = _model(peft, KindCase(case.make, case.x)).eval()
    assert not torch.allclose(ours(x), theirs(x), rtol=1e-2)
    _layer(ours).base_layer.out_proj.set_scale("one", 2.0)
    _close(ours(x), theirs(x))
    theirs.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="adds the update of out_proj twice"):
        fastlora.LoraModel.from_pretrained(case.make(), tmp_path / "one")


def test_attention_in_a_transformer_layer_acts_in_evaluation() -> None:
    """The layer reads its attention's weights in evaluation, where PEFT's adapters do nothing."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
            self.layers = nn.TransformerEncoder(layer, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers(x)

    x, config = _tokens(2, 5, 8), {"target_modules": ["self_attn"], "init_lora_weights": False}
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = fastlora.get_peft_model(Encoder(), fastlora.LoraConfig(**config))
    expected = model(x)
    model.eval()
    with torch.no_grad():
        _close(model(x), expected)
        with model.disable_adapter():
            assert not torch.allclose(model(x), expected, rtol=1e-2)
        model.merge_adapter()
        _close(model(x), expected)


def test_an_encoder_makes_a_nested_tensor() -> None:
    """Of a padded batch in evaluation; attention of PyTorch's takes none with gradients."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2)
    fields = {"target_modules": ["self_attn", "linear1"], "init_lora_weights": False}
    model = fastlora.get_peft_model(encoder, fastlora.LoraConfig(**fields)).eval()
    x, padded = _tokens(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        y = model(x, src_key_padding_mask=padded)
    with pytest.raises(AssertionError, match="NestedTensor"):
        model(x, src_key_padding_mask=padded)
    encoder.use_nested_tensor = False
    expected = model(x, src_key_padding_mask=padded)
    assert expected.requires_grad and not y[padded].any()  # what was in no sample is 0
    _close(y[~padded], expected[~padded])


def test_attention_shares_no_batch() -> None:
    case = KINDS["attention"]
    model = _model(fastlora, case)
    with (
        fastlora.adapters(model, ["one", None]),
        pytest.raises(UnsupportedLayerError, match="all rows share its weight"),
    ):
        model(case.x(2))
    with fastlora.adapters(model, [None, None]):
        model(case.x(2))


@pytest.mark.parametrize(
    ("options", "fields", "words"),
    [
        ({"kdim": 6, "vdim": 6}, {}, "kdim=6, vdim=6"),
        ({}, {"use_dora": True}, "use_dora=True is not supported for"),
        ({}, {"lora_bias": True}, "lora_bias=True is not supported for"),
    ],
)
def test_attention_that_cannot_be_adapted(
    options: dict[str, Any], fields: dict[str, Any], words: str
) -> None:
    model = KINDS["attention"].make(**options)  # type: ignore[call-arg]
    with pytest.raises(UnsupportedLayerError, match=f"'kind'.*{words}"):
        fastlora.get_peft_model(model, fastlora.LoraConfig(target_modules=["kind"], **fields))
    assert type(model.kind.out_proj) is not nn.Linear and not hasattr(model.kind, "r")


def test_a_failure_behind_attention_takes_it_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = KINDS["attention"].make()
    attention, out_proj = model.kind, model.kind.out_proj
    monkeypatch.setattr(fastlora.FastLoraLinear, "add_adapter", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fastlora.get_peft_model(model, fastlora.LoraConfig(target_modules=["kind", "lin"]))
    assert model.kind is attention and attention.out_proj is out_proj


def test_an_adapter_of_attention_is_loaded_over_itself(tmp_path: Path) -> None:
    case = KINDS["attention"]
    model = _model(fastlora, case, ("default",))
    expected = model(case.x(2))
    model.save_pretrained(tmp_path)
    for parameter in _layer(model).parameters():
        parameter.data += parameter.requires_grad
    model.load_adapter(tmp_path, "default")
    _close(model(case.x(2)), expected)

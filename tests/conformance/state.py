"""What forwards leave alone, keep, and forget; copies, merges, hooks and refusals."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fastlora
from fastlora.testing import assert_within_budget, run_with_largest_error
from fastlora.validation import (
    AdapterStateError,
    FastLoraError,
    ImplementationError,
    UnsupportedLayerError,
)
from tests.support.conformance_cases import Case
from tests.support.conformance_models import SHAPES, Subject, direction, drawn, local
from tests.support.conformance_suite import invariant
from tests.support.conformance_truth import Group, check, groups_of, merged, plain, read_masks

OURS = ("layer", "model", "patched")


@invariant()
def saved_for_backward(case: Case) -> None:
    """x itself, parameters, s and seeds; a DoRA adapter's output; no cast or dropped copy."""
    subject = Subject(case)
    x = subject.x(100 if case.tokens < 100 else None).requires_grad_()
    tensors: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        tensors.append(local(tensor))
        return tensor

    with subject.block(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        subject.net.q(x)
    own = {t.untyped_storage().data_ptr() for t in (x, *map(local, subject.net.parameters()))}
    kept = {t.untyped_storage().data_ptr() for t in tensors}
    assert x.untyped_storage().data_ptr() in kept or not case.trains
    # The same memory once; of an image only what is read.
    beside = {(t.data_ptr(), t.numel()): t for t in tensors}.values()
    other = sum(t.nbytes for t in beside if t.untyped_storage().data_ptr() not in own)
    n, k = SHAPES["q"]
    size, budget = x.element_size(), 2048  # seeds, scalings, routing's small tables
    if case.impl == "triton" and case.rows == "mixed":
        budget += size * x[..., 0].numel() * 16  # one s for all, as wide as the widest block
    for rows, names in groups_of(subject, x[..., 0].numel()):
        for name in (name for name in names if f"q.{name}.A" in subject.values):
            config = subject.adapters[name]
            r, p, dora = config["r"], config.get("lora_dropout"), "use_dora" in config
            budget += size * len(rows) * (r + n * dora + k * bool(dora and p and len(names) == 1))
            if case.rows == "several" or not case.trains:
                budget += size * r * (n + k)  # rank rows side by side, or out of an image
    if case.dora and case.rows == "mixed":
        # Which rows: two int64 each; and rows of adapters beside it.
        budget += x[..., 0].numel() * (4 * 8 + 2 * size * n)
    assert other <= budget, f"{other} bytes beside x and parameters, expected at most {budget}"


@invariant(per=("source", "rows", "base", "feature"))
def inputs_untouched(case: Case) -> None:
    """Forward and backward write into no input, parameter or gradient, nor into y afterwards."""
    subject = Subject(case)
    in_order = [[None, "en", "en", "fr", "fr", "de"]] if case.rows == "mixed" else []
    for ids in (None, *in_order):
        check_untouched(subject, ids)


def check_untouched(subject: Subject, ids: Any) -> None:
    """`inputs_untouched` for one batch; None for the case's own."""
    case, leaf = subject.case, subject.x().requires_grad_()
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    if case.base == "called":
        for layer in subject.layers().values():
            base = layer.get_base_layer()
            # A base layer may keep what it returned.
            base.register_forward_hook(lambda m, args, y: kept.append((y, y.detach().clone())))
    dy = direction(subject.forward(leaf, ids))
    given = [leaf, dy, *subject.net.parameters()]
    before = [(t._version, t.detach().clone()) for t in given]
    with torch.no_grad():
        for _ in range(case.forwards):  # the last one takes what an evaluation keeps
            subject.forward(leaf, ids)
    y = subject.forward(leaf, ids)
    copy_of_y = y.detach().clone()
    y.backward(dy)
    for tensor, (version, values) in zip(given, before, strict=True):
        assert tensor._version == version
        assert torch.equal(local(tensor), local(values))
    assert torch.equal(y, copy_of_y)
    assert all(torch.equal(y, values) for y, values in kept)
    assert kept or case.base == "plain"


@invariant(lambda case: case.source not in ("pool", "shards"), per=("source", "rows", "base"))
def copies(case: Case) -> None:
    """A deep copy and an unpickled model give the same, and share nothing."""
    subject = Subject(case)
    subject.net.eval()
    x = subject.x()
    expected = subject.forward(x)
    for duplicate in (copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))):
        twin = Subject(case)
        twin.call = duplicate(subject.call)
        twin.handle = twin.call
        twin.net = twin.call.get_base_model() if subject.handle is not None else twin.call
        assert torch.equal(twin.forward(x), expected)
        if case.rows == "mixed":  # it follows no block of the other's
            alone = twin.call(x)
            with subject.block():
                assert torch.equal(twin.call(x), alone)
        twin.values = {name: value * 0.5 for name, value in twin.values.items()}
        twin.put()
        check(twin, twin.step(x), x, masks={})
        assert torch.equal(subject.forward(x), expected)


@invariant(
    lambda case: case.source in OURS and case.rows != "mixed", per=("source", "rows", "feature")
)
def merging(case: Case) -> None:
    """Merged weights give the adapted output; unmerging brings the base back, ours bit for bit."""
    subject = Subject(case)
    x = subject.x()
    subject.net.eval()
    expected, weights = subject.forward(x), [m.weight.clone() for m in subject.layers().values()]

    def each(merge: bool) -> None:
        if case.source == "layer":
            for layer in subject.layers().values():
                layer.merge() if merge else layer.unmerge()
        else:
            subject.handle.merge_adapter() if merge else subject.handle.unmerge_adapter()

    if case.feature == "bias":  # "k" has no bias for a lora_bias to go into
        if case.source != "patched":
            with pytest.raises(AdapterStateError, match="lora_bias"):
                each(True)
            if case.source == "layer":
                subject.layers()["q"].unmerge()
            assert torch.equal(subject.forward(x), expected)
        return
    each(True)
    tensors = merged(subject)
    rows = [Group(torch.arange(x[..., 0].numel()), [])]
    truth = plain(subject, tensors, x, torch.float64, rows)
    runs = [plain(subject, tensors, x, case.x_dtype, rows, seed) for seed in range(8)]
    with torch.no_grad():
        assert_within_budget(subject.forward(x), run_with_largest_error(runs, truth), truth)
    if case.source == "layer":
        with pytest.raises(AdapterStateError, match="is merged"):
            subject.net.q.delete_adapter("en")
    if case.source == "model":
        with pytest.raises(AdapterStateError, match="merged"), subject.block(["en"] * 6):
            subject.call(x)
    each(False)
    if case.source == "patched":
        subject.read()  # PEFT subtracts
    else:
        for layer, weight in zip(subject.layers().values(), weights, strict=True):
            assert torch.equal(layer.weight, weight)
    check(subject, {"y": subject.forward(x)}, x, masks={})


@invariant(lambda case: case.source in OURS, per=("source", "rows", "base"))
def disabled(case: Case) -> None:
    """Without adapters the model is its base model, and afterwards it has them again."""
    if case.rows == "mixed":
        case = case._replace(rows="single")
    subject = Subject(case)
    x = subject.x()
    owners = list(subject.layers().values()) if case.source == "layer" else [subject.handle]
    subject.net.eval()
    with pytest.raises(KeyError), contextlib.ExitStack() as stack:
        for owner in owners:
            stack.enter_context(owner.disable_adapter())
        check(subject, {"y": subject.forward(x)}, x, [None] * 6, masks={})
        raise KeyError
    check(subject, {"y": subject.forward(x)}, x, masks={})


class Doubled(nn.Module):
    """A module that a layer does not know."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Doubles."""
        return 2 * x


class Masking(nn.Module):
    """Drops what a mask says."""

    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiplies."""
        rows = x.reshape(-1, x.shape[-1])
        return (rows * self.mask.to(x.dtype)).view(x.shape)


def check_called(case: Case) -> None:
    """`hooks` with DoRA or dropout: modules are called, and the numbers are the same."""
    subject, calls = Subject(case), list[int]()
    x = subject.x()
    masks = read_masks(subject, x)
    for key, layer in subject.layers().items():
        for name in (name for name in case.active if name in layer.lora_A):
            layer.lora_A[name].register_forward_hook(lambda *_: calls.append(1))
            if (key, name) in masks and "lora_dropout" in subject.adapters[name]:
                layer.lora_dropout[name] = Masking(masks[key, name])
    check(subject, subject.step(x), x, masks=masks)
    assert len(calls) >= 3


@invariant(lambda case: case.source in OURS, per=("source", "rows", "base", "feature"))
def hooks(case: Case) -> None:
    """A hooked factor, and a module in the place of dropout, are called, and what they give acts.

    Each doubles the low-rank term here, as a doubled lora_A would; beside DoRA and dropout none.
    """
    if case.dora or case.drops:
        if case.rows != "mixed":
            check_called(case)
        return
    for kind in ("forward hook", "pre-hook", "module"):
        subject = Subject(case)
        with torch.no_grad():
            for _ in range(3):  # nothing that was kept passes over it
                subject.forward(subject.x())
        seen = 0

        def doubled(module: nn.Module, args: Any, y: Any = None) -> Any:
            nonlocal seen
            seen += 1
            return 2 * y if y is not None else (2 * args[0],)

        for layer in subject.layers().values():
            if kind == "module":
                layer.lora_dropout["en"] = Doubled()
            elif kind == "pre-hook":
                layer.lora_A["en"].register_forward_pre_hook(doubled)
            else:
                layer.lora_A["en"].register_forward_hook(doubled)
        x = subject.x()
        if case.rows == "mixed":  # its rows cannot be had from a module; those of others can
            for call in (torch.no_grad()(subject.forward), subject.step):
                with pytest.raises(
                    UnsupportedLayerError, match="'en'.*cannot be used in a mixed batch"
                ):
                    call(x)
            others = ["fr", None, "de"] * 2
            check(subject, subject.step(x, others), x, others, masks={})
            continue
        found = subject.step(x)
        assert seen == 3 or kind == "module"
        for name in list(subject.values):
            if name.endswith(".en.A"):
                subject.values[name] = 2 * subject.values[name]
                found[name] = found[name] / 2
        check(subject, found, x, masks={})


@invariant(lambda case: case.impl == "eager", per=("source", "rows", "base", "feature"))
def batch_invariance_raises(case: Case) -> None:
    """The mode never does less: plain PyTorch cannot keep it, and says so; nothing stays behind."""
    subject = Subject(case)
    subject.net.eval()
    x = subject.x()
    expected = [subject.forward(x) for _ in range(2)][-1]  # the first one finds the groups
    with fastlora.batch_invariant(), torch.no_grad():
        with pytest.raises(ImplementationError, match="batch-invariant"):
            subject.forward(x)
        with fastlora.batch_invariant(False):
            subject.forward(x)
    if case.source != "pool":
        assert torch.equal(subject.forward(x), expected)


@invariant(lambda case: case.source in ("layer", "model"), per=("source", "rows"))
def unsupported_calls(case: Case) -> None:
    """What does not fit raises one typed error, and model and output are as before."""
    subject = Subject(case)
    subject.net.eval()
    x = subject.x()
    expected, keys = subject.forward(x), list(subject.net.state_dict())
    layer = subject.net.q
    wrong: list[tuple[Callable[[], Any], str]] = [
        (lambda: layer.add_adapter("en"), "'en' already exists"),
        (lambda: layer.add_adapter("new", r=0), "got 0"),
        (lambda: layer.add_adapter("new", r=2.5), "got 2.5"),
        (lambda: layer.add_adapter("new", init_lora_weights="magic"), "got 'magic'"),
        (lambda: layer.add_adapter("new", lora_dropout=1.0), "got 1.0"),
        (lambda: layer.add_adapter("new", lora_alpha=float("nan")), "got nan"),
        (lambda: layer.add_adapter("a.b"), "a.b"),
        (lambda: layer.add_adapter("new", use_dora=True, lora_bias=True), "lora_bias=True"),
        (lambda: layer.set_adapter("enn"), "close names: en"),
        (lambda: layer.delete_adapter("enn"), "close names: en"),
        (lambda: layer.set_scale("enn", 1.0), "'enn'"),
        (lambda: layer.merge(adapter_names=["enn"]), "'enn'"),
    ]
    for call, message in wrong:
        with pytest.raises(FastLoraError, match=message):
            call()
        assert list(subject.net.state_dict()) == keys
        assert torch.equal(subject.forward(x), expected)
    with pytest.raises(ValueError, match=r"x has shape \(6, 3, 17\), expected \[..., 16\]"):
        subject.forward(torch.zeros(6, 3, 17, dtype=case.x_dtype))
    layer.lora_A["en"].to("meta")
    with pytest.raises((ValueError, RuntimeError), match="meta"):
        subject.forward(x)


@invariant(lambda case: case.source in ("layer", "model"), per=("source", "rows", "feature"))
def adapters_come_and_go(case: Case) -> None:
    """A deleted adapter leaves no trace, and a new one of its name is a new one."""
    subject = Subject(case)
    subject.net.eval()
    x = subject.x()
    owner = subject.handle or subject.net
    with torch.no_grad():
        for _ in range(3):
            subject.forward(x)
    for layer in subject.layers().values():
        if "fr" in layer.lora_A and case.source == "layer":
            layer.delete_adapter("fr")
    if case.source == "model":
        owner.delete_adapter("fr")
    assert not any(".fr." in key for key in owner.state_dict())
    left = [None if name == "fr" else name for name in case.ids] if case.rows == "mixed" else None
    if case.rows != "several":
        check(subject, {"y": subject.forward(x, left)}, x, left, masks={})
    config = {"r": 2, "lora_alpha": 7, "target_modules": ["q", "k"]}
    if case.source == "model":
        owner.add_adapter("fr", fastlora.LoraConfig(**config))
        owner.base_model.set_adapter(case.active)
    else:
        for layer in (subject.net.q, subject.net.k):
            layer.add_adapter("fr", r=2, lora_alpha=7)
            layer.set_adapter([name for name in case.active if name in layer.lora_A])
    subject.adapters = {**subject.adapters, "fr": config}
    subject.values = {n: v for n, v in subject.values.items() if ".fr." not in n}
    for layer in ("q", "k"):
        n, k = SHAPES[layer]
        for end, shape in (("A", (2, k)), ("B", (n, 2))):
            name = f"{layer}.fr.{end}"
            subject.values[name] = drawn("new", *shape).to(case.x_dtype).double()
    subject.put()
    check(subject, {"y": subject.forward(x)}, x, masks={})
    subject.net.train(case.drops)
    check(subject, subject.step(x), x, masks=read_masks(subject, x))

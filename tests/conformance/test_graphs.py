"""What compiles a graph and what does not, and what a graph holds."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

import fastlora
from tests.conformance.cache_invalidation import changes
from tests.conformance.test_compiled import CASES, compiled
from tests.support.compiled import Graphs, graph_count
from tests.support.conformance_cases import Case
from tests.support.conformance_models import Subject
from tests.support.conformance_truth import check, read_masks

pytestmark = pytest.mark.usefixtures("fresh_compiler")

MIXED = [case for case in CASES if case.rows == "mixed" and case.dtype == "float32"]


@pytest.mark.drawn(1 / 6)
@pytest.mark.parametrize("case", MIXED, ids=str)
def test_mixes_and_lengths_compile_nothing(case: Case) -> None:
    """Any ids, slots, scalings and lengths are one graph in training and one in serving."""
    subject = compiled(Subject(case), dynamic=True)
    chosen = random.Random(0)
    names = [*subject.adapters, None]
    steps = 6 if case.impl == "triton" else 12  # its interpreter takes a second for one
    if case.trains:
        for step in range(steps):
            x = subject.x(chosen.randint(5, 30))
            own = [chosen.choice(names) for _ in range(6)]
            ids: Any = own
            if step % 4 == 3:
                ids = torch.tensor([names.index(name) if name else -1 for name in own])
            if step == 4:
                changes(subject)["scale"]()
            found = subject.step(x, ids)
            if step % 5 == 4 and not case.drops:
                check(subject, found, x, own, zeros=True, masks={})
        assert graph_count() == 1
    before = graph_count()
    subject.net.eval()
    with torch.no_grad():
        for _ in range(steps):
            subject.forward(subject.x(chosen.randint(5, 30)), [chosen.choice(names)] * 6)
    assert graph_count() == before + 1


def test_switches_compile_nothing() -> None:
    """Once each active adapter had its graph, switching makes no more."""
    subject = compiled(Subject(Case("model", "single", "rslora")), dynamic=True)
    for length in range(12):
        subject.handle.set_adapter(("en", "fr", "de")[length % 3])
        y = subject.forward(subject.x(4 + length))
        y.sum().backward()
        if length == 2:
            count = graph_count()
    assert graph_count() == count == 3


def test_each_kind_of_batch_has_a_graph() -> None:
    """Ids per sample, per token, one row, and no block at all; and then no more."""
    subject = compiled(Subject(Case("model", "mixed", "bias")))
    x, names = subject.x(), [*subject.adapters, None]
    for repeat in range(2):
        for ids in (["en", None] * 3, ["fr", "de"] * 3):
            check(subject, subject.step(x, ids), x, ids, zeros=True, masks={})
        tokens = torch.tensor([0, 2, -1, 2, 1, repeat] * 3)
        own = [names[slot] for slot in tokens.tolist()]
        found = subject.step(x, tokens)
        check(subject, found, x, own, zeros=True, masks={})
        one = subject.x(1)[:1]
        check(subject, subject.step(one, ["fr"]), one, ["fr"], zeros=True, masks={})
        subject.call(x)
        if not repeat:
            count = graph_count()
    assert graph_count() == count == 4


def test_automatic_dynamic_shapes() -> None:
    """A second length makes a dynamic graph; no choice by the number of rows makes another."""
    subject = compiled(Subject(Case("model", "single", "plain")))
    for length in (5, 6, *range(7, 20), 400):
        subject.step(subject.x(length))
        assert graph_count() == min(2, length - 4)
    with torch.no_grad():
        for length in (5, 400):
            subject.forward(subject.x(length))
    assert graph_count() == 3


SCALED = [("model", feature) for feature in ("plain", "bias", "dora")] + [("patched", "plain")]


@pytest.mark.drawn(1 / 6)
@pytest.mark.parametrize(("source", "feature"), SCALED)
@pytest.mark.parametrize("training", [True, False])
def test_other_scalings_compile_nothing(source: str, feature: str, training: bool) -> None:
    """A number that is set anew, in every way to set one, or a tensor written into."""
    subject = compiled(Subject(Case(source, "single", feature)))
    x, config, layers = subject.x(), subject.adapters["en"], subject.layers().values()
    own = torch.tensor(0.0)
    for step in range(8):
        factor = 0.5 + 0.3 * step
        for layer in layers:
            if step >= 6:
                layer.scaling["en"] = own.fill_(factor)
            elif step % 3 == 0:
                layer.set_scale("en", factor * config["r"] / config["lora_alpha"])
            elif step % 3 == 1:
                layer.scale_layer(factor / layer.scaling["en"])
            else:
                layer.scaling = dict.fromkeys(layer.scaling, factor)
        subject.adapters = {
            **subject.adapters,
            "en": {**config, "lora_alpha": factor * config["r"]},
        }
        with torch.set_grad_enabled(training):
            found = subject.step(x) if training else {"y": subject.forward(x)}
        check(subject, found, x, masks={})
        assert graph_count() == 1 + (step >= 6)  # a tensor of the user's is another input


def test_rows_are_sorted_once_a_graph() -> None:
    """Layers sort alike, which compilers merge; the backward has the order saved."""
    graphs = Graphs()
    subject = compiled(Subject(Case("model", "mixed", "plain")), backend=graphs.backend)
    subject.step(subject.x())
    assert graphs.count(torch.ops.fastlora.rows_sort.default) == [1, 0]


def masked(node: Any, mask: Any) -> bool:
    """Whether a node is a dropout mask, or a tensor under one that no product has reduced yet."""
    if node.target is mask:
        return True
    through = ("aten.mul", "aten.view", "aten.reshape", "aten.alias", "aten.clone")
    return str(node.target).startswith(through) and any(
        masked(source, mask) for source in node.all_input_nodes
    )


def test_neither_a_mask_nor_a_dropped_copy_is_saved() -> None:
    """Compiled too, the backward has x and the seeds, and draws its masks again."""
    mask, graphs = torch.ops.fastlora.lora_keep.default, Graphs()
    case = Case("model", "single", "dropout")
    subject = compiled(Subject(case), backend=graphs.backend)
    x = subject.x()
    check(subject, subject.step(x), x, masks=read_masks(Subject(case), x))
    assert graphs.count(mask) == [3, 3]  # one mask a layer in the forward, and one again behind it
    assert len(graphs.saved) > 3
    nodes = [node for node in graphs.saved if isinstance(node, torch.fx.Node)]
    assert not [node for node in nodes if masked(node, mask)]


def test_the_report_says_that_grouped_layers_run_alone() -> None:
    """Without kernels there is nothing to share; with them nothing has been seen yet."""
    subject = Subject(Case("model", "mixed", "many"))

    def group_notes() -> list[str]:
        return [row.shared_input for row in fastlora.fusion_report(subject.handle).rows]

    subject.step(subject.x())
    assert group_notes() == ["without kernels, each layer reads x separately"] * 3
    for layer in subject.layers().values():
        layer.impl = "triton"
    assert group_notes() == ["no training forward pass yet"] * 3

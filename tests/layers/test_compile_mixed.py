"""Mixed batches under torch.compile(fullgraph=True): one graph for any mix, in both directions."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import LoraModel
from fastlora.layers import sharing
from fastlora.testing import assert_within_budget
from tests.support.compiled import graph_count
from tests.support.compiled_mixed import SEEDS, K, adapted, check, results

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def test_one_graph_for_a_batch_and_one_without() -> None:
    """Ids per token, one row, and no block at all: each its graph, and then no more."""
    model = adapted()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for repeat in range(2):
        x = torch.randn(2, 3, K)
        for ids in (["a", None], ["c", "d"]):
            check(results(compiled, model, x, ids), model, x, ids)
        tokens = torch.tensor([0, 3, -1, 3, 2, repeat])
        check(results(compiled, model, x, tokens), model, x, tokens)
        one = torch.randn(1, 1, K)
        check(results(compiled, model, one, ["b"]), model, one, ["b"])
        compiled(x)
        if not repeat:
            count = graph_count()
    assert graph_count() == count == 4


def test_rows_are_sorted_once_a_graph() -> None:
    """Layers sort alike, which compilers merge; the backward has the order saved."""
    graphs: list[Any] = []

    def keep(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph)

    model, x = adapted(), torch.randn(4, 3, K)
    backend = aot_autograd(
        fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition
    )
    ids = ["a", "b", None, "d"]
    mine = results(torch.compile(model, backend=backend, fullgraph=True), model, x, ids)
    check(mine, model, x, ids)
    sort = torch.ops.fastlora.rows_sort.default
    assert [sum(n.target is sort for n in graph.graph.nodes) for graph in graphs] == [1, 0]


def test_backward_after_the_block_and_in_another_thread() -> None:
    """The graph has its routing, whatever block is open then."""
    model, x, ids = adapted(0.3), torch.randn(4, 3, K), ["a", "b", "b", "d"]
    expected = results(model, model, x, ids)[2:]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with fastlora.adapters(model, ids, seeds=SEEDS):
        loss = compiled(x).pow(2).mean()

    def backward() -> None:
        with fastlora.adapters(model, ["c"] * 4):
            loss.backward()

    thread = threading.Thread(target=backward)
    thread.start()
    thread.join()
    for parameter, plain in zip(
        (p for p in model.parameters() if p.requires_grad), expected, strict=True
    ):
        error = (parameter.grad - plain).norm()
        assert error <= 32 * torch.finfo(x.dtype).eps * plain.norm()


def test_checkpoints_within_the_graph() -> None:
    """What is recomputed has the routing of the forward: it is an input."""
    model, x, ids = adapted(0.3), torch.randn(4, 3, K), ["a", "b", None, "c"]

    def call(x: torch.Tensor) -> torch.Tensor:
        return checkpoint(model, x, use_reentrant=False)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    check(results(compiled, model, x, ids), model, x, ids)
    assert graph_count() == 1


def test_autocast() -> None:
    """Compiled and not, the same casts."""
    model, x, ids = adapted(), torch.randn(4, 3, K), ["a", "b", None, "c"]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    exact = copy.deepcopy(model).double()
    with torch.autocast("cpu", torch.bfloat16):
        mine, plain = results(compiled, model, x, ids), results(model, model, x, ids)
    for one, other, true in zip(mine, plain, results(exact, exact, x.double(), ids), strict=True):
        assert_within_budget(one.bfloat16(), other.bfloat16(), true)


def siblings(model: LoraModel) -> list[str]:
    """What the fusion report says of gate, up and down."""
    return [row.siblings for row in fastlora.fusion_report(model).rows]


def test_the_report_says_that_siblings_are_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of mixed batches in PyTorch and in graphs, whatever an earlier step shared."""
    monkeypatch.setattr(sharing, "MIN_ROWS", 0)
    model, x, ids = adapted(), torch.randn(4, 3, K), ["a", "b", None, "d"]
    with torch.no_grad():
        results(model, model, x, ids)
    assert siblings(model) == ["no training forward seen yet"] * 3
    for _ in range(2):
        results(model, model, x, ids)
    graph = "2, not shared: without kernels each layer of a compiled graph has its own pass over x"
    eager = graph.replace("compiled graph", "mixed batch")
    assert siblings(model) == [eager, eager, "none"]
    model(x)
    assert siblings(model) == ["2 share x", "2 share x", "none"]
    results(torch.compile(model, backend="aot_eager", fullgraph=True), model, x, ids)
    assert siblings(model) == [f"2 share x; compiled: {graph}"] * 2 + ["none"]
    results(model, model, x, ids)
    assert siblings(model) == [f"{eager}; compiled: {graph}"] * 2 + ["none"]


def operands() -> dict[str, Any]:
    """A batch of two adapters and a base row, as operators take it."""
    a = [torch.randn(r, 6, requires_grad=True) for r in (2, 3)]
    b = [torch.randn(5, r, requires_grad=True) for r in (2, 3)]
    numbers = torch.tensor([1.0, 2.0]), torch.tensor([0, 1, -1, 1]), torch.tensor([1, 2])
    x, y = torch.randn(8, 6, requires_grad=True), torch.randn(8, 5)
    factors = (a, b, [None, torch.randn(5)], *numbers, [0.0, 0.5], 3, "eager", None)
    dtypes = torch.float32, torch.float32
    magnitudes = [torch.rand(5, requires_grad=True) for _ in a]
    norms = [torch.rand(5) + 1.0 for _ in a]
    # Of one rank, and each row with an adapter: memory for s and z is not written elsewhere.
    rank_3 = [torch.randn(3, 6) for _ in a], [torch.randn(5, 3) for _ in a]
    parts = zip(*rank_3, magnitudes, norms, numbers[0], numbers[2].split(1), strict=True)
    batch = ([t.detach() for own in parts for t in own], torch.tensor([0, 1, 0, 1]), [0, 1])
    dora = (y, x.detach(), torch.randn(5, 6), *batch, [0.5, 0.3], "eager")
    blocks = [torch.randn(2, 6), torch.randn(2, 5)]
    none = torch.zeros(1, 2, dtype=torch.int64)
    addresses = [torch.tensor([[0, block.data_ptr()]]) for block in blocks]
    tables = [*addresses, torch.tensor([[0, 2]], dtype=torch.int32), torch.ones(1, 2), none]
    rows = torch.ops.fastlora.rows_sort(numbers[1], 8, 2, torch.device("cpu"))[:4]
    return {
        "lora_shared": (x, a, [0, 1], 1, [0.0, 0.5], None, 1, torch.float32, None, "eager"),
        "lora_shared of a mixed batch": (
            *(x, [*a, a[1]], [0, 1, 3], 1, [0.0, 0.0], numbers[1], 2, *dtypes, "eager"),
        ),
        "lora_mixed": (x, torch.randn(5, 6), None, None, *factors),
        "lora_mixed over y": (x, None, None, y, *factors),
        "dora_dropped": (*dora, True),
        "dora_dropped_backward": (*dora, torch.randn(8, 3), torch.randn(8, 5), [True] * 8),
        "lora_add_at_": (y, x.detach(), rows, tables, 0, 2, torch.float32, "eager"),
        "kept": blocks,
    }


@pytest.mark.parametrize("name", [name for name in operands() if name != "kept"])
def test_opcheck(name: str) -> None:
    """Schema, fake, autograd and dispatch of every operator agree with what it does."""
    arguments = operands()
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    if name != "lora_shared":  # whose seeds differ from call to call
        checks += ("test_aot_dispatch_dynamic",)
    operator = getattr(torch.ops.fastlora, name.split()[0]).default
    torch.library.opcheck(operator, arguments[name], test_utils=checks)

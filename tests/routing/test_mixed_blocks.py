"""Blocks of `fastlora.adapters`: what they refuse, what they see, and what they leave behind."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.distributed._composable import checkpoint as composable_checkpoint
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import adapters
from fastlora.routing.active import active_routings
from fastlora.routing.ids import DeferredIdChecks, _PendingIdCheck
from fastlora.routing.routing import _MOST_SEEDS, layer_numbers_from_name_hashes
from fastlora.validation import AdapterNotFoundError, AdapterStateError, UnsupportedLayerError
from tests.support.tiny import TwoLayers, randomize, tiny_llama, with_adapters


def build(base: nn.Module | None = None, targets: Any = ("q", "v"), **config: Any) -> Any:
    """Adapters a, b and c at random over TwoLayers, in evaluation and float64."""
    torch.manual_seed(0)
    made = fastlora.LoraConfig(r=4, target_modules=list(targets), **config)
    model = with_adapters(base or TwoLayers(), dict.fromkeys("abc", made))
    randomize(model)
    return model.double().eval()


def rows_of(model: Any, x: torch.Tensor) -> torch.Tensor:
    """The model's output, without gradients."""
    with torch.no_grad():
        return model(x)


# -------------------------------------------------------------------------- ids and the batch


@pytest.mark.parametrize("library", ["ours", "patched"])
@pytest.mark.parametrize("count", [1, 2, 3, 8, 12])
def test_ids_that_are_neither_samples_nor_tokens(library: str, count: int) -> None:
    """Numbers that divide the rows, or the samples, are wrong all the same, as in PEFT."""
    peft = pytest.importorskip("peft", reason="patches a PEFT model")
    made: Any = fastlora if library == "ours" else peft
    config = made.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = made.get_peft_model(tiny_llama(), config, "a")
    if library == "patched":
        fastlora.patch(model.eval())
    ids, names = torch.randint(0, 97, (4, 6)), ["a"] * count
    message = rf"4 samples \(24 tokens\) and {count} adapter ids"
    with pytest.raises(ValueError, match=message), adapters(model, names):
        model(input_ids=ids)
    with pytest.raises(ValueError, match=message):
        model(input_ids=ids, adapter_names=names)
    if library == "ours":
        with pytest.raises(ValueError, match=message):
            model.generate(input_ids=ids, adapter_names=names, max_new_tokens=1)
    assert not active_routings()


def test_ids_of_a_pool_fit_its_batch() -> None:
    """Before any work, and for the batch that came in where a beam search makes more of it."""
    model = tiny_llama().eval()
    pool = fastlora.AdapterPool(model, target_modules=["q_proj"])
    generate = type(model).generate
    ids = torch.randint(1, 97, (2, 5))
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=r"2 samples .* 1 adapter ids"), adapters(pool, [None]):
            call(input_ids=ids)
    with adapters(pool, [None, None]):
        found = model.generate(
            input_ids=ids, max_new_tokens=3, num_beams=3, do_sample=False, pad_token_id=0
        )
    pool.close()
    assert model.generate.__func__ is generate
    expected = model.generate(
        input_ids=ids, max_new_tokens=3, num_beams=3, do_sample=False, pad_token_id=0
    )
    assert torch.equal(found, expected)
    for target in (model, None, 5):
        with pytest.raises(TypeError, match="adapters.. expects a LoraModel.*AdapterPool"):
            adapters(target, [None]).__enter__()


NO_IDS: tuple[Any, ...] = ([], torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int32))
EMPTY = {
    "plain": {},
    "dora": {"use_dora": True},
    "dropout": {"lora_dropout": 0.3},
    "dora and dropout": {"use_dora": True, "lora_dropout": 0.3},
    "a copy of the head": {"modules_to_save": ["head"]},
}


def gives_nothing(model: Any, shape: tuple[int, ...], target: Any = None) -> None:
    """A batch without rows gives an empty result and empty gradients, as PyTorch's linear does."""
    plain = nn.Linear(shape[-1], 5, dtype=torch.float64)
    for ids in NO_IDS:
        for _ in range(3):
            x = torch.empty(shape, dtype=torch.float64, requires_grad=True)
            with adapters(model if target is None else target, ids):
                y = model(x)
            y.sum().backward()
            assert y.shape == plain(x).shape and x.grad is not None and x.grad.shape == shape
            with torch.no_grad(), adapters(model if target is None else target, ids):
                assert model(x).shape == y.shape
    for parameter in model.parameters():
        assert parameter.grad is None or not parameter.grad.any()
    with adapters(model if target is None else target, []):
        for _ in range(2):
            with pytest.raises(ValueError, match="0 adapter ids"):
                model(torch.zeros(2, 3, 16, dtype=torch.float64))


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("feature", EMPTY)
def test_a_batch_of_no_rows(feature: str, train: bool) -> None:
    """An empty last batch of a data-parallel job; with rows, no ids are still refused."""
    model = build(**EMPTY[feature]).train(train)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in ("lora_", ".a.")))
    for shape in ((0, 16), (0, 3, 16), (2, 0, 16)):
        if shape[0] and "copy" in feature:
            continue
        gives_nothing(model, shape)


def test_a_batch_of_no_rows_in_a_pool_and_a_patched_model() -> None:
    base = TwoLayers().double().eval()
    with fastlora.AdapterPool(base, target_modules=["q"]) as pool:
        pool.load("a", state(), config=CONFIG)
        gives_nothing(base, (0, 3, 16), target=pool)
        assert pool.stats().leases == 0
    peft = pytest.importorskip("peft", reason="patches a PEFT model")
    model = peft.get_peft_model(TwoLayers().double(), peft.LoraConfig(**CONFIG), "a")
    fastlora.patch(model)
    gives_nothing(model, (0, 16))
    model.eval()
    assert model(torch.empty(0, 16, dtype=torch.float64), adapter_names=[]).shape == (0, 5)


class Arrival:
    """An event of a GPU that has come so far when a test says so."""

    def __init__(self) -> None:
        self.has_come = False
        self.waits = 0

    def query(self) -> bool:
        return self.has_come

    def synchronize(self) -> None:
        self.waits += 1
        self.has_come = True


def test_ids_out_of_range_are_told_by_a_later_block_that_waits_for_nothing() -> None:
    model, x = build(), torch.randn(2, 3, 16, dtype=torch.float64)
    unchecked, bad, good = model.base_model.group.unchecked, Arrival(), Arrival()
    unchecked._pending += [
        _PendingIdCheck(torch.tensor([False]), good, "good"),
        _PendingIdCheck(torch.tensor([True]), bad, "an adapter id is out of range"),
    ]

    def block() -> None:
        with adapters(model, ["a", "b"]):
            rows_of(model, x)

    block()  # neither has come
    good.has_come = True
    block()
    assert len(unchecked._pending) == 1
    bad.has_come = True
    with pytest.raises(AdapterNotFoundError, match="out of range"):
        block()
    block()
    assert not unchecked._pending and not bad.waits
    late = [Arrival() for _ in range(DeferredIdChecks._MOST + 3)]
    unchecked._pending += [_PendingIdCheck(torch.tensor([False]), arrival, "") for arrival in late]
    block()
    assert len(unchecked._pending) == DeferredIdChecks._MOST
    assert [arrival.waits for arrival in late] == [1] * 3 + [0] * DeferredIdChecks._MOST


def test_evaluation_draws_no_seed() -> None:
    """Sampling goes on as it would without adapters; in training dropout seeds are drawn."""
    model = build(lora_dropout=0.1)
    before = torch.random.get_rng_state()
    with adapters(model, ["a", "b"]):
        pass
    assert torch.equal(torch.random.get_rng_state(), before)
    model.train()
    with adapters(model, ["a", "b"]):
        pass
    assert not torch.equal(torch.random.get_rng_state(), before)


# ------------------------------------------------------------------------------ dropout


class Recurrent(nn.Module):
    """Layers of every kind, two of which run twice; each half of a forward may be a checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(8, 16), nn.Linear(16, 5)
        self.q, self.conv = nn.Linear(16, 16), nn.Conv1d(3, 3, 1)
        self.reentrant: bool | None = None

    def half(self, x: torch.Tensor) -> torch.Tensor:
        """Calls each shared layer once."""
        return self.conv(self.q(x).tanh())

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Maps ``[B, 3]`` to ``[B, 3, 5]``."""
        x = self.embed(ids)
        for _ in range(2):
            if self.reentrant is None:
                x = self.half(x)
            else:
                x = checkpoint(self.half, x, use_reentrant=self.reentrant)
        return self.out(x)


KINDS = ("embed", "q", "conv", "out")
TOKENS = torch.arange(6).view(2, 3)
SEEDS = {"a": 3, "b": 5, "c": 7}


def dropping(use_dora: bool, targets: Any = KINDS) -> Any:
    """Recurrent with dropout in all its adapters, in training."""
    config = {"lora_dropout": 0.5, "use_dora": use_dora}
    model = build(Recurrent(), targets, **config).train()
    for name, parameter in model.named_parameters():
        if "lora_embedding_A" in name:
            nn.init.normal_(parameter)
    model.set_adapter(["a", "b", "c"])
    return model


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("kind", KINDS[1:])  # PEFT's embeddings drop nothing
def test_each_forward_pass_of_a_block_has_its_own_masks(kind: str, use_dora: bool) -> None:
    """They follow from the seeds, whatever else is in the batch; the first ones as before."""
    model = dropping(use_dora, [kind])

    def passes(ids: list[str], rows: slice) -> list[torch.Tensor]:
        with adapters(model, ids, seeds=SEEDS):
            return [rows_of(model, TOKENS[rows]) for _ in range(3)]

    together, alone = passes(["a", "b"], slice(2)), passes(["b"], slice(1, 2))
    for number, (found, expected) in enumerate(zip(together, alone, strict=True)):
        torch.testing.assert_close(found[1:], expected)
        assert all(not torch.allclose(found[1], y[1]) for y in together[:number])


def test_a_layer_that_runs_twice_has_two_masks() -> None:
    model = build(targets=["q"], lora_dropout=0.5).train()
    q, x = model.base_model.model.q, torch.randn(2, 16, dtype=torch.float64)
    with adapters(model, ["a", "b"], seeds=SEEDS):
        assert not torch.allclose(q(x), q(x))


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_recomputation_has_the_masks_of_its_first_run(
    use_reentrant: bool, whole: bool, use_dora: bool
) -> None:
    """Two passes of a block, whose checkpoints hold one layer's calls and may be nested."""
    model, grads = dropping(use_dora), []
    one = torch.ones((), dtype=torch.float64, requires_grad=True)

    def run(one: torch.Tensor) -> torch.Tensor:
        return model(TOKENS) * one

    for checkpointed in (False, True):
        model.zero_grad()
        model.base_model.model.reentrant = use_reentrant if checkpointed else None
        with adapters(model, ["a", "b"], seeds=SEEDS):
            loss = torch.zeros((), dtype=torch.float64)
            for _ in range(2):
                segment = checkpointed and whole
                y = checkpoint(run, one, use_reentrant=use_reentrant) if segment else run(one)
                loss = loss + y.square().sum()
            if whole:  # A recomputation within the block does not count.
                loss.backward()
            last = rows_of(model, TOKENS)
        if not whole:
            loss.backward()
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        grads.append({**found, "last": last})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=name)


class _OwnCheckpoint(torch.autograd.Function):
    """Runs a function again in the backward pass, without `torch.utils.checkpoint`."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        ctx.function = function
        ctx.save_for_backward(x)
        with torch.no_grad():
            return function(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, torch.Tensor | None]:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            ctx.function(x).backward(grad)
        return None, x.grad


def test_a_recomputation_that_is_no_checkpoint_has_the_masks_of_the_only_run() -> None:
    model = build(lora_dropout=0.5).train()
    x, found = torch.randn(2, 16, dtype=torch.float64, requires_grad=True), []
    for run in (model, lambda x: _OwnCheckpoint.apply(model, x)):
        with adapters(model, ["a", "b"], seeds=SEEDS):
            found += torch.autograd.grad(run(x).square().sum(), x)
    torch.testing.assert_close(found[1], found[0])
    with adapters(model, ["a", "b"], seeds=SEEDS):
        model(x)
        y = _OwnCheckpoint.apply(model, x)
        with pytest.raises(AdapterStateError, match="which of these calls it recomputes"):
            y.sum().backward()


def test_the_composable_checkpoint_has_the_masks_of_its_first_run() -> None:
    model, x = build(lora_dropout=0.5).train(), torch.randn(2, 16, dtype=torch.float64)
    x, found = x.requires_grad_(), []
    for composable in (False, True):
        if composable:
            composable_checkpoint(model.base_model.model)
        with adapters(model, ["a", "b"], seeds=SEEDS):
            y = model(x) + model(x)
        found += torch.autograd.grad(y.square().sum(), x)
    torch.testing.assert_close(found[1], found[0])


def test_passes_of_a_compiled_graph_share_their_masks() -> None:
    """Another call compiles nothing."""
    model, x = build(lora_dropout=0.5).train(), torch.randn(2, 16, dtype=torch.float64)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    graphs = counters["stats"]["unique_graphs"]
    for _ in range(2):
        with adapters(model, ["a", "b"], seeds=SEEDS):
            found = [compiled(x) for _ in range(3)]
            torch.testing.assert_close(model(x), found[0])
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert counters["stats"]["unique_graphs"] == graphs + 1


def test_a_block_of_many_passes_keeps_few_seeds() -> None:
    model, x = build(lora_dropout=0.5).train(), torch.randn(2, 16, dtype=torch.float64)
    with adapters(model, ["a", "b"]):
        for _ in range(40):
            rows_of(model, x)
        assert len(active_routings()[-1].cache.seeds) <= _MOST_SEEDS


def train_dropouts(model: nn.Module) -> None:
    """Turns on the dropout of a model in evaluation."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.train()


@pytest.mark.parametrize("kind", KINDS[1:])  # PEFT's embeddings drop nothing
@pytest.mark.parametrize("how", ["dropouts", "model"])
def test_a_block_that_begins_in_evaluation_draws_seeds_for_dropout(how: str, kind: str) -> None:
    """Of the dropout modules alone, as for Monte Carlo dropout, or of a model that then trains."""
    model, found = dropping(False, [kind]), []
    for seed in (0, 0, 1):
        model.eval()
        torch.manual_seed(seed)
        with adapters(model, ["a", "b"]):
            if how == "dropouts":
                train_dropouts(model)
            else:
                model.train()
            found.append(rows_of(model, TOKENS))
    assert torch.equal(found[0], found[1]) and not torch.allclose(found[0], found[2])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_missing_seeds_are_drawn_before_a_checkpoint(use_reentrant: bool) -> None:
    """A recomputation starts from the generator's state at the checkpoint, and draws none."""
    model, grads = build(lora_dropout=0.5), []
    train_dropouts(model)
    x = torch.randn(2, 16, dtype=torch.float64, requires_grad=True)

    def run(x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(model(x))

    for checkpointed in (False, True):
        torch.manual_seed(0)
        x.grad = None
        with adapters(model, ["a", "b"]):
            y = checkpoint(run, x, use_reentrant=use_reentrant) if checkpointed else run(x)
        y.square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads)


def test_training_within_a_block_draws_the_seeds_of_graphs() -> None:
    model = build(lora_dropout=0.5)
    with adapters(model, ["c", "a"], seeds={"a": 4}):
        routing = active_routings()[-1]
        assert routing.seeds.tolist() == [4, 0]
        model.train()
        a, c = routing.seeds.tolist()
        assert a == 4 and c > 0 and routing.whole.seeds.tolist() == [a, 0, c]


# ------------------------------------------------------------------------------ open blocks


def test_blocks_that_end_out_of_order() -> None:
    """It is said, and none stays in force."""
    model = build()
    x = torch.randn(2, 16, dtype=torch.float64)
    first, second = adapters(model, ["b", "b"]), adapters(model, ["c", "c"])
    first.__enter__()
    second.__enter__()
    with pytest.raises(RuntimeError, match="in the reverse of the order"):
        first.__exit__(None, None, None)
    torch.testing.assert_close(model(x), model(x, adapter_names=["c", "c"]))
    second.__exit__(None, None, None)
    assert not active_routings()


def test_a_merge_within_a_block() -> None:
    """It would count twice, beside packed factors too."""
    model = build()
    x = torch.randn(2, 16, dtype=torch.float64)
    layer = model.base_model.model.q
    for _ in range(2):
        with adapters(model, ["b", "c"]):
            rows_of(model, x)
    with adapters(model, ["b", "c"]):
        rows_of(model, x)
        layer.merge(adapter_names=["b"])
        for forward in (functools.partial(rows_of, model), model):
            with pytest.raises(AdapterStateError, match=r"\['b'\] were .*adapters\(\) block"):
                forward(x)
        layer.unmerge()
        torch.testing.assert_close(rows_of(model, x), model(x, adapter_names=["b", "c"]))


def test_an_adapter_is_not_deleted_within_a_block() -> None:
    """A layer raises as its model does, and the rows stay as they were, packed factors or not."""
    model = build()
    x = torch.randn(4, 16, dtype=torch.float64)
    names = ["b", "c", "b", None]
    with adapters(model, names):
        before = [rows_of(model, x) for _ in range(4)][-1]
        with pytest.raises(AdapterStateError, match="block is open or a call with adapter_names="):
            model.base_model.model.q.delete_adapter("b")
        found = rows_of(model, x)
    torch.testing.assert_close(found, before)
    torch.testing.assert_close(found, build_again(model, x, names))


def build_again(model: Any, x: torch.Tensor, names: list[str | None]) -> torch.Tensor:
    """What the model computes from its factors as they are now: with gradients nothing is kept."""
    with torch.enable_grad(), adapters(model, names):
        return model(x).detach()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradients_within_a_block_without(use_reentrant: bool) -> None:
    """A checkpoint with gradients in a block that began without them keeps its routing."""
    model = build()
    model.set_adapter(["a", "b", "c"])
    x = torch.randn(2, 16, dtype=torch.float64, requires_grad=True)
    grads = []
    for checkpointed in (False, True):
        with torch.no_grad(), adapters(model, ["b", "c"]), torch.enable_grad():
            y = checkpoint(model, x, use_reentrant=use_reentrant) if checkpointed else model(x)
        (grad,) = torch.autograd.grad(y.sum(), x) if not checkpointed else (None,)
        if checkpointed:
            y.sum().backward()
            grad = x.grad
        grads.append(grad)
    torch.testing.assert_close(*grads)


def test_factors_that_functional_call_replaced() -> None:
    """The message names `functional_call`; with parameters in place of plain tensors it works."""
    model, x = build(), torch.randn(2, 16, dtype=torch.float64)
    with torch.no_grad(), adapters(model, ["b", "c"]):
        expected = model(x)
        state = {name: parameter.detach() for name, parameter in model.named_parameters()}
        with pytest.raises(UnsupportedLayerError, match=r"'b'.* plain tensor.*functional_call"):
            torch.func.functional_call(model, state, (x,))
        state = {name: nn.Parameter(tensor) for name, tensor in state.items()}
        torch.testing.assert_close(torch.func.functional_call(model, state, (x,)), expected)


# ------------------------------------------------------------------------------- layers, pools


def test_layers_whose_names_collide() -> None:
    """CRC-32 of both is the same; each keeps its own factors."""
    assert len(set(layer_numbers_from_name_hashes(["plumless", "buckeroo"]))) == 2

    class Colliding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plumless, self.buckeroo = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.plumless(x).tanh() + self.buckeroo(x.sin())

    model = build(Colliding(), targets=("plumless", "buckeroo"))
    x = torch.randn(2, 16, dtype=torch.float64)
    for _ in range(4):
        with adapters(model, ["b", "c"]):
            found = rows_of(model, x)
    torch.testing.assert_close(found, build_again(model, x, ["b", "c"]))


def test_a_patched_model_with_an_adapter_deleted_and_added_elsewhere() -> None:
    """New layers follow the routing too."""
    peft = pytest.importorskip("peft", reason="patches a PEFT model")
    twins = []
    for _ in range(2):
        torch.manual_seed(0)
        model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=["q_proj"]), "a")
        model.add_adapter("b", peft.LoraConfig(target_modules=["q_proj"]))
        twins.append(model.double().eval())
    patched, twin = twins
    fastlora.patch(patched)
    ids = torch.randint(0, 97, (3, 5))
    patched(input_ids=ids, adapter_names=["a", "b", "a"])
    for model in twins:
        model.delete_adapter("a")
        torch.manual_seed(1)
        model.add_adapter("a", peft.LoraConfig(target_modules=["q_proj", "v_proj", "up_proj"]))
        torch.manual_seed(2)
        randomize(model)
        model.double().eval()
    names = ["a", "b", "__base__"]
    expected = twin(input_ids=ids, adapter_names=names).logits
    torch.testing.assert_close(patched(input_ids=ids, adapter_names=names).logits, expected)
    with adapters(patched, names):
        torch.testing.assert_close(patched(input_ids=ids).logits, expected)


def state(scale: float = 1.0) -> dict[str, torch.Tensor]:
    """An adapter of rank 2 on q."""
    torch.manual_seed(3)
    prefix = "base_model.model.q."
    shapes = {"lora_A.weight": (2, 16), "lora_B.weight": (24, 2)}
    return {prefix + key: torch.randn(shape) * scale for key, shape in shapes.items()}


CONFIG = {"r": 2, "target_modules": ["q"]}


def test_an_adapter_loaded_in_inference_mode() -> None:
    """It serves gradients of the input afterwards."""
    model = TwoLayers()
    with torch.inference_mode():
        pool = fastlora.AdapterPool(model, target_modules=["q"])
        pool.load("a", state(), config=CONFIG)
        with adapters(pool, ["a", None]):
            model(torch.randn(2, 16))
    pool.load("b", state(2.0), config=CONFIG)
    x = torch.randn(2, 16, requires_grad=True)
    with adapters(pool, ["a", "b"]):
        model(x).sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()


def test_training_behind_inference_mode() -> None:
    """Scalings that inference mode met first, which no other test has, are saved for a backward."""
    model, x = build(lora_alpha=7.3125), torch.randn(2, 16, dtype=torch.float64)
    with torch.inference_mode(), adapters(model, ["a", "b"]):
        model(x)
    with adapters(model.train(), ["a", "b"]):
        model(x).sum().backward()
    assert model.base_model.model.q.lora_B["a"].weight.grad.any()


@pytest.mark.parametrize("given", ["names", "slots"])
def test_training_in_a_block_that_inference_mode_opened(given: str) -> None:
    """DoRA with dropout saves the ids and the seeds for its backward pass."""
    model = build(lora_dropout=0.5, use_dora=True).train()
    x = torch.randn(2, 16, dtype=torch.float64)
    with torch.inference_mode():
        block = adapters(model, ["a", "b"] if given == "names" else torch.tensor([0, 1]))
        block.__enter__()
    model(x).sum().backward()
    block.__exit__(None, None, None)
    assert model.base_model.model.q.lora_B["a"].weight.grad.any()


def test_a_dropout_that_trains_in_a_layer_that_does_not() -> None:
    """Packed factors drop nothing, so they serve no adapter with a dropout that acts."""
    model, x = build(lora_dropout=0.5), torch.randn(2, 16, dtype=torch.float64)

    def run() -> torch.Tensor:
        with adapters(model, ["a", "b"]):
            return rows_of(model, x)

    before = [run() for _ in range(3)]
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    assert torch.equal(before[1], before[2]) and not torch.allclose(run(), before[2])


def test_ids_written_within_a_block() -> None:
    """A block's rows are those of the ids that its first forward saw, whenever they are read."""
    model, ids = build(), torch.tensor([0, 1])
    x = torch.randn(2, 16, dtype=torch.float64)
    with adapters(model, ids):
        rows = active_routings()[-1].sorted_rows(4, ids.device)
        ids.fill_(-1)
        assert [(segment.slot, segment.start) for segment in rows.segments] == [(0, 0), (1, 2)]
        found = rows_of(model, x)
    with adapters(model, ["a", "b"]):
        torch.testing.assert_close(rows_of(model, x), found)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_ids_written_before_the_backward_pass(use_reentrant: bool) -> None:
    """A checkpoint is recomputed with the adapters of its first run."""
    model = build(modules_to_save=["head"])
    x, grads = torch.randn(2, 16, dtype=torch.float64, requires_grad=True), []
    for written in ([0, 1], [1, -1]):
        model.zero_grad()
        ids = torch.tensor([0, 1])
        with adapters(model, ids):
            y = checkpoint(model, x, use_reentrant=use_reentrant)
        ids.copy_(torch.tensor(written))
        y.sum().backward()
        grads.append(model.base_model.model.head.modules_to_save["a"].weight.grad.clone())
    assert grads[0].any() and torch.equal(*grads)


def test_unloading_frees_packed_factors() -> None:
    model = TwoLayers().eval()
    pool = fastlora.AdapterPool(model, target_modules=["q"])
    for name in ("a", "b"):
        pool.load(name, state(), config=CONFIG)
    for _ in range(3):
        with torch.no_grad(), adapters(pool, ["a", "b"]):
            model(torch.randn(2, 16))
    assert pool.group.packs.packed_factors_nbytes > 0
    pool.unload("a")
    assert pool.group.packs.packed_factors_nbytes == 0


def test_a_block_does_not_walk_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 64 adapters SmolLM2 has 41,560 modules: a walk over them took a third of a forward."""
    # fastlora looks for patched layers once it is imported.
    pytest.importorskip("peft", reason="finding a patched model is the walk")
    model = build()
    with fastlora.adapters(model, ["a"]):
        pass
    monkeypatch.setattr(nn.Module, "named_modules", None)
    with fastlora.adapters(model, ["a"]):
        pass


# ------------------------------------------------------------------------- where tensors are made


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize(("rows", "dtype"), [(5, "float32"), (300, "bfloat16"), (300, "float64")])
def test_a_default_device_does_not_matter(rows: int, dtype: str, use_dora: bool) -> None:
    """Indices, seeds, and tables are on the CPU whatever `torch.set_default_device` says."""
    model = build(use_dora=use_dora, lora_dropout=0.1).to(getattr(torch, dtype))
    x = torch.randn(rows, 16, dtype=getattr(torch, dtype))
    names = (["a", "b", None, "c", "b"] * rows)[:rows]
    slots = torch.tensor(["abc".index(name) if name else -1 for name in names])
    found = []
    for device in ("cpu", "meta"):
        fastlora.clear_caches(model)
        results = []
        with torch.device(device):
            for ids in (names, slots):
                for training in (True, False):
                    model.train(training)
                    with adapters(model, ids, seeds={"a": 1, "b": 2, "c": 3}):
                        y = model(x)
                    y.sum().backward()
                    results.append(y.detach())
        found.append([*results, *(p.grad for p in model.parameters() if p.grad is not None)])
        model.zero_grad()
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    with torch.device("meta"), adapters(model.train(), names):  # draws seeds
        model(x)

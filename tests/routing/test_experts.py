"""Layers that get only some rows of a mixed batch are refused by name; all others are not.

Their rows cannot be given to adapters by position: where the number of rows happened to be a
multiple of the number of ids, they got another adapter's update without an error.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import LoraConfig, adapters
from fastlora.validation import UnsupportedLayerError
from tests.support.row_checks import IDS, ROWS_SELECTED_ERROR, D, X, check_raises, ours, routed
from tests.support.tiny import tiny, with_adapters

# Which expert each of the 8 tokens goes to: 4 tokens to each of 2, of both samples.
CHOICE = torch.tensor([0, 0, 0, 1, 1, 1, 1, 0])
# What some experts add to their tokens.
TABLE = nn.Parameter(torch.randn(8, D, generator=torch.Generator().manual_seed(3)))
# Both experts get every token, in an order that the router chose.
BOTH = torch.tensor([5, 2, 7, 0, 1, 6, 3, 4])


class Mlp(nn.Module):
    """Two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Linear(D, 12), nn.Linear(12, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps ``[M, D]`` to ``[M, D]``."""
        return self.w2(self.w1(x).relu())


class InList(nn.Module):
    """Experts in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([Mlp(), Mlp()])

    def all(self) -> list[nn.Module]:
        """Returns the experts."""
        return list(self.experts)


class InDict(nn.Module):
    """Experts in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"x": Mlp(), "y": Mlp()})

    def all(self) -> list[nn.Module]:
        """Returns the experts."""
        return list(self.parts.values())


class AsAttributes(nn.Module):
    """Experts under names that do not say so."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = Mlp(), Mlp()

    def all(self) -> list[nn.Module]:
        """Returns the experts."""
        return [self.left, self.right]


class AsLinears(nn.Module):
    """Experts of one linear each."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Linear(D, D), nn.Linear(D, D)

    def all(self) -> list[nn.Module]:
        """Returns the experts."""
        return [self.w1, self.w2]


HOLDERS = {
    "list": (InList, "0.experts.0.w1"),
    "dict": (InDict, "0.parts.x.w1"),
    "attributes": (AsAttributes, "0.left.w1"),
    "linears": (AsLinears, "0.w1"),
}

Experts = list[nn.Module]


def by_index(experts: Experts, x: torch.Tensor) -> torch.Tensor:
    """Each expert gets tokens by their numbers, and adds to them."""
    out = torch.zeros_like(x)
    for number, expert in enumerate(experts):
        index = (number == CHOICE).nonzero().flatten()
        out.index_add_(0, index, expert(x[index]))
    return out


def by_mask(experts: Experts, x: torch.Tensor) -> torch.Tensor:
    """Each expert gets tokens by a mask."""
    out = torch.empty_like(x)
    for number, expert in enumerate(experts):
        out[number == CHOICE] = expert(x[number == CHOICE])
    return out


def by_new_dimension(experts: Experts, x: torch.Tensor) -> torch.Tensor:
    """As transformers 4 did in Mixtral."""
    out = torch.zeros_like(x)
    for number, expert in enumerate(experts):
        index = torch.where(number == CHOICE)[0]
        out.index_add_(0, index, expert(x[None, index].reshape(-1, D)))
    return out


def by_index_select(experts: Experts, x: torch.Tensor) -> torch.Tensor:
    """With noise of the rows' shape, and all rows in another order: both of the top 2."""
    parts = []
    for expert in experts:
        own = x.index_select(0, BOTH)
        parts.append(expert(own + torch.zeros(own.shape))[BOTH.argsort()])
    return parts[0] + parts[1]


def by_gather(experts: Experts, x: torch.Tensor) -> torch.Tensor:
    """Each expert chooses tokens; one that two choose gets both."""
    out = torch.zeros_like(x)
    for expert, index in zip(experts, (BOTH[:4], BOTH[4:]), strict=True):
        index = index.unsqueeze(1).expand(-1, D)
        out.scatter_add_(0, index, expert(x.gather(0, index)))
    return out


def by_sorting(experts: Experts, x: torch.Tensor) -> torch.Tensor:
    """Tokens are sorted by expert, and each expert gets a part of them."""
    order = CHOICE.argsort()
    parts = x[order].split(4)
    made = torch.cat([expert(part) for expert, part in zip(experts, parts, strict=True)])
    return made[order.argsort()]


def by_buffer(experts: Experts, x: torch.Tensor) -> torch.Tensor:
    """Tokens are written into the places of their experts."""
    places = CHOICE.argsort().argsort()
    buffer = torch.zeros_like(x).index_copy_(0, places, x)
    parts = zip(experts, buffer.view(2, 4, D), strict=True)
    return torch.stack([expert(part) for expert, part in parts]).view(8, D)[places]


def by_product(experts: Experts, x: torch.Tensor) -> torch.Tensor:
    """Tokens are dispatched by a product, as in GShard."""
    places = CHOICE.argsort().argsort()
    dispatch = nn.functional.one_hot(places, 8).to(x.dtype).view(8, 2, 4)
    parts = torch.einsum("tec,td->ecd", dispatch, x)
    made = torch.stack([expert(part) for expert, part in zip(experts, parts, strict=True)])
    return torch.einsum("tec,ecd->td", dispatch, made)


def by_placed_ones(experts: Experts, x: torch.Tensor) -> torch.Tensor:
    """By a product with ones that were written into zeros."""
    places = CHOICE.argsort().argsort()
    dispatch = torch.zeros(8, 8).scatter_(1, places[:, None], 1.0)
    return _dispatched(experts, x, dispatch)


def by_indexed_ones(experts: Experts, x: torch.Tensor) -> torch.Tensor:
    """By a product with ones at the places of tokens."""
    dispatch = torch.zeros(8, 8)
    dispatch[torch.arange(8), CHOICE.argsort().argsort()] = 1.0
    return _dispatched(experts, x, dispatch)


def by_comparison(experts: Experts, x: torch.Tensor) -> torch.Tensor:
    """By a product with ones where a place is a token's own."""
    own = CHOICE.argsort().argsort()[:, None] == torch.arange(8)
    return _dispatched(experts, x, torch.where(own, 1.0, 0.0))


def by_weights(experts: Experts, x: torch.Tensor) -> torch.Tensor:
    """By a product with the router's weights, zero in the places of others."""
    weights = nn.functional.one_hot(CHOICE.argsort().argsort(), 8).float()
    return _dispatched(experts, x, x[:, :1].sigmoid() * weights)


def _dispatched(experts: Experts, x: torch.Tensor, dispatch: torch.Tensor) -> torch.Tensor:
    parts = (dispatch.t() @ x).view(2, 4, D)
    made = torch.cat([expert(part) for expert, part in zip(experts, parts, strict=True)])
    return dispatch @ made


def by_sorted_weights(experts: Experts, x: torch.Tensor) -> torch.Tensor:
    """Tokens are multiplied by their sorted weights before their experts."""
    weights, order = x[:, 0].sort()
    parts = (x[order] * weights[:, None].expand(8, D)).split(4)
    made = torch.cat([expert(part) for expert, part in zip(experts, parts, strict=True)])
    return made[order.argsort()]


def by_capacity(experts: Experts, x: torch.Tensor) -> torch.Tensor:
    """Tokens that fit are written into a buffer of each expert, by expert and place."""
    places = (nn.functional.one_hot(CHOICE, 2).cumsum(0) - 1).gather(1, CHOICE[:, None])[:, 0]
    kept = places < 4
    buffer = x.new_zeros(2, 4, D)
    buffer[CHOICE[kept], places[kept]] = x[kept]
    made = torch.stack([expert(part) for expert, part in zip(experts, buffer, strict=True)])
    out = x.clone()
    out[kept] = made[CHOICE[kept], places[kept]]
    return out


def by_sorted_capacity(experts: Experts, x: torch.Tensor) -> torch.Tensor:
    """Tokens are sorted by expert, and padded in a buffer of each."""
    order = CHOICE.argsort(stable=True)
    counts = CHOICE.bincount(minlength=2)
    chosen = CHOICE[order]
    places = torch.arange(8) - (counts.cumsum(0) - counts)[chosen]
    buffer = torch.zeros(2, 6, D)
    buffer[chosen, places] = x[order]
    made = torch.stack([expert(part) for expert, part in zip(experts, buffer, strict=True)])
    out = torch.zeros_like(x)
    out[order] = made[chosen, places]
    return out


def by_counted_sum(experts: Experts, x: torch.Tensor) -> torch.Tensor:
    """Sorted tokens are added to zeros, in the order of the numbers of their places."""
    order = CHOICE.argsort()
    return _sorted(experts, order, torch.zeros_like(x).index_add(0, torch.arange(8), x[order]))


def by_counted_places(experts: Experts, x: torch.Tensor) -> torch.Tensor:
    """Sorted tokens are written into a new tensor."""
    order = CHOICE.argsort()
    rows = torch.empty_like(x)
    rows[torch.arange(8)] = x[order]
    return _sorted(experts, order, rows)


def by_position_table(experts: Experts, x: torch.Tensor) -> torch.Tensor:
    """To each expert's tokens a table's entries for their positions are added."""
    out = torch.zeros_like(x)
    for number, expert in enumerate(experts):
        index = (number == CHOICE).nonzero().flatten()
        out[index] = expert(x[index] + nn.functional.embedding(torch.arange(8)[index], TABLE))
    return out


def by_expert_table(experts: Experts, x: torch.Tensor) -> torch.Tensor:
    """To sorted tokens a table's entry for their expert is added."""
    order = CHOICE.argsort()
    return _sorted(experts, order, x[order] + nn.functional.embedding(CHOICE[order], TABLE))


def by_identity(experts: Experts, x: torch.Tensor) -> torch.Tensor:
    """By a product with rows of the identity matrix."""
    return _dispatched(experts, x, torch.eye(8)[CHOICE.argsort().argsort()])


def by_added_gate(experts: Experts, x: torch.Tensor) -> torch.Tensor:
    """Sorted tokens are added to a tensor in the order of the batch."""
    order = CHOICE.argsort()
    return _sorted(experts, order, x[order] + x.sigmoid()[:8])


def _sorted(experts: Experts, order: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    parts = zip(experts, rows.split(4), strict=True)
    return torch.cat([expert(part) for expert, part in parts])[order.argsort()]


def by_counting(experts: Experts, x: torch.Tensor) -> torch.Tensor:
    """Each expert gets a fixed part of the tokens."""
    parts = [expert(x[torch.arange(4 * n, 4 * n + 4)]) for n, expert in enumerate(experts)]
    return torch.cat(parts)


WAYS = [
    *(by_index, by_mask, by_new_dimension, by_index_select, by_gather, by_sorting, by_buffer),
    *(by_product, by_placed_ones, by_indexed_ones, by_comparison, by_weights),
    *(by_sorted_weights, by_counting, by_capacity, by_sorted_capacity, by_counted_sum),
    *(by_counted_places, by_position_table, by_expert_table, by_identity, by_added_gate),
]


def moe(holder: type, way: Callable[[Experts, torch.Tensor], torch.Tensor]) -> nn.Module:
    """A model of a mixture over experts in one place, and a head."""

    class Moe(holder):  # type: ignore[misc, valid-type]  # made for a test
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            flat = x.reshape(-1, D)
            return way(self.all(), flat).view_as(x)

    torch.manual_seed(0)
    return nn.Sequential(Moe(), nn.Linear(D, 3))


def patched(base: nn.Module) -> Any:
    """PEFT's model with adapters a and b, patched."""
    peft = pytest.importorskip("peft", reason="patches PEFT's models")
    made = peft.LoraConfig(r=2, target_modules=["w1", "w2"], init_lora_weights=False)
    model = with_adapters(base, dict.fromkeys(IDS, made), peft).eval()
    fastlora.patch(model)
    return model


# ------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize("holder", HOLDERS)
def test_experts_raise_wherever_they_are(holder: str) -> None:
    """2 samples of 4 tokens, 4 rows for each of 2 experts: rows went to the wrong adapter."""
    made, name = HOLDERS[holder]
    model = ours(moe(made, by_index))
    check_raises(model, name)
    model.train()
    with (
        pytest.raises(UnsupportedLayerError, match=ROWS_SELECTED_ERROR.format(name)),
        adapters(model, IDS),
    ):
        model(X)
    model.set_adapter("a")
    model(X)  # one adapter at a time


@pytest.mark.parametrize("way", WAYS)
def test_experts_raise_however_they_get_their_rows(way: Any) -> None:
    check_raises(ours(moe(AsAttributes, way)), "0.left.w1")


def test_experts_of_a_pool_and_of_a_patched_model_raise() -> None:
    base = moe(AsAttributes, by_index).eval()
    with fastlora.AdapterPool(base, target_modules=["w1", "w2"]) as pool:
        for name in IDS:
            state = {}
            for layer in ("left.w1", "right.w1"):
                prefix = f"base_model.model.0.{layer}."
                state[prefix + "lora_A.weight"] = torch.randn(2, D)
                state[prefix + "lora_B.weight"] = torch.randn(12, 2)
            pool.load(name, state, config={"r": 2, "target_modules": ["w1"]})
        check_raises(base, "0.left.w1", target=pool)
        assert pool.stats().leases == 0
    model = patched(moe(InList, by_index))
    check_raises(model, "0.experts.0.w1")
    with pytest.raises(UnsupportedLayerError, match="gets rows that the model selected"):
        model(X, adapter_names=IDS)


def test_per_expert_linears_of_a_transformers_model_raise() -> None:
    pytest.importorskip("transformers")
    ids = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 1}
    sizes = {"num_experts": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
    model = ours(tiny("SwitchTransformersForConditionalGeneration", **ids, **sizes), "all-linear")
    tokens = torch.randint(3, 31, (2, 4))
    match = r"experts\.expert_\d\.wi' gets rows that the model selected"
    with pytest.raises(UnsupportedLayerError, match=match), adapters(model, IDS):
        model(input_ids=tokens, decoder_input_ids=tokens)


def test_an_expert_behind_a_checkpoint_raises() -> None:
    base = moe(AsAttributes, by_index)
    inner = base[0].forward
    base[0].forward = lambda x: checkpoint(inner, x, use_reentrant=False)
    model = ours(base)
    with pytest.raises(UnsupportedLayerError, match="'0.left.w1'"), adapters(model, IDS):
        model(X.clone().requires_grad_())


def test_experts_that_run_late_raise() -> None:
    """They may be idle in the first blocks, or run in training alone."""
    sparse = [False]

    def late(experts: Experts, x: torch.Tensor) -> torch.Tensor:
        return by_index(experts, x) if sparse[0] else x

    model = ours(nn.Sequential(Mlp(), moe(AsAttributes, late)))
    for _ in range(3):
        with adapters(model, IDS):
            model(X)
    sparse[0] = True
    check_raises(model, "1.0.left.w1")

    def trained(experts: Experts, x: torch.Tensor) -> torch.Tensor:
        return by_index(experts, x) if model.training else experts[0](x) + experts[1](x)

    model = ours(moe(AsAttributes, trained))
    routed(model)
    model.train()
    with pytest.raises(UnsupportedLayerError, match="'0.left.w1'"), adapters(model, IDS):
        model(X)


def test_an_expert_that_gets_all_rows_does_not_speak_for_the_others() -> None:
    """A layer that was never followed and looks like an expert is refused, however late it runs."""
    sparse = [False]

    def second(experts: Experts, x: torch.Tensor) -> torch.Tensor:
        out = experts[0](x)
        index = CHOICE.nonzero().flatten()
        return out.index_add(0, index, experts[1](x[index])) if sparse[0] else out

    model = ours(moe(InList, second))
    for _ in range(9):
        with adapters(model, IDS):
            model(X)
    sparse[0] = True
    with pytest.raises(UnsupportedLayerError, match="'0.experts.1.w1'"), adapters(model, IDS):
        model(X)


def test_a_late_layer_that_looks_like_an_expert_is_checked_in_the_next_batch() -> None:
    """It raises in its first batch. If it gets all rows, later batches run."""
    used = [1]
    model = ours(moe(InList, lambda experts, x: sum(e(x) for e in list(experts)[: used[0]])))
    for _ in range(9):
        with adapters(model, IDS):
            model(X)
    used[0] = 2
    with pytest.raises(UnsupportedLayerError, match="'0.experts.1.w1'"), adapters(model, IDS):
        model(X)
    for _ in range(2):
        with adapters(model, IDS):
            mixed = model(X)
    for row, name in enumerate(IDS):
        with adapters(model, [name]):
            torch.testing.assert_close(mixed[row : row + 1], model(X[row : row + 1]))


def test_a_layer_without_alike_siblings_raises() -> None:
    """As the head of a masked language model, where it gets the masked tokens alone."""

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1 = nn.Linear(D, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.w1(x.reshape(-1, D)[CHOICE == 0])

    check_raises(ours(Head()), "w1")


def test_experts_run_in_a_batch_of_one_id() -> None:
    """All of its rows have one adapter."""
    model = ours(moe(InList, by_index))
    check_raises(model, "0.experts.0.w1")
    for name in IDS:
        model.set_adapter(name)
        with adapters(model, [name]):
            found = model(X.view(1, 8, D))
        torch.testing.assert_close(found, model(X.view(1, 8, D)))


def test_experts_raise_where_their_rows_happen_to_be_in_order() -> None:
    """Each expert gets 2 tokens of each sample, in this batch."""

    def lucky(experts: Experts, x: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        for number, expert in enumerate(experts):
            index = (torch.arange(8) % 2 == (x[:, 0] * 0 + number)).nonzero().flatten()
            out[index] = expert(x[index])
        return out

    check_raises(ours(moe(InList, lucky)), "0.experts.0.w1")


class SequenceFirst(nn.Module):
    """Its linear gets ``[T, B, K]``."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Linear(D, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps ``[B, T, K]`` to ``[B, T, K]``."""
        return self.w1(x.transpose(0, 1)).transpose(0, 1)


@pytest.mark.parametrize("saved", [False, True])
def test_samples_that_are_not_along_the_first_dimension_raise(saved: bool) -> None:
    """Rows went to adapters in order: those of the first half of the tokens to the first one."""
    base = nn.ModuleDict({"inner": SequenceFirst(), "w2": nn.Linear(D, D)})
    base.forward = base["inner"].forward
    torch.manual_seed(0)
    made = LoraConfig(r=2, target_modules=["w2"], modules_to_save=["w1"])
    model = with_adapters(base, dict.fromkeys(IDS, made)) if saved else ours(base)
    match = r"layer 'inner.w1' got an input of shape \[5, 2, 8\] in a batch with 2 adapter ids"
    with pytest.raises(ValueError, match=match), adapters(model, IDS):
        model(torch.randn(2, 5, D))


def test_experts_of_a_copy_of_a_model_raise() -> None:
    import copy

    model = ours(moe(AsAttributes, by_index))
    check_raises(copy.deepcopy(model), "0.left.w1")
    check_raises(model, "0.left.w1")


def test_two_threads_raise() -> None:
    """Rows are followed in each thread by itself."""
    model, seen = ours(moe(AsAttributes, by_index)), []

    def run() -> None:
        check_raises(model, "0.left.w1")
        seen.append(True)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [True, True]


def test_blocks_that_end_out_of_order_show_nothing() -> None:
    """What follows the rows of one block ends with the other one; a later block follows anew."""
    model = ours(moe(AsAttributes, by_index))
    first, second = adapters(model, IDS), adapters(model, IDS)
    first.__enter__()
    second.__enter__()
    with pytest.raises(RuntimeError, match="in the reverse of the order"):
        first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    check_raises(model, "0.left.w1")


# -------------------------------------------------------------------------------------- allowed


def soft(experts: Experts, x: torch.Tensor) -> torch.Tensor:
    """Every expert sees all rows, and their sum is weighted."""
    weights = x[:, :2].softmax(-1)
    return sum(expert(x) * weights[:, n, None] for n, expert in enumerate(experts))


@pytest.mark.parametrize("holder", HOLDERS)
def test_experts_that_see_all_rows_share_a_batch(holder: str) -> None:
    routed(ours(moe(HOLDERS[holder][0], soft)))


def test_layers_behind_experts_share_a_batch() -> None:
    """Rows that are put back are in order again; an adapter may be on what comes behind."""

    class Behind(nn.Module):
        def __init__(self, way: Any) -> None:
            super().__init__()
            self.moe, self.w1, self.w2 = moe(InList, way)[0], nn.Linear(D, D), nn.Linear(D, D)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.w2(self.w1(self.moe(x)))

    ways = (by_index, by_mask, by_index_select, by_gather, by_sorting, by_capacity)
    for way in (*ways, by_sorted_capacity, by_counted_places, by_position_table):
        model = ours(Behind(way), r"w1|w2")
        for _ in range(2):
            with torch.no_grad(), adapters(model, IDS):
                mixed = model(X)
            with torch.no_grad(), adapters(model, ["b", "b"]):
                torch.testing.assert_close(model(X)[1], mixed[1])


def test_pooled_rows_are_one_for_each_sample() -> None:
    """CLIP takes a token of each sample, by `torch.arange` and a number, before a projection."""

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1, self.w2 = nn.Linear(D, D), nn.Linear(D, D)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            at = x[..., 0].argmax(-1)
            return self.w2(self.w1(x)[torch.arange(x.shape[0]), at])

    routed(ours(Pooled()))


def test_slots_of_tokens_are_followed_too() -> None:
    model = ours(moe(AsAttributes, soft))
    slots = torch.tensor([0, 1, -1, 0, 1, 1, 0, -1])
    with torch.no_grad(), adapters(model, slots):
        mixed = model(X).view(8, -1)
    for slot, name in enumerate(IDS):
        model.set_adapter(name)
        torch.testing.assert_close(mixed[slots == slot], model(X).view(8, -1)[slots == slot])
    model = ours(moe(AsAttributes, by_index))
    with pytest.raises(UnsupportedLayerError), adapters(model, slots):
        model(X)


_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
_TOKENS = torch.randint(3, 31, (4, 5), generator=torch.Generator().manual_seed(2))
_DECODED = {"input_ids": _TOKENS, "decoder_input_ids": _TOKENS[:, :3]}
ARCHITECTURES: dict[str, tuple[dict[str, Any], dict[str, torch.Tensor]]] = {
    "BertForSequenceClassification": ({"num_labels": 16}, {"input_ids": _TOKENS}),
    "T5ForConditionalGeneration": (_IDS, _DECODED),
    "WhisperForConditionalGeneration": (
        {**_IDS, "max_source_positions": 6, "max_target_positions": 8, "num_mel_bins": 4},
        {"input_features": torch.randn(4, 4, 12), "decoder_input_ids": _TOKENS[:, :3]},
    ),
    "CLIPModel": (
        {
            "text_config": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
            | {"num_attention_heads": 2, "vocab_size": 31, "eos_token_id": 2},
            "vision_config": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
            | {"num_attention_heads": 2, "image_size": 8, "patch_size": 4},
            "projection_dim": 16,
        },
        {"input_ids": _TOKENS, "pixel_values": torch.randn(4, 3, 8, 8)},
    ),
    "Qwen3MoeForCausalLM": ({**_EXPERTS, "moe_intermediate_size": 8}, {"input_ids": _TOKENS}),
    "MixtralForCausalLM": ({**_EXPERTS, "num_hidden_layers": 2}, {"input_ids": _TOKENS}),
    "Qwen2MoeForCausalLM": (
        {**_EXPERTS, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8},
        {"input_ids": _TOKENS},
    ),
}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_models_of_transformers_share_a_batch(kind: str) -> None:
    """Heads, poolers, cross-attention, projections and shared experts are not experts."""
    pytest.importorskip("transformers")
    changes, batch = ARCHITECTURES[kind]
    model, names = ours(tiny(kind, **changes), "all-linear"), ["a", "__base__", "b", "a"]

    def values(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        made = model(**batch)
        return made.logits if hasattr(made, "logits") else torch.cat(made[2:4], -1)

    with torch.no_grad():
        found = []
        for _ in range(2):
            with adapters(model, names):
                found.append(values(batch))
        for row, name in enumerate(names):
            with adapters(model, [name]):
                alone = values({key: value[row : row + 1] for key, value in batch.items()})
            for each in found:
                torch.testing.assert_close(each[row], alone[0], rtol=1e-4, atol=1e-5)
    checks = model.base_model.group.row_checks
    # Later blocks cost nothing.
    assert checks is not None and checks.row_checker_unless_all_layers_were_checked(2) is None


def test_a_beam_search_shares_a_batch() -> None:
    pytest.importorskip("transformers")
    model = ours(tiny("T5ForConditionalGeneration", **_IDS), "all-linear")
    more = {"max_new_tokens": 3, "num_beams": 2, "do_sample": False}
    names = ["a", None, "b", "a"]
    with adapters(model, names):
        first = model.generate(input_ids=_TOKENS, **more)
    with adapters(model, names):
        assert torch.equal(model.generate(input_ids=_TOKENS, **more), first)


def test_the_users_own_choice_of_samples_is_a_batch() -> None:
    """What a model is called with is in the order of the ids, whoever chose it."""
    model, data = ours(nn.Sequential(Mlp(), Mlp())), torch.randn(6, D)
    with torch.no_grad(), adapters(model, IDS):
        model(data[torch.tensor([4, 1])])


# ------------------------------------------------------------------------------------- compiled


class Layers(nn.Module):
    """Two alike layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Mlp(), Mlp()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps ``[..., D]`` to ``[..., D]``."""
        for layer in self.layers:
            x = x + layer(x)
        return x


def test_following_compiles_nothing_anew() -> None:
    """The first block follows rows, later ones do not, and one graph serves all of them."""
    model, graphs = ours(Layers()), []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        for _ in range(2):
            with adapters(model, IDS):
                found = compiled(X)
        with adapters(model, IDS):
            torch.testing.assert_close(model(X), found)
        with adapters(model, IDS):
            torch.testing.assert_close(compiled(X), found)
    assert len(graphs) == 1


def test_compiled_experts_raise_until_a_block_has_shown_that_they_see_all_rows() -> None:
    torch._dynamo.reset()
    model = ours(moe(InList, soft))
    compiled = torch.compile(model, backend="eager")
    with (
        torch.no_grad(),
        pytest.raises(UnsupportedLayerError, match="'0.experts.0.w1' looks like an expert"),
        adapters(model, IDS),
    ):
        compiled(X)
    with torch.no_grad(), adapters(model, IDS):
        expected = model(X)
    with torch.no_grad(), adapters(model, IDS):
        torch.testing.assert_close(compiled(X), expected)


def test_a_router_beside_alike_modules_makes_them_experts() -> None:
    """So compiled code rejects them whatever their names are."""

    class Routed(AsLinears):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(D, 2, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            weights = self.gate(x).softmax(-1)
            return self.w1(x) * weights[..., :1] + self.w2(x) * weights[..., 1:]

    torch._dynamo.reset()
    model = ours(nn.Sequential(Routed(), nn.Linear(D, 3)))
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(UnsupportedLayerError, match="'0.w1' looks like"), adapters(model, IDS):
        compiled(X)


def test_compiled_code_alone_ends_the_following() -> None:
    torch._dynamo.reset()
    model = ours(Layers())
    compiled = torch.compile(model, backend="eager")
    for _ in range(9):
        with torch.no_grad(), adapters(model, IDS):
            compiled(X)
    followed = model.base_model.group.row_checks.row_checker_unless_all_layers_were_checked(2)
    assert followed is not None and followed.order is None


# --------------------------------------------------------------------------------- idle layers


def test_a_part_of_the_model_that_is_idle_ends_the_following() -> None:
    """Blocks cost nothing more then, and the part is followed once it has run."""

    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.text, self.image, self.uses_image = Layers(), Layers(), False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.image if self.uses_image else self.text)(x)

    base = Towers()
    model = ours(base)
    for _ in range(12):
        with torch.no_grad(), adapters(model, IDS):
            model(X)
    checks = model.base_model.group.row_checks
    followed = checks.row_checker_unless_all_layers_were_checked(2)
    assert followed is not None and followed.order is None
    base.uses_image = True
    first = pytest.warns(UserWarning, match="'image.layers.0.w1' runs in a mixed batch for the")
    for warned in (first, contextlib.nullcontext()):
        with warned, torch.no_grad(), adapters(model, IDS):
            model(X)
    assert checks.row_checker_unless_all_layers_were_checked(2) is None

"""Rows that a model selects by an index or a mask: accepted in the order of the batch alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fastlora import adapters
from fastlora.validation import UnsupportedLayerError
from tests.support.row_checks import IDS, ROWS_SELECTED_ERROR, D, X, check_raises, ours, routed
from tests.support.tiny import tiny

Pick = Callable[[torch.Tensor], torch.Tensor]


class Head(nn.Module):
    """A linear, and a head over rows that are picked from its output ``[B, 4, D]``."""

    def __init__(self, pick: Pick) -> None:
        super().__init__()
        self.w1, self.w2, self.pick = nn.Linear(D, D), nn.Linear(D, 3), pick

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps ``[B, 4, D]`` to ``[B, ...]``."""
        return self.w2(self.pick(self.w1(x))).view(x.shape[0], -1)


def last(h: torch.Tensor) -> torch.Tensor:
    """Returns the number of each sample's last token, which data may choose."""
    return (h[..., 0] * 0 + torch.arange(4)).argmax(-1)


def is_last(h: torch.Tensor) -> torch.Tensor:
    """Returns a mask with one token of each sample."""
    return torch.arange(4) == last(h)[:, None]


IN_ORDER: dict[str, Pick] = {
    "flat numbers": lambda h: h.reshape(-1, D)[torch.arange(h.shape[0]) * 4 + last(h)],
    "flat select": lambda h: h.reshape(-1, D).index_select(0, torch.arange(len(h)) * 4 + last(h)),
    "lists": lambda h: h[list(range(h.shape[0])), last(h).tolist()],
    "mask": lambda h: h[is_last(h)],
    "mask of a view": lambda h: h[is_last(h)].view(h.shape[0], -1, D)[:, -1],
    "mask of all": lambda h: h[h[..., 0].isfinite()],
    "numbers of all": lambda h: h.reshape(-1, D)[h[..., 0].isfinite().flatten().nonzero()[:, 0]],
    "numbers of samples": lambda h: h[torch.ones(h.shape[0]).nonzero()[:, 0], -1],
    "within samples": lambda h: h.reshape(-1, D)[
        (torch.tensor([2, 0, 3, 1]) + 4 * torch.arange(h.shape[0])[:, None]).flatten()
    ],
    "new dimension": lambda h: h.reshape(-1, D)[None, is_last(h).flatten().nonzero()[:, 0]],
    "beside a masked scatter": lambda h: (
        h + torch.zeros_like(h).masked_scatter(is_last(h)[..., None], h).mul(0)
    ),
    "counted up": lambda h: h.reshape(-1, D)[torch.arange(0, h.shape[0] * 4, 2)],
    "sorted and back": lambda h: _and_back(h.reshape(-1, D), h[..., 1].flatten().argsort()),
    "placed back": lambda h: torch.zeros(h.shape[0] * 4, D).index_copy(
        0, h[..., 1].flatten().argsort(), h.reshape(-1, D)[h[..., 1].flatten().argsort()]
    ),
}


def _and_back(rows: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    return rows[order].tanh()[order.argsort()]


OUT_OF_ORDER: dict[str, Pick] = {
    "samples exchanged": lambda h: h[torch.tensor([1, 0])],
    "samples exchanged by a list": lambda h: h[[1, 0]],
    "samples repeated": lambda h: h[torch.tensor([0, 1, 0, 1])],
    "samples selected": lambda h: h.index_select(0, torch.tensor([1, 0])),
    "more of one": lambda h: h.reshape(-1, D)[torch.tensor([0, 1, 2, 3, 4, 5])],
    "as many, mixed": lambda h: h.reshape(-1, D)[torch.tensor([0, 4, 1, 5])],
    "mask, 3 and 1": lambda h: h[torch.tensor([[True, True, True, False], [True] + [False] * 3])],
    "ranked": lambda h: h.reshape(-1, D)[torch.tensor([1, 0, 3, 2, 5, 4, 7, 6]).argsort() // 2],
    "placed in another order": lambda h: torch.zeros(8, D).index_copy(
        0, torch.tensor([4, 1, 2, 3, 0, 5, 6, 7]), h.reshape(-1, D)
    ),
    "two samples at one place": lambda h: torch.zeros(2, D).index_add(
        0, torch.tensor([0, 0, 0, 1, 1, 1, 1, 0]), h.reshape(-1, D)
    ),
    "counted down": lambda h: h[torch.arange(1, -1, -1)],
    "placed while counting down": lambda h: torch.zeros(8, D).index_copy(
        0, torch.arange(7, -1, -1), h.reshape(-1, D)
    ),
    "joined": lambda h: torch.cat([h[torch.tensor([1])], h[torch.tensor([0])]]),
}


@pytest.mark.parametrize("pick", IN_ORDER)
def test_rows_in_the_order_of_the_batch_share_it(pick: str) -> None:
    routed(ours(Head(IN_ORDER[pick])))


@pytest.mark.parametrize("pick", OUT_OF_ORDER)
def test_rows_out_of_order_raise(pick: str) -> None:
    check_raises(ours(Head(OUT_OF_ORDER[pick])), "w2")


def test_a_mask_that_fits_by_chance_is_followed_again() -> None:
    """One token of each sample in the first batch, two tokens of one sample in the second."""
    mask = torch.tensor([[True, False, False, False], [False, True, False, False]])
    model = ours(Head(lambda h: h[mask.clone() & h[..., 0].isfinite()]))
    with torch.no_grad(), adapters(model, IDS):
        model(X)
    mask.copy_(torch.tensor([[True, True, False, False], [False] * 4]))
    check_raises(model, "w2")


def _forward() -> torch.Tensor:
    return torch.zeros(2).long() + torch.arange(2)


def _backward() -> torch.Tensor:
    return 1 - torch.arange(2)


def _reversed(h: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Returns the rows that a mask selects, the last one first."""
    return h.reshape(-1, D)[mask.flatten().nonzero()[:, 0].flip(0)]


# Data choose rows by a mask, and constants put them in an order.
CHOSEN_THEN_PUT: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "picked": lambda h, mask: h[mask][_forward()],
    "picked backward": lambda h, mask: _reversed(h, mask)[_backward()],
    "computed and picked backward": lambda h, mask: (_reversed(h, mask) * 2 + 1).tanh()[
        _backward()
    ],
    "picked twice": lambda h, mask: h[mask][_backward()][_backward()],
    "placed": lambda h, mask: torch.zeros(2, D).index_copy(0, _forward(), h[mask]),
    "placed backward": lambda h, mask: torch.zeros(2, D).index_copy(
        0, _backward(), _reversed(h, mask)
    ),
}


@pytest.mark.parametrize("case", CHOSEN_THEN_PUT)
def test_rows_that_data_chose_are_followed_again_after_constants_placed_them(case: str) -> None:
    """They fit the first batch by chance, and belong to one sample in the second."""
    mask = torch.tensor([[True, False, False, False], [False, True, False, False]])
    pick = CHOSEN_THEN_PUT[case]
    model = ours(Head(lambda h: pick(h, mask.clone() & h[..., 0].isfinite())))
    with torch.no_grad(), adapters(model, IDS):
        model(X)
    mask.copy_(torch.tensor([[False] * 4, [True, True, False, False]]))
    check_raises(model, "w2")


def test_rows_of_which_data_placed_some_are_followed_again() -> None:
    """Constants place the others last."""
    places = torch.tensor([0, 2])

    def pick(h: torch.Tensor) -> torch.Tensor:
        by_data = places + (h[:2, 0, 0] * 0).long()
        made = torch.zeros(4, D).index_copy(0, by_data, h[:, 0])
        return made.index_copy(0, 1 + 2 * torch.arange(2), h[:, 1])

    model = ours(Head(pick))
    with torch.no_grad(), adapters(model, IDS):
        model(X)
    places.copy_(torch.tensor([2, 0]))
    check_raises(model, "w2")


@pytest.mark.parametrize("steps", ["picked", "placed", "placed in two steps"])
def test_rows_that_constants_alone_moved_are_followed_once(steps: str) -> None:
    """Two permutations, or the writes of two halves, restore the order in every batch."""
    picks: dict[str, Pick] = {
        "picked": lambda h: (h[:, 0][_backward()] * 2).tanh()[_backward()],
        "placed": lambda h: torch.zeros(2, D).index_copy(0, _backward(), h[_backward(), 0] * 2),
        "placed in two steps": lambda h: (
            torch.zeros(4, D)
            .index_copy(0, 2 * torch.arange(2), h[:, 0])
            .index_copy(0, 1 + 2 * torch.arange(2), h[:, 1])
        ),
    }
    model = ours(Head(picks[steps]))
    with torch.no_grad(), adapters(model, IDS):
        model(X)
    assert model.base_model.group.row_checks.row_checker_unless_all_layers_were_checked(2) is None


def test_rows_that_constants_select_are_followed_once() -> None:
    """An index that data may have made is followed in 8 batches; then nothing is."""
    for pick, blocks in (("numbers of samples", 1), ("lists", 8), ("mask of all", 8)):
        model = ours(Head(IN_ORDER[pick]))
        for _ in range(blocks):
            checks = model.base_model.group.row_checks
            assert checks.row_checker_unless_all_layers_were_checked(2) is not None
            with torch.no_grad(), adapters(model, IDS):
                model(X)
        assert checks.row_checker_unless_all_layers_were_checked(2) is None


def test_a_block_that_is_abandoned_follows_nothing() -> None:
    model = ours(Head(IN_ORDER["mask"]))
    followed = model.base_model.group.row_checks.row_checker_unless_all_layers_were_checked(2)
    with followed:
        assert followed.order.has_valid_facts
        followed.stop_tracking_in_block()
        assert not followed.order.has_valid_facts


@pytest.mark.parametrize("kind", ["BartForSequenceClassification", "T5ForSequenceClassification"])
def test_classifiers_over_the_last_token_share_a_batch(kind: str) -> None:
    """They pick a mask's tokens, as many of each sample, and view them by sample."""
    pytest.importorskip("transformers")
    ids = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 1, "bos_token_id": 1}
    model = ours(tiny(kind, **ids, num_labels=3), "all-linear")
    tokens = torch.randint(3, 31, (2, 5), generator=torch.Generator().manual_seed(2))
    tokens[:, -1] = 2
    with torch.no_grad():
        with adapters(model, IDS):
            mixed = model(input_ids=tokens).logits
        for row, name in enumerate(IDS):
            model.set_adapter(name)
            alone = model(input_ids=tokens[row : row + 1]).logits[0]
            torch.testing.assert_close(mixed[row], alone, rtol=1e-4, atol=1e-5)


# -------------------------------------------------------------------------------------- tables


LONE = r"layer '{}' gets values computed from the model's parameters alone"


class Relative(nn.Module):
    """A linear over the batch, and one over a table of positions."""

    def __init__(self, table: Callable[[nn.Module, int], torch.Tensor]) -> None:
        super().__init__()
        self.w1, self.w2, self.table = nn.Linear(D, D), nn.Linear(D, D), table
        self.positions, self.norm = nn.Embedding(8, D), nn.LayerNorm(D)
        self.register_buffer("fixed", torch.randn(1, 4, D))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps ``[B, 4, D]`` to ``[B, 4, D]``."""
        return self.w1(x) + self.w2(self.table(self, x.shape[0])).mean(-2, keepdim=True)[:1]


class Queries(Relative):
    """Each sample has the same rows of the table."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps ``[B, 4, D]`` to ``[B, 4, D]``."""
        return self.w1(x) + self.w2(self.table(self, x.shape[0])).view(x.shape[0], -1, D)[:, :4]


LONE_TABLES: dict[str, Any] = {
    "parameter": lambda model, count: model.norm(model.positions.weight),
    "embedding": lambda model, count: model.positions(torch.arange(4)),
    "one sample": lambda model, count: model.positions(torch.arange(4))[None],
    "buffer": lambda model, count: model.fixed.tanh(),
}
EXPANDED_TABLES: dict[str, Any] = {
    "expanded": lambda model, count: model.norm(model.positions.weight.expand(count, -1, -1)),
    "repeated": lambda model, count: model.fixed.repeat(count, 1, 1),
    "flat": lambda model, count: model.positions.weight.repeat(count, 1),
    "by sample": lambda model, count: model.positions(torch.arange(4).expand(count, -1)),
}


@pytest.mark.parametrize("table", LONE_TABLES)
def test_a_layer_over_a_table_of_the_model_raises(table: str) -> None:
    """Half of the table had the first adapter, and half the second one."""
    check_raises(ours(Relative(LONE_TABLES[table])), "w2", why=LONE)


@pytest.mark.parametrize("table", EXPANDED_TABLES)
def test_a_table_that_is_repeated_for_each_sample_shares_a_batch(table: str) -> None:
    routed(ours(Queries(EXPANDED_TABLES[table])))


@pytest.mark.parametrize(
    ("kind", "shared", "layer"),
    [
        ("DebertaModel", False, "pos_proj"),
        ("DebertaV2Model", False, "pos_key_proj"),
        ("DebertaV2Model", True, "query_proj"),
        ("DebertaV2Model", True, "key_proj"),
    ],
)
def test_projections_of_relative_positions_raise(kind: str, shared: bool, layer: str) -> None:
    """DeBERTa calls them on a table; what gets the batch alone shares it."""
    pytest.importorskip("transformers")
    config = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 4}
    config["share_att_key"] = shared
    tokens = torch.randint(3, 31, (2, 4), generator=torch.Generator().manual_seed(2))
    model = ours(tiny(kind, **config), [layer])
    name = f"encoder.layer.0.attention.self.{layer}"
    with pytest.raises(UnsupportedLayerError, match=LONE.format(name)), adapters(model, IDS):
        model(input_ids=tokens)
    model = ours(tiny(kind, **config), ["value_proj" if "V2" in kind else "in_proj", "dense"])
    with torch.no_grad():
        with adapters(model, IDS):
            mixed = model(input_ids=tokens)[0]
        for row, adapter in enumerate(IDS):
            model.set_adapter(adapter)
            alone = model(input_ids=tokens[row : row + 1])[0][0]
            torch.testing.assert_close(mixed[row], alone, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------ sequence first


_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SEQUENCE_FIRST: dict[str, tuple[dict[str, Any], str]] = {
    "XLNetModel": ({"d_inner": 24}, "layer.0.ff.layer_1"),
    "LongformerModel": ({"attention_window": 4}, "encoder.layer.0.attention.self.query"),
    "LEDModel": ({"attention_window": 4}, "encoder.layers.0.self_attn.longformer_self_attn.query"),
    "FSMTModel": (
        {"langs": ["en", "de"], "src_vocab_size": 31, "tgt_vocab_size": 31},
        "encoder.layers.0.self_attn.k_proj",
    ),
}


@pytest.mark.parametrize("kind", SEQUENCE_FIRST)
def test_layers_that_compute_with_the_sequence_first_raise(kind: str) -> None:
    """4 tokens of 2 samples: tokens went to adapters, and no shape showed it."""
    pytest.importorskip("transformers")
    changes, name = SEQUENCE_FIRST[kind]
    model = ours(tiny(kind, **_IDS, **changes), "all-linear")
    batch = {"input_ids": torch.randint(3, 31, (2, 4))}
    if kind in ("LEDModel", "FSMTModel"):
        batch["decoder_input_ids"] = batch["input_ids"]
    for _ in range(2):
        match = (
            f"layer '{name}' is inside a .*, which puts the sequence dimension before the samples"
        )
        with pytest.raises(UnsupportedLayerError, match=match), adapters(model, IDS):
            model(**batch)
    model.set_adapter("a")
    model(**batch)


def test_the_head_behind_a_model_with_the_sequence_first_shares_a_batch() -> None:
    pytest.importorskip("transformers")
    model = ours(tiny("XLNetForSequenceClassification", **_IDS, d_inner=24), ["logits_proj"])
    batch = {"input_ids": torch.randint(3, 31, (2, 4))}
    with torch.no_grad():
        with adapters(model, IDS):
            mixed = model(**batch).logits
        for row, name in enumerate(IDS):
            model.set_adapter(name)
            torch.testing.assert_close(model(**batch).logits[row], mixed[row])


def test_the_message_says_how_rows_were_selected() -> None:
    model = ours(Head(OUT_OF_ORDER["samples exchanged"]))
    match = (
        ROWS_SELECTED_ERROR.format("w2")
        + " with a mask or an index, as for an expert in a mixture of experts"
    )
    with pytest.raises(UnsupportedLayerError, match=match), adapters(model, IDS):
        model(X)

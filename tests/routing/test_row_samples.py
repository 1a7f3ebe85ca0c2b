"""Samples of rows against samples of every element, which the same operators move."""

from __future__ import annotations

import pytest
import torch

from fastlora.routing import row_samples
from fastlora.routing.row_samples import NO_SAMPLE, SEVERAL_SAMPLES

SAMPLES = torch.tensor([3, 1, 0, 2, 1, 1])
# Of a [6, 2, 4] tensor, and the leading dimensions that are asked for.
VIEWS = {
    "whole": (lambda t: t, 2),
    "first dimension": (lambda t: t, 1),
    "rows": (lambda t: t[2:5], 1),
    "every second row": (lambda t: t[1::2], 2),
    "transposed": (lambda t: t.transpose(0, 1), 2),
    "merged": (lambda t: t.view(12, 4), 1),
    "split": (lambda t: t.view(2, 3, 2, 4)[1].transpose(0, 1), 2),
    "one row": (lambda t: t[4], 0),
    "expanded": (lambda t: t[:, :1].expand(-1, 5, -1), 2),
    "no rows": (lambda t: t[:0], 1),
}


@pytest.mark.parametrize("view", VIEWS)
def test_samples_of_a_view(view: str) -> None:
    take, lead = VIEWS[view]
    each = SAMPLES[:, None, None].expand(6, 2, 4).contiguous()
    expected = take(each)
    found = row_samples.batch_sample_of_each_row(take(torch.randn(6, 2, 4)), SAMPLES, lead)
    assert found is not None and found.shape == expected.shape[:lead]
    assert torch.equal(
        found[(...,) + (None,) * (expected.dim() - lead)].expand_as(expected), expected
    )


def test_rows_of_several_samples_have_no_sample() -> None:
    rows = torch.randn(6, 2, 4)
    assert row_samples.batch_sample_of_each_row(rows.transpose(0, 1), SAMPLES, 1) is None
    assert row_samples.batch_sample_of_each_row(rows.view(3, 16), SAMPLES, 1) is None
    assert row_samples.batch_sample_of_each_row(torch.randn(5, 2), SAMPLES, 1) is None
    behind_the_first_element = torch.randn(24).as_strided((5, 4), (4, 1), 1)
    assert row_samples.batch_sample_of_each_row(behind_the_first_element, SAMPLES, 1) is None


def test_the_order_of_the_batch() -> None:
    expected = torch.tensor([[0, 0, 0], [1, 1, 1]])
    assert torch.equal(row_samples.samples_in_batch_order((2, 3), 2), expected)
    assert torch.equal(row_samples.samples_in_batch_order((3, 2), 2), expected.view(3, 2))
    assert (
        row_samples.samples_in_batch_order((3,), 2) is None
        and row_samples.samples_in_batch_order((0,), 2) is None
    )
    assert row_samples.are_samples_in_batch_order(expected, 2)
    for samples, allow_no_sample, fits in (
        ([0, 1, 0, 1], False, False),
        ([0, 0, 1], False, False),
        ([0, NO_SAMPLE, 1, 1], False, False),
        ([0, NO_SAMPLE, 1, 1], True, True),
        ([0, NO_SAMPLE, 1, 0], True, False),
        ([0, 0, 1, SEVERAL_SAMPLES], True, False),
        ([], True, False),
    ):
        found = row_samples.are_samples_in_batch_order(
            torch.tensor(samples), 2, allow_no_sample=allow_no_sample
        )
        assert found is fits, samples


def test_rows_that_are_placed() -> None:
    blank = torch.full((4,), NO_SAMPLE)
    at = torch.tensor([2, 0])
    placed = row_samples.samples_after_write(blank, [at], torch.tensor([1, 0]), adds=False)
    assert placed is not None and placed.tolist() == [0, NO_SAMPLE, 1, NO_SAMPLE]
    over = row_samples.samples_after_write(placed, [at], torch.tensor([0, 0]), adds=False)
    assert over is not None and over.tolist() == [0, NO_SAMPLE, 0, NO_SAMPLE]
    added = row_samples.samples_after_write(placed, [at], torch.tensor([0, 0]), adds=True)
    assert added is not None and added.tolist() == [0, NO_SAMPLE, SEVERAL_SAMPLES, NO_SAMPLE]
    twice = row_samples.samples_after_write(
        blank, [torch.tensor([1, 1])], torch.tensor([1, 0]), adds=True
    )
    assert twice is not None and twice.tolist() == [-1, SEVERAL_SAMPLES, -1, -1]
    mask = torch.tensor([True, False, False, True])
    masked = row_samples.samples_after_write(blank, [mask], torch.tensor([0, 1]), adds=False)
    assert masked is not None and masked.tolist() == [0, NO_SAMPLE, NO_SAMPLE, 1]


def test_values_of_meta_tensors_are_not_read() -> None:
    index = torch.empty(2, dtype=torch.long, device="meta")
    assert row_samples.selected_samples(SAMPLES, [index]) is None
    assert row_samples.samples_after_write(SAMPLES, [index], SAMPLES[:2], adds=False) is None


def test_the_host_reads_cpu_tensors_while_a_graph_is_captured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert row_samples.values_are_readable(torch.ones(1))
    assert row_samples.values_are_readable(torch.nn.Parameter(torch.ones(1)))


def test_what_is_no_sample_is_told_from_each_sample() -> None:
    assert max(NO_SAMPLE, SEVERAL_SAMPLES) < 0 and NO_SAMPLE != SEVERAL_SAMPLES

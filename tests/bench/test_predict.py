"""The predictions: their inputs are counted right, and they never look like measurements."""

from __future__ import annotations

import csv
import importlib.util
import itertools
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

pytest.importorskip("triton", reason="triton is not installed")

from fastlora.bench import byte_forms, counted, launch_forms, predict  # noqa: E402
from fastlora.bench.ceilings import CEILINGS  # noqa: E402
from fastlora.bench.counted import ADDMM, BARE, OURS, PEFT, Case, others, ours  # noqa: E402
from fastlora.bench.shapes import DECODERS, LLAMA, QWEN  # noqa: E402
from fastlora.kernels import configs  # noqa: E402
from fastlora.kernels.chips import Chip, ConfigRow  # noqa: E402
from fastlora.kernels.config_tables import config_of_row, rows_of  # noqa: E402

H100 = CEILINGS["sm_90"]
TINY = dict.fromkeys(DECODERS[LLAMA], (32, 32))
needs_peft = pytest.mark.skipif(not importlib.util.find_spec("peft"), reason="needs PEFT")


@pytest.mark.parametrize(
    ("case", "floor", "bare"),
    [
        (Case("decode", 1), 146, 159),
        (Case("decode", 16), 147, 160),
        (Case("decode", 16, 4), 150, 160),
        (Case("decode", 64), 150, 163),
        (Case("decode", 64, 64), 205, 163),
        (Case("prefill", 2048), 1350, 1276),
        (Case("training", 8192), 10713, 10210),
    ],
)
def test_floor_and_bare_layer_are_near_an_estimate_by_hand(
    case: Case, floor: float, bare: float
) -> None:
    """3.0 TB/s, 700 TFLOP/s and 2 us a kernel, for Llama-3.1-8B and rank 16."""
    linears = DECODERS[LLAMA]
    found = sum(time.us for _, time in predict.predicted(BARE, linears, case, 16, "sm_90"))
    assert predict.floor_of(linears, case, 16, H100) == pytest.approx(floor, rel=0.1)
    assert found == pytest.approx(bare, rel=0.1)


def test_what_a_decode_launches_and_moves() -> None:
    """A shrink and a linear of each group of siblings; every weight once."""
    works = ours(DECODERS[QWEN], Case("decode", 1), 16, "sm_90", 132)
    assert [work.name for work in works] == 4 * ["lora_shrink", "lora_linear"]
    weights = sum(2 * k * n for k, n in DECODERS[QWEN].values())
    factors = sum(2 * 16 * (k + n) for k, n in DECODERS[QWEN].values())
    moved = sum(work.loads + work.stores for work in works)
    assert weights + factors < moved < 1.02 * (weights + factors)
    times = predict.times_of(works, H100, "sm_90")
    assert all(time.start > 0 and time.work >= 0 for time in times)
    # What the shrinks do is hidden behind the linears that depend on them.
    assert sum(t.us for t in times) < sum(predict.time_of(w, H100, "sm_90").us for w in works)


def test_many_adapters_go_by_pieces_and_parts_can_be_switched_off() -> None:
    case = Case("decode", 64, 64)
    by_pieces, before = (
        [work.name for work, _ in predict.predicted(name, TINY, case, 16, "sm_90")]
        for name in (OURS, f"{OURS} without expand by pieces")
    )
    assert (by_pieces.count("mixed_lora_expand"), by_pieces.count("mm")) == (4, 7)
    assert before.count("mixed_lora_linear") == 4
    again = ours(TINY, case, 16, "sm_90", 132)
    assert [work.name for work in again] == by_pieces


@pytest.mark.drawn(1 / 3)
@pytest.mark.parametrize("part", predict.PARTS)
def test_each_part_can_be_switched_off(part: str) -> None:
    """The parts are patched by name, so a renamed function must not go unnoticed."""
    case = {
        "expand by pieces": Case("decode", 64, 64),
        "update first": Case("prefill", 2048),
    }.get(part, Case("decode", 64))
    linears = DECODERS[QWEN if part == "split K" else LLAMA]
    whole = predict.predicted(OURS, linears, case, 16, "sm_90")
    changed = predict.predicted(f"{OURS} without {part}", linears, case, 16, "sm_90")
    launches, fewer = ([(w.name, w.issued) for w, _ in found] for found in (whole, changed))
    assert launches != fewer


def test_tiles_are_chosen_by_the_ceilings() -> None:
    memory, l2, program = Chip("sm_90", H100.processors).bandwidths or (0, 0, 0)
    assert (memory, l2) == pytest.approx((H100.bytes_per_s, H100.l2_bytes_per_s))
    assert program == pytest.approx(0.9 * H100.l2_bytes_per_cycle * H100.clock_hz, rel=0.01)


def shortest(row: ConfigRow, splits: int, m: int, linears: counted.Linears, l2: float) -> float:
    """A lower bound of the time of a shrink and the linears after it, from bytes alone."""
    config = config_of_row(Chip("sm_90", H100.processors), "lora_linear", "half", row, 16, splits)
    sizes = [byte_forms.Sizes(m, n, k, 16, 2, 2) for k, n in linears.values()]
    form = launch_forms.together([byte_forms.linear(own, config) for own in sizes])
    work = 1e6 * max(form.distinct / H100.bytes_per_s, form.issued / l2)
    return H100.launch_us * (1 + (splits > 1)) + H100.dependent_us + work


def test_decode_tiles_are_near_the_best_for_any_plausible_l2() -> None:
    """A layer with the chosen tiles, and with the fastest candidate of each launch, at M 64."""
    m, rates = 64, (4e12, 5.5e12, 7e12)
    case, layer = Case("decode", m), DECODERS[LLAMA]
    rows = rows_of(Chip("sm_90", H100.processors), "lora_linear", torch.bfloat16, "ieee")[1]

    def times(linears: counted.Linears) -> list[float]:
        works = ours(linears, case, 16, "sm_90", H100.processors)
        ceilings = [H100._replace(l2_bytes_per_s=rate) for rate in rates]
        return [sum(time.us for time in predict.times_of(works, c, "sm_90")) for c in ceilings]

    totals, fewest, tried = [0.0] * 3, [0.0] * 3, 0
    for names in ("q_proj k_proj v_proj", "o_proj", "gate_proj up_proj", "down_proj"):
        linears = {name: layer[name] for name in names.split()}
        own = times(linears)
        least = own
        for row, splits in itertools.product(configs.bucket_of(m, rows), (1, 2, 4)):
            bounds = [shortest(row, splits, m, linears, rate) for rate in rates]
            if all(bound >= time for bound, time in zip(bounds, least, strict=True)):
                continue
            forced = mock.patch.object(configs, "_of_decode", lambda *_, r=row, s=splits: (r, s))
            with predict.without(""), forced:
                least = [min(pair) for pair in zip(least, times(linears), strict=True)]
            tried += 1
        totals = [total + time for total, time in zip(totals, own, strict=True)]
        fewest = [total + time for total, time in zip(fewest, least, strict=True)]
    assert tried >= 8
    assert all(total <= 1.03 * few for total, few in zip(totals, fewest, strict=True)), totals


@pytest.mark.parametrize(("r", "most"), [(16, 1.08), (64, 1.20)])
def test_a_decode_is_near_the_bare_layer(r: int, most: float) -> None:
    """And ahead of `addmm_`. Fewer rows have shorter times relative to the bare layer."""
    for m in (33, 48, 64):
        bare, own, addmm = (
            sum(
                time.us
                for _, time in predict.predicted(
                    name, DECODERS[LLAMA], Case("decode", m), r, "sm_90"
                )
            )
            for name in (BARE, OURS, ADDMM)
        )
        assert own <= most * bare, (m, own / bare)
        assert own < addmm, (m, own, addmm)


def test_a_training_step_has_no_product_beside_the_base_layers() -> None:
    works = ours(TINY, Case("training", 2048), 16, "sm_90", 132)
    products = [work for work in works if work.launch is None and work.flops]
    assert len(products) == 14
    assert all(work.flops == 2 * 2048 * 32 * 32 for work in products)
    assert (torch.eye(2) + torch.eye(2)).trace() == 4  # products and sums compute again
    assert torch.equal(torch.eye(2) @ torch.eye(2), torch.eye(2))


@needs_peft
@pytest.mark.parametrize("kind", ["decode", "training"])
def test_operators_of_peft_are_those_that_run_on_a_cpu(kind: str) -> None:
    """On meta tensors as in a profile of a CPU."""
    import peft

    case = Case(kind, 64)
    model = counted.adapted(peft, TINY, case, 16, "cpu").base_model.model
    run = counted.step(model, TINY, case, "cpu")
    run()
    for parameter in model.parameters():
        parameter.grad = None
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        run()
    kernels = {"aten::mm", "aten::mul", "aten::add", "aten::add_"}
    ran = Counter[str]()
    for event in recorded.key_averages():
        if event.key in kernels:  # autograd sums in place where it may
            ran[event.key.removeprefix("aten::").rstrip("_")] += event.count
    assert ran == Counter(work.name for work in others(PEFT, TINY, case, 16))


def test_addmm_is_three_products_a_linear() -> None:
    works = others(ADDMM, TINY, Case("decode", 16), 8)
    assert [work.name for work in works] == 7 * ["mm", "mm", "addmm_"]
    assert works[2].flops == 2 * 16 * 8 * 32


def test_every_line_and_row_is_marked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict, "DECODERS", {QWEN: TINY})
    monkeypatch.setattr(predict, "CASES", (Case("decode", 16),))
    target = tmp_path / "predicted.csv"
    assert predict.main(["--details", "--out", str(target)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("prediction: ") for line in lines)
    assert any("input bytes_per_s = 3e+12" in line for line in lines)
    assert any("registers" in line and "waves" in line for line in lines)
    with target.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["measured"] for row in rows} == {"no"}
    assert {BARE, OURS, ADDMM} <= {row["contender"] for row in rows}

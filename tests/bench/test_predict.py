"""The predictions: their inputs are counted right, and they never look like measurements."""

from __future__ import annotations

import csv
import importlib.util
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

pytest.importorskip("triton", reason="triton is not installed")

from fastlora.bench import counted, predict  # noqa: E402
from fastlora.bench.ceilings import CEILINGS  # noqa: E402
from fastlora.bench.counted import ADDMM, BARE, OURS, PEFT, Case, others, ours  # noqa: E402
from fastlora.bench.shapes import DECODERS, LLAMA, QWEN  # noqa: E402

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

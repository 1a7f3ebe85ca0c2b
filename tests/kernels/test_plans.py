"""Plans: data, the call before the environment before the table, and the same numbers from each."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from fastlora import env
from fastlora.functional import lora_linear
from fastlora.ops import backend as ops
from fastlora.ops import plans
from fastlora.ops.philox_reference import philox_keep_mask
from fastlora.ops.plans import PLANS
from fastlora.testing import assert_within_budget

NATIVE = torch.cuda.is_available() and not env.triton_interpreted()
DEVICE = "cuda" if NATIVE else "cpu"
if not ops.triton_status(DEVICE)[0]:
    pytest.skip(f"no kernels here: {ops.triton_status(DEVICE)[1]}", allow_module_level=True)

# Only where there are kernels.
from fastlora.kernels import chips, configs  # noqa: E402
from fastlora.ops.triton import forward  # noqa: E402


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the ways that forwards and backwards take, as they take them."""
    seen: list[str] = []

    def note(module: object, name: str, what: str) -> None:
        plain: Callable[..., object] = getattr(module, name)

        def call(*args: object, **kwargs: object) -> object:
            seen.append(what)
            return plain(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    note(forward, "_fused_one", "fused")
    note(forward, "_expand_one_", "split")
    return seen


def operands(m: int) -> list[torch.Tensor]:
    """x, weight, lora_a, lora_b."""
    shapes = ((m, 48), (40, 48), (8, 48), (40, 8))
    return [torch.randn(shape).to(DEVICE).requires_grad_() for shape in shapes]


@pytest.mark.parametrize(("m", "expected"), [(64, "fused"), (65, "split")])
def test_the_default_is_the_designs(m: int, expected: str, launched: list[str]) -> None:
    """On every chip, while nothing has been measured: fused up to 64 rows, split above."""
    lora_linear(*operands(m), 0.5, impl="triton")
    assert launched == [expected]
    h100 = chips.Chip("sm_90", 132)
    for launch in ("lora_linear", "lora_grad_x", "mixed_lora_linear", "mixed_lora_grad_x"):
        assert configs.plan_of(h100, launch, torch.bfloat16, m=m, n=40, k=48, r=16) == expected


def test_a_table_is_read_in_order(monkeypatch: pytest.MonkeyPatch, launched: list[str]) -> None:
    """The first row whose limits hold, for the chip's table, the launch and the kind alone."""
    chip, row, key = chips.chip_of(torch.device(DEVICE)), chips.Row, ("lora_linear", "ieee")
    table = configs.TABLES[chip.family]
    rows = (
        row(max_m=30, n=40, k=48, max_r=8, plan="split"),
        row(max_m=30, plan="fused"),
        row(plan="split"),
    )
    monkeypatch.setitem(table, key, (*rows, *table[key]))
    plan_of = configs.plan_of.__wrapped__  # which remembers nothing
    monkeypatch.setattr(configs, "plan_of", plan_of)

    def found(m: int, r: int, launch: str = "lora_linear", n: int = 40, k: int = 48) -> str:
        return plan_of(chip, launch, torch.float32, m=m, n=n, k=k, r=r)

    assert [found(30, 8), found(30, 9), found(31, 8)] == ["split", "fused", "split"]
    assert [found(30, 8, n=41), found(30, 8, k=49)] == ["fused", "fused"]
    assert found(31, 8, "lora_grad_x") == "fused"
    assert plan_of(chip, "lora_linear", torch.float16, m=31, n=40, k=48, r=8) == "fused"
    lora_linear(*operands(30), 0.5, impl="triton")
    assert launched == ["split"]


def test_the_call_goes_before_the_environment(
    monkeypatch: pytest.MonkeyPatch, launched: list[str]
) -> None:
    """``plan=`` names it; else ``FASTLORA_PLAN``; a name that is none is refused."""
    tensors = operands(20)
    monkeypatch.setattr(plans, "_PLAN", "split")
    lora_linear(*tensors, 0.5, impl="triton")
    lora_linear(*tensors, 0.5, impl="triton", plan="fused")
    assert launched == ["split", "fused"]
    for name in ("best", "dense", "augmented", "invariant"):
        monkeypatch.setattr(plans, "_PLAN", name)
        with pytest.raises(ValueError, match=f"FASTLORA_PLAN is '{name}', expected one of auto, f"):
            lora_linear(*tensors, 0.5, impl="triton")
    with pytest.raises(ValueError, match="plan must be one of auto, .* got 'augmented'"):
        lora_linear(*tensors, 0.5, impl="triton", plan="augmented")


def put_rows(monkeypatch: pytest.MonkeyPatch, launch: str, rows: tuple[chips.Row, ...]) -> None:
    """Puts measured rows into the table of the device's chip, for fp32."""
    table, key = configs.TABLES[chips.chip_of(torch.device(DEVICE)).family], (launch, "ieee")
    monkeypatch.setitem(table, key, (*rows, *table[key]))
    # Which remembers nothing.
    monkeypatch.setattr(configs, "plan_of", configs.plan_of.__wrapped__)


def test_who_chooses_in_a_mixed_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The call, else ``FASTLORA_PLAN``, else the table."""
    weight = torch.empty(40, 48, device=DEVICE)

    def choose(plan: str, m: int, rank_rows: int) -> str:
        x = torch.empty(m, 48, device=DEVICE)
        return plans.choose_plan(plan, x, weight, rank_rows, "mixed_lora_linear")

    assert [choose("auto", m, 200) for m in (20, 65)] == ["fused", "split"]
    rows = (chips.Row(max_m=32, max_r=128, plan="split"), chips.Row(plan="fused"))
    put_rows(monkeypatch, "mixed_lora_linear", rows)
    assert [choose("auto", 20, rows) for rows in (128, 129)] == ["split", "fused"]
    monkeypatch.setattr(plans, "_PLAN", "split")
    assert choose("auto", 20, 1000) == "split"
    assert choose("fused", 20, 128) == "fused"
    assert choose("invariant", 20, 128) == "invariant"
    with pytest.raises(ValueError, match="plan must be one of auto, .* got 'dense'"):
        choose("dense", 20, 128)


@pytest.mark.parametrize("launch", ["mixed_lora_train_linear", "mixed_lora_grad_x"])
def test_who_chooses_in_training(monkeypatch: pytest.MonkeyPatch, launch: str) -> None:
    """The same order; "invariant", which training does not have, is passed over."""
    weight = torch.empty(40, 48, device=DEVICE)

    def choose(plan: str, m: int, rank_rows: int) -> str:
        x = torch.empty(m, 48, device=DEVICE)
        return plans.choose_plan(plan, x, weight, rank_rows, launch)

    assert [choose(plan, 20, 64) for plan in ("auto", "split", "invariant")] == [
        *("fused", "split", "fused"),
    ]
    assert choose("auto", 65, 64) == "split"
    put_rows(monkeypatch, launch, (chips.Row(max_r=64, plan="split"), chips.Row(plan="fused")))
    assert [choose("auto", 20, rows) for rows in (64, 65)] == ["split", "fused"]
    monkeypatch.setattr(plans, "_PLAN", "split")
    assert [choose(plan, 20, 65) for plan in ("auto", "fused")] == ["split", "fused"]


def test_the_environment_is_read() -> None:
    """In a fresh process."""
    code = "from fastlora.ops import plans; raise SystemExit(plans._PLAN != 'split')"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "FASTLORA_PLAN": "Split"}, check=False
    )
    assert done.returncode == 0


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_gradients_agree_under_dropout_too(p: float) -> None:
    """dx of each plan is PyTorch's, where the mask parts the two terms."""
    dy, weight, ds, lora_a = (
        torch.randn(shape).to(DEVICE) for shape in ((20, 40), (40, 48), (20, 8), (8, 48))
    )
    seed = torch.tensor([7], device=DEVICE) if p else None
    results = {
        plan: torch.ops.fastlora.lora_grad_x(
            dy, weight, ds, [], [lora_a], seed, [p], "triton", plan
        )
        for plan in PLANS
    }
    keep = philox_keep_mask(7, 20, 48, p) if p else torch.ones(20, 48, dtype=torch.bool)

    def by_hand(*given: torch.Tensor) -> torch.Tensor:
        dy, weight, ds, lora_a = given
        return dy @ weight + torch.where(keep, ds @ lora_a, 0) / (1 - p)

    given = [tensor.cpu() for tensor in (dy, weight, ds, lora_a)]
    truth = by_hand(*(tensor.double() for tensor in given))
    for plan, dx in results.items():
        assert_within_budget(dx.cpu(), by_hand(*given), truth, plan)

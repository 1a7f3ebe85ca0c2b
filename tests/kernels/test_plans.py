"""Plans: data, the call before the environment before the table, and the same numbers from each."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from fastlora import env
from fastlora.functional import lora_linear
from fastlora.ops import execution_mode as ops
from fastlora.ops import plans
from fastlora.ops.plans import PLANS

NATIVE = torch.cuda.is_available() and not env.triton_interpreted()
DEVICE = "cuda" if NATIVE else "cpu"
if not ops.triton_status(DEVICE)[0]:
    pytest.skip(f"no kernels here: {ops.triton_status(DEVICE)[1]}", allow_module_level=True)

# Only where there are kernels.
from fastlora.kernels import chips, configs  # noqa: E402
from tests.support.kernels.lab import Lab, put_rows  # noqa: E402
from tests.support.kernels.mixed_problem import OPS  # noqa: E402
from tests.support.kernels.one_adapter import Problem  # noqa: E402

# What a plan's second launch is.
WAYS = {"fused": "linear", "split": "expand"}


def operands(m: int) -> list[torch.Tensor]:
    """x, weight, lora_a, lora_b."""
    shapes = ((m, 48), (40, 48), (8, 48), (40, 8))
    return [torch.randn(shape).to(DEVICE).requires_grad_() for shape in shapes]


@pytest.mark.parametrize(("m", "expected"), [(64, "fused"), (65, "split")])
def test_the_default_is_the_designs(m: int, expected: str, launches: Any) -> None:
    """On every chip, while nothing has been measured: fused up to 64 rows, split above."""
    lora_linear(*operands(m), 0.5, impl="triton")
    assert launches[1:] == [f"{WAYS[expected]} 1"]
    h100 = chips.Chip("sm_90", 132)
    for launch in ("lora_linear", "lora_grad_x", "mixed_lora_linear", "mixed_lora_grad_x"):
        assert configs.plan_of(h100, launch, torch.bfloat16, m=m, n=40, k=48, r=16) == expected


@pytest.mark.parametrize(
    "launch", ["mixed_lora_linear", "mixed_lora_train_linear", "mixed_lora_grad_x"]
)
def test_more_adapters_than_an_epilogue_takes_go_by_pieces(launch: str) -> None:
    """By the most that a row tile can hold: as many as there are, and no more than rows."""
    h100, sizes = chips.Chip("sm_90", 132), {"n": 4096, "k": 4096, "r": 16}

    def found(m: int, slots: int) -> str:
        return configs.plan_of(h100, launch, torch.bfloat16, m=m, slots=slots, **sizes)

    assert [found(64, 4), found(64, 5), found(4, 64), found(5, 64)] == ["fused", "split"] * 2
    assert [found(65, 1), found(8192, 1)] == ["split"] * 2


def test_a_table_is_read_in_order(monkeypatch: pytest.MonkeyPatch, launches: Any) -> None:
    """The first row whose limits hold, for the chip's table, the launch and the kind alone."""
    chip, row = chips.chip_of(torch.device(DEVICE)), chips.ConfigRow
    rows = (
        row(max_m=30, n=40, k=48, max_r=8, plan="split"),
        row(max_m=30, plan="fused"),
        row(plan="split"),
    )
    put_rows(monkeypatch, chip, ("lora_linear", "ieee"), rows)

    def found(m: int, r: int, launch: str = "lora_linear", n: int = 40, k: int = 48) -> str:
        return configs.plan_of(chip, launch, torch.float32, m=m, n=n, k=k, r=r)

    assert [found(30, 8), found(30, 9), found(31, 8)] == ["split", "fused", "split"]
    assert [found(30, 8, n=41), found(30, 8, k=49)] == ["fused", "fused"]
    assert found(31, 8, "lora_grad_x") == "fused"
    assert configs.plan_of(chip, "lora_linear", torch.float16, m=31, n=40, k=48, r=8) == "fused"
    lora_linear(*operands(30), 0.5, impl="triton")
    assert launches == ["shrink 1", "expand 1"]


def test_the_call_goes_before_the_environment(
    monkeypatch: pytest.MonkeyPatch, launches: Any
) -> None:
    """``plan=`` names it; else ``FASTLORA_PLAN``; a name that is none is refused."""
    tensors = operands(20)
    monkeypatch.setattr(plans, "_PLAN", "split")
    lora_linear(*tensors, 0.5, impl="triton")
    lora_linear(*tensors, 0.5, impl="triton", plan="fused")
    assert launches == ["shrink 1", "expand 1", "shrink 1", "linear 1"]
    for name in ("best", "dense", "augmented", "invariant"):
        monkeypatch.setattr(plans, "_PLAN", name)
        with pytest.raises(ValueError, match=f"FASTLORA_PLAN is '{name}', expected one of auto, f"):
            lora_linear(*tensors, 0.5, impl="triton")
    with pytest.raises(ValueError, match="plan must be one of auto, .* got 'augmented'"):
        lora_linear(*tensors, 0.5, impl="triton", plan="augmented")


@pytest.mark.parametrize(
    "launch", ["mixed_lora_linear", "mixed_lora_train_linear", "mixed_lora_grad_x"]
)
def test_who_chooses_in_a_mixed_batch(monkeypatch: pytest.MonkeyPatch, launch: str) -> None:
    """The call, else ``FASTLORA_PLAN``, else the table; training has no plan "invariant"."""
    weight = torch.empty(40, 48, device=DEVICE)

    def choose(plan: str, m: int, r: int) -> str:
        x = torch.empty(m, 48, device=DEVICE)
        return plans.choose_plan(plan, x, weight, r, launch, slots=4)

    served = launch == "mixed_lora_linear"
    assert [choose("auto", m, 50) for m in (20, 65)] == ["fused", "split"]
    assert choose("invariant", 20, 32) == ("invariant" if served else "fused")
    rows = (chips.ConfigRow(max_m=32, max_r=128, plan="split"), chips.ConfigRow(plan="fused"))
    put_rows(monkeypatch, chips.chip_of(torch.device(DEVICE)), (launch, "ieee"), rows)
    assert [choose("auto", 20, r) for r in (32, 33)] == ["split", "fused"]
    monkeypatch.setattr(plans, "_PLAN", "split")
    assert [choose(plan, 20, 250) for plan in ("auto", "fused")] == ["split", "fused"]
    with pytest.raises(ValueError, match="plan must be one of auto, .* got 'dense'"):
        choose("dense", 20, 32)


def test_the_environment_is_read() -> None:
    """In a fresh process."""
    code = "from fastlora.ops import plans; raise SystemExit(plans._PLAN != 'split')"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "FASTLORA_PLAN": "Split"}, check=False
    )
    assert done.returncode == 0


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_gradients_agree_under_dropout_too(lab: Lab, p: float) -> None:
    """dx of each plan is PyTorch's, where the mask parts the two terms."""
    problem = Problem(lab, 20, 40, 48, 8, p=p)
    for plan in PLANS:
        given = problem.dy, problem.weight, problem.ds, [], [problem.lora_a]
        dx = OPS.lora_grad_x(*given, problem.drops()["seed"], [p], "triton", plan)
        problem.check({"dx": dx})

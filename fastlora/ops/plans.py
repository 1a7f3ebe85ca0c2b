"""Which launches make a linear over the kernels: named by a call, the environment, or a table.

See `fastlora.kernels.configs.plan_of` for what each plan launches. Chosen inside the operators,
where no compiler looks: a graph serves every size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastlora import env

# "invariant" is "fused" with configs that do not know the batch: `fastlora.batch_invariant`.
PLANS = ("auto", "fused", "split", "augmented", "invariant")
MIXED_PLANS = ("auto", "fused", "split", "dense", "invariant")
MIXED_TRAIN_PLANS = ("auto", "fused", "split")
_PLAN = env.plan()


def choose_plan(
    plan: str, x: torch.Tensor, weight: torch.Tensor, r: int, launch: str = "lora_linear"
) -> str:
    """Returns what to launch for x ``[M, K]`` and rank R: the plan named, else a table's.

    Named is one by the call, else by ``FASTLORA_PLAN``, unless that is a plan of mixed batches. For
    a dx, ``x`` is dy and ``launch`` "lora_grad_x"; ``weight`` is ``[N, K]`` for both.

    Raises:
        ValueError: ``FASTLORA_PLAN`` names no plan.
    """
    if plan == "auto":
        plan = _from_environment(PLANS)
    if plan == "auto":
        plan = _from_table(launch, x, weight, r)
    return plan


def choose_mixed_plan(plan: str, x: torch.Tensor, weight: torch.Tensor, rank_rows: int) -> str:
    """The same for a mixed batch whose slots have so many rank rows, all together.

    Raises:
        ValueError: ``plan`` is none of `MIXED_PLANS`, or ``FASTLORA_PLAN`` names no plan.
    """
    if plan not in MIXED_PLANS:
        raise ValueError(f"plan must be one of {', '.join(MIXED_PLANS)}, got {plan!r}")
    if plan == "auto":
        plan = _from_environment(MIXED_PLANS)
    if plan == "auto":
        plan = _from_table("mixed_lora_linear", x, weight, rank_rows)
    return plan


def choose_mixed_train_plan(
    plan: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    rank_rows: int,
    launch: str = "mixed_lora_train_linear",
) -> str:
    """The same in training, whose forward and dx have `MIXED_TRAIN_PLANS`; others are passed over.

    For a dx, ``x`` is dy and ``launch`` "mixed_lora_grad_x".

    Raises:
        ValueError: ``FASTLORA_PLAN`` names no plan.
    """
    if plan not in MIXED_TRAIN_PLANS or plan == "auto":
        plan = _from_environment(MIXED_TRAIN_PLANS)
    if plan == "auto":
        plan = _from_table(launch, x, weight, rank_rows)
    return plan


def _precision(dtype: torch.dtype) -> str:
    """How fp32 dots round: exactly, unless the user allowed TF32 for matrix products.

    torch's older switches (``set_float32_matmul_precision``, ``allow_tf32``) set what is read here
    too; reading those raises once somebody has used the newer one.
    """
    allowed = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"


def _from_table(launch: str, x: torch.Tensor, weight: torch.Tensor, r: int) -> str:
    """Returns the plan of the chip's table for x, or dy, with M rows, and weight ``[N, K]``."""
    from fastlora.kernels import chips, configs

    (n, k), precision = weight.shape, _precision(x.dtype)
    return configs.plan_of(
        chips.chip_of(x.device),
        launch,
        x.dtype,
        m=x.shape[0],
        n=n,
        k=k,
        r=r,
        input_precision=precision,
    )


def _from_environment(known: tuple[str, ...]) -> str:
    """Returns what ``FASTLORA_PLAN`` names; ``"auto"`` where that is for other batches."""
    named = [name for name in dict.fromkeys((*PLANS, *MIXED_PLANS)) if name != "invariant"]
    if _PLAN not in named:
        raise ValueError(f"FASTLORA_PLAN is {_PLAN!r}, expected one of {', '.join(named)}")
    return _PLAN if _PLAN in known else "auto"


def augmented(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    s: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: torch.Tensor,
) -> torch.Tensor:
    """``[x | s] @ [weight | scaling * lora_b].T + bias``: one GEMM over K + R, rounded once."""
    scaled = (lora_b.float() * scaling).to(x.dtype)
    return F.linear(torch.cat([x, s], dim=1), torch.cat([weight, scaled], dim=1), bias)

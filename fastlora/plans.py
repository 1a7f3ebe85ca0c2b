"""Which launches make a linear over the kernels: named by a call, the environment, or a table.

See `fastlora.kernels.plan_tables` for what each plan launches. Chosen inside the operators, where
no compiler looks: a graph serves every size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastlora import env

# "invariant" is "fused" with configs that do not know the batch: `fastlora.batch_invariant`.
PLANS = ("auto", "fused", "split", "augmented", "invariant")
_PLAN = env.plan()


def choose_plan(plan: str, x: torch.Tensor, r: int) -> str:
    """Returns what to launch for x ``[M, K]`` and rank R: the plan named, else a table's.

    Named is one by the call, else by ``FASTLORA_PLAN``.

    Raises:
        ValueError: ``FASTLORA_PLAN`` names none of `PLANS`.
    """
    from fastlora.kernels import configs, plan_tables

    if plan == "auto":
        plan = _PLAN
        if plan not in PLANS or plan == "invariant":
            named = ", ".join(name for name in PLANS if name != "invariant")
            raise ValueError(f"FASTLORA_PLAN is {plan!r}, expected one of {named}")
    if plan == "auto":
        family = configs.chip_of(x.device).family
        plan = plan_tables.plan_for(family, x.dtype, x.shape[0], r)
    return plan


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

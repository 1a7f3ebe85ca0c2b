"""Which launches make a linear over the kernels: named by a call, the environment, or a table.

See `fastlora.kernels.configs.plan_of` for what each plan launches. Chosen inside the operators,
where no compiler looks: a graph serves every size.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from fastlora import env
from fastlora.coded_weight import Coded

# "invariant" is "fused" with configs that do not know the batch: `fastlora.batch_invariant`.
PLANS = ("auto", "fused", "split", "invariant")
_INVARIANT = ("lora_linear", "mixed_lora_linear")
_NAMED = ("auto", "fused", "split")
_PLAN = env.plan()
_rounding_of_fp32 = functools.partial(torch._C._get_fp32_precision_getter, "cuda", "matmul")


def choose_plan(
    plan: str,
    x: torch.Tensor,
    weight: torch.Tensor | Coded,
    r: int,
    launch: str = "lora_linear",
    *,
    n: int | None = None,
    slots: int = 1,
) -> str:
    """Returns what to launch for x ``[M, K]`` and weight ``[N, K]``.

    A plan that the call names goes before ``FASTLORA_PLAN``, which goes before the table.

    Args:
        plan: One of `PLANS`. Only forwards without gradients have "invariant"; others take it for
            "auto".
        x: What the launch reads: x, or dy ``[M, N]`` for a dx.
        weight: ``[N, K]``.
        r: Rank; the largest in a mixed batch.
        launch: That of the plan "fused", one of `fastlora.kernels.tables.PLANNED`.
        n: Outputs of all siblings of the launch; None for those of the weight.
        slots: Adapters that a mixed batch may have.

    Raises:
        ValueError: There is no such plan, or ``FASTLORA_PLAN`` names none.
    """
    if plan not in PLANS:
        raise ValueError(f"plan must be one of {', '.join(PLANS)}, got {plan!r}")
    if plan == "invariant" and launch.removeprefix("coded_") in _INVARIANT:
        return plan
    if plan in ("auto", "invariant"):
        if _PLAN not in _NAMED:
            raise ValueError(f"FASTLORA_PLAN is {_PLAN!r}, expected one of {', '.join(_NAMED)}")
        plan = _PLAN
    return _from_table(launch, x, weight, r, n, slots) if plan == "auto" else plan


def precision(dtype: torch.dtype) -> str:
    """How fp32 dots round: exactly, unless the user allowed TF32 for matrix products.

    torch's older switches (``set_float32_matmul_precision``, ``allow_tf32``) set what is read here
    too; reading those raises once somebody has used the newer one.
    """
    # `torch.backends.cuda.matmul.fp32_precision` takes six times as long.
    allowed = dtype is torch.float32 and _rounding_of_fp32() == "tf32"
    return "tf32" if allowed else "ieee"


def _from_table(
    launch: str,
    x: torch.Tensor,
    weight: torch.Tensor | Coded,
    r: int,
    siblings_n: int | None,
    slots: int,
) -> str:
    """Returns the plan of the chip's table for x, or dy, with M rows, and weight ``[N, K]``."""
    (n, k), m, rounding = weight.shape, x.shape[0], precision(x.dtype)
    chips, configs = _tables()
    chip, sizes = chips.chip_of(x.device), {"m": m, "n": siblings_n or n, "k": k, "r": r}
    return configs.plan_of(chip, launch, x.dtype, **sizes, slots=slots, input_precision=rounding)


@functools.cache
def _tables() -> tuple[Any, Any]:
    """Returns the modules of chips and of their tables, which import Triton."""
    from fastlora.kernels import chips, configs

    return chips, configs

"""The plan of a linear layer, which selects the kernels to launch.

The plan comes from the call, the environment, or a table. `fastlora.kernels.configs.plan_of` lists
the launches of each plan. Operators choose the plan when they run, hidden from compilers, so that
one graph serves all sizes.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch

from fastlora import env
from fastlora.quantized_tensor import QuantizedData

# "invariant" is "fused" with configs that do not depend on the batch: `fastlora.batch_invariant`.
PLANS = ("auto", "fused", "split", "invariant")
_INVARIANT = ("lora_linear", "mixed_lora_linear")
_NAMED = ("auto", "fused", "split")
_PLAN = env.default_plan()
_rounding_of_fp32 = functools.partial(torch._C._get_fp32_precision_getter, "cuda", "matmul")


def choose_plan(
    plan: str,
    x: torch.Tensor,
    weight: torch.Tensor | QuantizedData,
    r: int,
    launch: str = "lora_linear",
    *,
    n: int | None = None,
    slots: int = 1,
) -> str:
    """Choose the plan for x and a weight, and return its name.

    The plan selects the kernels to launch. A ``plan`` other than "auto" takes precedence over
    ``FASTLORA_PLAN``, which takes precedence over the chip's table.

    Args:
        plan: One of `PLANS`. "invariant" exists for forward passes without gradients only; other
            launches treat it as "auto".
        x: The tensor that the launch reads: x, or dy ``[M, N]`` to compute dx.
        weight: ``[N, K]``.
        r: Rank, or the largest rank in a mixed batch.
        launch: The launch of the plan "fused", one of `fastlora.kernels.config_tables.PLANNED`.
        n: Total number of outputs of the layers in the launch, or None for the weight's N.
        slots: Number of adapters that a mixed batch may have.

    Raises:
        ValueError: The plan does not exist, or ``FASTLORA_PLAN`` names one that does not exist.
    """
    if plan not in PLANS:
        raise ValueError(f"plan must be one of {', '.join(PLANS)}, got {plan!r}")
    if plan == "invariant" and launch.removeprefix("coded_") in _INVARIANT:
        return plan
    if plan in ("auto", "invariant"):
        if _PLAN not in _NAMED:
            raise ValueError(f"FASTLORA_PLAN is {_PLAN!r}, expected one of {', '.join(_NAMED)}")
        plan = _PLAN
    return _plan_from_table(launch, x, weight, r, n, slots) if plan == "auto" else plan


def fp32_precision(dtype: torch.dtype) -> str:
    """Return the precision of fp32 products.

    The result is "tf32" if ``dtype`` is fp32 and the user has allowed TF32, else "ieee". torch's
    older switches (``set_float32_matmul_precision``, ``allow_tf32``) also set the value that is
    read here. Reading the older switches raises once the newer switch has been used.
    """
    # `torch.backends.cuda.matmul.fp32_precision` takes six times as long to read.
    allowed = dtype is torch.float32 and _rounding_of_fp32() == "tf32"
    return "tf32" if allowed else "ieee"


def _plan_from_table(
    launch: str,
    x: torch.Tensor,
    weight: torch.Tensor | QuantizedData,
    r: int,
    group_n: int | None,
    slots: int,
) -> str:
    """Look up the plan of a kernel launch in a table.

    The table is the one for the chip on which x is stored. It lists plans by launch, dtype,
    precision, the sizes of x and the weight, the rank, and the number of slots. If the table lists
    no plan for a launch, the plan depends on the number of rows and slots.
    """
    (n, k), m, rounding = weight.shape, x.shape[0], fp32_precision(x.dtype)
    chips, configs = _import_chips_and_configs()
    chip, sizes = chips.chip_of(x.device), {"m": m, "n": group_n or n, "k": k, "r": r}
    return configs.plan_of(chip, launch, x.dtype, **sizes, slots=slots, input_precision=rounding)


@functools.cache
def _import_chips_and_configs() -> tuple[ModuleType, ModuleType]:
    """Import and return the modules `chips` and `configs` of `fastlora.kernels`.

    The import is inside this function because both modules import Triton.
    """
    from fastlora.kernels import chips, configs

    return chips, configs

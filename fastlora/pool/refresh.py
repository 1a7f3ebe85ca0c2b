"""`refresh`, for weights that were written in a way that fastlora cannot detect."""

from __future__ import annotations

from torch import nn

from fastlora.layers.coded_base import forget_weights
from fastlora.layers.shared_input import forget_group
from fastlora.pool.pool import pool_of
from fastlora.weight_marks import marks


def refresh(model: nn.Module) -> None:
    """Clear everything that fastlora has cached from a model's weights.

    This is needed only after writes that fastlora cannot detect:

    * through ``.data`` or ``set_``, as PEFT's `hotswap_adapter` does;
    * by compiled code that does not use a `torch.optim.Optimizer`;
    * to factors, in the middle of a `fastlora.adapters` block;
    * to base weights under a pool with DoRA adapters, while a lease is open.

    All other writes are detected: steps of optimizers, including fused and compiled ones, and any
    write that is followed by a change between training and evaluation mode.

    CUDA graphs that were captured over the model before this call must not be replayed after it,
    because the memory that they read is freed.

    Args:
        model: Any module with LoRA layers of fastlora or patched LoRA layers of PEFT.
    """
    marks.end_all()
    for module in model.modules():
        forget_weights(module, captured=True)
        forget_group(module)
        group = getattr(module, "routed_by", None)
        if group is not None:
            group.packs.clear()
            group.packs.unpin()
    for module in model.modules():
        pool = pool_of(module)
        if pool is not None:
            pool.remake_scales()

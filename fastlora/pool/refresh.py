"""`refresh`: for weights that were written behind PyTorch's back."""

from __future__ import annotations

from torch import nn

from fastlora.layers.coded_base import forget_weights
from fastlora.layers.shared_input import forget_group
from fastlora.pool.pool import pool_of
from fastlora.weight_marks import marks


def refresh(model: nn.Module) -> None:
    """Forget whatever fastlora derived from a model's weights.

    Needed only after writes that nobody tells of: through ``.data`` or ``set_`` (PEFT's
    `hotswap_adapter`), by compiled code under no `torch.optim.Optimizer`, in place in the middle of
    a `fastlora.adapters` block, or, over a pool with DoRA adapters, after any change of base
    weights there. Everything else is noticed: steps of optimizers, fused or compiled ones too, and
    a change between training and evaluation, whatever was written in between.

    CUDA graphs that were captured over the model before must not be replayed afterwards: what they
    read is given back.

    Args:
        model: Any module that holds LoRA layers of fastlora's or patched ones of PEFT's.
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

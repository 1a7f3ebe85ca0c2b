"""`refresh`: for weights that were written behind PyTorch's back."""

from __future__ import annotations

from torch import nn

from fastlora.layers.dora_norms import forget_norms
from fastlora.pool import pool_of


def refresh(model: nn.Module) -> None:
    """Forgets whatever fastlora derived from a model's weights.

    Needed only after writes that PyTorch does not count: through ``.data`` or ``set_`` (PEFT's
    `hotswap_adapter`, some optimizers outside of training forwards), in place in the middle of a
    `fastlora.adapters` block, or, over a pool with DoRA adapters, after any change of base weights
    there. Everything else is noticed.

    Args:
        model: Any module that holds LoRA layers of fastlora's or patched ones of PEFT's.
    """
    for module in model.modules():
        forget_norms(module)
        group = getattr(module, "routed_by", None)
        if group is not None:
            group.packs.clear()
        if hasattr(module, "lora_magnitude_vector"):
            forget_norms(module)
    for module in model.modules():
        pool = pool_of(module)
        if pool is not None:
            pool.remake_scales()

"""`clear_caches`, which clears cached values after writes to weights that cannot be detected."""

from __future__ import annotations

from torch import nn

from fastlora.layers.quantized_base import clear_base_and_adapter_caches
from fastlora.layers.shared_input import clear_group_cache
from fastlora.pool.pool import pool_of
from fastlora.validation import check_is_module
from fastlora.weights_version import weights_versions


def clear_caches(model: nn.Module) -> None:
    """Clear the caches of a model's layers.

    The caches contain values that were computed from the model's weights, which include base
    weights and LoRA factors. If the model has an adapter pool, the DoRA scales of the pool's
    adapters are recomputed.

    Call this function only after writes to weights that fastlora cannot detect:

    * writes through ``.data`` or ``set_``, such as those of PEFT's `hotswap_adapter`;
    * writes by compiled code that does not use a `torch.optim.Optimizer`;
    * writes to LoRA factors inside a `fastlora.adapters` block;
    * writes to the base weights of a model whose pool has DoRA adapters, while a lease is active.

    All other writes are detected, including the steps of fused and compiled optimizers, and any
    write that is followed by a change between training and evaluation mode.

    CUDA graphs that were captured with the model before this call must not be replayed afterwards,
    because the memory that they read is freed.

    Args:
        model: Any module that contains LoRA layers of fastlora or patched LoRA layers of PEFT.

    Raises:
        TypeError: ``model`` is not a module, for example because it is a pool.
    """
    check_is_module("clear_caches", model)
    weights_versions.invalidate_all()
    for module in model.modules():
        clear_base_and_adapter_caches(module, release_cuda_graph_weights=True)
        clear_group_cache(module)
        group = getattr(module, "routing_group", None)
        if group is not None:
            group.packs.clear()
            group.packs.drop_cuda_graph_references()
    for module in model.modules():
        pool = pool_of(module)
        if pool is not None:
            pool.recompute_scales()

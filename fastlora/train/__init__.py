"""Training several adapters in mixed batches, each as it would train alone.

Rows of a mixed batch (`fastlora.adapters`) are independent of each other; these helpers keep the
rest of a training step so: the loss, clipping, the optimizer, its schedule, non-finite values.
"""

from fastlora.train.losses import AdapterLosses, adapter_losses, causal_lm_losses, count_tokens
from fastlora.train.optimizers import AdapterOptimizers, StepReport, train_adapters
from fastlora.train.solo import AdapterCounts, adapter_parameters

__all__ = [
    "AdapterCounts",
    "AdapterLosses",
    "AdapterOptimizers",
    "StepReport",
    "adapter_losses",
    "adapter_parameters",
    "causal_lm_losses",
    "count_tokens",
    "train_adapters",
]

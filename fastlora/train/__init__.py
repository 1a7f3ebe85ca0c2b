"""Train several adapters in mixed batches, each as it would train alone, up to rounding.

The rows of a mixed batch (`fastlora.adapters`) are independent of each other. The helpers in this
package keep the rest of a training step independent for each adapter too: the loss, gradient
clipping, the optimizer, the learning-rate schedule, and the handling of non-finite values.
"""

from fastlora.train.adapter_training_state import AdapterCounts, adapter_parameters
from fastlora.train.losses import AdapterLosses, adapter_losses, causal_lm_losses, count_tokens
from fastlora.train.optimizers import AdapterOptimizers, StepReport, train_adapters

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

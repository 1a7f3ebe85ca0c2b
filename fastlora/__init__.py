"""Fused low-rank adaptation for PyTorch: layers, whole models, and PEFT models and files."""

from pathlib import Path as _Path

# In a source checkout the kernels lie beside this package, in `kernels/` (setup.py says why).
_checkout = _Path(__file__).resolve().parent.parent
if (_checkout / "kernels" / "lora_linear.py").is_file():
    __path__.append(str(_checkout))

import fastlora.integrations.transformers  # noqa: E402, F401 - what LoraModel is on their models
from fastlora import functional  # noqa: E402  # the path above comes first
from fastlora.integrations.patch import patch, unpatch  # noqa: E402
from fastlora.integrations.report import FusionReport, fusion_report  # noqa: E402
from fastlora.layers import FastLoraLinear  # noqa: E402
from fastlora.model import LoraModel, get_peft_model  # noqa: E402
from fastlora.model.config import LoraConfig, TaskType  # noqa: E402
from fastlora.model.estimate import Estimate, estimate  # noqa: E402
from fastlora.model.recommend import Recommendation, recommend  # noqa: E402
from fastlora.ops.invariant import batch_invariant  # noqa: E402
from fastlora.pool import AdapterPool  # noqa: E402
from fastlora.routing.block import adapters  # noqa: E402
from fastlora.routing.refresh import refresh  # noqa: E402
from fastlora.train import (  # noqa: E402
    AdapterOptimizers,
    adapter_losses,
    adapter_parameters,
    causal_lm_losses,
    train_adapters,
)
from fastlora.validation import FastLoraError  # noqa: E402

# PEFT's name for it, so that a snippet needs only its import changed.
PeftModel = LoraModel

__version__ = "0.1.0"

__all__ = [
    "AdapterOptimizers",
    "AdapterPool",
    "Estimate",
    "FastLoraError",
    "FastLoraLinear",
    "FusionReport",
    "LoraConfig",
    "LoraModel",
    "PeftModel",
    "Recommendation",
    "TaskType",
    "__version__",
    "adapter_losses",
    "adapter_parameters",
    "adapters",
    "batch_invariant",
    "causal_lm_losses",
    "estimate",
    "functional",
    "fusion_report",
    "get_peft_model",
    "patch",
    "recommend",
    "refresh",
    "train_adapters",
    "unpatch",
]

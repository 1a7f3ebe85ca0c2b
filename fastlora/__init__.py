"""Fused low-rank adaptation (LoRA) for PyTorch layers and models, and for PEFT models and files."""

import sys as _sys
from importlib import util as _util
from importlib.machinery import ModuleSpec as _ModuleSpec
from pathlib import Path as _Path
from typing import TYPE_CHECKING as _TYPE_CHECKING

import fastlora.integrations.peft_registration  # registers fastlora's classes with PEFT
import fastlora.integrations.transformers  # noqa: F401 - adds fastlora's models to its pipelines
from fastlora import functional
from fastlora.deprecation import warn_renamed as _warn_renamed
from fastlora.init.configs import CordaConfig, EvaConfig, LoftQConfig, LoraGAConfig
from fastlora.integrations import from_peft as _from_peft
from fastlora.integrations.patch import patch, unpatch
from fastlora.integrations.report import FusionReport, fusion_report
from fastlora.layers import FastLoraLinear
from fastlora.model import LoraModel, get_peft_model
from fastlora.model.calibration import (
    estimate_gradients,
    preprocess_corda,
    preprocess_loraga,
)
from fastlora.model.config import LoraConfig, LoraRuntimeConfig, TaskType
from fastlora.model.config_checks import PeftType
from fastlora.model.estimate import Estimate, estimate
from fastlora.model.eva import get_eva_state_dict, initialize_lora_eva_weights
from fastlora.model.hotswap import (
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    prepare_model_for_compiled_hotswap,
)
from fastlora.model.loftq import replace_lora_weights_loftq
from fastlora.model.recommend import Recommendation, recommend
from fastlora.model.reduce import (
    RankReduction,
    convert_to_lora,
    reduce_intruder_dimension,
    reduce_rank,
    save_as_lora,
)
from fastlora.model.status import get_layer_status, get_model_status
from fastlora.model.warm_up import WarmUpReport, warm_up
from fastlora.ops.execution_mode import batch_invariant
from fastlora.pool import AdapterPool
from fastlora.pool.cache_invalidation import clear_caches
from fastlora.routing.block import adapters
from fastlora.train import (
    AdapterOptimizers,
    adapter_losses,
    adapter_parameters,
    causal_lm_losses,
    train_adapters,
)
from fastlora.validation import FastLoraError

if _TYPE_CHECKING:
    from peft import (
        AutoPeftModel as AutoPeftModel,
    )
    from peft import (
        AutoPeftModelForCausalLM as AutoPeftModelForCausalLM,
    )
    from peft import (
        AutoPeftModelForFeatureExtraction as AutoPeftModelForFeatureExtraction,
    )
    from peft import (
        AutoPeftModelForQuestionAnswering as AutoPeftModelForQuestionAnswering,
    )
    from peft import (
        AutoPeftModelForSeq2SeqLM as AutoPeftModelForSeq2SeqLM,
    )
    from peft import (
        AutoPeftModelForSequenceClassification as AutoPeftModelForSequenceClassification,
    )
    from peft import (
        AutoPeftModelForTokenClassification as AutoPeftModelForTokenClassification,
    )
    from peft import (
        PeftConfig as PeftConfig,
    )
    from peft import (
        cast_mixed_precision_params as cast_mixed_precision_params,
    )
    from peft import (
        get_base_model_state_dict as get_base_model_state_dict,
    )
    from peft import (
        get_peft_config as get_peft_config,
    )
    from peft import (
        get_peft_model_state_dict as get_peft_model_state_dict,
    )
    from peft import (
        load_peft_weights as load_peft_weights,
    )
    from peft import (
        prepare_model_for_kbit_training as prepare_model_for_kbit_training,
    )
    from peft import (
        set_base_model_state_dict as set_base_model_state_dict,
    )
    from peft import (
        set_peft_model_state_dict as set_peft_model_state_dict,
    )

    from fastlora.integrations.from_peft import inject_adapter_in_model as inject_adapter_in_model
else:

    def __getattr__(name: str) -> object:
        """Return an object that PEFT provides or that was renamed.

        See `fastlora.integrations.from_peft` and `fastlora.deprecation`.
        """
        if name == "refresh":
            _warn_renamed("fastlora.refresh", "fastlora.clear_caches")
            return clear_caches
        if name in _from_peft.NAMES:
            globals()[name] = found = _from_peft.import_from_peft(name)
            return found
        message = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(message, name=name, obj=_sys.modules[__name__])


def __dir__() -> list[str]:
    """Return the package's names, including the names that PEFT provides if PEFT is installed."""
    return sorted({*globals(), *_from_peft.provided_peft_names()})


# PEFT's name for `LoraModel`, so that PEFT code works with only its import changed.
PeftModel = LoraModel

__version__ = "0.1.0"


def _register_checkout_folders_as_packages() -> None:
    """Register the folders `kernels/` and `bench/` of a source checkout as packages.

    The function makes the folders importable as `fastlora.kernels` and `fastlora.bench`. In a
    source checkout, the two folders are next to this package's folder. An installed package
    contains both folders, so nothing is registered. See `setup.py` for the reason why the
    folders have no `__init__.py`.
    """
    checkout = _Path(__file__).resolve().parent.parent
    if not (checkout / "kernels" / "lora_linear.py").is_file():
        return
    for name in ("kernels", "bench"):
        spec = _ModuleSpec(f"fastlora.{name}", None, is_package=True)
        spec.submodule_search_locations = [str(checkout / name)]
        globals()[name] = _sys.modules[spec.name] = _util.module_from_spec(spec)


_register_checkout_folders_as_packages()

__all__ = [
    "AdapterOptimizers",
    "AdapterPool",
    "CordaConfig",
    "Estimate",
    "EvaConfig",
    "FastLoraError",
    "FastLoraLinear",
    "FusionReport",
    "LoftQConfig",
    "LoraConfig",
    "LoraGAConfig",
    "LoraModel",
    "LoraRuntimeConfig",
    "PeftModel",
    "PeftType",
    "RankReduction",
    "Recommendation",
    "TaskType",
    "__version__",
    "adapter_losses",
    "adapter_parameters",
    "adapters",
    "batch_invariant",
    "causal_lm_losses",
    "convert_to_lora",
    "estimate",
    "estimate_gradients",
    "functional",
    "fusion_report",
    "get_eva_state_dict",
    "get_layer_status",
    "get_model_status",
    "get_peft_model",
    "hotswap_adapter",
    "hotswap_adapter_from_state_dict",
    "initialize_lora_eva_weights",
    "patch",
    "prepare_model_for_compiled_hotswap",
    "preprocess_corda",
    "preprocess_loraga",
    "recommend",
    "reduce_intruder_dimension",
    "reduce_rank",
    "clear_caches",
    "replace_lora_weights_loftq",
    "save_as_lora",
    "train_adapters",
    "unpatch",
    "WarmUpReport",
    "warm_up",
]

"""Names from PEFT that `fastlora` also provides if PEFT is installed.

PEFT is imported when one of these names is first used. A script can then import all names from
fastlora that it used to import from PEFT:

* The names in `AS_IN_PEFT` refer to PEFT's own objects. `fastlora.integrations.peft_overrides`
  makes the functions for state dicts accept fastlora models.
* The auto classes load a `fastlora.LoraModel`, where PEFT's own classes load a PEFT model.
* `inject_adapter_in_model` adds patched layers.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from typing import Any

from torch import nn

from fastlora.integrations.patch import patch
from fastlora.integrations.peft_overrides import has_fastlora_layers
from fastlora.model import LoraModel
from fastlora.model.config_checks import PeftType
from fastlora.validation import AdapterStateError, ConfigError

AS_IN_PEFT = (
    "PeftConfig",
    "cast_mixed_precision_params",
    "get_base_model_state_dict",
    "get_peft_config",
    "get_peft_model_state_dict",
    "load_peft_weights",
    "prepare_model_for_kbit_training",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
)
AUTO_CLASSES = (
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
)
NAMES = (*AUTO_CLASSES, *AS_IN_PEFT, "inject_adapter_in_model")


def provided_peft_names() -> tuple[str, ...]:
    """Return the names from PEFT that fastlora also provides.

    They are the names of classes and functions. If PEFT is not installed, the result is empty.
    """
    return NAMES if importlib.util.find_spec("peft") is not None else ()


def import_from_peft(name: str) -> Any:
    """Import an object from PEFT by name.

    The name is one of `NAMES`. For an auto class and for ``inject_adapter_in_model``, the result is
    fastlora's version of PEFT's object.

    Raises:
        ImportError: PEFT is not installed, or the installed version does not have the name.
    """
    try:
        peft: Any = importlib.import_module("peft")
    except ModuleNotFoundError as error:
        if error.name != "peft":
            raise
        raise ImportError(
            f"fastlora.{name} is provided by PEFT, which is not installed; install it with: "
            "pip install peft"
        ) from error
    theirs = getattr(peft, name, None)
    if theirs is None:
        raise ImportError(
            f"fastlora.{name} is provided by PEFT, but the installed PEFT {peft.__version__} does "
            "not include it; upgrade with: pip install --upgrade peft"
        )
    if name in AUTO_CLASSES:
        return _auto_subclass_loading_lora_model(theirs)
    return inject_adapter_in_model if name == "inject_adapter_in_model" else theirs


def inject_adapter_in_model(
    peft_config: Any, model: nn.Module, adapter_name: str = "default", **options: Any
) -> nn.Module:
    """Inject a LoRA adapter into a model in place, as PEFT's function of the same name does.

    For LoRA, this function is a drop-in replacement for PEFT's function. PEFT creates the LoRA
    layers, and `patch` then replaces the class of each supported layer with a subclass, so that the
    layer runs with fastlora. Use `unpatch` to restore PEFT's own layers. The result is the model
    itself, without a `peft.PeftModel` around it. `fastlora.adapters` accepts the model if all
    adapted modules are linear layers.

    Args:
        peft_config: A `fastlora.LoraConfig`, or any PEFT config for LoRA.
        model: The model.
        adapter_name: The name of the adapter.
        **options: Additional keyword arguments for PEFT's function.

    Raises:
        AdapterStateError: If the model has layers of a `LoraModel`. The model is unchanged.
        ConfigError: If the config is not for LoRA. The model is unchanged.
    """
    kind = getattr(peft_config, "peft_type", None)
    if kind != PeftType.LORA:
        raise ConfigError(
            f"peft_type is {getattr(kind, 'value', kind)!r}; expected 'LORA' (for other methods, "
            "use peft.inject_adapter_in_model)"
        )
    if has_fastlora_layers(model):
        raise AdapterStateError(
            "inject_adapter_in_model() got a model with LoRA layers of fastlora; add the adapter "
            "with the add_adapter() method of its LoraModel"
        )
    peft: Any = importlib.import_module("peft")
    adapted: nn.Module = peft.inject_adapter_in_model(peft_config, model, adapter_name, **options)
    patch(adapted)
    return adapted


def _auto_subclass_loading_lora_model(peft_auto_class: type[Any]) -> type[Any]:
    """Return a subclass of a PEFT auto class whose ``from_pretrained`` returns a `LoraModel`."""
    parameters = inspect.signature(LoraModel.from_pretrained).parameters

    def from_pretrained(model: nn.Module, model_id: str, **options: Any) -> LoraModel:
        # The options also contain those of the base model, which has already been loaded.
        known = {name: value for name, value in options.items() if name in parameters}
        return LoraModel.from_pretrained(model, model_id, **known)

    # PEFT compares the name of the class with the one that it expects for the config's task.
    name = peft_auto_class._target_peft_class.__name__
    loaded = type(name, (), {"from_pretrained": staticmethod(from_pretrained)})
    own_name = peft_auto_class.__name__
    text = f"""PEFT's `{own_name}` with a `from_pretrained` that returns a `LoraModel`."""
    return type(
        own_name,
        (peft_auto_class,),
        {"_target_peft_class": loaded, "__doc__": text, "__module__": "fastlora"},
    )

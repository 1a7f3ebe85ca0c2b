"""`LoraConfig`: the configuration of an adapter, compatible with PEFT.

Fields, defaults, and the file format are those of PEFT. All values are checked when a config is
created. A field that fastlora does not support must have its default value. Otherwise, an error
that names all these fields is raised, so that no setting is silently ignored.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from fastlora.deprecation import renamed_arguments
from fastlora.init import InitConfigField, InitMethod, all_init_methods, find_init_method
from fastlora.init.configs import CordaConfig, EvaConfig, LoraGAConfig, convert_init_config
from fastlora.model.adapter_files import (
    CONFIG_NAME,
    MAX_CONFIG_BYTES,
    config_file_bytes_for_config_only_save,
    read_config_matching_weights,
)
from fastlora.model.atomic_files import atomic_replace_file, folder_lock
from fastlora.model.base_modules import strip_wrapper_prefixes
from fastlora.model.config_checks import PeftType, TaskType, check_and_normalize_fields
from fastlora.model.peft_config_methods import PeftConfigMethods
from fastlora.patterns import (
    count_toward_matching_time_limit,
    first_pattern_matching_name_suffix,
)
from fastlora.user_warnings import warn
from fastlora.validation import PEFT_MODEL_ALTERNATIVE, ConfigError, error_prefix

# Fields that fastlora does not support -> the values that leave the feature switched off.
_NOT_IMPLEMENTED: dict[str, tuple[Any, ...]] = {
    "megatron_config": (None, {}),
    "megatron_core": ("megatron.core", None),
    "velora_config": (None,),
    "alora_invocation_tokens": (None,),
    "use_qalora": (False,),
    "qalora_group_size": (16,),
    "monteclora_config": (None,),
    "use_bdlora": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
}
# Fields without an effect on an adapter that already has weights. They are settings of features
# that other fields enable.
_IDLE_AFTER_INIT = ("megatron_core", "qalora_group_size")

# The key by which Unsloth records the order of the columns of lora_B on stacked parameters, and the
# value for PEFT's order, in which the expert is the fastest index.
_LAYOUT_OF_UNSLOTH, _LAYOUT_OF_PEFT = "lora_B_layout", "rank_major"

# "new": the adapter is about to be initialized. "load": its weights come from a file.
# "live": it is already in a model, and its initialization has already changed the base weights if
# it changes them at all.
Stage = Literal["new", "load", "live"]
_T = TypeVar("_T", bound="LoraConfig")


@dataclass
class LoraRuntimeConfig:
    """Runtime options of a `LoraConfig`, as in PEFT.

    They apply only to the current run and are never saved.

    Args:
        ephemeral_gpu_offload: Accepted for compatibility with PEFT and ignored. PEFT uses it only
            to compute DoRA's weight norm.
    """

    ephemeral_gpu_offload: bool = False


@dataclass
class LoraConfig(PeftConfigMethods):
    """The configuration of a LoRA adapter.

    The fields and defaults are those of PEFT 0.21.2.

    Args:
        task_type: The task, such as ``"CAUSAL_LM"`` or ``"SEQ_CLS"``, as in PEFT; or None.
        peft_type: Always ``"LORA"``, as a `PeftType`.
        peft_version: The version of PEFT that wrote the config. In a new config, it is the version
            of the installed PEFT if PEFT is imported, or else the version that fastlora follows.
        inference_mode: Whether the adapter is frozen.
        r: The rank, at least 1.
        target_modules: The modules to adapt: a list of names, a regular expression that must match
            the whole name of a module, ``"all-linear"``, or None for the default of the model's
            architecture. An entry of a list matches a module with exactly this name, and every
            module with a name that ends with a dot and the entry. If ``target_parameters`` is set
            and the architecture has no default, None adapts no module.
        exclude_modules: Modules to exclude from the targets: a list of names or a regular
            expression, matched in the same way as ``target_modules``.
        lora_alpha: Determines the scaling, which is ``lora_alpha / r``, or
            ``lora_alpha / sqrt(r)`` with ``use_rslora``.
        lora_dropout: The dropout probability in [0, 1), applied only to the input of the LoRA
            branch.
        fan_in_fan_out: Whether the base weight is stored as ``[in, out]``.
        bias: Which biases of the base model are trained and saved: ``"none"``, ``"all"``, or
            ``"lora_only"`` for the biases of the adapted modules.
        use_rslora: Whether to use rank-stabilized LoRA. See ``lora_alpha``.
        modules_to_save: Modules that are trained in full. The adapter owns a copy of each.
        init_lora_weights: The initialization: True (A uniform, B zero), ``"gaussian"`` (A normal,
            B zero), False (both random, so that a new adapter changes the output),
            ``"orthogonal"``, a method that uses the base weight (``"pissa"``, ``"pissa_niter_4"``,
            ``"olora"``, ``"mica"``, ``"loftq"``), or a method that uses data (``"corda"``,
            ``"eva"``, ``"lora_ga"``). See ``docs/initialization.md``.
        layers_to_transform: The indices of the layers to adapt. If set, neither ``target_modules``
            nor the architecture's default for it may be a string.
        layers_pattern: The name of the list of layers that ``layers_to_transform`` refers to.
        rank_pattern: A mapping from regular expressions to ranks. An expression applies to a module
            or a target parameter if it matches the whole name, or the part of the name after one of
            the dots. The first match is used.
        alpha_pattern: A mapping from regular expressions to values of ``lora_alpha``, with the same
            rules as ``rank_pattern``.
        loftq_config: Settings for ``"loftq"``, stored as a dict.
        eva_config: Settings for ``"eva"``.
        corda_config: Settings for ``"corda"``.
        lora_ga_config: Settings for ``"lora_ga"``.
        use_dora: Whether to train a magnitude for each output feature
            (DoRA, https://arxiv.org/abs/2402.09353).
        layer_replication: Ranges ``(first, end)`` of layer indices, with ``end`` excluded, that
            make up a deeper model. Copies of a layer share its weights and have their own adapters.
        trainable_token_indices: The rows of the input embedding to train, or a mapping from module
            names to the rows to train in these modules.
        ensure_weight_tying: Whether modules that the model ties to its input embedding share the
            embedding's adapter.
        target_parameters: The parameters of two or three dimensions to adapt in addition to
            ``target_modules``: a list of names, which match in the same way as those of modules.
            Weights of experts that are stacked in one parameter are examples. For some model
            types, names in ``target_modules`` also select them. See ``docs/differences.md``.
        lora_bias: Whether B has a bias. The bias is multiplied by the scaling like the rest of the
            LoRA branch. Not supported together with DoRA.
        runtime_config: Settings that apply only to the current run and are never saved.

    Raises:
        ConfigError: If a value is invalid, if two values contradict each other, or if a field is
            set that fastlora does not support. The message names the field and its value, and says
            what to do.
    """

    task_type: TaskType | str | None = None
    peft_type: PeftType | str | None = PeftType.LORA
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    r: int = 8
    target_modules: set[str] | list[str] | str | None = None
    exclude_modules: set[str] | list[str] | str | None = None
    lora_alpha: int | float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, int | float] = field(default_factory=dict)
    megatron_config: dict[str, Any] | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    loftq_config: Any = field(default_factory=dict)
    eva_config: EvaConfig | dict[str, Any] | None = None
    corda_config: CordaConfig | dict[str, Any] | None = None
    lora_ga_config: LoraGAConfig | dict[str, Any] | None = None
    use_dora: bool = False
    velora_config: Any = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: Any = None
    layer_replication: list[tuple[int, int]] | None = None
    runtime_config: LoraRuntimeConfig = field(default_factory=LoraRuntimeConfig)
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    use_bdlora: Any = None
    arrow_config: Any = None
    kasa_config: Any = None
    ensure_weight_tying: bool = False

    def __post_init__(self) -> None:
        self._finish("new")

    def _finish(self, stage: Stage) -> None:
        for name, value in check_and_normalize_fields(vars(self)).items():
            setattr(self, name, value)
        if self.peft_version is None and stage != "load":
            self.peft_version = self._peft_version_to_save()
        self.check_supported(stage)
        chosen = self.init
        for init in all_init_methods():
            if init.settings is not None:
                self._normalize_init_settings(init, init.settings, init is chosen, stage)
        if stage == "new" and chosen.converts:
            self._warn_of_conversion()

    def _normalize_init_settings(
        self, init: InitMethod, settings_field: InitConfigField, is_selected: bool, stage: Stage
    ) -> None:
        """Normalize and check the settings of an initialization method in the config.

        For a new adapter, a warning is emitted if settings are given for a method that is not
        selected, or if default settings are used for the selected method.

        Args:
            init: The initialization method.
            settings_field: A description of the method's settings field.
            is_selected: Whether ``init_lora_weights`` selects this method.
            stage: See `check_supported`.

        Raises:
            ConfigError: If the settings are invalid, or if the adapter is new and the selected
                method requires settings, but none are given.
        """
        field_name = settings_field.field
        made = convert_init_config(getattr(self, field_name) or None, settings_field.cls)
        if made is None and is_selected and settings_field.missing == "raise" and stage == "new":
            raise ConfigError(
                f"`{field_name}` must be specified when `init_lora_weights` is {init.name!r}."
            )
        if made is None and is_selected and settings_field.missing == "default":
            if stage == "new":
                warn(
                    f"`init_lora_weights` is {init.name!r} but `{field_name}` is not specified. "
                    f"Using default {init.title} config.",
                )
            made = settings_field.cls()
        if made is not None and not is_selected and stage == "new":
            warn(
                f"`{field_name}` specified but will be ignored when `init_lora_weights` is not "
                f"{init.name!r}.",
            )
        if settings_field.as_dict:
            made = {} if made is None or not is_selected else dataclasses.asdict(made)
        setattr(self, field_name, made)

    def _warn_of_conversion(self) -> None:
        if self.use_rslora and (self.rank_pattern or self.alpha_pattern):
            warn(
                "Using Rank-Stabilized LoRA with rank_pattern/alpha_pattern and post-training "
                f"conversion is not supported: {self.init.title} changes the base weights, and "
                "save_pretrained() will not accept path_initial_model_for_weight_conversion. To "
                "convert the adapter after training, leave use_rslora or the patterns at their "
                "defaults",
            )

    def check_supported(self, stage: Stage = "new") -> None:
        """Raise an error if the config uses features that fastlora does not support.

        The config's fields for these features must have their default values. Fields that have no
        effect at the given stage are not checked.

        Args:
            stage: ``"new"`` if the adapter is about to be initialized, ``"load"`` if its weights
                come from a file, or ``"live"`` if it is already in a model.

        Raises:
            ConfigError: If a field for an unsupported feature is set. The message names all of
                these fields.
        """
        idle = _IDLE_AFTER_INIT if stage != "new" else ()
        unset = {
            name: getattr(self, name)
            for name, defaults in _NOT_IMPLEMENTED.items()
            if name not in idle and getattr(self, name) not in defaults
        }
        if unset:
            names = ", ".join(f"{name}={value!r}" for name, value in unset.items())
            raise ConfigError(f"fastlora does not support {names}; {PEFT_MODEL_ALTERNATIVE}")

    def check_plain(self, what: str) -> None:
        """Check that the adapter can be treated as plain LoRA on unchanged base weights.

        Some initialization methods change the base weights, and the adapter is then trained on the
        changed weights. If this change to the base weights must be repeated when the adapter is
        loaded, an error is raised. If PEFT does not repeat the change to the base weights either,
        only a warning is emitted. DoRA, rank patterns, and other features are allowed.

        Args:
            what: A description of the operation's result, as the subject of the message.

        Raises:
            ConfigError: If the initialization method changes the base weights and the change must
                be repeated when the adapter is loaded.
        """
        if not self.init.changes_base:
            return
        if not self.init.must_repeat:
            warn(
                f"init_lora_weights={self.init_lora_weights!r} changed the base weights for "
                f"training; {what} adds the adapter to the current base weights, as in PEFT",
            )
        else:
            raise ConfigError(
                f"init_lora_weights={self.init_lora_weights!r} changed the base weights before "
                f"this adapter was trained, and {what} does not reproduce this change; first save "
                "the adapter as plain LoRA with save_pretrained(..., "
                "path_initial_model_for_weight_conversion=<folder of the untrained adapter>)"
            )

    @property
    def init(self) -> InitMethod:
        """The initialization method that ``init_lora_weights`` selects."""
        return find_init_method(self.init_lora_weights)

    @property
    def init_config(self) -> object | None:
        """The settings of the selected initialization method.

        The value is None if there are no settings.
        """
        where = self.init.settings
        return (
            None
            if where is None
            else convert_init_config(getattr(self, where.field) or None, where.cls)
        )

    def shapes_only(self) -> LoraConfig:
        """Return a copy of the config without its initialization settings.

        The copy determines the shapes of an adapter's tensors, but not their values, because it
        uses the default initialization method. Such a config is used, for example, if the adapter's
        weights are loaded afterwards.

        Raises:
            ConfigError: If fastlora cannot load an adapter with this config.
        """
        self.check_supported("load")
        default = LoraConfig()
        fields = (init.settings.field for init in all_init_methods() if init.settings is not None)
        idle = {name: getattr(default, name) for name in (*_IDLE_AFTER_INIT, *fields)}
        return dataclasses.replace(self, init_lora_weights=True, **idle)

    def _register_custom_module(self, mapping: Mapping[type, type]) -> None:
        """Register custom LoRA layer classes for module classes.

        The registration is not saved with the config. To load an adapter that uses custom classes,
        register them again on a config, and pass this config as ``config=``. PEFT defines the
        method's name.

        Args:
            mapping: A mapping from module classes to subclasses of `fastlora.layers.LoraLayer`. The
                subclass is called with the module as its only argument.
        """
        self._custom_modules = {**self.custom_modules, **mapping}

    @property
    def custom_modules(self) -> dict[type, type]:
        """A dict that maps module classes to LoRA layer classes. See `_register_custom_module`.

        The first entry with a class that a module is an instance of determines its LoRA layer.
        """
        named: dict[type, type] | None = self.__dict__.get("_custom_modules")
        return named or {}

    def rank_for(self, name: str) -> int:
        """Return the rank for a module.

        The first pattern in ``rank_pattern`` that matches the name determines the rank. If no
        pattern matches, the rank is ``r``.

        Args:
            name: The name of a module or target parameter.
        """
        patterns = self.rank_pattern
        name = self._name_for_rank_and_alpha_patterns(name) if patterns else name
        key = (
            first_pattern_matching_name_suffix("rank_pattern", patterns, name) if patterns else None
        )
        return self.r if key is None else patterns[key]

    def alpha_for(self, name: str) -> int | float:
        """Return the LoRA alpha for a module.

        The first pattern in ``alpha_pattern`` that matches the name determines the alpha. If no
        pattern matches, the alpha is ``lora_alpha``.

        Args:
            name: The name of a module or target parameter.
        """
        patterns = self.alpha_pattern
        name = self._name_for_rank_and_alpha_patterns(name) if patterns else name
        key = (
            first_pattern_matching_name_suffix("alpha_pattern", patterns, name)
            if patterns
            else None
        )
        return self.lora_alpha if key is None else patterns[key]

    def _name_for_rank_and_alpha_patterns(self, module_or_parameter_name: str) -> str:
        """Return the name to match against ``rank_pattern`` and ``alpha_pattern``.

        The given name is that of a module or target parameter. If the weight of the module is a
        target parameter, the result is the name of the weight, as in PEFT. Otherwise, the result is
        the given name. The prefixes of wrapper modules are left out, as in adapter files.
        """
        name = strip_wrapper_prefixes(module_or_parameter_name)
        weight, entries = f"{name}.weight", self.target_parameters or ()
        # A config may list any number of names.
        with count_toward_matching_time_limit("target_parameters"):
            return weight if any(f".{weight}".endswith(f".{e}") for e in entries) else name

    def _set_layer_ranks_and_alphas(
        self, ranks: Mapping[str, int], alphas: Mapping[str, int | float]
    ) -> None:
        """Set the patterns so that each of the given layers has the given rank and alpha.

        ``rank_pattern`` and ``alpha_pattern`` are replaced. They contain only the layers with
        values other than ``r`` and ``lora_alpha``. Call this method after ``target_parameters`` is
        set, because this field determines the names that the patterns are matched against.

        Args:
            ranks: A mapping from the names of modules and target parameters to ranks.
            alphas: A mapping from the same names to values of ``lora_alpha``.
        """

        def pattern(name: str) -> str:
            return f"^{re.escape(self._name_for_rank_and_alpha_patterns(name))}"

        self.rank_pattern = {pattern(n): rank for n, rank in ranks.items() if rank != self.r}
        self.alpha_pattern = {pattern(n): a for n, a in alphas.items() if a != self.lora_alpha}

    def scaling_for(self, name: str) -> float:
        """Return the LoRA scaling for a module.

        The scaling is the module's alpha divided by its rank or, with ``use_rslora``, by the square
        root of the rank.

        Args:
            name: The name of a module or target parameter.
        """
        rank = self.rank_for(name)
        return self.alpha_for(name) / (math.sqrt(rank) if self.use_rslora else rank)

    def to_dict(self) -> dict[str, Any]:
        """Return the config as a dict.

        The dict can be serialized as JSON. Sets are converted to sorted lists, and
        ``runtime_config`` is left out.
        """
        data = dataclasses.asdict(self)
        del data["runtime_config"]
        return {key: sorted(v) if isinstance(v, set) else v for key, v in data.items()}

    @classmethod
    def from_dict(cls: type[_T], data: Mapping[str, Any], *, for_loading: bool = False) -> _T:
        """Create a config from a dict.

        The dict has the fields of an ``adapter_config.json``. The values are checked. Unknown keys,
        such as those of a newer PEFT version, are dropped with a single warning, as in PEFT.

        Args:
            data: A mapping from field names to values.
            for_loading: Whether the adapter's weights come from a file. The checks are then more
                tolerant: settings of the initialization are not required, but those that are given
                are checked. ``init_lora_weights`` keeps its value.

        Raises:
            ConfigError: See `LoraConfig`.
        """
        if for_loading and data.get("peft_type", "LORA") is None:
            raise ConfigError("peft_type is None; expected 'LORA'")
        return cls._build(data, "load" if for_loading else "new")

    @classmethod
    @renamed_arguments(initialised="initialized")
    def from_peft(cls: type[_T], peft_config: Any, *, initialized: bool = False) -> _T:
        """Create a config from a ``peft.LoraConfig``.

        Args:
            peft_config: PEFT's config object.
            initialized: Whether the adapter is already in a model, and is therefore not initialized
                again. Settings of the initialization are then not required, but those that are
                given are checked.

        Raises:
            ConfigError: If the object is not a config for LoRA, or has a value that `LoraConfig`
                does not accept.
        """
        if not callable(getattr(peft_config, "to_dict", None)):
            raise ConfigError(f"expected a LoraConfig, got {peft_config!r}")
        kind = getattr(peft_config, "peft_type", None)
        if kind is not None and kind != PeftType.LORA:
            kind = getattr(kind, "value", kind)
            raise ConfigError(f"peft_type is {kind!r}; expected 'LORA' ({PEFT_MODEL_ALTERNATIVE})")
        data = dict(peft_config.to_dict())
        config = cls._build(data, "live" if initialized else "new")
        runtime = getattr(peft_config, "runtime_config", None)
        offload = bool(getattr(runtime, "ephemeral_gpu_offload", False))
        config._register_custom_module(getattr(peft_config, "_custom_modules", None) or {})
        config.runtime_config = LoraRuntimeConfig(ephemeral_gpu_offload=offload)
        return config

    @classmethod
    def _build(cls: type[_T], data: Mapping[str, Any], stage: Stage) -> _T:
        config = object.__new__(cls)  # __init__ would apply the checks for a new adapter
        fields = {f.name: f for f in dataclasses.fields(cls)}
        for name, f in fields.items():
            if name in data and name != "runtime_config":
                value = data[name]
            elif f.default_factory is not dataclasses.MISSING:
                value = f.default_factory()
            else:
                value = f.default
            setattr(config, name, value)
        config._finish(stage)
        layout = data.get(_LAYOUT_OF_UNSLOTH, _LAYOUT_OF_PEFT)
        if config.target_parameters and layout != _LAYOUT_OF_PEFT:
            raise ConfigError(
                f"{_LAYOUT_OF_UNSLOTH}={layout!r}: with this setting, the lora_B of each parameter "
                f"in {config.target_parameters} is stored in an order that differs from PEFT's; "
                f"the only supported value is {_LAYOUT_OF_PEFT!r}. For 'grouped_by_expert' with E "
                "experts and rank r, replace each lora_B with "
                "lora_B.unflatten(1, (E, r)).transpose(1, 2).flatten(1)"
            )
        unknown = sorted(set(data) - set(fields) - {_LAYOUT_OF_UNSLOTH})
        if unknown:
            warn(
                f"ignoring the config keys {unknown}: LoraConfig has no such fields; "
                "the file is probably from a newer PEFT",
            )
        if "runtime_config" in data:
            warn("ignoring runtime_config: it is never read from a file")
        return config

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        auto_mapping: dict[str, Any] | None = None,
        auto_mapping_dict: dict[str, Any] | None = None,
    ) -> None:
        """Save the config to a folder.

        The file is named ``adapter_config.json``.

        Args:
            save_directory: The folder. It is created if it does not exist.
            auto_mapping: The class and the library of the base model. PEFT records them if the
                config has no task type.
            auto_mapping_dict: The name under which PEFT's models pass ``auto_mapping``. Used if
                ``auto_mapping`` is None.
        """
        auto_mapping = auto_mapping if auto_mapping is not None else auto_mapping_dict
        text = self.to_json(auto_mapping=auto_mapping)
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        with folder_lock(folder), atomic_replace_file(folder / CONFIG_NAME) as partial:
            partial.write_bytes(
                config_file_bytes_for_config_only_save(folder, text.encode("utf-8"))
            )

    def to_json(self, **overrides: Any) -> str:
        """Return the config as a JSON string.

        The string has the format of ``adapter_config.json``.

        Args:
            **overrides: Values that replace the config's own values. A value of None is ignored.

        Raises:
            ConfigError: If the text is longer than the maximum that `from_pretrained` reads.
        """
        data = self.to_dict() | {key: v for key, v in overrides.items() if v is not None}
        # Only the fields are sorted. PEFT sorts the patterns too, which can change the first match.
        text = json.dumps({key: data[key] for key in sorted(data)}, indent=2)
        # The text is ASCII, so its length is its size in bytes.
        if len(text) > MAX_CONFIG_BYTES:
            raise ConfigError(
                f"{CONFIG_NAME} would be {len(text)} bytes long, expected at most "
                f"{MAX_CONFIG_BYTES}"
            )
        return text

    @classmethod
    def from_pretrained(
        cls: type[_T], folder: str | os.PathLike[str], *, for_loading: bool = False
    ) -> _T:
        """Load an adapter's config from a local folder.

        The config is usually read from ``adapter_config.json``. If a save was interrupted after it
        replaced the weights file and before it replaced ``adapter_config.json``, the config file
        does not match the weights. In this case, the config that was saved with the weights is read
        from the metadata of the weights file. To read the config file itself, use `from_json_file`.

        Args:
            folder: The adapter folder.
            for_loading: Whether the adapter's weights are loaded from the folder as well. The
                checks are then more lenient. See `from_dict`.

        Raises:
            CheckpointError: If the config file is missing or is not a JSON object.
            ConfigError: If a value is not accepted.
        """
        data = read_config_matching_weights(Path(folder))
        with error_prefix(Path(folder) / CONFIG_NAME):
            return cls.from_dict(data, for_loading=for_loading)

"""Reads adapters from PEFT folders or state dicts, validates them, and packs them for a pool."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from fastlora.layers.adapted_parameters import file_prefixes_by_parameter
from fastlora.layers.base_layers import dense_weight
from fastlora.model.adapter_files import CONFIG_NAME, MAX_CONFIG_BYTES, ConfigAndHeaderSizeLimits
from fastlora.model.adapter_folder import (
    AdapterContents,
    OpenAdapterFolder,
    ParsedAdapterKey,
    Tensors,
    open_adapter_folder,
    parse_and_check_tensors,
)
from fastlora.model.base_modules import base_module_of, modules_with_original_names
from fastlora.model.config import LoraConfig
from fastlora.model.expert_files import convert_expert_factors, may_need_expert_conversion
from fastlora.model.plan import check_targets_of_parameters
from fastlora.model.stacked_experts import base_parameters_outside_auxiliary_wrappers
from fastlora.model.targets import NO_TARGETS, SelectedTargets, select_targets
from fastlora.model.tensor_file import MAX_HEADER_BYTES
from fastlora.patterns import bounded_matching
from fastlora.pool.packed_adapter import AdapterPacker, PackedAdapter
from fastlora.validation import (
    AdapterTooLargeError,
    CheckpointError,
    ConfigError,
    TargetNotFoundError,
    UnsupportedLayerError,
    error_prefix,
    near_names,
)

# Maximum number of cached lists of module names, one for each combination of target settings.
_MAX_CACHED_TARGETS = 256
# Bytes allowed for the parts of a config and of a header's metadata that do not depend on modules.
_CONFIG_BYTES, _METADATA_BYTES = 64 << 10, 256 << 10
# A config contains the name of a module up to three times, and a header lists up to four tensors of
# a module. These are the bytes that each occurrence takes in addition to the name.
_NAMED_BYTES, _TENSOR_BYTES = 64, 160


class UnsupportedAdapterError(CheckpointError):
    """A pool does not support an adapter, although the adapter is not damaged."""


class TensorTargetAndKind(NamedTuple):
    """The target and the kind of an adapter tensor.

    The target and the kind determine the location of the tensor in a packed adapter.

    Attributes:
        row: Index of the target in the pool.
        kind: Kind of the tensor, an entry of `BLOCK_KINDS`.
        name: Name that the patterns of the config match for this target.
    """

    row: int
    kind: str
    name: str


_BLOCK_OF = {
    "lora_A": "lora_a",
    "lora_B": "lora_b",
    "lora_B_bias": "lora_bias",
    "magnitude": "magnitude",
}
_UNSUPPORTED = {
    "saved": "a full copy of a module (modules_to_save)",
    "duplicate": "a full copy of a module (modules_to_save)",
    "base": "a changed base weight (an embedding saved with the adapter)",
    "bias": "a trained bias of the base model",
    "tokens": "a set of embedding rows (trainable_token_indices)",
    "lora_embedding_A": "a LoRA factor of an embedding",
    "lora_embedding_B": "a LoRA factor of an embedding",
}


class AdapterReader:
    """Reads adapters into the form that a pool stores.

    An adapter is read from a folder or from a state dict. The reader validates the contents of the
    adapter and packs its tensors. Any thread may use the reader, because the reader stores no
    adapters.

    Args:
        model: The base model, in which the pool's layers have replaced the target modules.
        packer: Packs the tensors. Its targets are the pool's modules.
        max_rank: Largest accepted rank, or None for any rank.
        max_bytes: Largest accepted size of an adapter's tensor file in bytes, or None for any size.
        root: Folder that must contain the files of every adapter after symbolic links are resolved,
            or None for no restriction.
    """

    def __init__(
        self,
        model: nn.Module,
        packer: AdapterPacker,
        *,
        max_rank: int | None,
        max_bytes: int | None,
        root: Path | None,
    ) -> None:
        self._model, self._packer, self._root = model, packer, root
        self._max_rank, self._max_bytes = max_rank, max_bytes
        self._limits = _config_and_header_limits(
            {target.name: target.num_matrices for target in packer.targets}
        )
        self._index = {target.name: i for i, target in enumerate(packer.targets)}
        self._has_stacks = any(target.num_matrices > 1 for target in packer.targets)
        # Maps the digest of a config's target settings and of the layers in a file to the targets
        # that they select in this model, and the names of their parameters. The parameters
        # themselves may be replaced. Adapters with equal settings share an entry.
        self._selected: dict[bytes, tuple[SelectedTargets, list[str]]] = {}

    def check_folder(self, folder: Path) -> LoraConfig:
        """Check an adapter folder, and return the adapter's config.

        The tensors are not read.

        Raises:
            CheckpointError: The folder does not contain an adapter that this pool supports.
        """
        with self._open_checked(folder) as opened:
            return opened.config

    def read_folder(self, folder: Path) -> PackedAdapter:
        """Read an adapter folder, and return the packed adapter.

        The contents are validated.

        Raises:
            CheckpointError: The adapter is damaged, has contents that a pool does not support, or
                does not match the model. The message names the file and the tensor, and says what
                was found and what was expected.
        """
        with self._open_checked(folder) as opened:
            header = opened.header
            layers = {module for module, _ in header.keys.values()}
            if self._has_stacks and may_need_expert_conversion(self._model, layers):
                return self._convert_experts_and_pack(opened.load(), str(folder))
            locations = self._update_config_and_locate_tensors(
                header.config, header.keys, header.tensor_infos, str(folder)
            )
            return self._pack(header.config, locations, opened.load().tensors, str(folder))

    @contextlib.contextmanager
    def _open_checked(self, folder: Path) -> Iterator[OpenAdapterFolder]:
        """Context manager that opens an adapter folder and checks its files.

        The pool must support the config, and the config and the tensor file must be within the
        pool's limits. The context manager yields the open folder. Inside the ``with`` block, the
        time and memory for matching the config's patterns are limited.
        """
        with bounded_matching(), open_adapter_folder(folder, self._root, self._limits) as opened:
            self._check_config(opened.config, str(folder / CONFIG_NAME))
            self._check_bytes(opened.weights_file_size, str(folder))
            yield opened

    def read_state_dict(
        self, name: str, tensors: Mapping[str, torch.Tensor], config: Any
    ) -> PackedAdapter:
        """Read an adapter from a state dict, and return the packed adapter.

        The state dict uses PEFT's keys. The contents are validated.

        Args:
            name: Name of the adapter, for error messages.
            tensors: The state dict.
            config: A `fastlora.LoraConfig`, a PEFT `LoraConfig`, or a mapping of its fields.

        Raises:
            ConfigError: The config is missing or invalid.
            CheckpointError: As in `read_folder`.
        """
        source = f"the state dict of {name!r}"
        if not isinstance(config, Mapping) and not callable(getattr(config, "to_dict", None)):
            raise ConfigError(
                f"{source} requires a LoraConfig in the config argument, got {config!r}"
            )
        fields = config if isinstance(config, Mapping) else config.to_dict()
        config = LoraConfig.from_dict(fields, for_loading=True)
        for key, value in tensors.items():
            if not isinstance(value, torch.Tensor):
                raise CheckpointError(
                    f"{source}: {key!r} is a {type(value).__name__}, expected a tensor"
                )
            if value.is_meta or value.layout != torch.strided:
                kind = "on the meta device" if value.is_meta else f"of layout {value.layout}"
                raise CheckpointError(f"{source}: {key!r} is {kind}, expected a dense tensor")
        tensors = {key: value.detach() for key, value in tensors.items()}
        self._check_config(config, source)
        self._check_bytes(sum(tensor.nbytes for tensor in tensors.values()), source)
        keys = parse_and_check_tensors(config, tensors, source)
        return self._convert_experts_and_pack(
            AdapterContents(Path(source), config, keys, tensors), source
        )

    def _convert_experts_and_pack(self, file: AdapterContents, source: str) -> PackedAdapter:
        """Convert the factors of individual experts, and return the packed adapter.

        The factors of individual experts become factors for the model's stacked parameters. If the
        pool has no stacks, nothing is converted.
        """
        if self._has_stacks:
            file = convert_expert_factors(self._model, file)
        config, tensors = file.config, file.tensors
        locations = self._update_config_and_locate_tensors(config, file.keys, tensors, source)
        return self._pack(config, locations, tensors, source)

    def _check_bytes(self, nbytes: int, source: str) -> None:
        if self._max_bytes is not None and nbytes > self._max_bytes:
            raise AdapterTooLargeError(
                f"{source}: the adapter's size is {nbytes} bytes, which exceeds the pool's "
                f"max_adapter_bytes={self._max_bytes}",
                "max_adapter_bytes",
            )

    def _check_rank(self, what: str, rank: int) -> None:
        if self._max_rank is not None and rank > self._max_rank:
            raise AdapterTooLargeError(
                f"{what} exceeds the pool's max_rank={self._max_rank}", "max_rank"
            )

    def _check_config(self, config: LoraConfig, source: str) -> None:
        try:
            config.check_plain("an adapter pool")
        except ConfigError as error:
            raise UnsupportedAdapterError(f"{source}: {error}") from error
        if config.modules_to_save:
            raise UnsupportedAdapterError(
                f"{source}: adapter pools do not support modules_to_save={config.modules_to_save}, "
                "because all rows of a batch share everything except the LoRA factors"
            )
        if config.bias != "none":
            raise UnsupportedAdapterError(
                f"{source}: adapter pools do not support bias={config.bias!r}, because all rows of "
                "a batch share the base model's biases; expected bias='none'"
            )
        if config.trainable_token_indices:
            raise UnsupportedAdapterError(
                f"{source}: adapter pools do not support trainable_token_indices, because all rows "
                "of a batch share the base model's embeddings"
            )
        if config.layer_replication:
            raise UnsupportedAdapterError(
                f"{source}: adapter pools do not support layer_replication, because all rows of a "
                "batch share the base model's layers"
            )
        # If a pattern changes ranks, they are checked on the factors instead.
        if not config.rank_pattern:
            self._check_rank(f"{source}: r={config.r}", config.r)

    def _update_config_and_locate_tensors(
        self,
        config: LoraConfig,
        keys: Mapping[str, ParsedAdapterKey],
        tensors: Tensors,
        source: str,
    ) -> dict[str, TensorTargetAndKind]:
        """Store the selected parameters in the config, and find the location of each tensor.

        The target and the kind of a tensor determine its location in the packed adapter. For the
        changes to the config, see `SelectedParameters.store_targets_and_patterns_in`.

        Returns:
            A dict that maps the key of each tensor to its location.

        Raises:
            CheckpointError: A tensor is not supported or does not match the pool's modules, or
                factors are missing.
        """
        locations: dict[str, TensorTargetAndKind] = {}
        names = [target.name for target in self._packer.targets]
        with error_prefix(source):
            selected = self._targets_in_model(config, {module for module, _ in keys.values()})
            parameters = self._adapted_parameter_and_rank_by_file_layer(config, selected)
        for key, (module, kind) in keys.items():
            if kind in _UNSUPPORTED:
                raise UnsupportedAdapterError(
                    f"{source}: {key!r} is {_UNSUPPORTED[kind]}, which an adapter pool does not "
                    "support because all rows of a batch would share the tensor"
                )
            target, name, rank = parameters.get(module, (module, module, None))
            index = self._index.get(target)
            if rank is None and config.target_parameters:  # Ranks have not been checked yet.
                rank = config.rank_for(module)
            if index is None:
                with error_prefix(f"{source}: {key!r}"):
                    raise self._unknown_target_error(target, module in parameters)
            self._check_shape(index, kind, rank, tuple(tensors[key].shape), key, source)
            locations[key] = TensorTargetAndKind(index, _BLOCK_OF[kind], name)
        found = {each.row for each in locations.values()}
        with error_prefix(source):
            self._check_selected_targets_have_factors(
                selected, {each.name for each in locations.values()}
            )
        for i in found if config.use_dora else ():  # DoRA's norm needs the weight
            try:
                dense_weight(base_module_of(self._model.get_submodule(names[i])))
            except UnsupportedLayerError as error:
                raise CheckpointError(f"{source}: {names[i]!r}: {error}") from error
        return locations

    def _pack(
        self,
        config: LoraConfig,
        locations: Mapping[str, TensorTargetAndKind],
        tensors: Mapping[str, torch.Tensor],
        source: str,
    ) -> PackedAdapter:
        blocks: dict[int, dict[str, torch.Tensor]] = {}
        for key, each in locations.items():
            blocks.setdefault(each.row, {})[each.kind] = tensors[key]
        with error_prefix(source):
            scaling = {each.row: config.scaling_for(each.name) for each in locations.values()}
        return self._packer.pack(blocks, scaling, source)

    def _unknown_target_error(self, target: str, is_parameter: bool) -> CheckpointError:
        if is_parameter or any(name == target for name, _ in self._model.named_modules()):
            fields = "target_parameters" if is_parameter else "target_modules"
            return UnsupportedAdapterError(
                f"{target!r} is not among the modules that this pool adapts; expected one of the "
                f"{len(self._index)} that {fields} matched when the pool was created"
            )
        names = near_names(target, self._index)
        return CheckpointError(f"the model has no module {target!r}{names}")

    def _check_shape(
        self,
        index: int,
        kind: str,
        rank: int | None,
        shape: tuple[int, ...],
        key: str,
        source: str,
    ) -> None:
        """Raise `CheckpointError` if the shape of a tensor does not match the model.

        If a rank exceeds the pool's ``max_rank``, the error is an `AdapterTooLargeError`, which
        is a `CheckpointError`. ``rank`` is the rank in the config, or None if the shape has already
        been checked against that rank.
        """
        name, k, n, count = self._packer.targets[index]
        if rank is not None:
            whole = self._packer.targets[index].tensor_shape(_BLOCK_OF[kind], rank)
            if shape != whole:
                stack = f" on each of its {count} matrices" if count > 1 else ""
                raise CheckpointError(
                    f"{source}: {key!r} has shape {shape}, but this model's {name!r} expects "
                    f"shape {whole} for rank {rank}{stack}"
                )
        # Biases have been checked against lora_B.
        found, expected, axis = (
            (shape[1], k, "last") if kind == "lora_A" else (shape[0], n, "first")
        )
        if found != expected:
            raise CheckpointError(
                f"{source}: {key!r} has shape {shape}; for this model, the {axis} dimension must "
                f"have size {expected}, got {found}"
            )
        if kind == "lora_A":
            own = shape[0] if rank is None else rank
            self._check_rank(f"{source}: {key!r} has rank {own}, which", own)

    def _adapted_parameter_and_rank_by_file_layer(
        self, config: LoraConfig, selected: SelectedTargets
    ) -> dict[str, tuple[str, str, int]]:
        """Map each layer in an adapter file to the parameter that it adapts and to its rank.

        Only layers whose factors adapt a parameter are included. The result is a dict that maps the
        name of each layer to a tuple (name of the target, name of the parameter, rank). If the
        parameter belongs to a linear layer, the target is that layer. The names of the layers in
        the file depend on the parameters that the adapter adapts.

        Raises:
            CheckpointError: A parameter does not support the config.
        """
        if not selected.parameters.names:
            return {}
        selected.parameters.store_targets_and_patterns_in(config)
        try:
            targets = check_targets_of_parameters(self._model, config, selected.parameters, True)
        except UnsupportedLayerError as error:
            raise CheckpointError(str(error)) from error
        found = {}
        for module, leaves in selected.parameters.by_module().items():
            of_module = targets[module].settings.parameters
            prefixes = file_prefixes_by_parameter([each.name for each in of_module])
            ranks = {each.name: each.r for each in of_module}
            for leaf in leaves:
                layer = f"{module}.{prefixes.get(leaf, '')}".removesuffix(".")
                name = f"{module}.{leaf}"
                rank = ranks.get(leaf, targets[module].settings.r)
                found[layer] = name if of_module else module, name, rank
        return found

    def _check_selected_targets_have_factors(
        self, selected: SelectedTargets, adapted: set[str]
    ) -> None:
        """Raise `CheckpointError` if factors are missing for a target that the config selects.

        Such an adapter was probably created for a different base model.

        Args:
            selected: The targets that the config selects.
            adapted: Names of the modules and parameters that have factors.
        """
        named = [*selected.modules, *selected.parameters.names]
        missing = [name for name in named if name not in adapted]
        if missing:
            raise CheckpointError(
                f"LoRA factors are missing for {len(missing)} of the {len(named)} modules that the "
                f"config selects in this model, such as {missing[0]!r}; the adapter was probably "
                "created for a different base model"
            )

    def _targets_in_model(self, config: LoraConfig, layers_in_file: set[str]) -> SelectedTargets:
        """Return the targets that an adapter's config selects in the model.

        The targets are modules and parameters. The selection also depends on the layers in the
        adapter's file. A config without ``target_modules`` selects parameters only.

        Args:
            config: The adapter's config.
            layers_in_file: The names of the layers in the adapter's file. See `select_targets`.

        Raises:
            CheckpointError: The adapter was created for a different base model, or the config is
                invalid or is not supported for this model.
        """
        given = NO_TARGETS if config.target_modules in (None, NO_TARGETS) else None
        fields = (
            *("target_modules", "target_parameters"),
            *("exclude_modules", "layers_to_transform", "layers_pattern"),
        )
        values = [getattr(config, name) for name in fields]
        values.append(layers_in_file)
        text = repr([sorted(v) if isinstance(v, set) else v for v in values])
        key = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
        cached = self._selected.get(key)
        if cached is None:
            layers = {layer.replace(".base_layer", "") for layer in layers_in_file}
            try:
                found = select_targets(self._model, config, given, layers_in_file=layers)
            except TargetNotFoundError as error:
                raise CheckpointError(
                    f"the adapter was created for a different base model: {error}"
                ) from error
            except (ConfigError, UnsupportedLayerError) as error:
                raise CheckpointError(str(error)) from error
            # A folder may be rewritten any number of times.
            if len(self._selected) >= _MAX_CACHED_TARGETS:
                self._selected.clear()
            without = replace(found.parameters, parameters=[])
            self._selected[key] = found._replace(parameters=without), found.parameters.names
            return found
        found, names = cached
        if not names:
            return found
        parameters = {
            e.name: e
            for e in base_parameters_outside_auxiliary_wrappers(
                modules_with_original_names(self._model)
            )
        }
        current = replace(found.parameters, parameters=[parameters[name] for name in names])
        return found._replace(parameters=current)


def _config_and_header_limits(modules: Mapping[str, int]) -> ConfigAndHeaderSizeLimits:
    """Return the size limits for an adapter's config file and for the header of its tensor file.

    The limits are in bytes. They bound the time and the memory that parsing takes, even for a
    malicious file. Python's global interpreter lock is held during parsing. For example, parsing
    1 MiB of empty JSON lists takes 65 ms on one core of an AMD EPYC. The parsed objects take up to
    25 times as much memory as the text. A header's metadata may repeat the config, with escape
    sequences of two bytes for some characters.

    Args:
        modules: Maps the names of the targets that an adapter may adapt to their numbers of
            matrices. Files of transformers 4 have factors for each matrix of a stack.
    """
    names = 3 * sum(len(name) + _NAMED_BYTES for name in modules)
    tensors = 4 * sum(count * (len(name) + _TENSOR_BYTES) for name, count in modules.items())
    return ConfigAndHeaderSizeLimits(
        config=min(_CONFIG_BYTES + names, MAX_CONFIG_BYTES),
        header=min(_METADATA_BYTES + 2 * names + tensors, MAX_HEADER_BYTES),
    )

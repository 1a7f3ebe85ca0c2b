"""Read and write PEFT adapter folders without PEFT.

An adapter folder contains ``adapter_config.json`` and ``adapter_model.safetensors``. The keys,
shapes, and ranks of the tensors are checked against the config before anything is returned or
written. Pickle files are never opened.

The format follows PEFT 0.21.2, ``utils/save_and_load.py``.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastlora.model.adapter_files import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    ConfigAndHeaderSizeLimits,
    ConfigAndOpenWeightsFile,
    make_weights_file_metadata,
    open_adapter_files,
)
from fastlora.model.atomic_files import atomic_replace_each_file, folder_lock, fsync_path
from fastlora.model.base_modules import WRAPPER_PREFIX
from fastlora.model.config import LoraConfig
from fastlora.model.target_names import saved_modules_and_task_heads
from fastlora.model.tensor_file import TensorInfo, write_safetensors
from fastlora.validation import CheckpointError, ConfigError, error_prefix

KEY_PREFIX = "base_model.model."
# Suffix of the key that stores the embedding rows that an adapter trains.
TOKENS_KEY = "token_adapter.trainable_tokens_delta"

_PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
_FACTOR_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Embedding and head modules. PEFT saves their base weights with the adapter if the vocabulary size
# has changed.
_EMBEDDINGS = (
    *("embed_tokens", "lm_head", "wte", "word_embeddings"),
    *("embed_in", "embed_out", "shared", "proj_out"),
)
# Tensors of features that fastlora does not support -> the config field that enables the feature.
_FOREIGN = {
    "lora_diag": "kasa_config",
    "lora_velora_embed": "velora_config",
}
_PARTNERS = {
    "lora_A": "lora_B",
    "lora_B": "lora_A",
    "lora_embedding_A": "lora_embedding_B",
    "lora_embedding_B": "lora_embedding_A",
}
# Vectors with one value per output feature -> the config field that enables the vector, and the
# suffix of its key.
_VECTORS = {
    "lora_B_bias": ("lora_bias", "lora_B.bias"),
    "magnitude": ("use_dora", "lora_magnitude_vector"),
}
_LEAVES = {
    ".lora_A.weight": "lora_A",
    ".lora_B.weight": "lora_B",
    ".lora_B.bias": "lora_B_bias",
    ".lora_magnitude_vector": "magnitude",
    ".lora_embedding_A": "lora_embedding_A",
    ".lora_embedding_B": "lora_embedding_B",
    f".{TOKENS_KEY}": "tokens",
}

Tensors = Mapping[str, TensorInfo | torch.Tensor]


class ParsedAdapterKey(NamedTuple):
    """A parsed key from an adapter's weights file.

    Attributes:
        module: The name of the module in the base model.
        kind: The kind of tensor: ``"lora_A"``, ``"lora_B"``, ``"lora_B_bias"``, ``"magnitude"``
            (for DoRA), ``"lora_embedding_A"``, ``"lora_embedding_B"``, ``"saved"`` (a tensor of a
            module in ``modules_to_save``), ``"tokens"`` (the rows of ``trainable_token_indices``),
            ``"bias"`` (a trained bias of the base model), ``"base"`` (a base weight, such as an
            embedding, that was saved with the adapter), or ``"duplicate"`` (a second copy that PEFT
            writes for a module in ``modules_to_save`` or a module tied to it; it is not loaded).
    """

    module: str
    kind: str


@dataclass(frozen=True)
class AdapterHeader:
    """The config of an adapter and the descriptions of its tensors.

    The header contains the validated contents of the adapter folder without the tensor data.

    Attributes:
        path: The folder.
        config: The adapter's config.
        tensor_infos: A dict that maps each key in the weights file to the tensor's dtype, shape,
            and position.
        keys: A dict that maps each key in the weights file to its parsed parts.
    """

    path: Path
    config: LoraConfig
    tensor_infos: dict[str, TensorInfo]
    keys: dict[str, ParsedAdapterKey]


@dataclass(frozen=True)
class AdapterContents:
    """The config and the tensors of an adapter.

    The object contains the validated contents of the adapter folder, including the tensor data.

    Attributes:
        path, config, keys: See `AdapterHeader`.
        tensors: A dict that maps the keys in the weights file to the tensors, on the CPU and in the
            file's dtype. Tensors of the kind ``"duplicate"`` are left out.
    """

    path: Path
    config: LoraConfig
    keys: dict[str, ParsedAdapterKey]
    tensors: dict[str, torch.Tensor]

    @property
    def layers(self) -> list[str]:
        """The names of the LoRA layers for which the adapter has weights.

        The names are in the order of the keys in the file.
        """
        names = (parts.module for parts in self.keys.values() if parts.kind in _PARTNERS)
        return list(dict.fromkeys(names))


class OpenAdapterFolder:
    """An adapter folder that is open for reading.

    The config is checked when the folder is opened. The config and the weights are from the same
    save, even if another process saves an adapter into the folder while it is open.

    Attributes:
        path: The folder.
        config: The adapter's config.
    """

    def __init__(self, path: Path, files: ConfigAndOpenWeightsFile) -> None:
        self.path = path
        self._weights = files.weights
        try:
            with error_prefix(path / CONFIG_NAME):
                self.config = LoraConfig.from_dict(files.config, for_loading=True)
        except ConfigError as error:
            raise CheckpointError(str(error)) from error

    @property
    def weights_file_size(self) -> int:
        """The size of the weights file in bytes.

        The file system reports it.
        """
        return self._weights.file_size

    @cached_property
    def header(self) -> AdapterHeader:
        """The adapter's header: its config, and the names, shapes, and dtypes of its tensors.

        When the property is read for the first time, the header of the weights file is checked
        against the config, which has already been validated. No tensor data is read.

        Raises:
            CheckpointError: If the header is damaged or contradicts the config.
        """
        tensor_infos = self._weights.tensor_infos
        keys = parse_and_check_tensors(self.config, tensor_infos, str(self._weights.path))
        return AdapterHeader(self.path, self.config, tensor_infos, keys)

    def load(self) -> AdapterContents:
        """Load the config and the tensors of the adapter.

        The config and the tensors are validated before they are returned.

        Raises:
            CheckpointError: If the weights file is damaged, contradicts the config, or changes
                while it is read.
        """
        keys = self.header.keys
        wanted = [key for key, parts in keys.items() if parts.kind != "duplicate"]
        return AdapterContents(self.path, self.config, keys, self._weights.read(wanted))


@contextlib.contextmanager
def open_adapter_folder(
    path: str | os.PathLike[str],
    root: Path | None = None,
    limits: ConfigAndHeaderSizeLimits | None = None,
) -> Iterator[OpenAdapterFolder]:
    """Open an adapter folder for the duration of a ``with`` block.

    Only local folders are supported; repository ids of the Hugging Face Hub are not downloaded. If
    a save into the folder was interrupted, the block reads either the complete old adapter or the
    complete new adapter.

    Args:
        path: The adapter folder.
        root: A folder that must contain the adapter's files after symbolic links are resolved. With
            None, links may lead anywhere.
        limits: Size limits for the config and the header. With None, the default limits apply.

    Raises:
        CheckpointError: If a file is missing, damaged, or unsafe. The message names the file.
    """
    folder = Path(path)
    with contextlib.ExitStack() as stack:
        try:
            files = stack.enter_context(open_adapter_files(folder, root, limits))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise CheckpointError(_open_error_message(folder, error)) from error
        yield OpenAdapterFolder(folder, files)


def load_adapter_folder(path: str | os.PathLike[str]) -> AdapterContents:
    """Load the config and the tensors from an adapter folder.

    Both are checked. The folder must be local. Symbolic links are followed.

    Raises:
        CheckpointError: If a file is missing, damaged, or unsafe, or if the two files contradict
            each other. The message names the file and the tensor, and states the value that was
            found and the value that was expected.
    """
    with open_adapter_folder(path) as opened:
        return opened.load()


def inspect_adapter_folder(path: str | os.PathLike[str]) -> AdapterHeader:
    """Read an adapter folder's header, which contains the config and describes the tensors.

    The tensor data is not read. The folder must be local, and is checked as in
    `load_adapter_folder`.
    """
    with open_adapter_folder(path) as opened:
        return opened.header


def effective_key_mapping(
    model: object, key_mapping: Mapping[str, str] | None
) -> Mapping[str, str]:
    """Return the key mapping to use for a model.

    It is ``key_mapping`` or, if ``key_mapping`` is None, the key mapping that the model itself
    defines. In the latter case, the result is empty if the model does not define a key mapping.
    """
    if key_mapping is not None:
        return key_mapping
    own = getattr(model, "_checkpoint_conversion_mapping", None)
    return own if isinstance(own, Mapping) else {}


def with_renamed_modules(
    file: AdapterContents, mapping: Mapping[str, str] | None
) -> AdapterContents:
    """Return a copy of a loaded adapter with its modules renamed.

    Some transformers models define a mapping from the module names of earlier versions to the
    current names.

    Args:
        file: The loaded adapter.
        mapping: A mapping from regular expressions to replacements, which are applied to keys
            without `KEY_PREFIX`. As in PEFT, only the first expression that matches a key is
            applied. If it is empty or None, ``file`` itself is returned.
    """
    if not mapping:
        return file
    names = {key: _renamed(key.removeprefix(KEY_PREFIX), mapping) for key in file.keys}
    new = {key: f"{KEY_PREFIX}{name}" for key, name in names.items()}
    keys: dict[str, ParsedAdapterKey] = {}
    for key, parts in file.keys.items():
        end = key.removeprefix(f"{KEY_PREFIX}{parts.module}")
        keys[new[key]] = ParsedAdapterKey(names[key].removesuffix(end), parts.kind)
    tensors = {new[key]: tensor for key, tensor in file.tensors.items()}
    return AdapterContents(file.path, file.config, keys, tensors)


def _renamed(name: str, mapping: Mapping[str, str]) -> str:
    for pattern, replacement in mapping.items():
        changed, count = re.subn(pattern, replacement, name)
        if count:
            return changed
    return name


def file_key(name: str, key_within_module: str) -> str:
    """Return the key that a tensor of a module or parameter has in an adapter file.

    The prefixes of wrapper modules (see `strip_wrapper_prefixes`) are left out of the key.

    Args:
        name: The name of the module or parameter in the base model.
        key_within_module: The rest of the key, such as ``lora_A.weight``.
    """
    return KEY_PREFIX + WRAPPER_PREFIX.sub("", f"{name}.{key_within_module}")


def save_adapter_folder(
    path: str | os.PathLike[str],
    config: LoraConfig,
    tensors: Mapping[str, torch.Tensor],
    *,
    auto_mapping: dict[str, Any] | None = None,
) -> None:
    """Save an adapter's config and tensors to a folder.

    PEFT and fastlora can load the folder. The config is written with ``inference_mode=True``. Both
    files are first written completely under temporary names. Then the weights file is renamed, and
    after it the config file. If the save fails or the process is killed before the renames, the old
    adapter remains. If there was no folder, a failed save leaves none. If the process is killed
    between the renames, fastlora reads the new adapter, but other readers find the new weights
    beside the old config. Concurrent saves into the same folder run one after another.

    Args:
        path: The folder. It is created if it does not exist.
        config: The adapter's config.
        tensors: A mapping from keys in the weights file to the adapter's tensors.
        auto_mapping: The value of ``auto_mapping`` in the config file. With None, the config's own
            value is written.

    Raises:
        CheckpointError: If the tensors do not fit the config or each other, or if a file cannot be
            written.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder}: expected a folder, found a file")
    parse_and_check_tensors(config, tensors, str(folder / WEIGHTS_NAME))
    text = config.to_json(inference_mode=True, auto_mapping=auto_mapping).encode("utf-8")
    with contextlib.ExitStack() as on_error:
        if not folder.exists():
            folder.mkdir(parents=True, exist_ok=True)
            on_error.callback(_remove_folder_if_empty, folder)
            fsync_path(folder.parent)
        paths = folder / WEIGHTS_NAME, folder / CONFIG_NAME
        with folder_lock(folder), atomic_replace_each_file(*paths) as (weights, new_config):
            write_safetensors(weights, tensors, make_weights_file_metadata(folder, text))
            new_config.write_bytes(text)
        on_error.pop_all()


def _remove_folder_if_empty(folder: Path) -> None:
    """Remove a folder if it is empty.

    A folder that contains files, for example files of another process, is kept.
    """
    with contextlib.suppress(OSError):
        folder.rmdir()


def parse_and_check_tensors(
    config: LoraConfig, tensors: Tensors, source: str
) -> dict[str, ParsedAdapterKey]:
    """Parse the keys of an adapter file, and check the tensors against the config.

    Args:
        config: The adapter's config.
        tensors: A mapping from keys in the weights file to tensors or their descriptions.
        source: The path of the weights file, for messages.

    Returns:
        A dict that maps each key to its parsed parts.

    Raises:
        CheckpointError: If a key is unknown, or a tensor does not fit the config.
    """
    with error_prefix(source):
        keys = {key: _parse(key, config, tensors) for key in tensors}
        if not any(k.kind in _PARTNERS for k in keys.values()):
            raise CheckpointError(
                "contains no LoRA factors; expected keys that end in lora_A.weight"
            )
        found = {(k.module, k.kind): key for key, k in keys.items() if k.kind != "saved"}
        for module, kind in found:
            if kind in _PARTNERS:
                _check_factor(config, tensors, found, module, kind)
            elif kind in _VECTORS:
                _check_vector(config, tensors, found, module, kind)
            elif kind == "tokens":
                _check_tokens(config, tensors, found[module, kind])
        return keys


def _open_error_message(folder: Path, error: OSError) -> str:
    """Return the error message for an adapter folder that could not be opened.

    ``error`` was raised when the files in the folder were opened.
    """
    if folder.is_file():
        return f"{folder}: expected the folder that contains {WEIGHTS_NAME}, found a file"
    if not folder.is_dir():
        return (
            f"{folder}: no such folder. Only local folders are supported; for an adapter on the "
            "Hugging Face Hub, pass the folder that huggingface_hub.snapshot_download(repo_id) "
            "returns"
        )
    missing = [name for name in (CONFIG_NAME, WEIGHTS_NAME) if not (folder / name).is_file()]
    if not missing:  # the file was created in the meantime
        return f"{folder}: {error.strerror}"
    pickles = [name for name in _PICKLES if (folder / name).exists()]
    if pickles and WEIGHTS_NAME in missing:
        return (
            f"{folder / pickles[0]}: not loaded, because a pickle can run any code when loaded; "
            f"expected {WEIGHTS_NAME}. If you trust the file, convert it: "
            "safetensors.torch.save_file(torch.load(bin_path, weights_only=True), "
            "safetensors_path, metadata={'format': 'pt'})"
        )
    inside = sorted(p.parent.name for p in folder.glob(f"*/{CONFIG_NAME}"))
    hint = f"; its subfolders {', '.join(inside[:10])} contain adapters: pass one of them"
    return f"{folder}: has no {' and no '.join(missing)}{hint if inside else ''}"


def _parse(key: str, config: LoraConfig, tensors: Tensors) -> ParsedAdapterKey:
    name = key.removeprefix(KEY_PREFIX)
    if name == key:
        raise CheckpointError(
            f"unknown key {key!r}; expected a key that starts with {KEY_PREFIX!r}"
        )
    for suffix, kind in _LEAVES.items():
        if name.endswith(suffix):
            return ParsedAdapterKey(name.removesuffix(suffix), kind)
    module, _, leaf = name.rpartition(".")
    entries = tuple(saved_modules_and_task_heads(config))
    for outer in accumulate(module.split("."), "{}.{}".format):  # a, a.b, a.b.c
        if entries and outer.endswith(entries):
            rest = name.removeprefix(f"{outer}.")
            copied = rest.startswith(("original_module.", "modules_to_save."))
            return ParsedAdapterKey(outer, "duplicate" if copied else "saved")
    if leaf in _FOREIGN:
        raise CheckpointError(
            f"found {key!r}, which PEFT saves if the config has {_FOREIGN[leaf]}; fastlora does "
            f"not support {_FOREIGN[leaf]}. Load the adapter with PEFT instead: "
            "model = peft.PeftModel.from_pretrained(model, folder), then fastlora.patch(model)"
        )
    if config.ensure_weight_tying and any(e.rpartition(".")[2] in _EMBEDDINGS for e in entries):
        tied = module.removesuffix(".original_module").removesuffix(".modules_to_save")
        if tied.rpartition(".")[2] in _EMBEDDINGS:  # may be tied to a module in modules_to_save
            return ParsedAdapterKey(tied, "saved" if tied == module else "duplicate")
    inner = module.removesuffix(".base_layer").removesuffix(".token_adapter")
    if leaf == "bias" and config.bias != "none":
        return ParsedAdapterKey(inner, "bias")
    adapted = any(f"{KEY_PREFIX}{inner}{suffix}" in tensors for suffix in _LEAVES)
    if leaf == "weight" and (
        inner.rpartition(".")[2] in _EMBEDDINGS or (adapted and inner != module)
    ):
        return ParsedAdapterKey(inner, "base")
    raise CheckpointError(
        f"unknown key {key!r}; expected the key of a LoRA factor"
        f"{', of a bias,' if config.bias != 'none' else ''} or of a module in "
        f"modules_to_save={list(entries)}"
    )


def _check_factor(
    config: LoraConfig, tensors: Tensors, found: dict[tuple[str, str], str], module: str, kind: str
) -> None:
    key, partner = found[module, kind], _PARTNERS[kind]
    if (module, partner) not in found:
        raise CheckpointError(
            f"found {key!r}, but no {partner} for {module!r}; expected both factors, A and B"
        )
    shape = tuple(tensors[key].shape)
    _check_dtype(key, tensors[key])
    if not 2 <= len(shape) <= 5:  # convolutions have more than 2 dimensions
        raise CheckpointError(f"{key!r} has shape {shape}, expected 2 to 5 dimensions")
    axis, expected = (0, "(rank, in)") if kind.endswith("A") else (1, "(out, rank)")
    rank = config.rank_for(target_name_of_inner_layer(module))
    grouped = axis == 1 and len(shape) > 2  # lora_B of a grouped convolution has rank / groups
    differs = bool(rank % max(shape[axis], 1) if grouped else shape[axis] != rank)
    if differs and not _may_be_stacked_rank(config, shape[axis]):
        raise CheckpointError(
            f"{key!r} has shape {shape} {expected} and therefore rank {shape[axis]}; "
            f"expected rank {rank}, as set for {module!r} by r and rank_pattern in the config"
        )
    if kind.endswith("B"):
        for vector, (field, leaf) in _VECTORS.items():
            if getattr(config, field) and (module, vector) not in found:
                raise CheckpointError(f"{field}=True, but {module!r} has no {leaf}")


def _may_be_stacked_rank(config: LoraConfig, rank_dim_size: int) -> bool:
    """Return whether the size of a rank dimension could be the combined rank of stacked matrices.

    A target parameter may be a stack of matrices, such as the weights of several experts. The rank
    dimension of its factors then has the combined rank, which is the adapter's rank multiplied by
    the number of matrices. The combined rank is therefore a multiple of a rank in the config. The
    result is False if the config has no target parameters. Only a model tells which modules have
    target parameters, and how many matrices they stack. `check_adapter_fits_model` compares the
    shapes.
    """
    ranks = {config.r, *config.rank_pattern.values()} if config.target_parameters else ()
    return rank_dim_size > 0 and any(rank_dim_size % rank == 0 for rank in ranks)


def target_name_of_inner_layer(layer_name: str) -> str:
    """Return the name of the target module that contains an inner layer.

    Some targets consist of several LoRA layers. In adapter files, the names of the inner layers
    start with the target's name and ``.base_layer.``. Other names are returned unchanged.
    """
    return layer_name.partition(".base_layer.")[0]


def _check_vector(
    config: LoraConfig, tensors: Tensors, found: dict[tuple[str, str], str], module: str, kind: str
) -> None:
    key, (field, _) = found[module, kind], _VECTORS[kind]
    if not getattr(config, field):
        raise CheckpointError(f"found {key!r}, but the config has {field}=False")
    factor = found.get((module, "lora_B"), found.get((module, "lora_embedding_B")))
    if factor is None:
        raise CheckpointError(
            f"found {key!r}, but LoRA factors for {module!r} are missing; expected both factors, "
            "A and B"
        )
    n, *kernel = tensors[factor].shape
    expected: tuple[int, ...] = (n,)
    if kind == "magnitude" and len(kernel) > 1:  # a convolution
        expected = (1, n, *[1] * (len(kernel) - 1))
    if tuple(tensors[key].shape) != expected:
        raise CheckpointError(f"{key!r} has shape {tuple(tensors[key].shape)}, expected {expected}")
    _check_dtype(key, tensors[key])


def _check_tokens(config: LoraConfig, tensors: Tensors, key: str) -> None:
    if config.trainable_token_indices is None:
        raise CheckpointError(f"found {key!r}, but the config has trainable_token_indices=None")
    if len(tensors[key].shape) != 2:
        raise CheckpointError(f"{key!r} has shape {tuple(tensors[key].shape)}, expected (n, dim)")
    _check_dtype(key, tensors[key])


def _check_dtype(key: str, tensor: TensorInfo | torch.Tensor) -> None:
    if tensor.dtype not in _FACTOR_DTYPES:
        raise CheckpointError(
            f"{key!r} has dtype {tensor.dtype}; expected a 16-, 32-, or 64-bit floating-point dtype"
        )

"""PEFT adapter folders (``adapter_config.json``, ``adapter_model.safetensors``), without PEFT.

Everything is checked before anything is returned or written: names, shapes, ranks, and the config
against the tensors. Pickles are never opened.

Method: PEFT 0.21.2, ``utils/save_and_load.py``.
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
    AdapterFiles,
    FileLimits,
    config_metadata,
    open_adapter_files,
)
from fastlora.model.config import LoraConfig
from fastlora.model.replace_files import flush_to_disk, locked, replacing_together
from fastlora.model.targets import modules_to_save_entries
from fastlora.model.tensor_file import TensorInfo, write_tensors
from fastlora.validation import CheckpointError, ConfigError, error_prefix

KEY_PREFIX = "base_model.model."
# End of the key of the rows of an embedding that an adapter trains.
TOKENS_KEY = "token_adapter.trainable_tokens_delta"

_PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
_FACTOR_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Names of the modules whose base weight PEFT saves beside the adapter after a vocabulary change.
_EMBEDDINGS = (
    *("embed_tokens", "lm_head", "wte", "word_embeddings"),
    *("embed_in", "embed_out", "shared", "proj_out"),
)
# Tensors of features that fastlora does not have yet -> the config field that asks for them.
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
# What has a value for each output -> the config field that asks for it, and the end of its key.
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


class AdapterKey(NamedTuple):
    """A key of an adapter file, taken apart.

    Attributes:
        module: Name of the module in the base model.
        kind: ``"lora_A"``, ``"lora_B"``, ``"lora_B_bias"``, ``"magnitude"`` (of DoRA),
            ``"lora_embedding_A"``, ``"lora_embedding_B"``, ``"saved"`` (of a module in
            ``modules_to_save``), ``"tokens"`` (of ``trainable_token_indices``), ``"bias"`` (a base
            bias that trained), ``"base"`` (a base
            embedding that was saved along) or
            ``"duplicate"`` (a copy that PEFT adds for a saved module; nothing to load).
    """

    module: str
    kind: str


@dataclass(frozen=True)
class AdapterHeader:
    """An adapter folder, checked, with no tensor loaded.

    Attributes:
        path: The folder.
        config: Its config.
        infos: Key on disk -> dtype, shape and place.
        keys: Key on disk -> its parts.
    """

    path: Path
    config: LoraConfig
    infos: dict[str, TensorInfo]
    keys: dict[str, AdapterKey]


@dataclass(frozen=True)
class AdapterFile:
    """An adapter folder, checked and loaded.

    Attributes:
        path, config, keys: As in `AdapterHeader`.
        tensors: Key on disk -> tensor on the CPU, in the file's dtype; no duplicates.
    """

    path: Path
    config: LoraConfig
    keys: dict[str, AdapterKey]
    tensors: dict[str, torch.Tensor]


class OpenAdapter:
    """An adapter folder with both files open: whatever happens to the folder, they belong together.

    Attributes:
        path: The folder.
        config: Its config.
    """

    def __init__(self, path: Path, files: AdapterFiles) -> None:
        self.path = path
        self._weights = files.weights
        try:
            with error_prefix(path / CONFIG_NAME):
                self.config = LoraConfig.from_dict(files.config, for_loading=True)
        except ConfigError as error:
            raise CheckpointError(str(error)) from error

    @property
    def nbytes(self) -> int:
        """Apparent size of the file of tensors."""
        return self._weights.nbytes

    @cached_property
    def header(self) -> AdapterHeader:
        """The header, checked against the config; no tensor is read.

        Raises `CheckpointError` if the header is damaged or contradicts the config.
        """
        infos = self._weights.infos
        keys = check_tensors(self.config, infos, str(self._weights.path))
        return AdapterHeader(self.path, self.config, infos, keys)

    def load(self) -> AdapterFile:
        """Returns the checked adapter with its tensors; raises as `header`."""
        keys = self.header.keys
        wanted = [key for key, parts in keys.items() if parts.kind != "duplicate"]
        return AdapterFile(self.path, self.config, keys, self._weights.read(wanted))


@contextlib.contextmanager
def open_adapter_folder(
    path: str | os.PathLike[str], root: Path | None = None, limits: FileLimits | None = None
) -> Iterator[OpenAdapter]:
    """Opens a local adapter folder for the block; ids of the Hugging Face Hub are not downloaded.

    If a save into the folder was cut off, the block sees the whole old or the whole new adapter.

    Args:
        path: The folder.
        root: Folder that the adapter's files must be in after links are resolved; None follows
            links anywhere.
        limits: Largest config and header that are parsed; None for those of any adapter.

    Raises:
        CheckpointError: A file is missing, damaged or unsafe; the message names the file.
    """
    folder = Path(path)
    with contextlib.ExitStack() as stack:
        try:
            files = stack.enter_context(open_adapter_files(folder, root, limits))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise CheckpointError(_why_missing(folder, error)) from error
        yield OpenAdapter(folder, files)


def load_adapter_folder(path: str | os.PathLike[str]) -> AdapterFile:
    """Reads a local adapter folder; links are followed.

    Raises:
        CheckpointError: A file is missing, damaged, unsafe, or contradicts the other; the message
            names file, tensor, what was found and what was expected.
    """
    with open_adapter_folder(path) as opened:
        return opened.load()


def inspect_adapter_folder(path: str | os.PathLike[str]) -> AdapterHeader:
    """Checks a local adapter folder as `load_adapter_folder` does, and reads no tensor data."""
    with open_adapter_folder(path) as opened:
        return opened.header


def renamed(file: AdapterFile, mapping: Mapping[str, str] | None) -> AdapterFile:
    """Returns a file whose modules have the names that a model has for them now.

    ``mapping`` gives regular expressions for keys without `KEY_PREFIX` replacements; the first that
    matches counts, as in PEFT. transformers' models have one for their old names.
    """
    if not mapping:
        return file
    names = {key: _renamed(key.removeprefix(KEY_PREFIX), mapping) for key in file.keys}
    new = {key: f"{KEY_PREFIX}{name}" for key, name in names.items()}
    keys: dict[str, AdapterKey] = {}
    for key, parts in file.keys.items():
        end = key.removeprefix(f"{KEY_PREFIX}{parts.module}")
        keys[new[key]] = AdapterKey(names[key].removesuffix(end), parts.kind)
    tensors = {new[key]: tensor for key, tensor in file.tensors.items()}
    return AdapterFile(file.path, file.config, keys, tensors)


def _renamed(name: str, mapping: Mapping[str, str]) -> str:
    for pattern, replacement in mapping.items():
        changed, count = re.subn(pattern, replacement, name)
        if count:
            return changed
    return name


def save_adapter_folder(
    path: str | os.PathLike[str],
    config: LoraConfig,
    tensors: Mapping[str, torch.Tensor],
    *,
    auto_mapping: dict[str, Any] | None = None,
) -> None:
    """Writes an adapter folder that PEFT and fastlora read, with ``inference_mode`` True.

    Both files are complete on disk under temporary names before the weights and then the config
    are renamed. A failure or a crash before leaves the old adapter. A crash between the renames
    leaves the new adapter to fastlora, and new weights beside the old config to other readers.
    Simultaneous saves into one folder wait for each other.

    Raises:
        CheckpointError: ``tensors``, by key on disk, do not fit the config or each other, or cannot
            be written.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder}: is a file, expected a folder")
    check_tensors(config, tensors, str(folder / WEIGHTS_NAME))
    text = config.to_json(inference_mode=True, auto_mapping=auto_mapping).encode("utf-8")
    if not folder.exists():
        folder.mkdir(parents=True, exist_ok=True)
        flush_to_disk(folder.parent)
    paths = folder / WEIGHTS_NAME, folder / CONFIG_NAME
    with locked(folder), replacing_together(*paths) as (weights, new_config):
        write_tensors(weights, tensors, config_metadata(folder, text))
        new_config.write_bytes(text)


def check_tensors(config: LoraConfig, tensors: Tensors, source: str) -> dict[str, AdapterKey]:
    """Returns every key's parts; raises `CheckpointError` unless all fit the config.

    ``source`` names the file in messages.
    """
    with error_prefix(source):
        keys = {key: _parse(key, config, tensors) for key in tensors}
        if not any(k.kind in _PARTNERS for k in keys.values()):
            raise CheckpointError("holds no LoRA factors, expected keys ...lora_A.weight")
        found = {(k.module, k.kind): key for key, k in keys.items() if k.kind != "saved"}
        for module, kind in found:
            if kind in _PARTNERS:
                _check_factor(config, tensors, found, module, kind)
            elif kind in _VECTORS:
                _check_vector(config, tensors, found, module, kind)
            elif kind == "tokens":
                _check_tokens(config, tensors, found[module, kind])
        return keys


def _why_missing(folder: Path, error: OSError) -> str:
    """Returns a message for an adapter folder that lacks a file."""
    if folder.is_file():
        return f"{folder}: is a file, expected the folder that holds {WEIGHTS_NAME}"
    if not folder.is_dir():
        return (
            f"{folder}: no such folder. Only local folders are read; for an adapter on the Hugging "
            "Face Hub, pass the folder that huggingface_hub.snapshot_download(repo_id) returns"
        )
    missing = [name for name in (CONFIG_NAME, WEIGHTS_NAME) if not (folder / name).is_file()]
    if not missing:  # it has come meanwhile
        return f"{folder}: {error.strerror}"
    pickles = [name for name in _PICKLES if (folder / name).exists()]
    if pickles and WEIGHTS_NAME in missing:
        return (
            f"{folder / pickles[0]}: a pickle can run any code when it is opened, so it is not "
            f"read; expected {WEIGHTS_NAME}. If you trust it, convert it: "
            "safetensors.torch.save_file(torch.load(bin_path, weights_only=True), "
            "safetensors_path, metadata={'format': 'pt'})"
        )
    inside = sorted(p.parent.name for p in folder.glob(f"*/{CONFIG_NAME}"))
    hint = f"; there are adapters in its subfolders {', '.join(inside[:10])}: name one of them"
    return f"{folder}: has no {' and no '.join(missing)}{hint if inside else ''}"


def _parse(key: str, config: LoraConfig, tensors: Tensors) -> AdapterKey:
    name = key.removeprefix(KEY_PREFIX)
    if name == key:
        raise CheckpointError(f"unknown key {key!r}, expected the prefix {KEY_PREFIX!r}")
    for suffix, kind in _LEAVES.items():
        if name.endswith(suffix):
            return AdapterKey(name.removesuffix(suffix), kind)
    module, _, leaf = name.rpartition(".")
    entries = tuple(modules_to_save_entries(config))
    for outer in accumulate(module.split("."), "{}.{}".format):  # a, a.b, a.b.c
        if entries and outer.endswith(entries):
            rest = name.removeprefix(f"{outer}.")
            copied = rest.startswith(("original_module.", "modules_to_save."))
            return AdapterKey(outer, "duplicate" if copied else "saved")
    if leaf in _FOREIGN:
        raise CheckpointError(
            f"found {key!r}, which belongs to {_FOREIGN[leaf]}; that is PEFT's to load: "
            "peft.PeftModel.from_pretrained(model, folder), then fastlora.patch(model)"
        )
    copied = any(entry.rpartition(".")[2] in _EMBEDDINGS for entry in entries)
    if config.ensure_weight_tying and copied and module.rpartition(".")[2] in _EMBEDDINGS:
        return AdapterKey(module, "saved")  # tied to one of modules_to_save
    inner = module.removesuffix(".base_layer").removesuffix(".token_adapter")
    if leaf == "bias" and config.bias != "none":
        return AdapterKey(inner, "bias")
    adapted = any(f"{KEY_PREFIX}{inner}{suffix}" in tensors for suffix in _LEAVES)
    if leaf == "weight" and (
        inner.rpartition(".")[2] in _EMBEDDINGS or (adapted and inner != module)
    ):
        return AdapterKey(inner, "base")
    raise CheckpointError(
        f"unknown key {key!r}, expected LoRA factors"
        f"{', a bias' if config.bias != 'none' else ''} or one of modules_to_save={list(entries)}"
    )


def _check_factor(
    config: LoraConfig, tensors: Tensors, found: dict[tuple[str, str], str], module: str, kind: str
) -> None:
    key, partner = found[module, kind], _PARTNERS[kind]
    if (module, partner) not in found:
        raise CheckpointError(f"{key!r} has no partner, expected {partner} of {module!r}")
    shape = tuple(tensors[key].shape)
    _check_dtype(key, tensors[key])
    if not 2 <= len(shape) <= 5:  # more than 2 are a convolution's
        raise CheckpointError(f"{key!r} has shape {shape}, expected 2 to 5 dimensions")
    axis, expected = (0, "(rank, in)") if kind.endswith("A") else (1, "(out, rank)")
    rank = config.rank_for(adapted_module(module))
    grouped = axis == 1 and len(shape) > 2  # a grouped convolution's lora_B has rank / groups
    if rank % max(shape[axis], 1) if grouped else shape[axis] != rank:
        raise CheckpointError(
            f"{key!r} has shape {shape} {expected}, so rank {shape[axis]}; "
            f"expected rank {rank}, which r and rank_pattern of the config give {module!r}"
        )
    if kind.endswith("B"):
        for vector, (field, leaf) in _VECTORS.items():
            if getattr(config, field) and (module, vector) not in found:
                raise CheckpointError(f"{field}=True, but {module!r} has no {leaf}")


def adapted_module(module: str) -> str:
    """Returns the target that a module of a file belongs to: parts lie below its base layer."""
    return module.partition(".base_layer.")[0]


def _check_vector(
    config: LoraConfig, tensors: Tensors, found: dict[tuple[str, str], str], module: str, kind: str
) -> None:
    key, (field, _) = found[module, kind], _VECTORS[kind]
    if not getattr(config, field):
        raise CheckpointError(f"found {key!r}, but the config says {field}=False")
    factor = found.get((module, "lora_B"), found.get((module, "lora_embedding_B")))
    if factor is None:
        raise CheckpointError(f"{key!r} has no factors, expected lora_B of {module!r}")
    n, *kernel = tensors[factor].shape
    expected: tuple[int, ...] = (n,)
    if kind == "magnitude" and len(kernel) > 1:  # a convolution's
        expected = (1, n, *[1] * (len(kernel) - 1))
    if tuple(tensors[key].shape) != expected:
        raise CheckpointError(f"{key!r} has shape {tuple(tensors[key].shape)}, expected {expected}")
    _check_dtype(key, tensors[key])


def _check_tokens(config: LoraConfig, tensors: Tensors, key: str) -> None:
    if config.trainable_token_indices is None:
        raise CheckpointError(f"found {key!r}, but the config says trainable_token_indices=None")
    if len(tensors[key].shape) != 2:
        raise CheckpointError(f"{key!r} has shape {tuple(tensors[key].shape)}, expected (n, dim)")
    _check_dtype(key, tensors[key])


def _check_dtype(key: str, tensor: TensorInfo | torch.Tensor) -> None:
    if tensor.dtype not in _FACTOR_DTYPES:
        raise CheckpointError(
            f"{key!r} has dtype {tensor.dtype}, expected a float of 16, 32 or 64 bits"
        )

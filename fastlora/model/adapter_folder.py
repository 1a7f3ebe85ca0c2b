"""PEFT adapter folders (``adapter_config.json``, ``adapter_model.safetensors``), without PEFT.

Everything is checked before anything is returned or written: names, shapes, ranks, and the config
against the tensors. Pickles are never opened.

Method: PEFT 0.21.2, ``utils/save_and_load.py``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastlora.model.config import CONFIG_NAME, LoraConfig, read_config_file
from fastlora.model.targets import modules_to_save_entries
from fastlora.model.tensor_file import (
    TensorInfo,
    flush_to_disk,
    read_header,
    read_tensors,
    replacing,
    write_tensors,
)
from fastlora.validation import CheckpointError, ConfigError

WEIGHTS_NAME = "adapter_model.safetensors"
KEY_PREFIX = "base_model.model."

_PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
_FACTOR_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Names of the modules whose base weight PEFT saves beside the adapter after a vocabulary change.
_EMBEDDINGS = (
    *("embed_tokens", "lm_head", "wte", "word_embeddings"),
    *("embed_in", "embed_out", "shared"),
)
# Tensors of features that fastlora does not have yet -> the config field that asks for them.
_FOREIGN = {
    "trainable_tokens_delta": "trainable_token_indices",
    "lora_diag": "kasa_config",
    "lora_velora_embed": "velora_config",
}
_PARTNERS = {
    "lora_A": "lora_B",
    "lora_B": "lora_A",
    "lora_embedding_A": "lora_embedding_B",
    "lora_embedding_B": "lora_embedding_A",
}
_LEAVES = {
    ".lora_A.weight": "lora_A",
    ".lora_B.weight": "lora_B",
    ".lora_B.bias": "lora_B_bias",
    ".lora_magnitude_vector": "magnitude",
    ".lora_embedding_A": "lora_embedding_A",
    ".lora_embedding_B": "lora_embedding_B",
}


class AdapterKey(NamedTuple):
    """A key of an adapter file, taken apart.

    Attributes:
        module: Name of the module in the base model.
        kind: ``"lora_A"``, ``"lora_B"``, ``"lora_B_bias"``, ``"magnitude"`` (of DoRA),
            ``"lora_embedding_A"``, ``"lora_embedding_B"``, ``"saved"`` (of a module in
            ``modules_to_save``), ``"bias"`` (a base bias that trained), ``"base"`` (a base
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

    @property
    def modules(self) -> list[str]:
        """Names of the modules that the file holds factors for, sorted."""
        return sorted({k.module for k in self.keys.values() if k.kind in _PARTNERS})


@dataclass(frozen=True)
class AdapterFile(AdapterHeader):
    """An adapter folder, checked and loaded.

    Attributes:
        tensors: Key on disk -> tensor on the CPU, in the file's dtype; no duplicates.
    """

    tensors: dict[str, torch.Tensor]


def load_adapter_folder(path: str | os.PathLike[str]) -> AdapterFile:
    """Reads a local adapter folder.

    Args:
        path: The folder. Ids of the Hugging Face Hub are not downloaded.

    Raises:
        CheckpointError: A file is missing, damaged, unsafe, or contradicts the other; the message
            names file, tensor, what was found and what was expected.
    """
    header = inspect_adapter_folder(path)
    tensors = read_tensors(header.path / WEIGHTS_NAME, header.infos)
    wanted = {key: tensors[key] for key, k in header.keys.items() if k.kind != "duplicate"}
    return AdapterFile(header.path, header.config, header.infos, header.keys, wanted)


def inspect_adapter_folder(path: str | os.PathLike[str]) -> AdapterHeader:
    """Checks a local adapter folder as `load_adapter_folder` does, and reads no tensor data."""
    folder = Path(path)
    _check_folder(folder)
    config_path = folder / CONFIG_NAME
    data = read_config_file(config_path)
    if data.get("peft_type", "LORA") != "LORA":
        raise CheckpointError(f"{config_path}: peft_type is {data['peft_type']!r}, expected 'LORA'")
    try:
        config = LoraConfig.from_dict(data, for_loading=True)
    except ConfigError as error:
        raise CheckpointError(f"{config_path}: {error}") from error
    weights = folder / WEIGHTS_NAME
    infos = read_header(weights)
    keys = check_tensors(config, infos, str(weights))
    return AdapterHeader(folder, config, infos, keys)


def save_adapter_folder(
    path: str | os.PathLike[str],
    config: LoraConfig,
    tensors: Mapping[str, torch.Tensor],
    *,
    auto_mapping: dict[str, Any] | None = None,
) -> None:
    """Writes an adapter folder that PEFT and fastlora read.

    Both files are complete on disk under other names before either takes its own, so a full disk
    or a crash while writing leaves an adapter that was there as it was.

    Args:
        path: The folder; made if need be.
        config: Saved with ``inference_mode`` True, as PEFT does.
        tensors: Key on disk -> tensor on any device.
        auto_mapping: Class and library of a base model without a task type, as PEFT records it.

    Raises:
        CheckpointError: The tensors do not fit the config or each other, or cannot be written.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder}: is a file, expected a folder")
    check_tensors(config, tensors, str(folder / WEIGHTS_NAME))
    text = config.to_json(inference_mode=True, auto_mapping=auto_mapping)
    folder.mkdir(parents=True, exist_ok=True)
    # The weights take their name first: a `with` ends from right to left.
    with (
        replacing(folder / CONFIG_NAME) as config_file,
        replacing(folder / WEIGHTS_NAME) as weights,
    ):
        write_tensors(weights, tensors)
        config_file.write_text(text, encoding="utf-8")
        flush_to_disk(config_file)


def check_tensors(
    config: LoraConfig, tensors: Mapping[str, TensorInfo | torch.Tensor], source: str
) -> dict[str, AdapterKey]:
    """Returns every key's parts, after checking keys, shapes and ranks against the config.

    Args:
        config: The adapter's config.
        tensors: Key on disk -> anything with ``shape`` and ``dtype``.
        source: Name of the file, for messages.

    Raises:
        CheckpointError: They do not fit.
    """
    keys = {key: _parse(key, config, tensors, source) for key in tensors}
    factors = {(k.module, k.kind): key for key, k in keys.items() if k.kind != "saved"}
    if not any(k.kind in _PARTNERS for k in keys.values()):
        raise CheckpointError(f"{source}: holds no LoRA factors, expected keys ...lora_A.weight")
    for (module, kind), key in factors.items():
        if kind in _PARTNERS:
            partner = factors.get((module, _PARTNERS[kind]))
            if partner is None:
                raise CheckpointError(
                    f"{source}: {key!r} has no partner, expected {_PARTNERS[kind]} of {module!r}"
                )
            _check_factor(config, tensors[key], module, kind, key, source)
        if kind == "lora_B" and config.lora_bias:
            _check_bias(tensors, factors, module, key, source)
        if kind == "lora_B_bias" and not config.lora_bias:
            raise CheckpointError(f"{source}: found {key!r}, but the config says lora_bias=False")
        if kind == "lora_B" and config.use_dora:
            _check_magnitude(tensors, factors, module, key, source)
        if kind == "magnitude" and not config.use_dora:
            raise CheckpointError(f"{source}: found {key!r}, but the config says use_dora=False")
        if kind == "magnitude" and (module, "lora_B") not in factors:
            raise CheckpointError(
                f"{source}: {key!r} has no factors, expected lora_B of {module!r}"
            )
    return keys


def _check_folder(folder: Path) -> None:
    if folder.is_file():
        raise CheckpointError(f"{folder}: is a file, expected the folder that holds {WEIGHTS_NAME}")
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: no such folder. Only local folders are read; for an adapter on the Hugging "
            "Face Hub, pass the folder that huggingface_hub.snapshot_download(repo_id) returns"
        )
    missing = [name for name in (CONFIG_NAME, WEIGHTS_NAME) if not (folder / name).is_file()]
    if not missing:
        return
    pickles = [name for name in _PICKLES if (folder / name).exists()]
    if pickles and WEIGHTS_NAME in missing:
        raise CheckpointError(
            f"{folder / pickles[0]}: a pickle can run any code when it is opened, so it is not "
            f"read; expected {WEIGHTS_NAME}. If you trust it, convert it: "
            "safetensors.torch.save_file(torch.load(bin_path, weights_only=True), "
            "safetensors_path, metadata={'format': 'pt'})"
        )
    inside = sorted(p.parent.name for p in folder.glob(f"*/{CONFIG_NAME}"))
    hint = f"; there are adapters in its subfolders {', '.join(inside[:10])}: name one of them"
    raise CheckpointError(f"{folder}: has no {' and no '.join(missing)}{hint if inside else ''}")


def _parse(
    key: str, config: LoraConfig, tensors: Mapping[str, TensorInfo | torch.Tensor], source: str
) -> AdapterKey:
    name = key.removeprefix(KEY_PREFIX)
    if name == key:
        raise CheckpointError(f"{source}: unknown key {key!r}, expected the prefix {KEY_PREFIX!r}")
    module, _, leaf = name.rpartition(".")
    entries = tuple(modules_to_save_entries(config))
    parents = module.split(".")
    prefixes = [".".join(parts) for parts in (parents[:i] for i in range(1, len(parents) + 1))]
    saved = [prefix for prefix in prefixes if entries and prefix.endswith(entries)]
    for suffix, kind in _LEAVES.items():
        if name.endswith(suffix):
            return AdapterKey(name.removesuffix(suffix), kind)
    if saved:
        rest = name.removeprefix(f"{saved[0]}.")
        copied = rest.startswith(("original_module.", "modules_to_save."))
        return AdapterKey(saved[0], "duplicate" if copied else "saved")
    if leaf in _FOREIGN:
        raise CheckpointError(
            f"{source}: found {key!r}, which belongs to {_FOREIGN[leaf]}; "
            "fastlora does not implement that yet"
        )
    if leaf in ("lora_A", "lora_B"):
        raise CheckpointError(
            f"{source}: found {key!r}, a factor of nn.MultiheadAttention; "
            "fastlora does not implement that yet"
        )
    inner = module.removesuffix(".base_layer")
    if leaf == "bias" and config.bias != "none":
        return AdapterKey(inner, "bias")
    adapted = any(f"{KEY_PREFIX}{inner}{suffix}" in tensors for suffix in _LEAVES)
    if leaf == "weight" and (
        inner.rpartition(".")[2] in _EMBEDDINGS or (adapted and inner != module)
    ):
        return AdapterKey(inner, "base")
    raise CheckpointError(
        f"{source}: unknown key {key!r}, expected LoRA factors"
        f"{', a bias' if config.bias != 'none' else ''} or one of modules_to_save={list(entries)}"
    )


def _check_factor(
    config: LoraConfig,
    tensor: TensorInfo | torch.Tensor,
    module: str,
    kind: str,
    key: str,
    source: str,
) -> None:
    shape = tuple(tensor.shape)
    if tensor.dtype not in _FACTOR_DTYPES:
        raise CheckpointError(
            f"{source}: {key!r} has dtype {tensor.dtype}, expected a float of 16, 32 or 64 bits"
        )
    if len(shape) != 2:
        raise CheckpointError(
            f"{source}: {key!r} has shape {shape}, expected 2 dimensions "
            "(adapters of convolutions are not implemented yet)"
        )
    axis, expected = (0, "(rank, in)") if kind.endswith("A") else (1, "(out, rank)")
    rank = config.rank_for(module)
    if shape[axis] != rank:
        raise CheckpointError(
            f"{source}: {key!r} has shape {shape} {expected}, so rank {shape[axis]}; "
            f"expected rank {rank}, which r and rank_pattern of the config give {module!r}"
        )


def _check_bias(
    tensors: Mapping[str, TensorInfo | torch.Tensor],
    factors: Mapping[tuple[str, str], str],
    module: str,
    key: str,
    source: str,
) -> None:
    bias = factors.get((module, "lora_B_bias"))
    if bias is None:
        raise CheckpointError(f"{source}: lora_bias=True, but {module!r} has no lora_B.bias")
    out_features = tensors[key].shape[0]
    if tuple(tensors[bias].shape) != (out_features,):
        raise CheckpointError(
            f"{source}: {bias!r} has shape {tuple(tensors[bias].shape)}, expected {(out_features,)}"
        )


def _check_magnitude(
    tensors: Mapping[str, TensorInfo | torch.Tensor],
    factors: Mapping[tuple[str, str], str],
    module: str,
    key: str,
    source: str,
) -> None:
    magnitude = factors.get((module, "magnitude"))
    if magnitude is None:
        raise CheckpointError(
            f"{source}: use_dora=True, but {module!r} has no lora_magnitude_vector"
        )
    tensor, out_features = tensors[magnitude], tensors[key].shape[0]
    if tuple(tensor.shape) != (out_features,):
        raise CheckpointError(
            f"{source}: {magnitude!r} has shape {tuple(tensor.shape)}, expected {(out_features,)}"
        )
    if tensor.dtype not in _FACTOR_DTYPES:
        raise CheckpointError(
            f"{source}: {magnitude!r} has dtype {tensor.dtype}, expected a float of 16, 32 or 64 "
            "bits"
        )

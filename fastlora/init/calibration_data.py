"""Helpers for initializations that run a model over the batches of a data loader."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from fastlora.validation import InitializationError

_T = TypeVar("_T")


def progress_bar(
    items: Iterable[_T], what: str, show: bool = True, total: int | None = None
) -> Iterable[_T]:
    """Return an iterable over ``items`` that shows a progress bar.

    The progress bar is that of tqdm.

    Returns ``items`` itself if tqdm is not installed or ``show`` is False.

    Args:
        items: The items to iterate over.
        what: Description that the progress bar shows.
        show: Whether to show a progress bar.
        total: Number of items, or None for the length of ``items``.
    """
    if show:
        with contextlib.suppress(ImportError):
            from tqdm import tqdm

            return tqdm(items, desc=what, leave=False, total=total)
    return items


def call_model(model: nn.Module, batch: Any) -> Any:
    """Call a model with a batch.

    Returns the model's output.

    Args:
        model: The model.
        batch: A mapping of keyword arguments, a tuple or list of positional arguments, or a single
            argument of any other type.
    """
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def parameter_device(model: nn.Module) -> torch.device | None:
    """Return the device of a model's parameters.

    The result is the device of the first parameter that is not a meta tensor. If there is no such
    parameter, the result is None.
    """
    return next((p.device for p in model.parameters() if not p.is_meta), None)


def move_to_device(batch: Any, device: torch.device | None) -> Any:
    """Return a batch with its tensors moved to ``device``.

    If ``device`` is None, the batch is returned unchanged.
    """
    if device is None:
        return batch
    if isinstance(batch, torch.Tensor) or (hasattr(batch, "to") and not isinstance(batch, dict)):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: move_to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(move_to_device(value, device) for value in batch)
    return batch


def iterate_batches(
    loader: Iterable[Any], model: nn.Module, what: str, show: bool = True
) -> Iterator[Any]:
    """Yield the batches of a data loader, moved to the model's device.

    Args:
        loader: The data loader.
        model: The model.
        what: Description for the progress bar and error messages.
        show: Whether to show a progress bar.

    Raises:
        InitializationError: The loader has no batches.
    """
    device, empty = parameter_device(model), True
    for batch in progress_bar(loader, what, show):
        empty = False
        yield move_to_device(batch, device)
    if empty and isinstance(loader, Iterator):
        raise InitializationError(
            f"{what}: the dataloader is an iterator that has no more batches; pass a list or a "
            "DataLoader, which can be iterated again"
        )
    if empty:
        raise InitializationError(f"{what}: the dataloader is empty; expected at least one batch")


@contextlib.contextmanager
def forward_pre_hooks(
    modules: Mapping[str, nn.Module], make_hook: Callable[[str], Callable[..., None]]
) -> Iterator[None]:
    """Register a forward pre-hook on each module for the duration of a ``with`` block.

    Args:
        modules: Maps the name of each module to the module.
        make_hook: Function that takes the name of a module and returns the module's hook, which is
            called with the module and its inputs.
    """
    handles = [
        module.register_forward_pre_hook(make_hook(name)) for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def temporary_training_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Set a model to training or evaluation mode for the duration of a ``with`` block.

    After the block, the previous mode of each module is restored.
    """
    before = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, was in before.items():
            module.training = was


@contextlib.contextmanager
def restoring_buffers(model: nn.Module) -> Iterator[None]:
    """Restore the values of a model's buffers at the end of a ``with`` block.

    For example, batch norm writes to its buffers in training mode.
    """
    before = {buffer: buffer.detach().clone() for buffer in model.buffers()}
    try:
        yield
    finally:
        for buffer, value in before.items():
            buffer.copy_(value)


def read_tensor_cache(path: str | None) -> dict[str, torch.Tensor] | None:
    """Read the tensors in a cache file, and return them.

    The result is a dict. It is None if there is no file, or if the file is empty.
    """
    if path is None or not Path(path).is_file() or not Path(path).stat().st_size:
        return None
    found: dict[str, torch.Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return found


def write_tensor_cache(path: str | None, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write the tensors of a calibration to a cache file, if a path is given.

    The file is written atomically. If ``path`` is None, do nothing.
    """
    if path is None:
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    partial = Path(f"{path}.partial")
    torch.save(dict(tensors), partial)
    partial.replace(path)


def cached_tensor_on_device(
    cache: Mapping[str, torch.Tensor], key: str, cache_path: str | None, module: nn.Module
) -> torch.Tensor:
    """Return a cached tensor, moved to the device of a module's weight.

    Args:
        cache: The tensors of the cache file, from `read_tensor_cache`.
        key: Key of the tensor.
        cache_path: Path of the cache file, for error messages.
        module: The module.

    Raises:
        InitializationError: The file contains no tensor with this key.
    """
    if key not in cache:
        raise InitializationError(
            f"{cache_path} has no {key!r}, because the file was created for different target "
            "modules; remove the file, or use another one"
        )
    weight: Any = module.weight
    return cache[key].to(weight.device)

"""Running a model over data: any loader, any batch, with progress where tqdm is installed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from fastlora.validation import InitialisationError

_T = TypeVar("_T")


def progress(items: Iterable[_T], what: str, show: bool = True) -> Iterable[_T]:
    """Returns items with a progress bar around them, where tqdm is installed and it is to show."""
    if show:
        with contextlib.suppress(ImportError):
            from tqdm import tqdm

            return tqdm(items, desc=what, leave=False)
    return items


def call_model(model: nn.Module, batch: Any) -> Any:
    """Calls a model with a batch: a mapping of arguments, a sequence of them, or the only one."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def device_of(model: nn.Module) -> torch.device | None:
    """Returns the device of a model's first parameter that is not on the meta device."""
    return next((p.device for p in model.parameters() if not p.is_meta), None)


def to_device(batch: Any, device: torch.device | None) -> Any:
    """Returns a batch with its tensors on a device."""
    if device is None:
        return batch
    if isinstance(batch, torch.Tensor) or (hasattr(batch, "to") and not isinstance(batch, dict)):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


def batches(loader: Iterable[Any], model: nn.Module, what: str, show: bool = True) -> Iterator[Any]:
    """Yields every batch of a loader on the model's device, one at a time.

    Raises:
        InitialisationError: There is none.
    """
    device, empty = device_of(model), True
    for batch in progress(loader, what, show):
        empty = False
        yield to_device(batch, device)
    if empty:
        raise InitialisationError(f"{what}: the data has no batch; expected at least one")


@contextlib.contextmanager
def hooked(
    modules: Mapping[str, nn.Module], make: Callable[[str], Callable[..., None]]
) -> Iterator[None]:
    """Within the block each module calls ``make(name)`` with itself and its inputs first."""
    handles = [module.register_forward_pre_hook(make(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Within the block a model trains or does not; then each module is as it was."""
    before = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, was in before.items():
            module.training = was


@contextlib.contextmanager
def same_buffers(model: nn.Module) -> Iterator[None]:
    """Behind the block a model's buffers are as before: batch norm in training writes into them."""
    before = {buffer: buffer.detach().clone() for buffer in model.buffers()}
    try:
        yield
    finally:
        for buffer, value in before.items():
            buffer.copy_(value)


def read_cache(path: str | None) -> dict[str, torch.Tensor] | None:
    """Returns the tensors of a cache file; None where there is none yet."""
    if path is None or not Path(path).is_file() or not Path(path).stat().st_size:
        return None
    found: dict[str, torch.Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return found


def write_cache(path: str | None, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes tensors to a cache file, whole or not at all; None writes nothing."""
    if path is None:
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    partial = Path(f"{path}.partial")
    torch.save(dict(tensors), partial)
    partial.replace(path)


def from_cache(
    cache: Mapping[str, torch.Tensor], key: str, path: str | None, module: nn.Module
) -> torch.Tensor:
    """Returns a tensor of a cache file, on the device of a module's weight.

    Raises:
        InitialisationError: It has no such tensor.
    """
    if key not in cache:
        raise InitialisationError(
            f"{path} has no {key!r}: it was made for other target modules; remove it, or name "
            "another file"
        )
    weight: Any = module.weight
    return cache[key].to(weight.device)

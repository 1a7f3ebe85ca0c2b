"""Images on their way to the device, in an order that their readers can rely on.

On a GPU everything that writes to the device tier (images, tables) runs on one stream of the
pool's own, and the images' memory belongs to it too. Before it reuses memory or a column it waits
for the events behind the forwards that read them, and forwards wait for the event behind their
adapters' copies. So no host thread ever waits for the device.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable
from typing import Any

import torch

from fastlora.pool.image import Image
from fastlora.validation import AdapterStateError


class Transfers:
    """Where device and host memory are the same: an image moves by reference.

    Attributes:
        shares_memory: Whether the device tier holds the very images of the CPU tier.
    """

    shares_memory = True

    def ordered(self) -> contextlib.AbstractContextManager[Any]:
        """Return a block within which writes to the device tier happen in order."""
        return contextlib.nullcontext()

    def upload(self, image: Image) -> Image:
        """Return the image in device memory."""
        return image

    def written(self) -> Any:
        """Return a mark behind the writes so far, or None where there is nothing to wait for."""
        return None

    def is_done(self, mark: Any) -> bool:
        """Return whether the device is past a mark."""
        return True

    def wait_for_writes(self, marks: Iterable[Any]) -> None:
        """Let whatever the calling thread starts next come after these writes."""

    def read(self) -> tuple[Any, Any] | None:
        """Return a mark behind what the calling thread has started, and its stream; or None."""
        return None

    def wait_for_reads(self, marks: Iterable[Any]) -> None:
        """Let the next writes come after these reads."""


class CudaTransfers(Transfers):
    """Asynchronous copies from pinned memory on a stream of their own.

    Args:
        device: A CUDA device.
    """

    shares_memory = False

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def ordered(self) -> contextlib.AbstractContextManager[Any]:
        """Make the pool's stream the current one."""
        return torch.cuda.stream(self._stream)

    def upload(self, image: Image) -> Image:
        """Start the copy of a pinned image."""
        data = torch.empty_like(image.data, device=self._device, pin_memory=False)
        data.copy_(image.data, non_blocking=True)
        return dataclasses.replace(image, data=data)

    def written(self) -> torch.cuda.Event:
        """Record an event on the pool's stream."""
        event = torch.cuda.Event()
        event.record(self._stream)
        return event

    def is_done(self, mark: torch.cuda.Event) -> bool:
        """Ask the event, which must not be done while a graph is captured."""
        return not torch.cuda.is_current_stream_capturing() and mark.query()

    def wait_for_writes(self, marks: Iterable[torch.cuda.Event]) -> None:
        """Make the current stream wait, which one that captures a CUDA graph cannot."""
        stream = torch.cuda.current_stream(self._device)
        capturing = torch.cuda.is_current_stream_capturing()
        for event in marks:
            if capturing:
                raise AdapterStateError(
                    "adapters are still on their way to the GPU and a CUDA graph is being "
                    "captured; take the lease before the capture starts"
                )
            stream.wait_event(event)

    def read(self) -> tuple[torch.cuda.Event, int] | None:
        """Record an event on the current stream; a captured forward has read nothing yet."""
        if torch.cuda.is_current_stream_capturing():
            return None
        stream = torch.cuda.current_stream(self._device)
        event = torch.cuda.Event()
        event.record(stream)
        return event, stream.cuda_stream

    def wait_for_reads(self, marks: Iterable[torch.cuda.Event]) -> None:
        """Make the pool's stream wait."""
        for event in marks:
            self._stream.wait_event(event)


def make_transfers(device: torch.device) -> Transfers:
    """Return how images get to a CPU or a CUDA device."""
    if device.type == "cuda":
        return CudaTransfers(device)
    if device.type != "cpu":
        raise ValueError(f"device is {device}, expected a CPU or a CUDA device")
    return Transfers()

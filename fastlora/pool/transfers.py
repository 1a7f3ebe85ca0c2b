"""Copies of images to the device, in an order that their readers can rely on.

On a GPU, everything that writes to the device tier (images and tables) runs on one stream of the
pool, and the memory of the images belongs to that stream too. Before it reuses memory or a column,
the stream waits for the events after the forwards that read them. Forwards wait for the event after
the copies of their adapters. No host thread therefore waits for the device.
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
    """Transfers for a device that uses host memory: an image moves by reference.

    Attributes:
        shares_memory: Whether the device tier holds the same images as the CPU tier.
    """

    shares_memory = True

    def ordered(self) -> contextlib.AbstractContextManager[Any]:
        """Return a context manager in which writes to the device tier happen in order."""
        return contextlib.nullcontext()

    def upload(self, image: Image) -> Image:
        """Return the image in device memory."""
        return image

    def written(self) -> Any:
        """Return an event that follows all writes so far, or None if no wait is needed."""
        return None

    def is_done(self, mark: Any) -> bool:
        """Return whether the device has passed an event."""
        return True

    def wait_for_writes(self, marks: Iterable[Any]) -> None:
        """Make the calling thread's next work on the device wait for these write events."""

    def read(self) -> tuple[Any, Any] | None:
        """Return an event that follows the calling thread's work, with its stream, or None."""
        return None

    def wait_for_reads(self, marks: Iterable[Any]) -> None:
        """Make the next writes wait for these read events."""


class CudaTransfers(Transfers):
    """Asynchronous copies from pinned memory, on a stream of their own.

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
        """Start the copy of a pinned image, and return the image on the device."""
        data = torch.empty_like(image.data, device=self._device, pin_memory=False)
        data.copy_(image.data, non_blocking=True)
        return dataclasses.replace(image, data=data)

    def written(self) -> torch.cuda.Event:
        """Record an event on the pool's stream."""
        event = torch.cuda.Event()
        event.record(self._stream)
        return event

    def is_done(self, mark: torch.cuda.Event) -> bool:
        """Return whether an event has completed. During a graph capture, return False.

        An event must not be queried while a CUDA graph is being captured.
        """
        return not torch.cuda.is_current_stream_capturing() and mark.query()

    def wait_for_writes(self, marks: Iterable[torch.cuda.Event]) -> None:
        """Make the current stream wait for the events.

        Raises:
            AdapterStateError: A CUDA graph is being captured, so the stream cannot wait.
        """
        stream = torch.cuda.current_stream(self._device)
        capturing = torch.cuda.is_current_stream_capturing()
        for event in marks:
            if capturing:
                raise AdapterStateError(
                    "adapters are still being copied to the GPU, and a CUDA graph is being "
                    "captured; acquire the lease before the capture starts"
                )
            stream.wait_event(event)

    def read(self) -> tuple[torch.cuda.Event, int] | None:
        """Record an event on the current stream, and return it with the stream.

        During the capture of a CUDA graph, return None, because a captured forward has not read
        anything.
        """
        if torch.cuda.is_current_stream_capturing():
            return None
        stream = torch.cuda.current_stream(self._device)
        event = torch.cuda.Event()
        event.record(stream)
        return event, stream.cuda_stream

    def wait_for_reads(self, marks: Iterable[torch.cuda.Event]) -> None:
        """Make the pool's stream wait for the events."""
        for event in marks:
            self._stream.wait_event(event)


def make_transfers(device: torch.device) -> Transfers:
    """Return the transfers for a CPU or a CUDA device.

    Raises:
        ValueError: The device has another type.
    """
    if device.type == "cuda":
        return CudaTransfers(device)
    if device.type != "cpu":
        raise ValueError(f"device is {device}, expected a CPU or a CUDA device")
    return Transfers()

"""Copies of images to the device, ordered with the forward passes that read the images.

On a GPU, all writes to adapters and tables run on the pool's own CUDA stream, and the memory of the
images is allocated on that stream. Before memory or a column is reused, this stream waits for the
events after the forward passes that read it. Forward passes wait for the event after the copies of
their adapters. Host threads therefore never wait for the GPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable
from typing import Any

import torch

from fastlora.pool.packed_adapter import PackedAdapter
from fastlora.validation import AdapterStateError


class BaseTransfersToDevice:
    """Base class for transfers of packed adapters from CPU memory to a pool's device.

    The subclass `AsyncTransfersToCuda` is for GPUs, and uses CUDA events to order the copies and
    the forward passes. The base class itself is for a pool on a CPU, and copies nothing.

    Attributes:
        shares_memory: Whether the device tier and the CPU tier use the same memory, so that an
            image can move between them without a copy.
    """

    shares_memory = True

    def use_write_stream(self) -> contextlib.AbstractContextManager[Any]:
        """Return a context manager that makes the write stream the current stream.

        The write stream is the stream for writes to adapters and tables. On a CPU, the context
        manager does nothing.
        """
        return contextlib.nullcontext()

    def upload(self, image: PackedAdapter) -> PackedAdapter:
        """Copy a packed adapter to device memory, and return the copy.

        On a CPU, return the given object.
        """
        return image

    def record_event_after_writes(self) -> torch.cuda.Event | None:
        """Record a CUDA event after the latest writes, and return the event.

        The event completes when all writes to adapters and tables that were issued so far have
        completed. On a CPU, which needs no events, return None.
        """
        return None

    def is_event_done(self, event: Any) -> bool:
        """Return whether an event has completed.

        On a CPU, which needs no events, the result is always True.
        """
        return True

    def make_stream_wait_for_writes(self, events: Iterable[Any]) -> None:
        """Make the current stream wait for the given write events.

        On a CPU, do nothing.
        """

    def record_read_event_and_stream_id(self) -> tuple[torch.cuda.Event, int] | None:
        """Record an event after the reads on the current stream, and return it and the stream's id.

        The event completes when all reads of adapters that were issued on the current stream so far
        have completed. The result is a tuple (event, id of the stream), or None if no event was
        recorded. On a CPU, no event is recorded.
        """
        return None

    def order_writes_after_reads(self, events: Iterable[Any]) -> None:
        """Make later writes wait for the given read events.

        All later writes to adapters and tables wait for the events. On a CPU, do nothing.
        """


class AsyncTransfersToCuda(BaseTransfersToDevice):
    """Copies packed adapters from the CPU to a GPU asynchronously, on a separate CUDA stream.

    The copies can overlap with computation, because the adapters are in page-locked CPU memory.
    CUDA events order the copies with the forward passes that use the adapters. Nothing is copied
    from the GPU back to the CPU.

    Args:
        device: A CUDA device.
    """

    shares_memory = False

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def use_write_stream(self) -> contextlib.AbstractContextManager[Any]:
        """Return a context manager that makes the write stream the current stream.

        The write stream is the pool's own stream. All writes to adapters and tables run on
        this stream, so they run in order.
        """
        return torch.cuda.stream(self._stream)

    def upload(self, image: PackedAdapter) -> PackedAdapter:
        """Copy a packed adapter to the GPU, and return the copy.

        The copy runs asynchronously on the current stream. The caller must first make the write
        stream the current stream, with `use_write_stream`.
        """
        data = torch.empty_like(image.data, device=self._device, pin_memory=False)
        data.copy_(image.data, non_blocking=True)
        return dataclasses.replace(image, data=data)

    def record_event_after_writes(self) -> torch.cuda.Event:
        """Record a CUDA event after the latest writes, and return the event.

        The event is recorded on the pool's stream, on which all writes to adapters and tables run.
        The event therefore completes when all writes issued so far have completed.
        """
        event = torch.cuda.Event()
        event.record(self._stream)
        return event

    def is_event_done(self, event: torch.cuda.Event) -> bool:
        """Return whether an event has completed.

        While a CUDA graph is being captured, the result is False. CUDA does not allow events to be
        queried during a capture.
        """
        return not torch.cuda.is_current_stream_capturing() and event.query()

    def make_stream_wait_for_writes(self, events: Iterable[torch.cuda.Event]) -> None:
        """Make the current stream wait for the given write events.

        Raises:
            AdapterStateError: A CUDA graph is being captured, so the stream cannot wait.
        """
        stream = torch.cuda.current_stream(self._device)
        capturing = torch.cuda.is_current_stream_capturing()
        for event in events:
            if capturing:
                raise AdapterStateError(
                    "adapters are still being copied to the GPU, and a CUDA graph is being "
                    "captured; acquire the lease before the capture starts"
                )
            stream.wait_event(event)

    def record_read_event_and_stream_id(self) -> tuple[torch.cuda.Event, int] | None:
        """Record an event after the reads on the current stream, and return it and the stream's id.

        The event completes when all reads of adapters that were issued on the current stream so far
        have completed. While a CUDA graph is being captured, no event is recorded and the result is
        None, because a captured forward pass has not read anything yet.
        """
        if torch.cuda.is_current_stream_capturing():
            return None
        stream = torch.cuda.current_stream(self._device)
        event = torch.cuda.Event()
        event.record(stream)
        return event, stream.cuda_stream

    def order_writes_after_reads(self, events: Iterable[torch.cuda.Event]) -> None:
        """Make later writes wait for the given read events.

        The pool's write stream waits for the events. All writes to adapters and tables run on this
        stream.
        """
        for event in events:
            self._stream.wait_event(event)


def make_transfers(device: torch.device) -> BaseTransfersToDevice:
    """Return the `BaseTransfersToDevice` object for a pool on a CPU or CUDA device.

    Raises:
        ValueError: The device is of another type.
    """
    if device.type == "cuda":
        return AsyncTransfersToCuda(device)
    if device.type != "cpu":
        raise ValueError(f"expected a CPU or CUDA device, got {device}")
    return BaseTransfersToDevice()

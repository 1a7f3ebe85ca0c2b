"""What a pool knows about a name."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from weakref import ref

from fastlora.pool.image import Image
from fastlora.pool.resident import DeviceCopy
from fastlora.validation import AdapterNotFoundError, near_names


class Entry:
    """What the pool knows about a name.

    Attributes:
        name: The adapter's name.
        folder: Where it can be read again; None for one that came as a state dict.
        generation: Changes when another adapter takes the name.
        pinned: Never evicted from the device.
        copy: Its copy on the device, or None.
        host: Its image in the CPU tier, or None.
        staged: Its image while a thread has read it and no tier holds it yet.
        reading: A thread is reading it.
    """

    __slots__ = ("copy", "folder", "generation", "host", "name", "pinned", "reading", "staged")

    def __init__(self, name: str, folder: Path | None) -> None:
        self.name, self.folder = name, folder
        self.generation = 0
        self.pinned = False
        self.copy: DeviceCopy | None = None
        self.host: Image | None = None
        self.staged: ref[Image] | None = None
        self.reading = False

    def image(self) -> Image | None:
        """Returns the image wherever it is in memory."""
        if self.copy is not None:
            return self.copy.image
        return self.host or (self.staged() if self.staged is not None else None)


def unknown(name: str, known: Collection[str]) -> AdapterNotFoundError:
    """Returns the error for a name that is not registered."""
    return AdapterNotFoundError(
        f"no adapter {name!r} among the {len(known)} of this pool{near_names(str(name), known)}"
    )

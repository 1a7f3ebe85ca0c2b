"""Packing: documents put together into rows, so that less of a batch is padding.

The strategies, and what each gives, are those of TRL 1.16's `pack_dataset`:

* ``bfd``, best fit decreasing (Ding et al., 2024): documents as they are, the longest first, each
  into the row with the least room that takes it; what is longer than a row is cut before.
* ``bfd_split``: the same, and the rest of what is longer than a row is a document of its own.
* ``wrapped``: one after another, cut wherever a row is full.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence

# Documents that are packed together, as `datasets` gives them to TRL's function.
_CHUNK = 1000
# A stretch of a document: its number, where it begins, where it ends.
Stretch = tuple[int, int, int]


def pack(lengths: Sequence[int], size: int, strategy: str) -> list[list[Stretch]]:
    """Returns rows of at most ``size`` tokens: the stretches of documents that each holds.

    Args:
        lengths: Tokens of each document, at least 1.
        size: Tokens of a row.
        strategy: ``"bfd"``, ``"bfd_split"`` or ``"wrapped"``.
    """
    rows: list[list[Stretch]] = []
    for first in range(0, len(lengths), _CHUNK):
        whole = [(i, 0, n) for i, n in enumerate(lengths[first : first + _CHUNK], first)]
        if strategy == "wrapped":
            rows += _wrapped(whole, size)
        elif strategy == "bfd_split":
            cut = [(i, a, min(a + size, n)) for i, _, n in whole for a in range(0, n, size)]
            rows += _best_fit(cut, size)
        else:
            rows += _best_fit([(i, 0, min(n, size)) for i, _, n in whole], size)
    return rows


def _best_fit(stretches: Sequence[Stretch], size: int) -> list[list[Stretch]]:
    rows: list[list[Stretch]] = []
    # Rows by the room that they have left, those that got it first in front.
    open_rows: dict[int, deque[list[Stretch]]] = {}
    rooms: list[int] = []
    for stretch in sorted(stretches, key=lambda s: s[1] - s[2]):
        length = stretch[2] - stretch[1]
        at = bisect_left(rooms, length)
        if at == len(rooms):
            rows.append([])
            row, room = rows[-1], size
        else:
            room = rooms[at]
            row = open_rows[room].popleft()
            if not open_rows[room]:
                rooms.pop(at)
        row.append(stretch)
        left = room - length
        if left:
            queue = open_rows.setdefault(left, deque())
            if not queue:
                insort(rooms, left)
            queue.append(row)
    return rows


def _wrapped(stretches: Sequence[Stretch], size: int) -> list[list[Stretch]]:
    rows: list[list[Stretch]] = []
    room = 0
    for number, start, stop in stretches:
        while start < stop:
            if not room:
                rows.append([])
                room = size
            taken = min(room, stop - start)
            rows[-1].append((number, start, start + taken))
            start, room = start + taken, room - taken
    return rows

"""Pack several documents into each row, so that batches have less padding.

The strategies and their results are those of `pack_dataset` in TRL 1.16:

* ``bfd``, best fit decreasing (Ding et al., 2024): documents are placed from the longest to the
  shortest, each in the fullest row that still has room for it. Documents longer than a row are
  truncated first.
* ``bfd_split``: like ``bfd``, but documents longer than a row are split, and each part is placed as
  a document of its own.
* ``wrapped``: documents follow one another and are split wherever a row is full.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence

# Number of documents that are packed together: `datasets` passes batches of this size to TRL.
_CHUNK = 1000
# A part of a document: (index of the document, start, end).
DocumentPart = tuple[int, int, int]


def pack_documents(
    lengths: Sequence[int], max_row_size: int, strategy: str
) -> list[list[DocumentPart]]:
    """Pack documents into rows of at most ``max_row_size`` tokens.

    Args:
        lengths: Number of tokens in each document, at least 1.
        max_row_size: Maximum number of tokens in a row.
        strategy: ``"bfd"``, ``"bfd_split"``, or ``"wrapped"``.

    Returns:
        A list of rows. Each row is a list of document parts, which are tuples (index of the
        document, start, end).
    """
    rows: list[list[DocumentPart]] = []
    for first in range(0, len(lengths), _CHUNK):
        whole = [(i, 0, n) for i, n in enumerate(lengths[first : first + _CHUNK], first)]
        if strategy == "wrapped":
            rows += _wrapped(whole, max_row_size)
        elif strategy == "bfd_split":
            cut = [
                (i, a, min(a + max_row_size, n))
                for i, _, n in whole
                for a in range(0, n, max_row_size)
            ]
            rows += _best_fit(cut, max_row_size)
        else:
            rows += _best_fit([(i, 0, min(n, max_row_size)) for i, _, n in whole], max_row_size)
    return rows


def _best_fit(parts: Sequence[DocumentPart], max_row_size: int) -> list[list[DocumentPart]]:
    rows: list[list[DocumentPart]] = []
    # Rows by their remaining room. In each queue, rows that reached that room earlier come first.
    open_rows: dict[int, deque[list[DocumentPart]]] = {}
    rooms: list[int] = []
    for part in sorted(parts, key=lambda part: part[1] - part[2]):
        length = part[2] - part[1]
        at = bisect_left(rooms, length)
        if at == len(rooms):
            rows.append([])
            row, room = rows[-1], max_row_size
        else:
            room = rooms[at]
            row = open_rows[room].popleft()
            if not open_rows[room]:
                rooms.pop(at)
        row.append(part)
        left = room - length
        if left:
            queue = open_rows.setdefault(left, deque())
            if not queue:
                insort(rooms, left)
            queue.append(row)
    return rows


def _wrapped(parts: Sequence[DocumentPart], max_row_size: int) -> list[list[DocumentPart]]:
    rows: list[list[DocumentPart]] = []
    room = 0
    for number, start, stop in parts:
        while start < stop:
            if not room:
                rows.append([])
                room = max_row_size
            taken = min(room, stop - start)
            rows[-1].append((number, start, start + taken))
            start, room = start + taken, room - taken
    return rows

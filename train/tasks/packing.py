"""Which examples share a row: best-fit decreasing, each into the fullest row that still has room for it."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of indices into ``lengths``, each row's lengths together at most ``capacity``.

    The same lengths give the same rows. Time grows with N log capacity.

    Raises:
      ValueError: one is longer than the capacity, or not positive.
    """
    if any(not 0 < length <= capacity for length in lengths):
        raise ValueError(f"lengths should be 1 to {capacity}, got {min(lengths)} to {max(lengths)}")
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # rows by the room they have left
    rooms: list[int] = []  # the keys, sorted
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect_left(rooms, lengths[i])
        if place < len(rooms):
            room = rooms[place]
            row = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[place]
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(i)
        left = room - lengths[i]
        if left not in with_room:
            with_room[left] = []
            insort(rooms, left)
        with_room[left].append(row)
    return rows

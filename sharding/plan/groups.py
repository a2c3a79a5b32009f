"""Which devices a collective runs between, from the ways in which a program's text writes its groups."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import numpy as np


def first_group(attributes: str, mesh: Mapping[str, int]) -> tuple[int, ...]:
    """The first group of devices, as positions in the flat order of the mesh.

    Forms: ``{{0,1},{2,3}}``; ``[8,32]<=[32,8]T(1,0)``, an iota, transposed and cut into rows;
    ``mesh['a'=8,'b'=4] {'b'}``, the axes of a mesh that a group spans; or a permutation's pairs of devices, where those
    that are linked with the first make a group.

    Raises:
      ValueError: another form.
    """
    everybody = tuple(range(math.prod(mesh.values())))
    pairs = re.search(r"source_target_pairs=\{((?:\{[^}]*\},?)*)\}", attributes)
    if pairs:
        return _connected([tuple(_numbers(pair)) for pair in re.findall(r"\{([\d,]+)\}", pairs[1])])
    iota = re.search(r"replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)", attributes)
    if iota:
        return _sorted(_iota(iota[1])[0])
    named = re.search(
        r"replica_groups=@?mesh\[([^\]]*)\](?:,?\s*device_ids=\(([^()]*(?:\([^)]*\))?)\))?\s*\{([^}]*)\}", attributes
    )
    if named:
        return _named(named[1], named[2], named[3])
    listed = re.search(r"replica_groups=\{(?:\{([\d,]*)\})?", attributes)
    if listed:
        return _sorted(_numbers(listed[1])) if listed[1] else everybody
    if "replica_groups" in attributes:
        raise ValueError(f"groups of devices in an unknown form: {attributes[:200]}")
    return everybody


def axes_of(devices: tuple[int, ...], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which devices differ, in the mesh's order."""
    places = np.unravel_index(np.asarray(devices), tuple(mesh.values()))
    return tuple(name for name, along in zip(mesh, places, strict=True) if len(np.unique(along)) > 1)


def _iota(text: str) -> np.ndarray:
    """``[2,4]<=[4,2]T(1,0)``: 0, 1, 2 … in the shape on the right, transposed, in the shape on the left."""
    found = re.fullmatch(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text.strip())
    if found is None:
        raise ValueError(f"an order of devices in an unknown form: {text}")
    dimensions = _numbers(found[2])
    ids = np.arange(math.prod(dimensions)).reshape(dimensions)
    return (ids.transpose(_numbers(found[3])) if found[3] else ids).reshape(_numbers(found[1]))


def _order(text: str | None, count: int) -> np.ndarray:
    """Devices in the order of the compiler's mesh: ``[16,4]T(1,0)``, 0, 1, 2 … in that shape, transposed; or a list."""
    if not text:
        return np.arange(count)
    found = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text.strip())
    if found is None:
        return _iota(text) if "[" in text else np.asarray(_numbers(text))
    ids = np.arange(count).reshape(_numbers(found[1]))
    return ids.transpose(_numbers(found[2])) if found[2] else ids


def _named(mesh: str, order: str | None, axes: str) -> tuple[int, ...]:
    """The group with device 0 of the named axes of the compiler's own mesh: ``'b'``, or ``'b':(2)4``, the 4 parts of an
    axis that come after 2."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    count = math.prod(sizes.values())
    ids = _order(order, count)
    # Every axis as (what comes before, the part, what comes after), so that parts of axes are axes.
    wanted = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)
    index: list[np.ndarray] = []
    coordinates = dict(zip(sizes, np.unravel_index(np.arange(count), tuple(sizes.values())), strict=True))
    for name, size in sizes.items():
        used = [(int(before), int(part)) for other, before, part in wanted if other == name and part]
        if any(other == name and not part for other, _, part in wanted):
            continue
        rest = coordinates[name]
        for before, part in used:
            after = size // (before * part)
            rest = rest - (rest // after % part) * after
        index.append(rest)
    inside = np.all([each == 0 for each in index], axis=0) if index else np.ones(count, bool)
    return _sorted(ids.reshape(-1)[inside])


def _connected(pairs: list[tuple[int, ...]]) -> tuple[int, ...]:
    """The devices that the first pair is linked with, over however many pairs."""
    links: dict[int, set[int]] = {}
    for one, other in pairs:
        links.setdefault(one, set()).add(other)
        links.setdefault(other, set()).add(one)
    group: set[int] = set()
    new = {pairs[0][0]} if pairs else set()
    while new:
        group |= new
        new = {other for one in new for other in links[one]} - group
    return _sorted(group)


def _sorted(devices) -> tuple[int, ...]:
    return tuple(sorted(int(device) for device in devices))


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number.strip()]

"""The sizes of a checkpoint's files, noted when it is complete: so one that is cut short or misses files is seen.

Of small files, in which the places in the data and the loop's memory stand, there is a checksum, too. The arrays' own
are not read again for one: that would take as long as to write them.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

SIZES = "sizes.json"
SMALL = 1 << 20  # bytes


def write_sizes(folder: Path) -> None:
    """Notes the size of every file of a finished checkpoint, and the checksum of a small one."""
    if jax.process_index() == 0 and folder.is_dir():
        sizes = {str(p.relative_to(folder)): _noted(p) for p in sorted(folder.rglob("*")) if p.is_file()}
        partial = folder / (SIZES + ".partial")
        partial.write_text(json.dumps(sizes))
        partial.rename(folder / SIZES)


def compare_sizes(folder: Path) -> str:
    """What is wrong with a checkpoint's files, as the first process sees them; empty if nothing is. One that was
    finished a moment before its run was killed has no list of sizes, and is taken as it is."""
    wrong = ""
    if jax.process_index() == 0 and (folder / SIZES).is_file():
        try:
            sizes = json.loads((folder / SIZES).read_text())
        except ValueError:
            sizes = {}
        for name, noted in sizes.items():
            path = folder / name
            size = noted[0] if isinstance(noted, list) and noted else noted
            if not path.is_file():
                wrong = f"{name} is missing"
            elif path.stat().st_size != size:
                wrong = f"{name} has {path.stat().st_size} bytes of {size}"
            elif noted != size and noted != _noted(path):
                wrong = f"{name} is not what was written"
            if wrong:
                break
    if jax.process_count() > 1:
        text = np.frombuffer(wrong.encode()[:200].ljust(200), np.uint8)
        wrong = bytes(np.asarray(multihost_utils.broadcast_one_to_all(text))).decode(errors="ignore").strip()
    return wrong


def _noted(path: Path) -> int | list[int]:
    """A file's size, and the checksum of a small one."""
    size = path.stat().st_size
    return [size, zlib.crc32(path.read_bytes())] if size <= SMALL else size

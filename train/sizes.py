"""The sizes of a checkpoint's files, noted when it is complete: so one that is cut short or misses files is seen."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

SIZES = "sizes.json"


def write_sizes(folder: Path) -> None:
    """Notes the size of every file of a finished checkpoint."""
    if jax.process_index() == 0 and folder.is_dir():
        sizes = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
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
        for name, size in sizes.items():
            path = folder / name
            if not path.is_file():
                wrong = f"{name} is missing"
            elif path.stat().st_size != size:
                wrong = f"{name} has {path.stat().st_size} bytes of {size}"
            if wrong:
                break
    if jax.process_count() > 1:
        text = np.frombuffer(wrong.encode()[:200].ljust(200), np.uint8)
        wrong = bytes(np.asarray(multihost_utils.broadcast_one_to_all(text))).decode(errors="ignore").strip()
    return wrong

"""Compiled programs kept from one run to the next: compiling takes longer than a short text."""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from pathlib import Path

MAX_BYTES = 1 << 30


def keep_compiled_programs() -> Path | None:
    """Has jax keep compiled programs in the user's cache folder; that folder, or None where there is no safe one.

    A folder that the user set for jax (``JAX_COMPILATION_CACHE_DIR``) is left as it is.
    """
    import jax

    if jax.config.values["jax_compilation_cache_dir"]:
        return None
    folder = _private_folder()
    if folder is not None:
        _prune(folder)
        jax.config.update("jax_compilation_cache_dir", str(folder))
        # Even a program that compiles in a tenth of a second loads faster than that.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return folder


def cache_folder() -> Path:
    """Where programs compiled for this kind of machine are kept."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if sys.platform == "win32":
        base = base or os.environ.get("LOCALAPPDATA", "")
    home = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    # A home folder may be shared by machines whose processors differ, and jax's key does not tell them apart.
    return home / "optjax" / "compiled" / hashlib.sha256(_processor().encode()).hexdigest()[:16]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    kinds = ("model name", "flags", "CPU part", "Features")
    return platform.machine() + "\n".join(sorted({line for line in lines if line.startswith(kinds)}))


def _private_folder() -> Path | None:
    """The folder, made if need be. What lies in it is run, so nobody else may be able to write to it."""
    try:
        folder = cache_folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = folder.stat()
        if hasattr(os, "getuid") and (state.st_uid != os.getuid() or state.st_mode & 0o022):
            return None
        return folder if os.access(folder, os.W_OK) else None
    except (OSError, RuntimeError):  # read-only, or no home at all
        return None


def _prune(folder: Path) -> None:
    """Removes the programs that were not used for longest, where they take more than ``MAX_BYTES``."""
    files = []
    for path in folder.iterdir():
        try:
            state = path.stat()
        except OSError:  # another process was faster
            continue
        files.append((max(state.st_atime, state.st_mtime), state.st_size, path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= MAX_BYTES:
            return
        path.unlink(missing_ok=True)
        total -= size

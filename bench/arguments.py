"""The command line of a program of this folder."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any


class Parser(argparse.ArgumentParser):
    """Of ``python -m bench.NAME``: its help is the program's docstring as it stands, and has each flag's default."""

    def __init__(self, name: str, text: str | None):
        plain = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=f"python -m bench.{name}", description=text, formatter_class=plain)

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        default, told = options.get("default"), options.get("help") or ""
        values = default if isinstance(default, list | tuple) else [default]
        shown = [shlex.quote(str(value)) for value in values if value not in (None, False, argparse.SUPPRESS)]
        here = isinstance(default, Path) and default.is_absolute()  # says nothing on another machine
        if shown and not here:
            options["help"] = f"{told} (default: {' '.join(shown)})".strip()
        return super().add_argument(*names, **options)

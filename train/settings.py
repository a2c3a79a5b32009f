"""Settings of a training script: flags on the command line, and the same ones in a file.

`--settings FILE` names a .toml or .json file of one level, whose keys are the flags' names with ``_`` for ``-``: a flag
beats the file, the file beats a preset or default. What a run was made with is saved in its folder as
`settings.json`, which `--settings` takes again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

FILE = "settings.json"


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The parser's namespace for argv (by default the command line's), with the flags of `--settings` files put first.

    Flags that are on or off should be made with `argparse.BooleanOptionalAction`, so that one can undo a file's. A
    file that is missing, not readable or has a key that is no flag ends the program as a wrong flag does: with the
    usage, what was wrong, and exit status 2.
    """
    parser.allow_abbrev = False
    parser.add_argument("--settings", type=Path, metavar="FILE", help=".toml or .json with flags of this command")
    argv = list(sys.argv[1:] if argv is None else argv)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--settings", type=Path)
    named = first.parse_known_args(argv)[0].settings
    if named is None or {"-h", "--help"} & set(argv):
        return parser.parse_args(argv)
    try:
        flags = _flags(read(named))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    # Asked of the parser itself: parsing would first complain of what is missing.
    known = parser._option_string_actions
    strange = [name for flag in flags if flag.startswith("--") and (name := flag.partition("=")[0]) not in known]
    if strange:
        names = ", ".join(name[2:].replace("-", "_") for name in strange)
        parser.error(f"{named}: no such setting: {names}; --help lists them")
    return parser.parse_args([*flags, *argv])


def read(path: str | Path) -> dict[str, Any]:
    """The settings of a file; of a run's folder, those of its `settings.json`.

    Raises:
      FileNotFoundError: it is not there.
      ValueError: it is neither TOML nor JSON, or not of one level.
    """
    path = Path(path)
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"no settings file {path}")
    text = path.read_text(encoding="utf-8")
    try:
        found = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (json.JSONDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path} is not {'JSON' if path.suffix == '.json' else 'TOML'}: {error}") from None
    if not isinstance(found, dict) or any(isinstance(value, dict) for value in found.values()):
        raise ValueError(f"{path}: expected settings of one level, name and value")
    return found


def write(args: argparse.Namespace, folder: str | Path) -> None:
    """Saves what was given, chosen and left at its default; the first of several processes does."""
    if jax.process_index() == 0:
        Path(folder).mkdir(parents=True, exist_ok=True)
        text = json.dumps(resolved(args), indent=2)
        (Path(folder) / FILE).write_text(text + "\n", encoding="utf-8")


def resolved(args: argparse.Namespace) -> dict[str, Any]:
    """Settings in JSON's types; those that are None are left out."""
    return {name: _plain(value) for name, value in vars(args).items() if name != "settings" and value is not None}


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value


def _flags(found: dict[str, Any]) -> list[str]:
    flags = []
    for name, value in found.items():
        flag = "--" + name.replace("_", "-")
        if value is None:
            continue
        if isinstance(value, bool):
            flags.append(flag if value else "--no-" + flag[2:])
        elif isinstance(value, list):
            flags += [flag, *map(str, value)]
        else:
            flags.append(f"{flag}={value}")
    return flags

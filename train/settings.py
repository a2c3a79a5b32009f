"""Settings of a training script: flags on the command line, and the same ones in a file.

`--settings FILE` names a .toml or .json file of one level, whose keys are the flags' names with ``_`` for ``-``: a flag
beats the file, the file beats a preset or default. What a run was made with is saved in its folder as
`settings.json`, which `--settings` takes again; there `filled` lists those that nobody gave.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import jax

from optjax.settings_file import FILE, read_settings

# Of a saved file: names of its settings that followed from others, and do not bind a run that changes those.
FILLED = "filled"


def parse(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None = None,
    beaten: Callable[[AbstractSet[str], Mapping[str, Any]], Iterable[str]] = lambda given, found: (),
) -> argparse.Namespace:
    """The parser's namespace for argv (by default the command line's), with the flags of `--settings` files put first.

    ``beaten``, of the names of the flags in argv and a file's settings, gives those settings that make way for flags of
    other names.

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
        found = read_settings(named)
        listed = found.get(FILLED, [])
        if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
            raise ValueError(f"{named}: {FILLED} should be a list of settings' names, not {listed!r}")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    # Asked of the parser itself: parsing would first complain of what is missing.
    known = parser._option_string_actions
    given = {known[flag].dest for word in argv if (flag := word.partition("=")[0]) in known}
    gone = {*beaten(given, found), FILLED}
    flags = _flags({name: value for name, value in found.items() if name not in gone})
    strange = [name for flag in flags if flag.startswith("--") and (name := flag.partition("=")[0]) not in known]
    if strange:
        names = ", ".join(name[2:].replace("-", "_") for name in strange)
        parser.error(f"{named}: no such setting: {names}; --help lists them")
    args = parser.parse_args([*flags, *argv])
    if FILLED in found:
        setattr(args, FILLED, [name for name in found[FILLED] if name not in gone | given])
    return args


def write(settings: Mapping[str, Any], folder: str | Path) -> None:
    """Saves what `resolved` gave; the first of several processes does."""
    if jax.process_index() == 0:
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def resolved(args: argparse.Namespace) -> dict[str, Any]:
    """Settings in JSON's types; those that are None are left out."""
    return {name: plain(value) for name, value in vars(args).items() if name != "settings" and value is not None}


def plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
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

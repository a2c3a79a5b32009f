"""Settings in a file: TOML or JSON of one level, names and values."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

FILE = "settings.json"


def read_settings(path: str | Path) -> dict[str, Any]:
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

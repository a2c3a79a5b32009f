"""Text as it is named on the command line: packed, or packed first."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from .barrier import together
from .data.store import ABOUT, read_about

# Packs text where no tokenizer is named.
OPT = "facebook/opt-125m"


def parse_source(text: str) -> tuple[str, float]:
    """``PATH`` or ``PATH=WEIGHT`` as a path and a weight (1 where none is named).

    Raises:
      ValueError: the weight is not above 0.
    """
    path, equals, weight = text.rpartition("=")
    if not equals or Path(text).exists():
        return text, 1.0
    try:
        value = float(weight)
    except ValueError:
        return text, 1.0
    if not 0 < value < float("inf"):
        raise ValueError(f"{text}: a weight should be above 0")
    return path, value


def packed(
    names: Sequence[str],
    tokenizer: str | None,
    folder: str | Path,
    *,
    beside: Sequence[str] = (),
    text_field: str = "text",
    quiet: bool = False,
) -> list[tuple[Path, float]]:
    """Folders of packed text with their weights; what is not packed yet is, into ``folder``, by the first process.

    Args:
      tokenizer: to pack with. By default that of the text that is packed already, else `OPT`.
      beside: other text of the run, named alike.

    Raises:
      FileNotFoundError: there is no such text.
      ValueError: it cannot be packed, or a weight makes no sense.
    """
    found = [parse_source(name) for name in names]
    ready = [(Path(path), weight) for path, weight in found]
    todo = [i for i, (path, _) in enumerate(ready) if not _is_packed(path)]
    before = [path for path in (Path(parse_source(name)[0]) for name in (*names, *beside)) if _is_packed(path)]
    if todo and before and tokenizer is None:
        tokenizer = _tokenizer_beside(before[0], found[todo[0]][0])
    for i in todo:
        ready[i] = Path(folder) / _name(found[i][0], tokenizer, text_field), found[i][1]
    if todo:
        try:
            for i in todo if jax.process_index() == 0 else ():
                if not _is_packed(ready[i][0]):
                    _pack(found[i][0], tokenizer or OPT, ready[i][0], text_field, quiet)
        finally:  # the others are not left waiting where it fails
            together(f"{', '.join(str(ready[i][0]) for i in todo)} packed")
        for i in todo:
            if not _is_packed(ready[i][0]):
                raise ValueError(f"the first process has not packed {found[i][0]} into {ready[i][0]}; it says why")
    return ready


def tokenizer_of(sources: Sequence[tuple[Path, float]], named: str | None, *, quiet: bool = False) -> Any:
    """The tokenizer that is named, else that with which the text was packed; None, and said, where neither can be had.

    Raises:
      FileNotFoundError, ValueError: as `optjax.Tokenizer.load`, of the one that is named.
    """
    from optjax.tokenizer import Tokenizer

    if named is not None:
        return Tokenizer.load(named)
    with_name = read_about(sources[0][0]).get("tokenizer")
    if not with_name:
        return None
    try:
        return Tokenizer.load(with_name)
    except (ValueError, OSError) as error:
        if not quiet and jax.process_index() == 0:
            why = (str(error).splitlines() or [""])[0]
            print(f"no sample texts, and no tokenizer with --export: {why} (--tokenizer names one)", file=sys.stderr)
        return None


def _is_packed(path: Path) -> bool:
    return (path / ABOUT).is_file()


def _tokenizer_beside(folder: Path, text: str) -> str | None:
    """The name of the tokenizer with which a folder was packed, to pack another text with; None: `OPT`.

    Raises:
      ValueError: the folder does not say.
    """
    name = read_about(folder).get("tokenizer")
    if not name:
        raise ValueError(
            f"{text} is not packed yet, and {folder} beside it does not say by which tokenizer it was packed: give "
            "that with --tokenizer"
        )
    return None if name == OPT else name


def _name(path: str, tokenizer: str | None, text_field: str) -> str:
    """Another text, tokenizer or field is another folder."""
    about = f"{Path(path).resolve()}\n{tokenizer}\n{text_field}"
    return f"{Path(path).name.partition('.')[0]}-{hashlib.sha256(about.encode()).hexdigest()[:8]}"


def _pack(path: str, tokenizer: str, out: Path, text_field: str, quiet: bool) -> None:
    from optjax.tokenizer import Tokenizer

    from . import pack

    try:
        Tokenizer.load(tokenizer)
    except (ValueError, OSError) as error:
        why = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"the tokenizer {tokenizer}, to pack {path} with, cannot be had ({why}): say with --tokenizer where it is"
        ) from None
    words = ["--documents", path, "--tokenizer", tokenizer, "--out", str(out), "--text-field", text_field]
    pack.main([*words, *(["--quiet"] if quiet else [])])

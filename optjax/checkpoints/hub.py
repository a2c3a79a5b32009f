"""Where a checkpoint is: on this machine, in the package, or on the hub."""

from __future__ import annotations

import importlib.resources
import os
import re
from pathlib import Path

from optjax.checkpoints.errors import shorten
from optjax.presets import PRESETS

PACKAGED = ("opt-mini",)
_HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?$")
# What a checkpoint needs beside its weights.
_SMALL_FILES = [
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "vocab.json", "merges.txt", "added_tokens.json", "adapter_config.json",
]  # fmt: skip
# One format is downloaded, the first that is there.
_WEIGHTS = [
    r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?",
    r"pytorch_model(-\d+-of-\d+)?\.bin(\.index\.json)?",
    r"flax_model(-\d+-of-\d+)?\.msgpack(\.index\.json)?",
    r"tf_model(-\d+-of-\d+)?\.h5(\.index\.json)?",
    r".*\.pt",
    r"decoder\..*",
]
_ADAPTER = [r"adapter_model\.safetensors", r"adapter_model\.bin"]


def resolve_source(
    source: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    weights: bool = True,
    adapter: bool = False,
) -> Path:
    """The path of a checkpoint, downloaded from the hub if need be (with a progress bar; what is there is kept).

    Args:
      source: a path, ``"opt-mini"``, or a hub id.
      revision, token: of the hub: a branch, tag or commit; an access token.
      weights: False for the config and the tokenizer's files only.
      adapter: True for PEFT's files of an adapter, instead of a model's.

    Raises:
      FileNotFoundError: there is no such path, and no such model on the hub or no way to reach it.
      ConnectionError: the network failed on the way; a second attempt goes on where the first stopped.
      ValueError: it is nothing of those, or the hub refuses access.
    """
    if not isinstance(source, str | os.PathLike):
        raise ValueError(f"source should be a path or a hub id such as 'facebook/opt-125m', not {source!r}")
    try:
        path = Path(source).expanduser()
        if str(source) and path.exists():
            return path
    except (OSError, RuntimeError) as error:  # a name that is too long, or a home that nobody has
        raise FileNotFoundError(f"no file or folder at {shorten(str(source))!r}: {shorten(str(error))}") from None
    name = str(source)
    if name in PACKAGED:
        folder = Path(str(importlib.resources.files("optjax") / "assets" / name))
        if not folder.is_dir():
            raise FileNotFoundError(f"this installation lacks the model {name!r}: no folder {folder}")
        return folder
    if isinstance(source, Path) or not _HUB_ID.match(name) or name.startswith("."):
        raise FileNotFoundError(f"no file or folder at {name!r}, and it is not a hub id such as 'facebook/opt-125m'")
    return _download(name, revision, token, _ADAPTER if adapter else _WEIGHTS if weights else None)


def _download(repo: str, revision: str | None, token: str | bool | None, weights: list[str] | None) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = f"{repo!r}" + (f" at revision {revision!r}" if revision else "")
    reached = False
    try:
        files = HfApi(token=token).list_repo_files(repo, revision=revision)
        reached = True
        wanted = _wanted(files, weights, where)
        return Path(snapshot_download(repo, revision=revision, token=token, allow_patterns=wanted))
    except GatedRepoError:
        raise ValueError(f"access to {where} is restricted: ask for it on its page, then pass token=") from None
    except RepositoryNotFoundError:
        raise FileNotFoundError(
            f"no file or folder {repo!r} here{_meant(repo)}, and no such model on the hub (a private one needs token=)"
        ) from None
    except RevisionNotFoundError:
        raise FileNotFoundError(f"{repo!r} is on the hub, but has no revision {revision!r}") from None
    except HFValidationError as error:
        raise FileNotFoundError(f"no file or folder at {repo!r}, and it is no hub id: {error}") from None
    except NoCheckpointError:
        raise
    except Exception as error:
        if reached:
            raise ConnectionError(
                f"the download of {where} broke off ({shorten(str(error))}): a second attempt goes on where it stopped"
            ) from error
        # No network: what an earlier download left will do, if it is complete.
        try:
            folder = Path(snapshot_download(repo, revision=revision, token=token, local_files_only=True))
            _wanted([path.name for path in folder.iterdir()], weights, where)
            return folder
        except (LocalEntryNotFoundError, NoCheckpointError):
            raise FileNotFoundError(
                f"no file or folder {repo!r} here{_meant(repo)}; on the hub {where} cannot be reached: "
                f"{shorten(str(error))}"
            ) from error


def _meant(repo: str) -> str:
    """A published size is named without its owner elsewhere. The largest is not on the hub."""
    name = repo.lower()
    return f" (the weights of {name} are 'facebook/{name}')" if name in PRESETS and name != "opt-175b" else ""


class NoCheckpointError(FileNotFoundError):
    """A model on the hub in no format that optjax reads."""


def _wanted(files: list[str], weights: list[str] | None, where: str) -> list[str]:
    """The small files, and the weights by the first pattern that has any."""
    small = [f for f in files if f in _SMALL_FILES]
    if weights is None:
        return small
    for pattern in weights:
        chosen = [f for f in files if re.fullmatch(pattern, f)]
        if chosen:
            return small + chosen
    raise NoCheckpointError(f"{where} holds no checkpoint that optjax reads; its files: {', '.join(files[:20])}")

"""Where a checkpoint is: on this machine, in the package, or on the hub."""

from __future__ import annotations

import importlib.resources
import re
from pathlib import Path

PACKAGED = ("opt-mini",)
_HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?$")
# What a checkpoint needs beside its weights.
_SMALL_FILES = [
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "vocab.json", "merges.txt", "added_tokens.json",
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


def resolve_source(
    source: str | Path, *, revision: str | None = None, token: str | bool | None = None, weights: bool = True
) -> Path:
    """The path of a checkpoint, downloaded from the hub if need be (with a progress bar; what is there is kept).

    Args:
      source: a path, ``"opt-mini"``, or a hub id.
      revision, token: of the hub: a branch, tag or commit; an access token.
      weights: False for the config and the tokenizer's files only.

    Raises:
      FileNotFoundError: there is no such path, and no such model on the hub or no way to reach it.
      ValueError: it is neither a path nor a hub id; access is refused.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    name = str(source)
    if name in PACKAGED:
        folder = Path(str(importlib.resources.files("optjax") / "assets" / name))
        if not folder.is_dir():
            raise FileNotFoundError(f"this installation lacks the model {name!r}: no folder {folder}")
        return folder
    if isinstance(source, Path) or not _HUB_ID.match(name) or name.startswith("."):
        raise FileNotFoundError(f"no file or folder at {name!r}, and it is not a hub id such as 'facebook/opt-125m'")
    return _download(name, revision, token, weights)


def _download(repo: str, revision: str | None, token: str | bool | None, weights: bool) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = f"{repo!r}" + (f" at revision {revision!r}" if revision else "")
    try:
        try:
            files = HfApi(token=token).list_repo_files(repo, revision=revision)
        except (OfflineModeIsEnabled, OSError) as error:
            if isinstance(error, HfHubHTTPError):
                raise
            # No network: what an earlier download left will do, if it is complete.
            folder = Path(snapshot_download(repo, revision=revision, token=token, local_files_only=True))
            return folder
        return Path(
            snapshot_download(repo, revision=revision, token=token, allow_patterns=_wanted(files, weights, where))
        )
    except GatedRepoError:
        raise ValueError(f"access to {where} is restricted: ask for it on its page, then pass token=") from None
    except RepositoryNotFoundError:
        raise FileNotFoundError(
            f"no file or folder {repo!r} here, and no such model on the hub (a private one needs token=)"
        ) from None
    except RevisionNotFoundError:
        raise FileNotFoundError(f"{repo!r} is on the hub, but has no revision {revision!r}") from None
    except HFValidationError as error:
        raise ValueError(f"{repo!r} is neither a path nor a hub id: {error}") from None
    except (LocalEntryNotFoundError, EntryNotFoundError) as error:
        raise FileNotFoundError(f"{where} is not on this machine, and the hub cannot be reached: {error}") from None
    except HfHubHTTPError as error:
        raise ValueError(f"the hub refused {where}: {error}") from None
    except OSError as error:
        raise FileNotFoundError(f"{where} could not be downloaded: {error}") from None


def _wanted(files: list[str], weights: bool, where: str) -> list[str]:
    """The small files, and the weights in the best format there is."""
    small = [f for f in files if f in _SMALL_FILES]
    if not weights:
        return small
    for pattern in _WEIGHTS:
        chosen = [f for f in files if re.fullmatch(pattern, f)]
        if chosen:
            return small + chosen
    raise FileNotFoundError(f"{where} holds no checkpoint that optjax reads; its files: {', '.join(files[:20])}")

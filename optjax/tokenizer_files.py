"""Finds, reads and writes a tokenizer's files: tokenizer.json, or vocab.json and merges.txt, and their settings."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optjax.added_tokens import DECODER, add_tokens, decoder_entry

if TYPE_CHECKING:
    import tokenizers

FULL, VOCAB, MERGES, ADDED = "tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json"
SETTINGS, NAMES, MODEL = "tokenizer_config.json", "special_tokens_map.json", "config.json"
FILES = (FULL, VOCAB, MERGES, ADDED, SETTINGS, NAMES)
OPT_NAMES = {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>"}


def locate(source: str | Path, revision: str | None, token: str | bool | None) -> Path:
    """The folder that holds a source's tokenizer files; a hub's are fetched first."""
    from optjax.checkpoints.hub import resolve_source

    path = resolve_source(source, revision=revision, token=token, weights=False)
    return path if path.is_dir() else path.parent  # a single weights file has its tokenizer beside it


def read(folder: Path) -> dict[str, Any]:
    """The backend and the names of the special tokens, as `Tokenizer` takes them; `Tokenizer.load` has the rules.

    Raises:
      FileNotFoundError: no tokenizer in the folder.
      ValueError: a damaged file, or files that do not fit together.
    """
    settings = _read_object(folder / SETTINGS)
    if (folder / FULL).is_file():
        backend = _parse(folder / FULL)
        names = _special_names(folder, settings, backend)
        if settings.get("add_bos_token") and not backend.num_special_tokens_to_add(False):
            _add_bos(backend, names["bos_token"])
    elif (folder / VOCAB).is_file() and (folder / MERGES).is_file():
        backend = _build(folder / VOCAB, folder / MERGES, bool(settings.get("add_prefix_space", False)))
        added = add_tokens(backend, _read_object(folder / ADDED), settings, _read_object(folder / NAMES), folder)
        names = _special_names(folder, settings, backend)
        known = [name for name in names.values() if name and backend.token_to_id(name) is not None]
        backend.add_special_tokens([name for name in dict.fromkeys(known) if name not in added])
        if settings.get("add_bos_token", True):
            _add_bos(backend, names["bos_token"])
    else:
        found = ", ".join(sorted(path.name for path in folder.iterdir())) if folder.is_dir() else "no such folder"
        raise FileNotFoundError(
            f"no tokenizer in {folder}: looked for {FULL}, or {VOCAB} with {MERGES}; found: {found or 'nothing'}; "
            "another source's may be named (--tokenizer, Tokenizer.load)"
        )
    return {"backend": backend, **names}


def write(backend: tokenizers.Tokenizer, names: dict[str, str], folder: Path, *, adds_bos: bool) -> None:
    """Writes the files that `read` and transformers read; see `Tokenizer.save`."""
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / FULL))
    state = json.loads(backend.to_str())
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    if _is_gpt2(state):
        backend.model.save(str(folder))  # vocab.json and merges.txt
        prefix = state["pre_tokenizer"]["add_prefix_space"]
        names = names | {"unk_token": names["eos_token"]}  # unnamed, transformers would add GPT-2's as one more entry
        settings |= {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": adds_bos, "add_prefix_space": prefix, **names}
        settings[DECODER] = decoder_entry(state)
    settings |= {"clean_up_tokenization_spaces": False, "errors": "replace"}
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (folder / NAMES).write_text(json.dumps(names, indent=2) + "\n", encoding="utf-8")
    remove_others(folder, {FULL, SETTINGS, NAMES} | ({VOCAB, MERGES} if _is_gpt2(state) else set()))


def remove_others(folder: Path, written: Collection[str]) -> None:
    """An earlier tokenizer's files away, but for those just written: of two tokenizers' files one wrong one is made."""
    for name in FILES:
        if name not in written:
            (folder / name).unlink(missing_ok=True)


def _is_gpt2(state: dict[str, Any]) -> bool:
    """Whether vocab.json and merges.txt say all there is to say: Galactica's, for one, also splits digits."""
    pre = state["pre_tokenizer"] or {}
    beyond = [token for token in state["added_tokens"] if token["content"] not in state["model"].get("vocab", {})]
    return (
        state["model"]["type"] == "BPE"
        and state["normalizer"] is None
        and pre.get("type") == "ByteLevel"
        and pre.get("use_regex", True)
        and not beyond
    )


def _build(vocab: Path, merges: Path, add_prefix_space: bool) -> tokenizers.Tokenizer:
    """GPT-2's tokenizer from its two files."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    ids = _read_object(vocab)
    if not ids or not all(type(i) is int and i >= 0 for i in ids.values()) or len(set(ids.values())) != len(ids):
        raise ValueError(f"{vocab} is damaged: expected an object that gives each token an id of its own, 0 or more")
    # A vocabulary of bytes, and some special tokens, has none.
    if len(ids) > 2 * 256 and not any(line and not line.startswith("#version") for line in _lines(merges)):
        raise ValueError(
            f"{merges} is damaged: it holds no merges, without which no text becomes the vocabulary's tokens"
        )
    try:
        model = models.BPE.from_file(str(vocab), str(merges))
    except Exception as error:  # the library raises bare Exceptions
        raise ValueError(f"{merges} is damaged or does not belong to {vocab}: {error}") from None
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    backend.decoder = decoders.ByteLevel()
    return backend


def _parse(path: Path) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer

    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exceptions
        raise ValueError(f"{path} is damaged, or newer than the installed tokenizers library: {error}") from None
    # A file may carry the settings of the run that saved it; lengths and padding are this package's arguments.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _add_bos(backend: tokenizers.Tokenizer, bos: str | None) -> None:
    from tokenizers.processors import TemplateProcessing

    id = None if bos is None else backend.token_to_id(bos)
    if bos is None or id is None:
        raise ValueError(f"the BOS {bos!r} is not in the vocabulary of {backend.get_vocab_size()} entries")
    single, pair = [bos, "$A"], [bos, "$A", "$B:1"]
    backend.post_processor = TemplateProcessing(single=single, pair=pair, special_tokens=[(bos, id)])


def _special_names(folder: Path, settings: dict[str, Any], backend: tokenizers.Tokenizer) -> dict[str, str | None]:
    """Which tokens are bos, eos and pad: the most specific file that says so decides, else OPT's."""
    table, model = _read_object(folder / NAMES), _read_object(folder / MODEL)
    names: dict[str, str | None] = {}
    for role, default in OPT_NAMES.items():
        name = _content(settings.get(role)) or _content(table.get(role))
        id = model.get(f"{role}_id")
        if name is None and type(id) is int and 0 <= id < 2**32:
            name = backend.id_to_token(id)
        if name is None and backend.token_to_id(default) is not None:
            name = default
        if name is None and role != "pad_token":
            raise ValueError(
                f"{folder} does not say which token is the {role}, and OPT's {default!r} is not in the vocabulary; "
                f"name it in {SETTINGS}"
            )
        names[role] = name
    return names


def _content(token: Any) -> str | None:
    """A token in a settings file: its text, or an object with its text."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object; an absent file is an empty one."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: not JSON in UTF-8 ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged: expected a JSON object, found a {type(value).__name__}")
    return value

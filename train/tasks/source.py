"""The model that is fine-tuned: its config with the task's labels, its tokenizer, its weights under the task's head."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from optjax import OPTConfig, Params, Tokenizer, load_params
from optjax.checkpoints.hub import resolve_source
from optjax.sharding import make_mesh


def load_config(args: argparse.Namespace) -> OPTConfig:
    """The config of ``--model``, with ``--dropout``; of a hub's model nothing else is fetched.

    Raises:
      FileNotFoundError, ValueError: there is none.
    """
    folder = resolve_source(args.model, weights=False)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{args.model} has no config.json; optjax convert writes a model that has one")
    config = OPTConfig.from_json(folder)
    return config if args.dropout is None else config.replace(dropout=args.dropout)


def load_tokenizer(args: argparse.Namespace, config: OPTConfig) -> Tokenizer:
    """The tokenizer of ``--tokenizer`` or ``--model``.

    Raises:
      FileNotFoundError, ValueError: there is none, or it has more entries than the model.
    """
    tokenizer = Tokenizer.load(args.tokenizer or args.model)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer of {args.tokenizer or args.model} has {tokenizer.vocab_size} entries, the model only "
            f"{config.vocab_size}"
        )
    return tokenizer


def load_weights(
    args: argparse.Namespace,
    config: OPTConfig,
    head: str,
    quantize: str | None = None,
    *,
    dtype: str = "float32",
    finished: bool = False,
) -> Params:
    """The weights in a dtype, or quantized, over ``--mesh``.

    A head that the model does not have is new, by ``--seed``, and any with ``--new-head``; where the model should be
    ``finished`` a missing one is an error.

    Raises:
      FileNotFoundError, ValueError: as `optjax.load_params`.
    """
    return load_params(
        args.model,
        dtype,
        head,
        None if args.mesh is None else make_mesh(args.mesh),
        args.rules,
        key=None if finished else jax.random.key(args.seed),
        new_head=not finished and getattr(args, "new_head", False),
        stacked=args.stacked,
        config=config,
        quantization=quantize,
    )


def pad_id(config: OPTConfig, tokenizer: Tokenizer) -> int:
    """What rows are padded with; masked, or after the text, so that any id will do."""
    found = (tokenizer.pad_token_id, config.pad_token_id, tokenizer.eos_token_id)
    return next(id for id in found if id is not None)


def with_labels(config: OPTConfig, problem_type: str, names: Sequence[str]) -> OPTConfig:
    """The config of a classifier, its labels in ``id2label`` as Hugging Face has them."""
    entries: dict[str, Any] = {
        "num_labels": len(names),
        "problem_type": problem_type,
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }
    return OPTConfig.from_dict(config.to_dict() | entries)


def labels_of(config: OPTConfig) -> tuple[str, ...] | None:
    """The names that a classifier's config has for its labels; None where there are none.

    ``LABEL_0``, … stand in the config of many a model that has learned no labels; they are names where it also says of
    which kind they are, as a finished classifier does.
    """
    found = dict(config.extra).get("id2label")
    named: Mapping[str, str] = json.loads(found) if found else {}
    names = tuple(named.get(str(i), "") for i in range(config.num_labels))
    unnamed = config.problem_type is None and all(name in ("", f"LABEL_{i}") for i, name in enumerate(names))
    return None if unnamed or len(named) != config.num_labels or not any(names) else names

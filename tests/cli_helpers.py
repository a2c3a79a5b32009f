"""A tiny model with a tokenizer, and commands run in this process."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax

import optjax
from optjax.cli import main


def write_model(folder: Path, **options) -> Path:
    """A tiny random model whose embedding has rows that its tokenizer lacks."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["the old house stood at the end of the road and the dog was in the road"], trainer)
    template = processors.TemplateProcessing(single="</s> $A", pair="</s> $A $B:1", special_tokens=[("</s>", 2)])
    backend.post_processor = template
    optjax.Tokenizer(backend, bos_token="</s>", eos_token="</s>", pad_token="<pad>").save(folder)
    config = optjax.OPTConfig(
        vocab_size=340, hidden_size=32, num_hidden_layers=2, ffn_dim=64, num_attention_heads=2, init_std=0.1, **options
    )
    optjax.save_params(optjax.init_params(config, jax.random.key(0)), folder)
    return folder


@dataclass
class Result:
    status: int
    out: str
    err: str


def runner(monkeypatch, capsys) -> Callable[..., Result]:
    """Runs a command in this process; without ``stdin`` it is as if nothing were connected to it."""

    def run(*words: str | Path, stdin: bytes | None = None) -> Result:
        words = tuple(map(str, words))
        if words and words[0] in ("generate", "score") and "--help" not in words:
            words += ("--no-compile-cache",)
        with open(os.devnull) if stdin is None else io.TextIOWrapper(io.BytesIO(stdin)) as given:
            monkeypatch.setattr(sys, "stdin", given)
            status = main(words)
        captured = capsys.readouterr()
        return Result(status, captured.out, captured.err)

    return run


def check_error(result: Result, status: int, *words: str) -> None:
    """An error of ours: its status, one line, the words in it, nothing on standard output, no traceback."""
    lines = result.err.strip().split("\n")
    assert result.status == status, result.err
    assert lines[-1].startswith("optjax: error: "), result.err
    assert result.out == "" and "Traceback" not in result.err
    for word in words:
        assert word in lines[-1], f"{word!r} is not in: {lines[-1]}"

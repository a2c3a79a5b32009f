"""The work of ``optjax generate``: loads a model, streams tokens, prints texts and how long it took."""

from __future__ import annotations

import argparse
import json
import logging
import secrets
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import jax
import numpy as np

import optjax
from optjax.checkpoints.layer_files import LayerFiles
from optjax.cli import models, terminal
from optjax.cli.generate import TOKENS, describe_choosing
from optjax.cli.stop import StopBefore


@dataclass
class Stats:
    """How many tokens there were and how long they took; compiling counts for the first one."""

    texts: int = 0
    tokens: int = 0
    attention: list[str] = field(default_factory=list)
    first: float | None = None
    others: float = 0.0

    def timed(self, steps: Iterator[np.ndarray], rows: int) -> Iterator[np.ndarray]:
        """The steps of a batch as they are, watched."""
        self.texts += rows
        began = time.perf_counter()
        for step, tokens in enumerate(steps):
            now = time.perf_counter()
            if self.first is None:
                self.first = now - began
            if step:
                self.others += now - began
            began = now
            yield tokens

    def __str__(self) -> str:
        among = f" in {self.texts} texts" if self.texts > 1 else ""
        speed = f", then {(self.tokens - self.texts) / self.others:,.0f} tokens/s" if self.others else ""
        attention = f"; attention {', then '.join(self.attention)}" if self.attention else ""
        return f"{self.tokens} tokens{among}: the first after {self.first or 0:.2f} s{speed}{attention}"


class AttentionSaid(logging.Handler):
    """Keeps which attention the model says that it takes, in that order: of prompts, then of later tokens."""

    def __init__(self, kinds: list[str]):
        super().__init__(logging.INFO)
        self.kinds = kinds

    def emit(self, record: logging.LogRecord) -> None:
        kind = record.args[-1] if isinstance(record.args, tuple) else None
        if kind in ("eager", "flash") and kind not in self.kinds:
            self.kinds.append(kind)


class LayersRead:
    """Says which layer is being read, until the first token is there: then the text itself shows how it goes on."""

    def __init__(self, layers: int):
        self.layers, self.done = layers, False

    def __call__(self, i: int) -> None:
        if self.done:
            return
        terminal.status(f"reading the prompt: layer {i + 1} of {self.layers}")
        if i + 1 == self.layers:
            self.done = True
            terminal.status("")


class Continuation:
    """A model that is ready to continue prompts as the arguments say."""

    def __init__(self, arguments: argparse.Namespace, options: dict[str, Any]):
        self.arguments = arguments
        model = models.load(arguments)
        self.params, self.tokenizer, self.config = model.params, model.tokenizer, model.params.config
        if isinstance(self.params.offload, LayerFiles) and not arguments.quiet:
            self.params.offload.on_layer = LayersRead(self.config.num_hidden_layers)
        self.seed = secrets.randbits(32) if arguments.seed is None else arguments.seed
        # Rows of the embedding that the tokenizer cannot decode must not come (transformers issue 18268).
        self.options: dict[str, Any] = options | {"suppress_tokens": self.tokenizer.unused_ids(self.config.vocab_size)}
        if "stop_strings" in options:
            self.options["tokenizer"] = self.tokenizer
        self.shortest, self.positions = arguments.model, self.config.max_position_embeddings
        if model.assistant is not None:
            self.options["assistant_model"] = model.assistant
            # It reads all that the model reads.
            if model.assistant.config.max_position_embeddings < self.positions:
                self.shortest = arguments.assistant_model
                self.positions = model.assistant.config.max_position_embeddings
        self.stats = Stats()
        if not arguments.quiet:
            terminal.note(f"{model.title}\n{describe_choosing(arguments, self.options, self.seed)}")

    def write(self, prompts: list[str]) -> None:
        """Prints the continuations of all prompts, batch after batch."""
        log, said = logging.getLogger("optjax.model"), AttentionSaid(self.stats.attention)
        level = log.level
        log.setLevel(logging.INFO)
        log.addHandler(said)
        try:
            self._write(prompts)
        finally:
            log.removeHandler(said)
            log.setLevel(level)
        if self.arguments.stats or (sys.stderr.isatty() and not self.arguments.quiet):
            terminal.note(str(self.stats))

    def _write(self, prompts: list[str]) -> None:
        tokens = self._room(prompts)
        samples, size = self.arguments.num_return_sequences, self.arguments.batch_size
        total = len(prompts) * samples
        # The first batch's key is the plain one, so that optjax.generate gives the same text.
        first_key = jax.random.key(self.seed)
        for start in range(0, len(prompts), size):
            batch = prompts[start : start + size]
            key = jax.random.fold_in(first_key, start) if start else first_key
            steps = self.stats.timed(self._steps(batch, tokens, key), len(batch) * samples)
            if total == 1 and not self.arguments.jsonl:
                self._write_as_it_comes(batch[0], steps)
            else:
                self._write_when_done(batch, steps, start * samples, total)

    def _steps(self, prompts: list[str], tokens: int, key: jax.Array) -> Iterator[np.ndarray]:
        """The new tokens of all rows, step by step; of beams when all are there, as the best may change until then."""
        ids, mask = self.tokenizer(prompts)
        options: dict[str, Any] = {"max_new_tokens": tokens, "key": key, **self.options}
        if self.arguments.negative_prompt is not None:
            other = self.tokenizer([self.arguments.negative_prompt] * len(prompts))
            options["negative_prompt_ids"], options["negative_prompt_attention_mask"] = other
        if self.options.get("num_beams", 1) == 1:
            return optjax.stream(self.params, ids, mask, **options)
        return iter(np.asarray(optjax.generate(self.params, ids, mask, **options))[:, ids.shape[1] :].T)

    def _room(self, prompts: list[str]) -> int:
        """How many tokens to add at most.

        Raises:
          ValueError: a prompt leaves no room, or less than was asked for.
        """
        lengths = [len(self.tokenizer.encode(prompt)) for prompt in prompts]
        longest, limit, asked = max(lengths), self.positions, self.arguments.max_new_tokens
        if longest + (asked or 1) > limit:
            text = prompts[lengths.index(longest)]
            text = repr(text if len(text) < 40 else text[:40] + "…")
            advice = f"ask for --max-new-tokens {limit - longest} or less" if longest < limit else "shorten the prompt"
            raise ValueError(
                f"{self.shortest} has {limit} positions, and the prompt {text} of {longest} tokens with "
                f"{asked or 1} new ones needs {longest + (asked or 1)}; {advice}"
            )
        return asked or min(TOKENS, limit - longest)

    def _write_as_it_comes(self, prompt: str, steps: Iterator[np.ndarray]) -> None:
        if self.params.offload is not None:
            steps = chain([next(steps)], steps)  # what is said while the prompt is read takes a line of its own
        if self.arguments.echo:
            terminal.write(prompt, style="1")
        decoder, cut = self.tokenizer.stream_decoder(), StopBefore(self.options.get("stop_strings", ()), prompt)
        for [token] in steps:
            self.stats.tokens += 1
            terminal.write(cut.push(decoder.push(int(token))))
        terminal.write(cut.push(decoder.finish()) + cut.finish() + "\n")

    def _write_when_done(self, prompts: list[str], steps: Iterator[np.ndarray], done: int, total: int) -> None:
        samples = self.arguments.num_return_sequences
        rows: list[list[int]] = [[] for _ in range(len(prompts) * samples)]
        stops = self.options.get("stop_strings", ())
        cuts = [StopBefore(stops, prompt) for prompt in prompts for _ in range(samples)]
        decoders = [self.tokenizer.stream_decoder() for _ in rows]
        texts = [""] * len(rows)
        for step, tokens in enumerate(steps, 1):
            for i, token in enumerate(tokens):
                if not cuts[i].stopped and not self._has_ended(rows[i]):
                    rows[i].append(int(token))
                    texts[i] += cuts[i].push(decoders[i].push(int(token)))
            if not self.arguments.quiet:
                terminal.status(f"{done} of {total} texts done; token {step} of the next {len(rows)}")
        terminal.status("")
        self.stats.tokens += sum(map(len, rows))
        for i, row in enumerate(rows):
            prompt, text = prompts[i // samples], texts[i] + cuts[i].push(decoders[i].finish()) + cuts[i].finish()
            if self.arguments.jsonl:
                reason = "stop" if cuts[i].stopped else "eos" if self._has_ended(row) else "length"
                line = {"prompt": prompt, "text": text, "tokens": len(row), "finish_reason": reason}
                terminal.write(json.dumps(line, ensure_ascii=False) + "\n")
            else:
                echo = prompt if self.arguments.echo else ""
                terminal.write(f"==> {done + i + 1} of {total} <==\n{echo}{text}\n")

    def _has_ended(self, row: list[int]) -> bool:
        eos = self.options.get("eos_token_id", self.config.eos_token_id)
        return bool(row) and row[-1] in ([eos] if isinstance(eos, int) else list(eos or ()))

"""The tables of ``optjax info``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from optjax.cli import sizes
from optjax.cli.units import count, size

if TYPE_CHECKING:
    from optjax.cli.info import Model

# More models than this stand in one line each.
DETAILED = 4
_NOTES = """
float32, bfloat16, int8: memory of the weights.
KV cache: of one sequence of 2048 tokens, bfloat16.
Training state: float32 weights and Adam's two moments; gradients and activations come on top."""


def print_models(models: list[Model]) -> None:
    """One column for each model; or, where they are many, one line."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    # A pipe has no width: nothing is wrapped or cut there.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 1000)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    if len(models) <= DETAILED:
        rows = [list(_details(model)) for model in models]
        table.add_column("")
        for model in models:
            table.add_column(model.name, justify="right", overflow="fold")
        for cells in zip(*rows, strict=True):
            title = cells[0][0]
            if any(value for _, value in cells):
                table.add_row(title, *(value or "–" for _, value in cells), style="bold" if title == "total" else "")
            elif not title:
                table.add_row("")
    else:
        headers = ("", "params", "layers", "width", "float32", "bfloat16", "KV cache", "training")  # 80 characters
        for i, header in enumerate(headers):
            table.add_column(header, justify="right" if i else "left", overflow="fold")
        for model in models:
            table.add_row(*_line(model))
    console.print(table)
    console.print(_NOTES, style="dim")


def _details(model: Model) -> Iterator[tuple[str, str]]:
    """Rows of one model's column: a title and a value, "" where it has none; an empty title is an empty row."""
    config, files = model.config, model.checkpoint
    counts, memory = sizes.parameters(config, model.head), sizes.memory(config, model.head)
    for group in sizes.GROUPS:
        yield group, f"{counts[group]:,}" if counts[group] else ""
    yield "total", f"{counts['total']:,}"
    yield "", ""
    for dtype, n in memory["weights"].items():
        yield dtype, size(n)
    cache = memory["kv_cache"]
    yield "KV cache, a token", size(cache["bytes_per_token"])
    yield "KV cache, 2048 tokens", _cache(cache)
    yield "training state", size(memory["training_state"])
    yield "", ""
    yield "layers", str(config.num_hidden_layers)
    yield "width", str(config.hidden_size)
    yield "heads", f"{config.num_attention_heads} of {config.head_dim}"
    yield "mlp width", str(config.ffn_dim)
    yield "embedding width", str(config.embed_dim) if config.has_projections else ""
    yield "vocabulary", str(config.vocab_size)
    yield "positions", str(config.max_position_embeddings)
    yield "layer norm", "before" if config.do_layer_norm_before else "after"
    yield "activation", config.activation_function
    yield "biases", "yes" if config.enable_bias else "no"
    yield "", ""
    yield "head in the files", (model.head or "base") if files else ""
    yield "files", f"{files['files']} {files['format']}, {size(files['bytes'])}" if files else ""
    yield "stored as", ", ".join(files["dtypes"]) if files else ""
    yield "quantized", _quantized(files["quantization"]) if files else ""
    yield "weights in the files", size(files["weights"]) if files else ""
    yield "tokenizer", ("yes" if files["tokenizer"] else "no") if files else ""


def _quantized(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return ""
    return f"{entry['kind']} in groups of {entry['group_size']}" if "group_size" in entry else entry["kind"]


def _line(model: Model) -> list[str]:
    config, memory = model.config, sizes.memory(model.config, model.head)
    shape = (config.num_hidden_layers, config.hidden_size)
    weights = (size(memory["weights"][dtype]) for dtype in ("float32", "bfloat16"))
    total = count(sizes.parameters(config, model.head)["total"])
    return [model.name, total, *map(str, shape), *weights, _cache(memory["kv_cache"]), size(memory["training_state"])]


def _cache(cache: dict[str, Any]) -> str:
    short = cache["tokens"] < 2048
    return size(cache["bytes"]) + (f" ({cache['tokens']})" if short else "")

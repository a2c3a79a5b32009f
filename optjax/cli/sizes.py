"""What a model is made of and what it needs, by its config alone. Nothing here imports jax."""

from __future__ import annotations

from typing import Any

from optjax.config import OPTConfig
from optjax.declaration import declare

GROUPS = ("embeddings", "attention", "mlp", "norms", "head")
WIDTHS = {"float32": 4, "bfloat16": 2, "int8": 1}
# A float32 copy of the weights and Adam's two moments.
TRAINING_BYTES = 12


def parameters(config: OPTConfig, head: str | None) -> dict[str, int]:
    """Parameters by group, and ``total``. A tied head counts once, as an embedding."""
    counts: dict[str, int] = dict.fromkeys(GROUPS, 0)
    for weight in declare(config, head):
        counts[_group(weight.path)] += weight.size * (config.num_hidden_layers if weight.per_layer else 1)
    return counts | {"total": sum(counts.values())}


def memory(config: OPTConfig, head: str | None) -> dict[str, Any]:
    """Bytes of the weights in each dtype, of the KV cache in bfloat16, and of the state that training keeps."""
    total = parameters(config, head)["total"]
    per_token = 2 * config.num_hidden_layers * config.hidden_size * WIDTHS["bfloat16"]
    tokens = min(2048, config.max_position_embeddings)
    return {
        "weights": {dtype: total * width for dtype, width in WIDTHS.items()},
        "kv_cache": {
            "dtype": "bfloat16",
            "bytes_per_token": per_token,
            "tokens": tokens,
            "bytes": per_token * tokens,
        },
        "training_state": total * TRAINING_BYTES,
    }


def _group(path: str) -> str:
    if "layer_norm" in path:
        return "norms"
    if path.startswith("layers.self_attn."):
        return "attention"
    if path.startswith("layers."):
        return "mlp"
    return "embeddings" if path.startswith(("embed_", "project_")) else "head"

"""The published sizes: OPT (Zhang et al. 2022, table 1) and Galactica (Taylor et al. 2022, table 5)."""

from __future__ import annotations

from typing import Any


def _sizes(rows: dict[str, tuple[int, int, int]], **common: Any) -> dict[str, dict[str, Any]]:
    return {
        name: {"hidden_size": d, "num_hidden_layers": layers, "num_attention_heads": heads, "ffn_dim": 4 * d} | common
        for name, (d, layers, heads) in rows.items()
    }


_OPT = _sizes(
    {
        "opt-125m": (768, 12, 12),
        "opt-350m": (1024, 24, 16),
        "opt-1.3b": (2048, 24, 32),
        "opt-2.7b": (2560, 32, 32),
        "opt-6.7b": (4096, 32, 32),
        "opt-13b": (5120, 40, 40),
        "opt-30b": (7168, 48, 56),
        "opt-66b": (9216, 64, 72),
        "opt-175b": (12288, 96, 96),
    }
)
# 350m alone is post-norm, with embeddings narrower than the model (Hugging Face #17389).
_OPT["opt-350m"] |= {"do_layer_norm_before": False, "word_embed_proj_dim": 512}

_GALACTICA = _sizes(
    {
        "galactica-125m": (768, 12, 12),
        "galactica-1.3b": (2048, 24, 32),
        "galactica-6.7b": (4096, 32, 32),
        "galactica-30b": (7168, 48, 56),
        "galactica-120b": (10240, 96, 80),
    },
    vocab_size=50000,
    activation_function="gelu",
    enable_bias=False,
    layer_norm_elementwise_affine=False,
    bos_token_id=0,
    pad_token_id=1,
    eos_token_id=2,
    attention_dropout=0.1,
)

PRESETS: dict[str, dict[str, Any]] = _OPT | _GALACTICA

_M = 1 << 20
# Tokens of a batch in training (Zhang et al. 2022, table 1).
BATCH_TOKENS: dict[str, int] = {
    "opt-125m": _M // 2,
    "opt-350m": _M // 2,
    "opt-1.3b": _M,
    "opt-2.7b": _M,
    "opt-6.7b": 2 * _M,
    "opt-13b": 4 * _M,
    "opt-30b": 4 * _M,
    "opt-66b": 2 * _M,
    "opt-175b": 2 * _M,
}

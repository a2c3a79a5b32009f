"""The paper's recipe for each of its sizes, as settings of `pretrain` (Zhang et al. 2022, table 1 and section 2.2).

All sizes: AdamW with betas 0.9 and 0.95 and a decay of 0.1, the gradient clipped at a norm of 1, dropout of 0.1 (not on
embeddings), weights drawn with a deviation of 0.006, that of output layers divided by √(2L); sequences of 2048 tokens;
a linear warm-up over 375 million tokens (175B: 2000 steps), then a linear fall to a tenth at 300 billion.

Not as in the paper: it computed in float16 with dynamic loss scaling (``--dtype float16``); bfloat16 needs none. And it
lowered the clip to 0.3 and the learning rate by hand on the way (section 2.5).
"""

from __future__ import annotations

from typing import Any

from optjax.presets import BATCH_TOKENS

LENGTH = 2048
TOKENS, WARMUP_TOKENS = 300e9, 375e6
PEAK_LR = {
    "opt-125m": 6e-4,
    "opt-350m": 3e-4,
    "opt-1.3b": 2e-4,
    "opt-2.7b": 1.6e-4,
    "opt-6.7b": 1.2e-4,
    "opt-13b": 1e-4,
    "opt-30b": 1e-4,
    "opt-66b": 0.8e-4,
    "opt-175b": 1.2e-4,
}

RECIPES: dict[str, dict[str, Any]] = {
    size: {
        "config": size,
        "length": LENGTH,
        "batch_size": BATCH_TOKENS[size] // LENGTH,
        "tokens": TOKENS,
        "lr": lr,
        "warmup_tokens": 2000 * BATCH_TOKENS[size] if size == "opt-175b" else WARMUP_TOKENS,
        "final_fraction": 0.1,
        "betas": (0.9, 0.95),
        "eps": 1e-8,
        "weight_decay": 0.1,
        "clip": 1.0,
        "dropout": 0.1,
        "init": "paper",
        "dtype": "bfloat16",
        "remat": "full",
        "stacked": True,
    }
    for size, lr in PEAK_LR.items()
}


def recipe_for(size: str) -> dict[str, Any]:
    """The settings of a size, by their names on the command line (``opt-175b``; ``facebook/`` may stand before it).

    Raises:
      ValueError: the paper has no such size.
    """
    name = size.lower().removeprefix("facebook/")
    if name not in RECIPES:
        raise ValueError(f"no recipe for {size!r}; there are: {', '.join(RECIPES)}")
    return dict(RECIPES[name])

"""Attention alone, as each library has it, for `bench.attention_gpu`: causal, of queries over their own keys.

Each function is made for one length and given q (scaled), k and v; it returns ``[B, T, H, K]``, or the same with the
last two flattened. Attention alone is no public function of optjax: this is the one program outside the package that
calls its inner ones.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any


def torch_eager(t: int):
    """transformers' own, which adds a mask to all scores. It takes ``[B, H, T, K]``, as the next ones."""
    import torch
    from transformers.models.opt.modeling_opt import eager_attention_forward

    masks: dict[Any, Any] = {}

    def attend(q, k, v):
        if q.dtype not in masks:
            hidden = torch.full((t, t), torch.finfo(q.dtype).min, dtype=q.dtype, device=q.device).triu(1)
            masks[q.dtype] = hidden[None, None]
        return eager_attention_forward(_module(), q, k, v, masks[q.dtype], scaling=1.0)[0]

    return attend


def torch_sdpa(t: int):
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return lambda q, k, v: sdpa_attention_forward(_module(), q, k, v, None, scaling=1.0, is_causal=True)[0]


def torch_flash(t: int):
    from transformers.integrations.flash_attention import flash_attention_forward

    return lambda q, k, v: flash_attention_forward(_module(), q, k, v, None, scaling=1.0, is_causal=True)[0]


def _module() -> Any:
    """What these functions ask of the layer that calls them."""
    config = SimpleNamespace(_attn_implementation="flash_attention_2")
    return SimpleNamespace(training=False, is_causal=True, config=config, layer_idx=0)


def jax_cudnn(t: int):
    """jax's call of cuDNN's flash attention. It takes ``[B, T, H, K]``, as the next ones."""
    import jax

    return lambda q, k, v: jax.nn.dot_product_attention(q, k, v, scale=1.0, is_causal=True, implementation="cudnn")


def optjax_plain(t: int):
    import jax.numpy as jnp

    from optjax.attention import attend

    mask = jnp.tril(jnp.ones((t, t), bool))[None, None]
    return lambda q, k, v: attend(q, k.swapaxes(1, 2), v.swapaxes(1, 2), mask, layout="heads")[0]


def optjax_blocks(t: int):
    """Some queries at a time."""
    import jax.numpy as jnp

    from optjax.attention_blocks import attend_in_blocks

    mask = jnp.tril(jnp.ones((t, t), bool))[None, None]
    block = next(size for size in (512, 256, 128, 64, 32, 16, 8, t) if t % size == 0 and size <= max(t // 2, 8))
    how: Any = dict(block=block, interleaved=False)
    return lambda q, k, v: attend_in_blocks(q, k.swapaxes(1, 2), v.swapaxes(1, 2), mask, **how)


def optjax_flash(t: int):
    """The kernel that prompts are read with, and that a train step takes on request."""
    from optjax.kernels.flash import Flash

    flash = Flash(placement=None)
    return lambda q, k, v: flash(q, k.swapaxes(1, 2), v.swapaxes(1, 2))


# In the order of the tables. Another one of optjax's is a function above and a line here and in NAMES.
TORCH = {"torch-eager": torch_eager, "torch-sdpa": torch_sdpa, "torch-flash": torch_flash}
JAX = {
    "jax-cudnn": jax_cudnn,
    "optjax-plain": optjax_plain,
    "optjax-blocks": optjax_blocks,
    "optjax-flash": optjax_flash,
}
NAMES = {
    "torch-eager": "transformers, eager",
    "torch-sdpa": "transformers, SDPA",
    "torch-flash": "transformers, FlashAttention-2",
    "jax-cudnn": "jax, cuDNN",
    "optjax-plain": "optjax, plain",
    "optjax-blocks": "optjax, blocks of queries",
    "optjax-flash": "optjax, flash kernel",
}

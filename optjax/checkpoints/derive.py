"""A config from the shapes of the weights, for checkpoints without a config.json."""

from __future__ import annotations

import re
from typing import Any

from optjax.checkpoints.errors import CheckpointError
from optjax.checkpoints.tensors import TensorRef
from optjax.checkpoints.unpickle import Inert
from optjax.config import OPTConfig
from optjax.presets import PRESETS

# metaseq's names of the two approximations are one function.
_ACTIVATIONS = {"gelu_accurate": "gelu_new", "gelu_fast": "gelu_new"}


def derive_config(tensors: dict[str, TensorRef], arguments: Any = None) -> OPTConfig | None:
    """The sizes come from the weights, the number of heads and the activation from metaseq's training arguments.

    Where there are none, heads and the like are those of the published model of the same width, depth and vocabulary.

    Args:
      tensors: by path, ``layers.0.fc1.weight``; metaseq's ``layer_norm`` stands for ``final_layer_norm``.
      arguments: ``cfg`` or ``args`` of a metaseq checkpoint.

    Returns:
      None where the weights do not look like a decoder's at all.

    Raises:
      CheckpointError: the number of heads cannot be known.
      ValueError: the sizes make no possible config.
    """
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    layers = {int(m[1]) for name in shapes if (m := re.match(r"layers\.(\d{1,6})\.", name))}
    try:
        vocab, embed = shapes["embed_tokens.weight" if "embed_tokens.weight" in shapes else "lm_head.weight"]
        positions, width = shapes["embed_positions.weight"]
        ffn, _ = shapes["layers.0.fc1.weight"]
    except (KeyError, ValueError):
        return None
    given = _arguments(arguments)
    depth = max(layers) + 1
    same = [p for p in PRESETS.values() if (p["hidden_size"], p["num_hidden_layers"]) == (width, depth)]
    published = next((p for p in same if p.get("vocab_size", OPTConfig.vocab_size) == vocab), {})
    heads = given.get("decoder_attention_heads", same[0]["num_attention_heads"] if same else None)
    if heads is None:
        raise CheckpointError(
            f"the number of attention heads of a model of {depth} layers and width {width} is not in the checkpoint: "
            "put a config.json beside it, or pass config="
        )
    final_norm = "final_layer_norm.weight" in shapes
    affine = "layers.0.final_layer_norm.weight" in shapes
    # metaseq dropped this argument when post-norm went; where it is not, a model without a last norm is post-norm.
    pre_norm = bool(given.get("decoder_normalize_before", final_norm or not affine))
    fields = {
        "vocab_size": vocab,
        "hidden_size": width,
        "word_embed_proj_dim": embed,
        "num_hidden_layers": depth,
        "ffn_dim": ffn,
        "max_position_embeddings": positions - 2,
        "num_attention_heads": heads,
        "do_layer_norm_before": pre_norm,
        "_remove_final_layer_norm": pre_norm and affine and not final_norm,
        "enable_bias": "layers.0.fc1.bias" in shapes,
        "layer_norm_elementwise_affine": affine,
        "tie_word_embeddings": bool(given.get("share_decoder_input_output_embed", True)),
    }
    for name, theirs in (("activation_function", "activation_fn"), ("dropout",) * 2, ("attention_dropout",) * 2):
        if theirs in given:
            fields[name] = _ACTIVATIONS.get(given[theirs], given[theirs])
    return OPTConfig(**(published | fields))


def _arguments(arguments: Any) -> dict[str, Any]:
    """The model's arguments: a namespace, a dictionary, or either of these under ``model``."""
    for _ in range(2):
        if isinstance(arguments, Inert):
            arguments = arguments.state.get("_content", arguments.state)
        if isinstance(arguments, dict) and arguments.get("model") is not None:
            arguments = arguments["model"]
    if isinstance(arguments, Inert):
        arguments = arguments.state
    wanted = {
        "decoder_attention_heads", "decoder_normalize_before", "share_decoder_input_output_embed", "activation_fn",
        "dropout", "attention_dropout",
    }  # fmt: skip
    found = {k: v for k, v in arguments.items() if k in wanted} if isinstance(arguments, dict) else {}
    return {k: v for k, v in found.items() if isinstance(v, int | float | str)}

"""The names of tensors in files, brought to the paths of the declaration."""

from __future__ import annotations

import re

from optjax.checkpoints.tensors import TensorRef, Transposed

# `model.decoder.` as transformers writes, `decoder.` (350m's file and the base model), more before it (TensorFlow,
# wrappers for training: a head, which stands outside of the decoder, has theirs alone), or nothing (some conversions).
_PREFIX = re.compile(r"^(?:.*?\bdecoder\.|(?:model\.|module\.|_orig_mod\.|base_model\.)+)")
# Buffers and bookkeeping that some versions of some tools leave in files.
_IGNORED = re.compile(
    r"(^|\.)version$|position_ids$|embed_positions\._float_tensor$|self_attn\.(masked_)?bias$|rotary_emb\.|\.inv_freq$"
)
# The last part of a name in Flax and Keras, for ours. A kernel is a transposed weight.
_LAST = {
    "kernel": "weight",
    "embedding": "weight",
    "embeddings": "weight",
    "scale": "weight",
    "gamma": "weight",
    "beta": "bias",
}


def canonical(name: str, tensor: TensorRef) -> tuple[str | None, TensorRef]:
    """The declaration's path of a tensor, and the tensor ``[out, in]``. The path is None for what is no weight.

    ``model.decoder.layers.3.fc1.weight``, Flax's ``model/decoder/layers/3/fc1/kernel`` and Keras'
    ``tfopt_model/model/decoder/layers.3/fc1/kernel:0`` all become ``layers.3.fc1.weight``. Whether there is such a
    weight is not asked. metaseq's and Alpa's ``layer_norm`` and ``project_in_dim`` get their names here too.
    """
    *steps, last = name.removesuffix(":0").replace("/", ".").split(".")
    path = ".".join([*steps, _LAST.get(last, last)])
    if last == "kernel" and len(tensor.shape) == 2:
        tensor = Transposed(tensor)
    if _IGNORED.search(path):
        return None, tensor
    path = _PREFIX.sub("", path, count=1)
    path = re.sub(r"^layer_norm\.", "final_layer_norm.", path)
    path = re.sub(r"^(project_in|project_out)_dim\.", r"\1.", path)
    path = re.sub(r"^output_projection\.", "lm_head.", path)
    return path, tensor

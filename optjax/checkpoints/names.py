"""The names of tensors in files, brought to the paths of the declaration."""

from __future__ import annotations

import re

# `model.decoder.` as transformers writes, `decoder.` (350m's file and the base model), or nothing (some conversions).
_PREFIX = re.compile(r"^(?:module\.)?(?:model\.)*(?:decoder\.)?")
# Buffers and bookkeeping that some versions of some tools leave in files.
_IGNORED = re.compile(
    r"(^|\.)(decoder\.)?version$|(^|\.)output_projection\.|position_ids$|embed_positions\._float_tensor$"
    r"|self_attn\.(masked_)?bias$|rotary_emb\.|\.inv_freq$|(^|\.)_metadata$"
)


def canonical(name: str) -> str | None:
    """The declaration's path of a tensor with the layer's number filled in, or None for what is known to be no weight.

    ``model.decoder.layers.3.fc1.weight`` becomes ``layers.3.fc1.weight``. Whether there is such a weight is not asked.
    """
    if _IGNORED.search(name):
        return None
    return _PREFIX.sub("", name, count=1)

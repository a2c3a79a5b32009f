"""What a step has in use beside what it keeps, part by part: why a peak stands above the least memory.

The least counts what outlives a layer: weights, their state and gradients, kept activations, the cache. To compute
anything, a device also has the layer at hand whole, in the width it multiplies with, and what that layer gives; while
one layer computes, the next one's weights arrive. Not all of it is there at the same moment: a peak lies between the
least and the least with all of these.
"""

from __future__ import annotations

from optjax.declaration import declare

from . import analytic
from .request import Request

# Values per token that one layer's forward and backward pass have at once, in multiples of the widths they have: of the
# residual stream between the regions that are split by heads and by F, and as it enters and leaves one; of what the
# heads split (queries, keys, values, their gradients); of the feed-forward network.
_RESIDUAL, _AT_REGIONS, _HEADS, _MLP = 2, 2, 6, 3
# Of a train step: bytes of the logits that are there at once; see train/options.py.
LOGITS_BYTES = 128 << 20
_FLOAT32 = analytic.WIDTHS["float32"]


def working_set(request: Request) -> dict[str, int]:
    """Bytes of one device, by what they are, of a train step that recomputes its layers, or of reading prompts."""
    config, splits, o = request.config, request.splits, request.options
    width = analytic.WIDTHS[o["dtype"]]
    d, f, heads = config.hidden_size, config.ffn_dim, config.num_attention_heads
    trains = request.job == "train"

    all_rows = o["batch"] // o["micro_batches"] if trains else o["batch"]
    rows = all_rows // splits.parts(all_rows, "batch")
    length = o["length"] if trains else o["prompt"]
    tokens = rows * length // splits.parts(length, "length")  # of attention and the feed-forward network
    of_residual = rows * length // splits.parts(length, "residual_length")

    found, gathered = {}, analytic.gathered_axes(config, splits, None if trains else (all_rows, length))
    weights = declare(config)
    of_layer = [weight for weight in weights if weight.per_layer]
    layer, kept = (sum(analytic.share(w, splits, axes) for w in of_layer) for axes in (gathered, ()))
    if trains or layer > kept:  # to generate, weights are used as they are kept, unless they are gathered
        found["two layers' weights"] = 2 * layer * width
    if trains:
        table = sum(analytic.share(w, splits, gathered) for w in weights if w.path == "embed_tokens.weight")
        found["a layer's gradient"] = layer * _FLOAT32
        found["the table and its gradient"] = table * (width + _FLOAT32)
    values = of_residual * _RESIDUAL * d + tokens * _AT_REGIONS * d
    if not trains and splits.tokens_travel((all_rows, length), d):
        # To each part of the weights come the tokens of all that share them: as input, as output of either network.
        values += splits.tokens_of_sharing((all_rows, length)) * max(d, f // splits.shards("mlp"))
    values += tokens * (_HEADS * d // splits.shards("heads") + _MLP * f // splits.shards("mlp"))
    found["a layer's values"] = values * width
    if not request.flash:
        block = min(tokens // rows, request.block or length)
        scores = rows * heads * block * request.keys // splits.shards("heads")
        found["scores of a block of queries"] = scores * (2 * _FLOAT32 + width)
    logits = (tokens if trains else rows) * config.vocab_size // splits.shards("vocab") * _FLOAT32
    if trains:
        logits = min(logits, LOGITS_BYTES) if o["loss_chunks"] is None else logits // o["loss_chunks"]
    found["logits at once"] = 2 * logits
    return found

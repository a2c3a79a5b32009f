"""What a request would take, roughly, without compiling it: for a search to begin with what promises most."""

from __future__ import annotations

from collections.abc import Set

import numpy as np

from . import analytic
from .hardware import Topology
from .interconnect import Links, Position, links, seconds
from .request import Request
from .roofline import Roofline, roofline

# What a step's logits and other small things take beside a layer's own values; see train/options.py.
_ASIDE = 512 << 20


def estimate(request: Request) -> Roofline:
    """Of the job's main program, with the traffic that the mesh and rules bring about."""
    work = list(request.works().values())[-1]
    return roofline(request.topology, work, _traffic(request))


def memory(request: Request) -> float:
    """Bytes of a device: the analytic minimum, and one layer's weights, gradients and activations as they are used."""
    least = max(work.least_memory for work in request.works().values())
    config, splits, o = request.config, request.splits, request.options
    width = analytic.WIDTHS[o["dtype"]]
    read = (o["batch"], o["prompt"]) if request.job == "generate" else None
    layer = analytic.used_bytes(config, splits, width, read) / config.num_hidden_layers
    if request.job == "generate":
        rows, length = o["batch"], o["prompt"]
    else:
        rows, length = o["batch"] // o["micro_batches"], o["length"]
        layer *= 4  # with the next layer's, and gradients
    tokens, own = rows * length, splits.parts(rows, "batch")
    d, f = config.hidden_size, config.ffn_dim
    if read is not None and splits.tokens_travel(read, d):
        own = tokens / splits.tokens_of_sharing(read)
    values = tokens / own * (4 * d + 4 * d / splits.shards("heads") + 2 * f / splits.shards("mlp")) * width
    heads = rows / own * config.num_attention_heads / splits.shards("heads")
    scores = 0 if request.flash else 8 * heads * (request.block or length) * request.keys
    if o.get("remat") == "none" and not request.flash:
        scores += 6 * config.num_hidden_layers * heads * length * length  # in float32 and as they are multiplied
    return least + layer + values + scores + _ASIDE


def _traffic(request: Request) -> float:
    """Seconds that gathers of weights, or of the tokens that come to them, and sums of activations take, the slower of
    the two: they share no links."""
    config, splits, o = request.config, request.splits, request.options
    width = analytic.WIDTHS[o["dtype"]]
    of_tokens = splits.token_axes
    of_weights = {name for axis in ("model", "embed") for name in splits.mesh_axes(axis)}
    of_layers = {name for axis in ("heads", "mlp") for name in splits.mesh_axes(axis)}
    used = analytic.used_bytes(config, splits, width)
    exchanged = 2 * config.num_hidden_layers * config.hidden_size * width  # a token's, in one pass over the layers
    if request.job == "generate":
        own = o["batch"] / splits.parts(o["batch"], "batch")
        if splits.tokens_travel((o["batch"],), config.hidden_size):
            numbers = splits.tokens_of_sharing((o["batch"],)) * splits.numbers_of_a_token(config.hidden_size)
            sent = config.num_hidden_layers * numbers * width
        else:
            sent = used
        gathers = seconds("all-gather", sent, _group(request, of_tokens & of_weights))
        return max(gathers, seconds("all-reduce", exchanged * own, _group(request, of_layers)))
    parts = o["micro_batches"]
    gathers = parts * 3 * seconds("all-gather", used, _group(request, of_tokens & of_weights))
    if of_tokens - of_weights:
        gathers += parts * seconds("all-reduce", used, _group(request, of_tokens - of_weights))
    own = o["batch"] * o["length"] / splits.shards("batch") / splits.shards("length")
    passes = 3 + analytic.REMAT[o["remat"]].products
    return max(gathers, passes * seconds("all-reduce", exchanged * own, _group(request, of_layers)))


def _group(request: Request, axes: Set[str]) -> Links:
    """The links of the devices that differ along some axes, were the mesh laid over the slice in its flat order."""
    shape = tuple(request.mesh.values())
    index = np.arange(int(np.prod(shape))).reshape(shape)
    cut = tuple(slice(None) if name in axes else 0 for name in request.mesh)
    places = _in_order(request.topology)
    return links(request.topology, [places[i] for i in np.atleast_1d(index[cut]).reshape(-1)])


def _in_order(topology: Topology) -> list[Position]:
    chip = topology.chip
    if not chip.dimensions:
        return [Position(i // chip.devices_per_host, (i % chip.devices_per_host,)) for i in range(topology.devices)]
    places = np.ndindex(topology.slices, *topology.shape, chip.devices_per_chip)
    return [Position(place[0], tuple(place[1:])) for place in places]

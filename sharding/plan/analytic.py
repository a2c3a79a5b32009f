"""What a step has to do and to hold, counted from the config: FLOPs, bytes through memory, and the least memory.

A count per device follows the rules: what a dimension is split into divides the work along it. FLOPs are those of the
matrix products (2 for a multiply and add), the convention in which utilization is given (Chowdhery et al. 2022, PaLM,
appendix B); nothing else comes near them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from optjax.config import OPTConfig
from optjax.declaration import Axis, Weight, declare

WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}
# Queries that a train step attends at a time, of rows of twice as many and more; see train/options.py.
QUERY_BLOCK = 512


@dataclass(frozen=True)
class Remat:
    """What a policy keeps of each layer for the backward pass, and what it computes again there.

    Attributes:
      residual, heads, mlp: values kept per token: of width D along the residual stream, of width D that heads split,
        of width F.
      products, attention: how often the forward pass's products with weights, and attention, are computed again; of
        the products all but `unneeded_again`.
    """

    residual: int
    heads: int
    mlp: int
    products: float
    attention: float


REMAT = {
    "none": Remat(residual=2, heads=4, mlp=1, products=0, attention=0),
    "dots": Remat(residual=3, heads=3, mlp=1, products=0, attention=1),
    "full": Remat(residual=1, heads=0, mlp=0, products=1, attention=1),
    "offload": Remat(residual=0, heads=0, mlp=0, products=1, attention=1),
}


class Splits(Protocol):
    """What is asked of a placement."""

    @property
    def mesh(self) -> Any: ...
    def mesh_axes(self, axis: Axis) -> tuple[str, ...]: ...
    def shards(self, axis: Axis) -> int: ...
    def parts(self, size: int, axis: str) -> int: ...
    def tokens_travel(self, shape: tuple[int, ...], width: int) -> bool: ...
    @property
    def token_axes(self) -> frozenset[str]: ...


@dataclass(frozen=True)
class Work:
    """One run of a program.

    Attributes:
      model_flops: of all devices together: forward, and twice that for backward, attention over the past alone. What
        utilization is measured by.
      flops: of one device, as they are carried out: with what is computed again, and attention over the keys that a
        block of queries has before it.
      hbm_bytes: that one device reads and writes at least.
      memory: bytes that one device holds at least at once, by what they are.
      tokens: that the program reads or makes.
      host_bytes, disk_bytes: of weights that come from the host's memory to one device, and from disk before.
    """

    model_flops: float
    flops: float
    hbm_bytes: float
    memory: dict[str, int]
    tokens: int
    host_bytes: int = 0
    disk_bytes: int = 0

    @property
    def least_memory(self) -> int:
        return sum(self.memory.values())


@dataclass(frozen=True)
class Training:
    """A training step's levers, as far as they change what it does and holds.

    Attributes:
      batch, length: rows and tokens a row of a step, over all devices.
      micro_batches: that a step is made of.
      remat: one of `REMAT`.
      block: queries that attention takes at a time, over the keys up to the last of them; their scores are computed
        again for the backward pass, unless all is kept. None for all.
      flash: whether that is done by a kernel, whose scores never reach the memory.
      weight, gradient, moment, compute: bytes of a weight, its gradient, each of Adam's two moments, and of what is
        computed with.
      moments_on_device: whether Adam's moments lie in HBM rather than in the host's memory.
    """

    batch: int
    length: int
    micro_batches: int = 1
    remat: str = "full"
    block: int | None = None
    flash: bool = False
    weight: int = 4
    gradient: int = 4
    moment: int = 4
    compute: int = 2
    moments_on_device: bool = True


def training(config: OPTConfig, splits: Splits, options: Training) -> Work:
    """One step."""
    o, again = options, REMAT[options.remat]
    tokens = o.batch * o.length
    rows = o.batch // o.micro_batches
    own = tokens / splits.parts(rows, "batch") / splits.parts(o.length, "length")  # tokens of a device
    forward = token_flops(config) * tokens + attention_flops(config, o.batch * causal_pairs(o.length))
    products = layer_flops(config, splits, own, 0)
    block = 1 if o.flash else o.block
    # Where devices share out a row, each has its part of every block, and looks at all keys.
    keys = keys_of_a_query(o.length, None if splits.parts(o.length, "length") > 1 else block)
    attention = layer_flops(config, splits, 0, own * keys)
    head = 2 * own * config.vocab_size * config.embed_dim / splits.shards("vocab")
    head += _projection_flops(config, own)
    # Of attention's two products, the first is what a block computes again.
    scores_again = o.flash or (o.block is not None and o.remat != "none")
    flops = (3 + again.products) * products + (3 + again.attention + 0.5 * scores_again) * attention + 3 * head
    flops -= again.products * unneeded_again(config) * own / splits.shards("mlp")

    weights = stored_bytes(config, splits, o.weight)
    used = used_bytes(config, splits, o.compute)
    passes = o.micro_batches * (2 + again.products)
    activations = _activation_traffic(config, splits, own, 0 if o.flash else keys, o.compute)
    state = weights * (2 * o.weight + 4 * o.moment * o.moments_on_device + 2 * o.gradient) / o.weight
    hbm = passes * used + activations * (3 + again.products) + state

    memory = {"weights": weights}
    if o.moments_on_device:
        memory["optimizer state"] = weights // o.weight * 2 * o.moment
    memory["gradients"] = weights // o.weight * o.gradient
    memory["activations"] = int(rows / splits.parts(rows, "batch") * _kept_bytes(config, splits, o))
    return Work(3 * forward, flops, hbm, memory, tokens)


def prefill(
    config: OPTConfig,
    splits: Splits,
    *,
    batch: int,
    length: int,
    cache_length: int,
    width: int = 2,
    cache_width: float | None = None,
    keys: float | None = None,
    flash: bool = False,
) -> Work:
    """Reading prompts of ``length`` tokens into an empty cache; logits of the last one only.

    Args:
      keys: that a query is multiplied with, on average; all of the prompt by default.
      flash: whether attention is by a kernel, whose scores never reach the memory.
    """
    tokens = batch * length
    own = tokens / splits.parts(batch, "batch") / splits.parts(length, "length")
    model = token_flops(config, head=False) * tokens + attention_flops(config, batch * causal_pairs(length))
    model += 2 * batch * config.vocab_size * config.embed_dim
    keys = length if keys is None else keys
    flops = layer_flops(config, splits, own, own * keys) + _projection_flops(config, own)
    flops += 2 * (batch / splits.parts(batch, "batch")) * config.vocab_size * config.embed_dim / splits.shards("vocab")
    memory = _serving(config, splits, batch, cache_length, width, cache_width)
    hbm = used_bytes(config, splits, width, (batch, length))
    hbm += _activation_traffic(config, splits, own, 0 if flash else keys, width)
    hbm += memory["cache"] * length / cache_length
    return Work(model, flops, hbm, memory, tokens)


def decoding(
    config: OPTConfig,
    splits: Splits,
    *,
    batch: int,
    cache_length: int,
    width: int = 2,
    cache_width: float | None = None,
) -> Work:
    """One token for each row, over a full cache."""
    own = batch / splits.parts(batch, "batch")
    model = token_flops(config) * batch + attention_flops(config, batch * cache_length)
    flops = layer_flops(config, splits, own, own * cache_length) + _projection_flops(config, own)
    flops += 2 * own * config.vocab_size * config.embed_dim / splits.shards("vocab")
    memory = _serving(config, splits, batch, cache_length, width, cache_width)
    return Work(model, flops, used_bytes(config, splits, width, (batch,)) + memory["cache"], memory, batch)


def offloaded(work: Work, config: OPTConfig, splits: Splits, *, width: int, from_disk: bool = False) -> Work:
    """The same work, but the layers' matrices come to the device for it, two layers at a time where there are two."""
    matrices = [w for w in declare(config) if w.per_layer and len(w.shape) > 1]
    layer = sum(share(w, splits, ()) for w in matrices) * width
    total = layer * config.num_hidden_layers
    at_once = min(1 if from_disk else 2, config.num_hidden_layers) * layer
    memory = work.memory | {"weights": work.memory["weights"] - total, "layers on their way": at_once}
    # They are written to the device's memory before they are read there.
    return replace(
        work,
        hbm_bytes=work.hbm_bytes + total,
        memory=memory,
        host_bytes=total,
        disk_bytes=total if from_disk else 0,
    )


def causal_pairs(length: int) -> int:
    """Pairs of a query and a key at or before it."""
    return length * (length + 1) // 2


def query_block(length: int, asked: int | None) -> int | None:
    """The queries that a train step attends at a time; None for all of a row."""
    if asked is None:
        asked = QUERY_BLOCK if length >= 2 * QUERY_BLOCK and length % QUERY_BLOCK == 0 else 0
    return asked if 0 < asked < length else None


def keys_of_a_query(length: int, block: int | None) -> float:
    """That a query of a row is multiplied with, on average, where ``block`` queries look no further than their last."""
    return (length + (block or length)) / 2


def unneeded_again(config: OPTConfig) -> int:
    """Forward FLOPs per token that are not needed a second time: of fc2, what it gives is only added to the residual
    stream, unless a norm follows."""
    return 2 * config.num_hidden_layers * config.hidden_size * config.ffn_dim * config.do_layer_norm_before


def token_flops(config: OPTConfig, head: bool = True) -> int:
    """Forward FLOPs per token of all products with weights; looking up an embedding is none."""
    flops = sum(2 * w.size * _copies(config, w) for w in declare(config, None) if w.kind in ("linear", "output"))
    return flops + (2 * config.vocab_size * config.embed_dim if head else 0)


def attention_flops(config: OPTConfig, pairs: float) -> float:
    """Forward FLOPs of q·k and of weights·v, for so many pairs of a query and a key in every layer."""
    return 4 * config.num_hidden_layers * config.hidden_size * pairs


def layer_flops(config: OPTConfig, splits: Splits, tokens: float, pairs: float) -> float:
    """Forward FLOPs of all layers on one device, which has so many tokens, and pairs of a query and a key."""
    d, f, n = config.hidden_size, config.ffn_dim, config.num_hidden_layers
    heads, mlp = splits.shards("heads"), splits.shards("mlp")
    return n * tokens * (8 * d * d / heads + 4 * d * f / mlp) + attention_flops(config, pairs) / heads


def stored_bytes(config: OPTConfig, splits: Splits, width: int) -> int:
    """Of the weights as a device keeps them."""
    return sum(share(w, splits, ()) * _copies(config, w) for w in declare(config)) * width


def used_bytes(config: OPTConfig, splits: Splits, width: int, read: tuple[int, ...] | None = None) -> int:
    """Of the weights as a device multiplies with them, see `gathered_axes`. A table is looked up, not read, but for the
    one that is the head as well."""
    weights = (w for w in declare(config) if w.path != "embed_positions.weight")
    gathered = gathered_axes(config, splits, read)
    return sum(share(w, splits, gathered) * _copies(config, w) for w in weights) * width


def cache_width(config: OPTConfig, dtype: str) -> float:
    """Bytes of a number in a cache; of int8 with its share of a scale."""
    return 1 + 4 / config.head_dim if dtype == "int8" else WIDTHS[dtype]


def cache_bytes(config: OPTConfig, splits: Splits, batch: int, length: int, width: float) -> int:
    """Of keys and values on one device."""
    parts = splits.parts(batch, "batch") * splits.shards("heads") * splits.parts(length, "cache_length")
    return int(2 * config.num_hidden_layers * batch * length * config.hidden_size * width) // parts


def gathered_axes(config: OPTConfig, splits: Splits, read: tuple[int, ...] | None = None) -> frozenset[str]:
    """The mesh's axes over which weights are gathered to be used: those whose devices have other tokens; but none where
    the tokens ``[B, T]`` that are ``read``, in a pass with a cache, are so few that it is they that travel."""
    travel = read is not None and splits.tokens_travel(read, config.hidden_size)
    return frozenset() if travel else splits.token_axes


def share(weight: Weight, splits: Splits, gathered: Iterable[str]) -> int:
    """Elements of one weight on a device."""
    sizes: Mapping[str, int] = splits.mesh.shape
    gathered = set(gathered)
    names = [name for axis in weight.axes for name in splits.mesh_axes(axis) if name not in gathered]
    return weight.size // math.prod(sizes[name] for name in names)


def _copies(config: OPTConfig, weight: Weight) -> int:
    return config.num_hidden_layers if weight.per_layer else 1


def _projection_flops(config: OPTConfig, tokens: float) -> float:
    """OPT-350m's products between the embedding's width and the model's, in and out."""
    return 4 * tokens * config.hidden_size * config.embed_dim if config.has_projections else 0


def _activation_traffic(config: OPTConfig, splits: Splits, tokens: float, keys: float, width: int) -> float:
    """Bytes of what goes into and comes out of each product of a forward pass; scores are written and read once."""
    d, f, h = config.hidden_size, config.ffn_dim, config.num_attention_heads
    heads, mlp = splits.shards("heads"), splits.shards("mlp")
    values = 5 * d + (4 * d) / heads + 2 * f / mlp
    scores = 2 * keys * h / heads
    return config.num_hidden_layers * tokens * (values + scores) * width


def _kept_bytes(config: OPTConfig, splits: Splits, o: Training) -> float:
    """Of one row, of all layers, between the forward and the backward pass."""
    keep = REMAT[o.remat]
    whole, inside = o.length / splits.parts(o.length, "residual_length"), o.length / splits.parts(o.length, "length")
    values = keep.residual * config.hidden_size * whole
    values += keep.heads * config.hidden_size * inside / splits.shards("heads")
    values += keep.mlp * config.ffn_dim * inside / splits.shards("mlp")
    return config.num_hidden_layers * values * o.compute


def _serving(
    config: OPTConfig, splits: Splits, batch: int, length: int, width: int, cache_width: float | None
) -> dict[str, int]:
    cache = cache_bytes(config, splits, batch, length, width if cache_width is None else cache_width)
    return {"weights": stored_bytes(config, splits, width), "cache": cache}

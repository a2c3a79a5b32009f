"""How a train step is computed: what it costs in memory and time, and not what it means."""

from __future__ import annotations

import dataclasses
import math

from optjax.kernels.choice import IMPLEMENTATIONS, settle, spread_by_hand
from optjax.params import Params

REMAT = ("none", "dots", "full", "offload")
DTYPES = ("float32", "bfloat16")
COMPUTE_DTYPES = (*DTYPES, "float16")
MEMORIES = ("device", "host")

# Scores of more queries than this at once are not worth their memory; on a CPU, not worth what falls out of its cache.
QUERY_BLOCK, QUERY_BLOCK_ON_CPU = 512, 128
# What one chunk's logits may take on a device.
LOGITS_BYTES, LOGITS_BYTES_ON_CPU = 128 << 20, 16 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepOptions:
    """Levers of a train step. Frozen and hashable: one value, one compiled program.

    Attributes:
      dtype: of activations, and of the weights as they are used; the weights that are kept are float32 always. Under
        float16 the loss is scaled before the backward pass; see `Guard.loss_scale`.
      micro_batches: the batch is taken in so many parts, whose gradients are summed in float32 in one copy.
      remat: what of a layer is kept for the backward pass. ``"none"``: all but gathered weights; ``"dots"``: what
        matrix products with weights give; ``"full"``: the layer's input; ``"offload"``: that, in the host's memory.
      query_block: attention goes over so many queries at a time, whose scores are computed again in the backward pass;
        0 is all at once. By default 512 of records of 1024 tokens and more, on a CPU 128 of 256 and more.
      attn_implementation: ``"eager"``, ``"flash"`` (kernels of TPU and GPU, without attention dropout), or ``"auto"``,
        which is ``"flash"`` where that can be had and no query_block is given; see `optjax.attention_kind`.
      loss_chunks: a row's logits are made in so many parts, forward and backward, and never exist in full. By default
        as many as keep a part below 128 MiB on a device, on a CPU 16 MiB.
      moments_dtype: of AdamW's moments. bfloat16 is rounded stochastically, so that small changes add up.
      moments_memory: ``"device"``, or ``"host"`` (pinned), from where each layer's come while it is updated.
      loss_scale_init, loss_scale_window, loss_scale_floor: of float16: the first scale, the finite updates in a row
        after which it doubles, and what it never falls below, halved at each update that is not finite.

    Raises:
      ValueError: there is no such value, or query_block with ``"flash"``.
    """

    dtype: str = "float32"
    micro_batches: int = 1
    remat: str = "none"
    query_block: int | None = None
    attn_implementation: str = "eager"
    loss_chunks: int | None = None
    moments_dtype: str = "float32"
    moments_memory: str = "device"
    loss_scale_init: float = 2.0**16
    loss_scale_window: int = 2000
    loss_scale_floor: float = 0.25

    def __post_init__(self):
        for name, allowed in (("dtype", COMPUTE_DTYPES), ("remat", REMAT), ("moments_dtype", DTYPES),
                              ("attn_implementation", IMPLEMENTATIONS),
                              ("moments_memory", MEMORIES)):  # fmt: skip
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} should be one of {', '.join(allowed)}, not {getattr(self, name)!r}")
        for name, least in (("micro_batches", 1), ("query_block", 0), ("loss_chunks", 1),
                            ("loss_scale_window", 1)):  # fmt: skip
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise ValueError(f"{name} should be an integer of {least} or more, not {value!r}")

        if not 0 < self.loss_scale_floor <= self.loss_scale_init < math.inf:
            raise ValueError(
                "expected 0 < loss_scale_floor <= loss_scale_init, which should be finite, got "
                f"{self.loss_scale_floor}, {self.loss_scale_init}"
            )
        if self.attn_implementation == "flash" and self.query_block is not None:
            raise ValueError("query_block is of attn_implementation 'eager'; 'flash' has blocks of its own")

    @property
    def scales_loss(self) -> bool:
        """Whether the loss is scaled before the backward pass."""
        return self.dtype == "float16"

    def attention_kind(self, params: Params, shape: tuple[int, int]) -> str:
        """What attention will be for records that make ids ``[B, T]``: ``"flash"`` or ``"eager"``.

        Raises:
          ValueError: ``"flash"`` is asked for and cannot be had.
        """
        name = "eager" if self.query_block is not None else self.attn_implementation
        rate = params.config.attention_dropout
        odd = f"it has no dropout, and attention_dropout is {rate}" if rate > 0 else None
        by_hand = spread_by_hand(params)
        return settle(name, params.config, params.placement, self.dtype, shape, odd=odd, by_hand=by_hand)

    def block_of_queries(self, length: int, on: str) -> int | None:
        """The queries that attention takes at a time, of rows of this length on a platform; None for all.

        Raises:
          ValueError: the length does not divide into the blocks asked for.
        """
        if self.query_block is None:
            block = QUERY_BLOCK_ON_CPU if on == "cpu" else QUERY_BLOCK
            block = block if length >= 2 * block and length % block == 0 else length
        else:
            block = self.query_block or length
        if length % block:
            raise ValueError(f"query_block {block} does not divide records of {length} tokens")
        return None if block == length else block

    def chunks_of_loss(self, length: int, bytes_per_token: float, on: str) -> int:
        """The parts that a row's logits are made in, where one token of every row takes so many bytes on a device.

        Args:
          length: the tokens of a row that a device has.

        Raises:
          ValueError: the length does not divide into the parts asked for.
        """
        if self.loss_chunks is None:
            allowed = LOGITS_BYTES_ON_CPU if on == "cpu" else LOGITS_BYTES
            most = max(1, math.floor(allowed / bytes_per_token))
            return next(n for n in range(1, length + 1) if length % n == 0 and (length // n <= most or n == length))
        if length % self.loss_chunks:
            raise ValueError(f"loss_chunks {self.loss_chunks} does not divide the {length} tokens of a device's rows")
        return self.loss_chunks


PLAIN = StepOptions()

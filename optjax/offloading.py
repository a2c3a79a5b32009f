"""Layers that do not lie on the device: a few are there at a time, each brought while the one before it computes.

``params.offload`` says where they lie, and rides along as static data; every function takes such params as they are, as
the decoder asks `bring` for each layer. Only matrices lie elsewhere: biases and norms, a thousandth of all, stay on the
device, as do the embeddings, the head and the cache.

- ``"host"``: in the memory of the device's host, pinned, stacked ``[L, …]``. A compiled program copies layer i + 1 to
  the device while it computes with layer i.
- ``"disk"``: in the checkpoint's files; see `optjax.checkpoints.layer_files`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from optjax.params import Params, stack_layers
from optjax.quantization.quantize import Quantization

OFFLOADS = ("host", "disk")
_HOST = "pinned_host"


class Offload(Protocol):
    """Where layers lie, and how they come. Hashable."""

    @property
    def memory(self) -> str:
        """``"host"`` or ``"disk"``."""
        ...

    @property
    def quantization(self) -> Quantization | None: ...

    def bring(self, params: Params, i: int, after: jax.Array, coming: Any) -> tuple[Any, Any]:
        """Layer ``i``, and the next one as far as it is on its way already.

        Args:
          after: an int32 that is known only once the layer before is done. No other order binds the compilers, which
            would bring all layers at once, and out of a loop even.
          coming: what the call before gave.
        """
        ...


@dataclasses.dataclass(frozen=True)
class HostMemory:
    """Stacked matrices in the host's memory."""

    quantization: Quantization | None = None
    memory: str = "host"

    def bring(self, params: Params, i: int, after: jax.Array, coming: Any) -> tuple[Any, Any]:
        def layer(i: int) -> Any:
            # An index that waits for `after`, which is larger than it.
            index = jnp.minimum(jnp.int32(i), after)

            def one(stacked: jax.Array) -> jax.Array:
                if stacked.ndim < 3:
                    return stacked[i]
                # What stands on the host is cut there, while it is copied.
                part = jax.lax.dynamic_index_in_dim(stacked, index, keepdims=False)
                return jax.device_put(part, jax.memory.Space.Device)

            return jax.tree.map(one, params["layers"])

        last = i + 1 == params.config.num_hidden_layers
        return layer(i) if coming is None else coming, None if last else layer(i + 1)


def bring(params: Params, i: int, x: jax.Array, coming: Any) -> tuple[Any, Any]:
    """The weights of layer ``i``, whose input is ``x``, on the device; and what is to be passed on for the next one."""
    if params.offload is None:
        return params.layer(i), None
    # The larger for its highest bits than any layer's number, whatever x is; no compiler sees that.
    bits = jax.lax.bitcast_convert_type(x[(0,) * x.ndim].astype(jnp.float32), jnp.int32)
    after = (bits & 0x3FFFFFFF) | 0x40000000
    return params.offload.bring(params, i, after, coming)


def offload(params: Params) -> Params:
    """The same params with their layers in the memory of the device's host, from where they are brought layer by layer.

    A model larger than the device's memory is loaded that way by ``load_params(…, offload="host")``. Every function but
    training takes the result. Works on abstract params too.

    Args:
      params: stacked or not, quantized or not, on a mesh or not.

    Raises:
      ValueError: no params, or they are offloaded already; a device without host memory of its own.
    """
    if not isinstance(params, Params):
        raise ValueError(f"params should be what init_params or load_params return, not {type(params).__name__}")
    if params.offload is not None:
        raise ValueError(f"the layers of these params lie {where(params)} already")
    params = stack_layers(params)

    def one(stacked: Any) -> Any:
        if stacked.ndim < 3:
            return stacked
        sharding = host_sharding(stacked.sharding)
        if isinstance(stacked, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(stacked.shape, stacked.dtype, sharding=sharding)
        return jax.device_put(stacked, sharding)

    layers = jax.tree.map(one, params["layers"])
    made = HostMemory(params.quantization)
    return dataclasses.replace(params, weights=params.weights | {"layers": layers}, offload=made)


def as_offload(value: Any) -> str | None:
    """One of `OFFLOADS` or None.

    Raises:
      ValueError: it is neither.
    """
    if value is None or (isinstance(value, str) and value in OFFLOADS):
        return value
    raise ValueError(f"offload should be {' or '.join(map(repr, OFFLOADS))}, not {value!r}")


def check_not_offloaded(params: Params, what: str) -> None:
    """ValueError where layers lie elsewhere, and ``what`` cannot be done there."""
    if params.offload is not None:
        raise ValueError(f"the layers of these params lie {where(params)}, where {what}; load them without offload=")


def where(params: Params) -> str:
    """In words."""
    assert params.offload is not None
    return "in the host's memory" if params.offload.memory == "host" else "on disk"


def host_sharding(sharding: Any) -> Any:
    """The same, in the memory of each device's host.

    Raises:
      ValueError: the devices have none that they can read.
    """
    if sharding is None:
        sharding = SingleDeviceSharding(jax.devices()[0])
    try:
        return sharding.with_memory_kind(_HOST)
    except ValueError:
        kind = next(iter(sharding.device_set)).device_kind
        raise ValueError(f"{kind} reads no memory of its host ({_HOST}); load without offload=") from None


def is_on_host(sharding: Any) -> bool:
    """Whether arrays of this sharding lie in the host's memory."""
    return getattr(sharding, "memory_kind", None) == _HOST

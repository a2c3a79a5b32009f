"""Compiler options that let weights travel while something is computed."""

from __future__ import annotations

import warnings
from typing import Any

import jax
from jax.sharding import Mesh

# v5e starts a gather and goes on by itself. The other TPUs wait for it, unless a gather beside a matrix product becomes
# a ring: each device multiplies with the part of the weight that it has, while the next part is on its way.
_RING = {
    "xla_tpu_all_gather_collective_matmul_mode": "post_spmd",
    "xla_tpu_reduce_scatter_collective_matmul_mode": "post_spmd",
}
_STARTS_BY_ITSELF = ("TPU v5 lite", "TPU v5e")


def overlap_options(mesh: Mesh | None) -> dict[str, Any]:
    """Options of XLA's compiler for a training step on the devices of a mesh, present or only described.

    For ``lowered.compile(compiler_options=…)``. Empty where the compiler overlaps by default, as on GPU.
    """
    if mesh is None or mesh.size == 1:
        return {}
    device = mesh.devices.flat[0]
    return dict(_RING) if device.platform == "tpu" and device.device_kind not in _STARTS_BY_ITSELF else {}


def compile_overlapped(lowered: jax.stages.Lowered, mesh: Mesh | None) -> jax.stages.Compiled:
    """Compiles with `overlap_options`; without them, and with a warning, where the compiler does not know them."""
    options = overlap_options(mesh)
    try:
        return lowered.compile(compiler_options=options or None)
    except jax.errors.JaxRuntimeError as error:
        unknown = [name for name in options if f"No such compile option: '{name}'" in str(error)]
        if not unknown:
            raise
        warnings.warn(
            f"this compiler has no {unknown[0]}: computing will wait while weights are gathered", stacklevel=2
        )
        return lowered.compile()

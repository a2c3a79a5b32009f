"""Compiler options for overlap: for which devices, and what happens where the compiler does not take them."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optjax.sharding import compile_overlapped, make_mesh, overlap_options
from optjax.sharding import overlap as module


def described(kind: str, platform: str = "tpu", devices: int = 8):
    """As much of a mesh as is asked for."""
    device = SimpleNamespace(platform=platform, device_kind=kind)
    return SimpleNamespace(size=devices, devices=np.array([device] * devices))


@pytest.mark.parametrize("kind", ["TPU v5", "TPU v6 lite", "TPU7x"])
def test_chips_that_wait_are_asked_not_to(kind):
    assert set(overlap_options(described(kind)).values()) == {"post_spmd"}


@pytest.mark.parametrize(
    "mesh", [None, described("TPU v5 lite"), described("NVIDIA H100", "gpu"), described("TPU v5", devices=1)]
)
def test_nobody_else_is(mesh):
    assert overlap_options(mesh) == {}


def test_a_compiler_that_does_not_know_the_options(monkeypatch):
    monkeypatch.setattr(module, "overlap_options", lambda mesh: {"xla_no_such_option": "post_spmd"})
    mesh = make_mesh("fsdp=2", jax.devices()[:2])
    with pytest.warns(UserWarning, match="no xla_no_such_option"):
        compiled = compile_overlapped(jax.jit(lambda x: x + 1).lower(jnp.ones(3)), mesh)
    assert compiled(jnp.ones(3)).tolist() == [2, 2, 2]


def test_other_failures_are_not_hidden(monkeypatch):
    class Full:
        def compile(self, compiler_options=None):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: with xla_option on")

    monkeypatch.setattr(module, "overlap_options", lambda mesh: {"xla_option": "on"})
    lowered: object = Full()
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        compile_overlapped(lowered, make_mesh("fsdp=2", jax.devices()[:2]))  # pyright: ignore[reportArgumentType]

"""Loading onto a mesh: the hook that the sharding package fills, with a placer of the test's own on four devices."""

from __future__ import annotations

import os
import subprocess
import sys

import safetensors.torch
from checkpoint_helpers import PRE_NORM, make_state, prefixed, write_config

PROGRAM = """
import sys, types
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from safetensors.numpy import load_file

mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
blocks = []

def checkpoint_placer(config, head, mesh, rules):
    assert rules == {"mlp": "x"} and head == "causal_lm"

    def place(weight, layer, tensor, dtype):
        assert tensor.shape == weight.shape
        sharding = NamedSharding(mesh, P(*(rules.get(axis) for axis in weight.axes)))

        def read(index):
            blocks.append(tensor.read(index).shape)
            return tensor.read(index).astype(dtype)

        return jax.make_array_from_callback(tensor.shape, sharding, read)

    return place

sys.modules["optjax.sharding"] = types.SimpleNamespace(checkpoint_placer=checkpoint_placer)
import optjax

stored = load_file(sys.argv[1] + "/model.safetensors")
for stacked in (False, True):
    params = optjax.load_params(sys.argv[1], mesh=mesh, rules={"mlp": "x"}, stacked=stacked)
    assert params.stacked == stacked
    for i in range(3):
        layer = params.layer(i)
        for name in ("fc1", "fc2"):
            np.testing.assert_array_equal(layer[name]["weight"], stored[f"decoder.layers.{i}.{name}.weight"])
    fc1 = params["layers"]["fc1"]["weight"] if stacked else params["layers"][0]["fc1"]["weight"]
    fc2 = params["layers"]["fc2"]["weight"] if stacked else params["layers"][0]["fc2"]["weight"]
    assert fc1.addressable_shards[0].data.shape == (3,) * stacked + (10, 24), fc1.sharding
    assert fc2.addressable_shards[0].data.shape == (3,) * stacked + (24, 10), fc2.sharding
assert (10, 24) in blocks and (24, 10) in blocks and (40, 24) not in blocks
print("done")
"""


def test_each_device_reads_its_blocks(tmp_path):
    state = {name: w.contiguous() for name, w in prefixed(make_state(PRE_NORM), "decoder.").items()}
    safetensors.torch.save_file(state, write_config(PRE_NORM, tmp_path) / "model.safetensors")
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM, str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == "done", done.stderr

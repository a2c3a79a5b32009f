"""Checkpoints onto a mesh: the same weights, and each process reads the bytes that its devices hold, once."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
from checkpoint_helpers import POST_NORM, PRE_NORM, make_state, prefixed, write_config

import optjax
from optjax.checkpoints import CheckpointError, tensors
from optjax.params import build_params
from optjax.sharding import make_mesh

PRE, POST = (config.replace(vocab_size=64) for config in (PRE_NORM, POST_NORM))


@pytest.fixture
def folder(tmp_path):
    def write(config):
        state = {name: w.contiguous() for name, w in prefixed(make_state(config), "decoder.").items()}
        safetensors.torch.save_file(state, write_config(config, tmp_path) / "model.safetensors")
        return tmp_path

    return write


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("config", [PRE, POST], ids=["pre-norm", "post-norm"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_same_weights(folder, config, stacked, dtype):
    mesh = make_mesh("fsdp=4,tensor=2", jax.devices()[:8])
    path = folder(config)
    alone = optjax.load_params(path, dtype, stacked=stacked)
    spread = optjax.load_params(path, dtype, stacked=stacked, mesh=mesh)
    abstract = optjax.abstract_params(alone.config, alone.dtype, alone.head, stacked=stacked, mesh=mesh)
    assert jax.tree.structure(spread) == jax.tree.structure(abstract)
    for one, many, want in zip(*map(jax.tree.leaves, (alone, spread, abstract)), strict=True):
        np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(many, np.float32))
        assert many.sharding.is_equivalent_to(want.sharding, many.ndim) and many.dtype == want.dtype


def test_a_block_is_read_once(folder, monkeypatch):
    path = folder(PRE)
    read = []
    original = tensors.FileTensor.read

    def noted(self, index=()):
        read.append((self.offset, str(index)))
        return original(self, index)

    monkeypatch.setattr(tensors.FileTensor, "read", noted)
    params = optjax.load_params(path, mesh=make_mesh("data=2,fsdp=2,tensor=2", jax.devices()[:8]), rules="fsdp+tensor")
    assert len(read) == len(set(read))
    fc1 = params["layers"][0]["fc1"]["weight"]
    assert len({str(shard.index) for shard in fc1.addressable_shards}) == 4


@pytest.mark.parametrize("columns", [(0, 512), (100, 3000), (2048, 4096), (4000, 4096)])
def test_columns_of_a_wide_tensor(tmp_path, monkeypatch, columns):
    """Parts of rows that are pages apart are read alone; others with their rows, a few rows at a time."""
    rows, width = 37, 4096
    array = np.random.default_rng(0).standard_normal((rows, width)).astype(np.float32)
    (tmp_path / "x").write_bytes(b"\0" * 64 + array.tobytes())
    monkeypatch.setattr(tensors, "BAND", 5 * width * 4)
    wanted = slice(3, 31), slice(*columns)
    for page in (1, 1 << 30):
        monkeypatch.setattr(tensors, "PAGE", page)
        tensor = tensors.FileTensor(tmp_path / "x", 64, (rows, width), np.dtype("<f4"))
        np.testing.assert_array_equal(tensor.read(wanted), array[wanted])
        cut = tensors.FileTensor(tmp_path / "x", 64, (rows + 1, width), np.dtype("<f4"))
        with pytest.raises(CheckpointError, match="ended while a tensor was read"):
            cut.read((slice(3, rows + 1), slice(*columns)))


PEAK = """
import resource, sys
import jax, numpy as np
import optjax
from optjax.sharding import make_mesh
def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
mesh = make_mesh(sys.argv[2])
params = optjax.load_params(sys.argv[1], mesh=mesh, stacked=sys.argv[3] == "stacked")
size = sum(shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards)
print(peak(), size)
"""


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A checkpoint of OPT-2.7b's width with few layers, in bfloat16."""
    folder = tmp_path_factory.mktemp("wide")
    config = optjax.OPTConfig.preset("opt-2.7b", num_hidden_layers=4)
    rng = np.random.default_rng(0)

    def leaf(weight, _):
        return rng.integers(0, 1 << 14, size=weight.shape, dtype=np.uint16).view(ml_dtypes.bfloat16)

    params = build_params(config, "causal_lm", leaf)
    optjax.save_params(params, folder)
    return folder


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="peak memory is read from /proc")
@pytest.mark.parametrize(("mesh", "stacked"), [("fsdp=8", "listed"), ("fsdp=2,tensor=4", "stacked")])
def test_peak_memory(wide, mesh, stacked):
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(wide), mesh, stacked], capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 0, done.stderr[-3000:]
    peak, size = map(int, done.stdout.split())
    assert peak <= 1.1 * size + 300e6

"""Loading and saving need little more memory than the weights."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from optjax import OPTConfig, count_params
from optjax.checkpoints.match import expected

CONFIG = OPTConfig.preset("opt-350m")  # 1.3 GB in float32.

PROGRAM = """
import json, sys
import jax
import optjax
source, options = sys.argv[1], json.loads(sys.argv[2])
target = options.pop("target", None)
params = optjax.load_params(source, **options)
jax.block_until_ready(params)
total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
value = float(params["embed_tokens"]["weight"][7, 3])
if target:
    optjax.save_params(params, target)
# Not ru_maxrss: that begins with the memory of the process that started this one.
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps([int(peak.split()[1]) * 1024, total, value]))
"""


def write_random(folder: Path, format: str) -> np.float32:
    """350m's shapes in float32, written without holding them: one tensor at a time, random bytes of small numbers."""
    rng = np.random.default_rng(0)
    block = rng.standard_normal(1 << 20, dtype=np.float32)
    tensors = [(f"decoder.{path}", w.shape) for w, _, path in expected(CONFIG, "causal_lm")]
    sizes = [4 * int(np.prod(shape)) for _, shape in tensors]
    CONFIG.to_json(folder)
    if format == "safetensors":
        ends = np.cumsum(sizes).tolist()
        header = {
            name: {"dtype": "F32", "shape": shape, "data_offsets": [end - size, end]}
            for (name, shape), size, end in zip(tensors, sizes, ends, strict=True)
        }
        text = json.dumps(header).encode()
        with open(folder / "model.safetensors", "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for size in sizes:
                write_values(file, block, size)
    else:
        import torch

        # One storage stands behind all tensors of a size: the file is small, what is loaded is not.
        stored = {size: torch.from_numpy(np.resize(block, size // 4)) for size in set(sizes)}
        torch.save(
            {name: stored[size].reshape(shape) for (name, shape), size in zip(tensors, sizes, strict=True)},
            folder / "pytorch_model.bin",
        )
    return block[7 * CONFIG.embed_dim + 3]


def write_values(file, block: np.ndarray, size: int) -> None:
    while size > 0:
        size -= file.write(block.data.cast("B")[:size])


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Folders by format, and the value at [7, 3] of their embeddings."""
    folders = {format: tmp_path_factory.mktemp(format) for format in ("safetensors", "torch")}
    yield {format: (folder, write_random(folder, format)) for format, folder in folders.items()}
    for folder in folders.values():
        shutil.rmtree(folder)


def measure(source: Path, **options) -> tuple[int, int, float]:
    """Peak memory of a fresh process that loads, python and jax included; the weights' bytes; one value."""
    arguments = [sys.executable, "-c", PROGRAM, str(source), json.dumps(options)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    out = subprocess.run(arguments, env=environment, check=True, capture_output=True, text=True).stdout
    peak, total, value = json.loads(out.splitlines()[-1])
    return peak, total, value


@pytest.mark.parametrize("format", ["safetensors", "torch"])
@pytest.mark.parametrize("options", [{}, {"stacked": True}, {"dtype": "bfloat16"}], ids=["as_is", "stacked", "cast"])
def test_loading(checkpoints, format, options):
    folder, value = checkpoints[format]
    peak, total, got = measure(folder, **options)
    size = 2 if options.get("dtype") else 4
    assert total == size * count_params(CONFIG)
    assert got == pytest.approx(float(value), rel=1e-2 if size == 2 else 0)
    assert peak <= 1.1 * total + 300e6, f"{peak / 1e6:.0f} MB for {total / 1e6:.0f} MB of weights"


def test_saving(checkpoints, tmp_path):
    peak, total, _ = measure(checkpoints["safetensors"][0], target=str(tmp_path / "out"))
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > total
    (tmp_path / "out" / "model.safetensors").unlink()
    assert peak <= 1.1 * total + 300e6, f"{peak / 1e6:.0f} MB for {total / 1e6:.0f} MB of weights"

"""More than a thousand broken files of every format: each is refused with an error of ours, or loads as what it says.

A flipped bit within a tensor's bytes is a value like any other and cannot be told; everything else must be. The files
are broken by seed, so that a failure can be looked at again.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import h5py
import jax
import numpy as np
import pytest
import safetensors.torch
import torch
from checkpoint_helpers import (
    PRE_NORM,
    make_params,
    make_state,
    no_hang_and_no_flood,
    prefixed,
    write_config,
)
from metaseq_writers import write_metaseq

import optjax
from optjax import Params, load_params, save_params
from optjax.checkpoints import CheckpointError
from optjax.checkpoints.match import expected

CONFIG = PRE_NORM.replace(vocab_size=16, hidden_size=8, ffn_dim=8, num_hidden_layers=2, max_position_embeddings=6)
FILES_EACH = 150


def make_safetensors(folder: Path) -> None:
    safetensors.torch.save_file(prefixed(make_state(CONFIG), "decoder."), folder / "model.safetensors")


def make_sharded(folder: Path) -> None:
    save_params(make_params(CONFIG), folder, max_shard_size=1000)


def make_bin(folder: Path) -> None:
    torch.save(prefixed(make_state(CONFIG), "decoder."), folder / "pytorch_model.bin")


def make_legacy_bin(folder: Path) -> None:
    state = prefixed(make_state(CONFIG), "decoder.")
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def make_flax(folder: Path) -> None:
    save_params(make_params(CONFIG), folder, "flax")


def make_sharded_flax(folder: Path) -> None:
    save_params(make_params(CONFIG), folder, "flax", max_shard_size=1000)


def make_h5(folder: Path) -> None:
    with h5py.File(folder / "tf_model.h5", "w") as file:
        for name, tensor in make_state(CONFIG).items():
            *steps, last = name.replace("layers.", "layers#").split(".")
            array = tensor.numpy()
            if array.ndim == 2 and "embed" not in name:
                last, array = "kernel", array.T
            path = "/".join(["model/tfopt/model/decoder", *steps, f"{last}:0"]).replace("layers#", "layers.")
            file.create_dataset(path, data=array)


def make_metaseq(folder: Path) -> None:
    write_metaseq(make_state(CONFIG), CONFIG, folder, parts=2, shards=2)


def make_npy(folder: Path) -> None:
    for name, tensor in make_state(CONFIG).items():
        np.save(folder / f"decoder.{name}.npy", tensor.numpy())


MAKERS = {
    "safetensors": make_safetensors,
    "sharded": make_sharded,
    "bin": make_bin,
    "legacy_bin": make_legacy_bin,
    "flax": make_flax,
    "sharded_flax": make_sharded_flax,
    "h5": make_h5,
    "metaseq": make_metaseq,
    "npy": make_npy,
}
# Numbers that break parsers: nothing, small, signs, and more than there is.
NUMBERS = [
    0,
    1,
    7,
    255,
    1 << 15,
    (1 << 16) - 1,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
    1 << 40,
    (1 << 63) - 1,
    (1 << 64) - 1,
]


def spot(data: bytes, rng: np.random.Generator) -> int:
    """A place in the file, mostly where its structure is described."""
    kind = rng.random()
    if kind < 0.5:
        return int(rng.integers(min(len(data), 1500)))
    if kind < 0.7:
        return len(data) - 1 - int(rng.integers(min(len(data), 3000)))
    return int(rng.integers(len(data)))


def damage(data: bytes, rng: np.random.Generator) -> bytes:
    """The file, broken in one of several ways; never the same as before."""
    broken = bytearray(data)
    at = spot(data, rng)
    match rng.choice(["cut", "flip", "flips", "number", "drop", "repeat", "swap", "digit", "zero"]):
        case "cut":
            del broken[at:]
        case "flip":
            broken[at] ^= 1 << int(rng.integers(8))
        case "flips":
            for _ in range(30):
                broken[spot(data, rng)] ^= 1 << int(rng.integers(8))
        case "number":
            size, order = int(rng.choice([2, 4, 8])), str(rng.choice(["little", "big"]))
            number = NUMBERS[rng.integers(len(NUMBERS))] & ((1 << 8 * size) - 1)
            broken[at : at + size] = number.to_bytes(size, order)  # type: ignore[arg-type]
        case "drop":
            del broken[at : at + int(rng.integers(1, 100))]
        case "repeat":
            broken[at:at] = broken[at : at + int(rng.integers(1, 300))]
        case "swap":
            other, size = spot(data, rng), int(rng.integers(4, 64))
            a, b = bytes(broken[at : at + size]), bytes(broken[other : other + size])
            broken[at : at + size], broken[other : other + size] = b, a
        case "digit":
            digits = [i for i, c in enumerate(data[:3000]) if 48 <= c <= 57]
            for i in rng.choice(digits or [0], size=3):
                broken[i] = 48 + int(rng.integers(10))
        case "zero":
            broken[at : at + 200] = bytes(len(broken[at : at + 200]))
    return bytes(broken)


def check(params: Params) -> None:
    """Whatever loaded has the shapes its config promises."""
    shapes = [leaf.shape for leaf in jax.tree.leaves(params)]
    assert sorted(shapes) == sorted(w.shape for w, _, _ in expected(params.config, params.head))
    assert sum(math.prod(shape) for shape in shapes) == optjax.count_params(params.config, params.head)


@pytest.mark.parametrize("kind", MAKERS)
def test_broken_files(tmp_path, kind):
    good = tmp_path / "good"
    good.mkdir()
    MAKERS[kind](good)
    if kind != "metaseq":
        write_config(CONFIG, good)
    check(load_params(good))
    names = sorted(p.name for p in good.iterdir() if p.name != "generation_config.json")
    refused = 0
    with no_hang_and_no_flood():
        for seed in range(FILES_EACH):
            rng = np.random.default_rng(seed)
            folder = tmp_path / "broken"
            shutil.copytree(good, folder)
            name = names[rng.integers(len(names))]
            data = (good / name).read_bytes()
            (folder / name).write_bytes(damage(data, rng))
            try:
                check(load_params(folder))
            except (CheckpointError, FileNotFoundError) as error:
                refused += 1
                assert all(line.isprintable() for line in str(error).splitlines()), seed
            except Exception as error:
                raise AssertionError(f"seed {seed}, {name}") from error
            shutil.rmtree(folder)
    assert refused > 0.5 * FILES_EACH


@pytest.mark.parametrize("kind", MAKERS)
def test_every_truncation_is_noticed(tmp_path, kind):
    """Any file that ends too early is refused, wherever it ends."""
    MAKERS[kind](tmp_path)
    if kind != "metaseq":
        write_config(CONFIG, tmp_path)
    names = sorted(p.name for p in tmp_path.iterdir() if "config" not in p.name)
    rng = np.random.default_rng(1)
    with no_hang_and_no_flood():
        for _ in range(30):
            path = tmp_path / names[rng.integers(len(names))]
            data = path.read_bytes()
            # The last bytes of an index are blanks, of a .h5 padding; of everything else they matter.
            keep = int(rng.integers(len(data) - (8 if path.suffix in (".h5", ".json") else 0)))
            path.write_bytes(data[:keep])
            with pytest.raises((CheckpointError, FileNotFoundError)):
                load_params(tmp_path)
                pytest.fail(f"{path.name} cut after {keep} of {len(data)} bytes was not noticed")
            path.write_bytes(data)

"""TensorFlow's .h5: files that TFOPT wrote, and files laid out like them, of all dtypes and sizes."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
from checkpoint_helpers import CONFIGS, PRE_NORM, assert_same, make_state, write_config

from optjax import load_params
from optjax.checkpoints import CheckpointError
from optjax.checkpoints.hdf5_reader import read_hdf5

GOLDEN = Path(__file__).parent / "checkpoint_golden"


def recorded(name: str) -> dict[str, np.ndarray]:
    """The variables of a golden file as TFOPT had them, by our names."""
    arrays = np.load(GOLDEN / "weights.npz")
    out = {}
    for key in arrays.files:
        checkpoint, variable = key.split(":", 1)
        if checkpoint == name:
            *steps, last = variable.split("/decoder/")[1].removesuffix(":0").split("/")
            last, kernel = ("bias", False) if last in ("bias", "beta") else ("weight", last == "kernel")
            out[".".join([*steps, last])] = arrays[key].T if kernel else arrays[key]
    assert out
    return out


@pytest.mark.parametrize("name", ["one_file", "sharded_post_norm"])
@pytest.mark.parametrize("stacked", [False, True])
def test_files_of_tensorflow(name, stacked):
    params = load_params(GOLDEN / name, stacked=stacked)
    assert params.head == "causal_lm" and params.config.has_projections == (name == "sharded_post_norm")
    assert_same(params, recorded(name))


def write_h5(state: dict, folder: Path, **options) -> Path:
    """As TFOPT's save_pretrained lays it out, with h5py."""
    with h5py.File(folder / "tf_model.h5", "w", **options) as file:
        file.attrs["backend"] = "tensorflow"
        file.attrs["layer_names"] = np.asarray([b"model"])
        group = file.create_group("model")
        names = []
        for name, tensor in state.items():
            *steps, last = name.replace("layers.", "layers#").split(".")
            norm, array = "norm" in name, np.asarray(tensor)
            kernel = array.ndim == 2 and "embed" not in name
            new = {"weight": "gamma" if norm else "kernel" if kernel else "weight", "bias": "beta" if norm else "bias"}
            path = "/".join(["tfopt_for_causal_lm/model/decoder", *steps, new[last] + ":0"]).replace(
                "layers#", "layers."
            )
            array = array.T if kernel else array
            group.create_dataset(path, array.shape, dtype=array.dtype)[...] = array
            names.append(path.encode())
        for i in range(0, len(names), 500):  # An attribute has to be smaller than 64 KB.
            group.attrs[f"weight_names{i // 500}" if len(names) > 500 else "weight_names"] = np.asarray(
                names[i : i + 500]
            )
        file.create_group("top_level_model_weights").attrs["weight_names"] = np.asarray([b""])
    return folder


@pytest.mark.parametrize("dtype", ["<f4", "<f2", ">f4"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_all_dtypes(tmp_path, dtype, config):
    state = {name: w.numpy().astype(dtype) for name, w in make_state(config).items()}
    write_h5(state, write_config(config, tmp_path))
    assert_same(load_params(tmp_path), {name: w.astype(w.dtype.newbyteorder("=")) for name, w in state.items()})


def test_float64_becomes_float32(tmp_path):
    state = {name: w.double().numpy() + 1e-9 for name, w in make_state(PRE_NORM).items()}
    write_h5(state, write_config(PRE_NORM, tmp_path))
    assert_same(load_params(tmp_path), {name: w.astype(np.float32) for name, w in state.items()})


def test_many_layers(tmp_path):
    """Groups of more entries than a node of their B-tree holds."""
    config = PRE_NORM.replace(num_hidden_layers=150, hidden_size=4, ffn_dim=4)
    state = {name: w.numpy() for name, w in make_state(config).items()}
    write_h5(state, write_config(config, tmp_path))
    assert_same(load_params(tmp_path), state)


def test_everything_in_a_file_as_the_library_reads_it():
    for path in GOLDEN.glob("*/*.h5"):
        with h5py.File(path) as file:
            theirs = {}
            file.visititems(lambda n, o: theirs.update({n: o[()]}) if isinstance(o, h5py.Dataset) else None)  # noqa: B023
        ours = read_hdf5(path)
        assert theirs and sorted(ours) == sorted(theirs)
        for name, array in theirs.items():
            np.testing.assert_array_equal(ours[name].read(), array)


def test_what_is_refused(tmp_path):
    state = {name: w.numpy() for name, w in make_state(PRE_NORM).items()}
    write_h5(state, write_config(PRE_NORM, tmp_path), libver="latest")
    with pytest.raises(CheckpointError, match="newer HDF5 layout"):
        load_params(tmp_path)
    with h5py.File(tmp_path / "tf_model.h5", "w") as file:
        file.create_dataset("decoder/layers.0/fc1/kernel:0", data=state["layers.0.fc1.weight"], compression="gzip")
    with pytest.raises(CheckpointError, match="compressed"):
        load_params(tmp_path)
    with h5py.File(tmp_path / "tf_model.h5", "w") as file:
        file.create_dataset("decoder/layers.0/fc1/kernel:0", data=state["layers.0.fc1.weight"], chunks=(8, 8))
    with pytest.raises(CheckpointError, match="chunks"):
        load_params(tmp_path)
    with h5py.File(tmp_path / "tf_model.h5", "w") as file:
        file.create_dataset("decoder/layers.0/fc1/kernel:0", shape=(24, 40), dtype="<f4")  # Never written.
    with pytest.raises(CheckpointError, match="not in the file"):
        load_params(tmp_path)

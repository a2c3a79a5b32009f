"""Files made to do harm: nothing in them is run, and no memory or time is lost to them."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile

import h5py
import msgpack
import numpy as np
import pytest
from checkpoint_helpers import PRE_NORM, make_state, no_hang_and_no_flood, prefixed, write_config
from hostile_pickles import as_legacy, as_zip, in_dictionary, payloads, tensor

import optjax.checkpoints.unpickle
from optjax import load_params
from optjax.checkpoints import CheckpointError
from optjax.checkpoints.flax_reader import read_flax
from optjax.checkpoints.safetensors_reader import read_safetensors
from optjax.checkpoints.torch_reader import read_torch
from optjax.checkpoints.unpickle import Global, Inert, PickledTensor, unpickle

REFUSED = (CheckpointError, FileNotFoundError)


@pytest.fixture(autouse=True)
def guard():
    with no_hang_and_no_flood():
        yield


def names():
    from pathlib import Path

    return [name for name, _ in payloads(Path("/nowhere"))]


@pytest.mark.parametrize("name", names())
def test_hostile_pickles(tmp_path, monkeypatch, name):
    sentinel = tmp_path / "it_was_run"
    body = dict(payloads(sentinel))[name]
    write_config(PRE_NORM, tmp_path / "x")
    if name == "many instructions":
        monkeypatch.setattr(optjax.checkpoints.unpickle, "MAX_OPCODES", 100_000)
    for pickled in (in_dictionary(body), b"\x80\x04" + body + b".", b"\x80\x04" + body):
        for data in (as_zip(pickled), as_legacy(pickled), pickled):
            for file in ("pytorch_model.bin", "reshard.pt") if len(body) < 10_000 else ("pytorch_model.bin",):
                path = tmp_path / "x" / file
                path.write_bytes(data)
                with pytest.raises(REFUSED):
                    load_params(path)
    assert not sentinel.exists()


@pytest.mark.parametrize("name", ["os.system", "eval", "exec", "subprocess", "stack global", "object"])
def test_these_pickles_are_live(tmp_path, name):
    """Python's own pickle does run them."""
    body = dict(payloads(tmp_path / "it_was_run"))[name]
    pickle.loads(b"\x80\x04" + body + b".")
    assert (tmp_path / "it_was_run").exists()


def test_what_is_refused_is_named(tmp_path):
    write_config(PRE_NORM, tmp_path)
    for name in ("os.system", "eval"):
        body = dict(payloads(tmp_path / "it_was_run"))[name]
        (tmp_path / "pytorch_model.bin").write_bytes(as_zip(in_dictionary(body)))
        with pytest.raises(CheckpointError, match="refers to '(os.system|builtins.eval)'.*nothing was run"):
            load_params(tmp_path)


def test_a_call_becomes_a_record():
    made, end = unpickle(in_dictionary(b"cnumpy.core.multiarray\nscalar\n(K\x05tR", "x"))
    record = made["x"]
    assert isinstance(record, Inert) and record.name == "numpy.core.multiarray.scalar" and record.args == (5,)
    made, _ = unpickle(in_dictionary(b"ctorch\nfloat16\n", "x"))
    assert made["x"] == Global("torch.float16")
    made, _ = unpickle(in_dictionary(tensor((2, 3), (3, 1), 1), "x"))
    assert isinstance(made["x"], PickledTensor) and made["x"].shape == (2, 3)


@pytest.mark.parametrize("case", ["repeated", "short", "far", "strides"])
def test_tensors_of_the_right_shape_that_are_not_there(tmp_path, case):
    """Of a few bytes a file could make any shape, by strides of 0; or look at what lies behind its storage."""
    shape, count = (61, 24), 61 * 24
    strides, offset, held = {
        "repeated": ((0, 1), 0, count // 2),
        "short": ((24, 1), 0, count - 1),
        "far": ((24, 1), 1, count),
        "strides": ((25, 1), 0, count),
    }[case]
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(as_zip(in_dictionary(tensor(shape, strides, offset)), {"0": bytes(4 * held)}))
    with pytest.raises(CheckpointError, match="does not fit into its storage"):
        read_torch(path)


def test_zips(tmp_path):
    """Bombs, entries that lie about their place or size, thousands of entries, and zips of something else."""
    path = write_config(PRE_NORM, tmp_path) / "pytorch_model.bin"
    good = in_dictionary(tensor((8,), (1,), 0))
    bombs = {
        "pickle bomb": as_zip(b"\x80\x04" + b"N0" * 100_000_000 + b"N.", compression=zipfile.ZIP_DEFLATED),
        "storage bomb": as_zip(good, {"0": bytes(300_000_000)}, zipfile.ZIP_DEFLATED),
        "entries": as_zip(good, {str(i): b"" for i in range(20_000)}),
        "no storage": as_zip(good, {}),
        "short storage": as_zip(good, {"0": bytes(31)}),
        "two pickles": as_zip(good, {"1/data.pkl": good}),
        "nothing": as_zip(good).replace(b"data.pkl", b"date.pkl"),
        "sizes": as_zip(good).replace(struct.pack("<I", 32), struct.pack("<I", 0x7FFFFFFF)),
        "names": as_zip(good).replace(b"archive/data/0", b"../../etc/data"),
        "cut": as_zip(good)[:-30],
        "empty": b"PK\x03\x04",
        "end only": b"PK\x05\x06" + bytes(18),
    }
    for name, data in bombs.items():
        assert len(data) < 5_000_000, name
        path.write_bytes(data)
        with pytest.raises(CheckpointError):
            load_params(tmp_path)


def safetensors_file(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def test_safetensors_headers(tmp_path):
    path = tmp_path / "model.safetensors"

    def one(**changes):
        return {"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} | changes}

    files = {
        "empty": b"",
        "seven bytes": bytes(7),
        "length of 2^63": safetensors_file(one(), bytes(16), 1 << 63),
        "length of 2^64 - 1": safetensors_file(one(), bytes(16), (1 << 64) - 1),
        "length beyond the file": safetensors_file(one(), b"", 10_000),
        "deep": safetensors_file(b"[" * 500_000),
        "deep maps": safetensors_file(b'{"x":' * 100_000),
        "list": safetensors_file([1, 2]),
        "no utf-8": safetensors_file(b"\xff\xfe{}"),
        "not a number": safetensors_file(b'{"x": NaN}'),
        "twice": safetensors_file(b'{"x":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},' * 2),
        "same name": safetensors_file(
            b'{"x":{"dtype":"F32","shape":[],"data_offsets":[0,4]},"x":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}',
            bytes(4),
        ),
        "huge shape": safetensors_file(one(shape=[1 << 40, 1 << 40])),
        "huge shape and offsets": safetensors_file(one(shape=[1 << 58], data_offsets=[0, 1 << 60])),
        "negative": safetensors_file(one(shape=[-4]), bytes(16)),
        "fraction": safetensors_file(one(shape=[4.0]), bytes(16)),
        "true": safetensors_file(one(shape=[True], data_offsets=[0, 4]), bytes(16)),
        "text": safetensors_file(one(shape="4"), bytes(16)),
        "dimensions": safetensors_file(one(shape=[1] * 1000, data_offsets=[0, 4]), bytes(16)),
        "huge number": safetensors_file(b'{"x":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}'),
        "backwards": safetensors_file(one(data_offsets=[16, 0]), bytes(16)),
        "before the start": safetensors_file(one(data_offsets=[-16, 0]), bytes(16)),
        "cut": safetensors_file(one(), bytes(15)),
        "type": safetensors_file(one(dtype="PICKLE"), bytes(16)),
        "type list": safetensors_file(one(dtype=["F32"]), bytes(16)),
        "overlap": safetensors_file(one() | {"y": {"dtype": "F32", "shape": [4], "data_offsets": [12, 28]}}, bytes(28)),
        "no entry": safetensors_file({"x": 5}),
    }
    for name, data in files.items():
        path.write_bytes(data)
        with pytest.raises(CheckpointError):
            read_safetensors(path)
            pytest.fail(name)


def test_msgpack(tmp_path):
    path = tmp_path / "flax_model.msgpack"

    def array(shape=(4,), dtype="float32", data=bytes(16)) -> bytes:
        return msgpack.packb(msgpack.ExtType(1, msgpack.packb((shape, dtype, data))))

    chunked = {"__msgpack_chunked_array__": True, "shape": {"0": 4}, "chunks": {}}
    files = {
        "empty": b"",
        "list": b"\x93\x01\x02\x03",
        "map of 4 G": b"\xdf\xff\xff\xff\xff",
        "map of 4 G entries": b"\xdf\xff\xff\xff\xff" + b"\xa1a\xc0" * 1000,
        "list of 4 G": b"\x81\xa1a\xdd\xff\xff\xff\xff",
        "text of 4 GB": b"\x81\xdb\xff\xff\xff\xff",
        "bytes of 4 GB": b"\x81\xa1a\xc6\xff\xff\xff\xff",
        "array of 4 GB": b"\x81\xa1a\xc9\xff\xff\xff\xff\x01",
        "deep": b"\x81\xa1a" * 100_000,
        "deep lists": b"\x81\xa1a" + b"\x91" * 100_000,
        "same name": b"\x82\xa1a\xc0\xa1a\xc0",
        "number as name": b"\x81\x05\xc0",
        "reserved": b"\x81\xa1a\xc1",
        "shape": b"\x81\xa1a" + array(shape=(1 << 60, 1 << 60)),
        "negative shape": b"\x81\xa1a" + array(shape=(-4,)),
        "shape of texts": b"\x81\xa1a" + array(shape=("4",)),
        "dimensions": b"\x81\xa1a" + array(shape=(1,) * 60, data=bytes(4)),
        "type": b"\x81\xa1a" + array(dtype="evil"),
        "objects": b"\x81\xa1a" + array(dtype="O"),
        "records": b"\x81\xa1a" + array(dtype="f4,O"),
        "texts": b"\x81\xa1a" + array(dtype="U1"),
        "short": b"\x81\xa1a" + array(data=bytes(15)),
        "array in an array": b"\x81\xa1a" + msgpack.packb(msgpack.ExtType(1, array())),
        "no chunks": msgpack.packb({"a": chunked}),
        "chunks that do not fit": b"\x81\xa1a\x83" + msgpack.packb("__msgpack_chunked_array__") + b"\xc3"
        + msgpack.packb("shape") + msgpack.packb({"0": 1 << 50}) + msgpack.packb("chunks") + b"\x81\xa10" + array(),
        "chunked shape": msgpack.packb({"a": chunked | {"shape": 5}}),
    }  # fmt: skip
    for name, data in files.items():
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match="levels of nesting" if "deep" in name else None):
            read_flax(path)
            pytest.fail(name)


def test_npy(tmp_path):
    write_config(PRE_NORM, tmp_path)
    state = make_state(PRE_NORM)
    for name, tensor_ in state.items():
        np.save(tmp_path / f"decoder.{name}.npy", tensor_.numpy())
    path = tmp_path / "decoder.embed_tokens.weight.npy"
    good = path.read_bytes()

    def header(text: str, version: bytes = b"\x01\x00") -> bytes:
        length = struct.pack("<H" if version[0] == 1 else "<I", len(text))
        return b"\x93NUMPY" + version + length + text.encode()

    files = {
        "empty": b"",
        "magic": b"\x93NUMPY",
        "version": good.replace(b"NUMPY\x01", b"NUMPY\x09"),
        "call": header("{'descr': '<f4', 'fortran_order': False, 'shape': (__import__('os').getpid(),)}"),
        "objects": header("{'descr': '|O', 'fortran_order': False, 'shape': (61, 24)}") + bytes(20_000),
        "long": header(" " * 60_000),
        "longer": header("(" * 200_000, b"\x02\x00"),
        "huge": header("{'descr': '<f4', 'fortran_order': False, 'shape': (1125899906842624, 24)}") + bytes(100),
        "negative": header("{'descr': '<f4', 'fortran_order': False, 'shape': (-61, 24)}") + bytes(20_000),
        "cut": good[:-1],
        "record": header("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (61, 24)}") + bytes(20_000),
    }
    for name, data in files.items():
        path.write_bytes(data)
        with pytest.raises(CheckpointError):
            load_params(tmp_path)
            pytest.fail(name)


def test_hdf5_that_goes_in_circles(tmp_path):
    """A group that holds itself, and trees whose branches lead back."""
    path = write_config(PRE_NORM, tmp_path) / "tf_model.h5"
    with h5py.File(path, "w") as file:
        file["a/b/c"] = np.zeros(4, np.float32)
        file["a/loop"] = file["a"]
    with pytest.raises(CheckpointError, match="two things at byte"):
        load_params(tmp_path)
    good = path.read_bytes()
    places = [
        i for i in range(0, len(good) - 8, 8) if good[i : i + 8] in (b"TREE\0\0\1\0", b"SNOD\1\0\1\0", b"SNOD\1\0\2\0")
    ]
    assert len(places) > 3
    rng = np.random.default_rng(0)
    for i in rng.permutation(range(96, len(good) - 8, 8))[:60]:
        for target in places[:3]:
            data = good[:i] + struct.pack("<Q", target) + good[i + 8 :]
            path.write_bytes(data)
            with pytest.raises(CheckpointError):
                load_params(tmp_path)


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin", "flax_model.msgpack", "tf_model.h5"])
def test_indices(tmp_path, kind):
    index = write_config(PRE_NORM, tmp_path / "model") / f"{kind}.index.json"
    suffix = kind.rsplit(".")[-1]
    (tmp_path / f"secret.{suffix}").write_bytes(b"")
    outside = [
        "../../etc/passwd", f"../secret.{suffix}", str(tmp_path / f"secret.{suffix}"), "/etc/passwd", "..", ".", "",
        f"sub/x.{suffix}", f"..\\secret.{suffix}", "config.json", "x.pt", f"C:\\x.{suffix}",
    ]  # fmt: skip
    for name in outside:
        index.write_text(json.dumps({"weight_map": {"decoder.embed_tokens.weight": name}}))
        with pytest.raises(CheckpointError, match="which is n"):
            load_params(tmp_path / "model")
    for content in (
        "",
        "{}",
        "[]",
        "null",
        '{"weight_map": {}}',
        '{"weight_map": []}',
        '{"weight_map": {"a": 5}}',
        "[" * 10**5,
    ):
        index.write_text(content)
        with pytest.raises(CheckpointError):
            load_params(tmp_path / "model")
    index.write_text(json.dumps({"weight_map": {"a": f"gone\x1b[31m.{suffix}"}}))
    with pytest.raises(FileNotFoundError) as error:
        load_params(tmp_path / "model")
    assert "\x1b" not in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 10**12},
        {"num_hidden_layers": 10**400},
        {"vocab_size": 10**18},
        {"hidden_size": 4 * 10**18},
        {"hidden_size": "24"},
        {"hidden_size": None},
        {"hidden_size": 24.0},
        {"hidden_size": -24},
        {"num_attention_heads": 0},
        {"num_attention_heads": []},
        {"ffn_dim": True},
        {"dropout": "much"},
        {"dropout": [0.1]},
        {"enable_bias": "no"},
        {"activation_function": ["relu"]},
        {"activation_function": "exec"},
        {"model_type": "llama"},
        {"model_type": ["opt"]},
        {"eos_token_id": {"a": 1}},
        {"eos_token_id": [[2]]},
        {"problem_type": {}},
        {"id2label": 5, "num_labels": []},
        {"architectures": [["OPTModel"]], "hidden_size": 1},
        {"quantization_config": {"quant_method": "gptq"}},
    ],
    ids=lambda change: str(change)[:40],
)
def test_configs(tmp_path, change):
    import safetensors.torch

    safetensors.torch.save_file(prefixed(make_state(PRE_NORM), "decoder."), tmp_path / "model.safetensors")
    write_config(PRE_NORM, tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | change))
    with pytest.raises(ValueError):
        load_params(tmp_path)


def test_configs_that_are_no_json(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(safetensors_file({}))
    for data in (b"", b"{", b"[]", b"\xff\xfe\x00", b"[" * 10**5, b"null", b'{"hidden_size": ' + b"9" * 5000 + b"}"):
        (tmp_path / "config.json").write_bytes(data)
        with pytest.raises(ValueError):
            load_params(tmp_path)

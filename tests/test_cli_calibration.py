"""`optjax convert --calibration`: texts in, a model rounded by them out."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

import optjax
from optjax import Quantization
from optjax.cli import main
from optjax.cli.calibration import windows

CONFIG = optjax.OPTConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, ffn_dim=4)


@pytest.fixture
def texts(tmp_path) -> list[Path]:
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    paths[0].write_text("It was a dark and stormy night. " * 300, encoding="utf-8-sig")
    paths[1].write_text("The rain fell in torrents; ünd so wëiter. " * 200, encoding="utf-8")
    return paths


def test_convert(tmp_path, texts, capsys):
    """The command writes what the function makes of the same windows, layer by layer from the files."""
    options = [
        "--quantize",
        "int4",
        "--group-size",
        "32",
        "--calibration",
        *map(str, texts),
        "--calibration-windows",
        "3",
    ]
    assert main(["convert", "opt-mini", str(tmp_path / "made"), *options]) == 0
    assert "in int4" in capsys.readouterr().err
    params, tokenizer = optjax.load("opt-mini")
    ids = windows(tokenizer, [path.read_text(encoding="utf-8-sig") for path in texts], 512, 3)
    assert ids.shape == (3, 512) and (ids[:, 0] == tokenizer.bos_token_id).all()
    wanted = optjax.gptq(params, ids, Quantization("int4", 32))
    made = optjax.load_params(tmp_path / "made")
    assert jax.tree.structure(made) == jax.tree.structure(wanted)
    for ours, theirs in zip(jax.tree.leaves(made), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_windows(texts):
    tokenizer = optjax.Tokenizer.load("opt-mini")
    whole = tokenizer.encode("one two three", add_special_tokens=False)
    np.testing.assert_array_equal(windows(tokenizer, ["one two three"], 2048, 5), [[tokenizer.bos_token_id, *whole]])
    long = [path.read_text(encoding="utf-8-sig") for path in texts]
    some, all_of_them = (windows(tokenizer, long, 100, count) for count in (3, 1000))
    assert some.shape == (3, 100) and len(all_of_them) > 20
    np.testing.assert_array_equal(some[[0, -1]], all_of_them[[0, -1]])
    with pytest.raises(ValueError, match="the texts to go by are empty"):
        windows(tokenizer, ["", ""], 100, 3)
    with pytest.raises(ValueError, match="a model of a single position"):
        windows(tokenizer, ["one two three"], 1, 3)


def test_a_model_without_a_tokenizer(tmp_path, texts, capsys):
    optjax.save_params(optjax.init_params(CONFIG, jax.random.key(0)), tmp_path / "model")
    words = ["convert", str(tmp_path / "model"), str(tmp_path / "made"), "--quantize", "int4"]
    assert main([*words, "--calibration", str(texts[0])]) == 2
    error = capsys.readouterr().err
    assert "name one with --tokenizer" in error and "the result has none" not in error


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--calibration", "TEXT"], 2, "--calibration is for --quantize"),
        (["--quantize", "int4", "--calibration-windows", "3"], 2, "--calibration-windows is for --calibration"),
        (["--quantize", "int4", "--calibration", "nowhere.txt"], 1, "nowhere.txt: No such file"),
        (["--quantize", "int4", "--calibration", "LATIN"], 1, "is not UTF-8"),
        (["--quantize", "int4", "--calibration", "EMPTY"], 1, "the texts to go by are empty"),
    ],
)
def test_errors_of_the_command(tmp_path, texts, capsys, options, status, message):
    (tmp_path / "latin").write_bytes("wëiter".encode("latin-1"))
    (tmp_path / "empty").touch()
    files = {"TEXT": texts[0], "LATIN": tmp_path / "latin", "EMPTY": tmp_path / "empty"}
    assert main(["convert", "opt-mini", str(tmp_path / "made"), *[str(files.get(o, o)) for o in options]]) == status
    assert message in capsys.readouterr().err and not (tmp_path / "made").exists()

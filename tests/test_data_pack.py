"""Packing: every input against `tokenizers` called plainly, and against itself killed."""

import gzip
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import tokenizers

import optjax
from optjax.train import pack as command
from optjax.train.data import PackedText, documents, encode, inputs, packing, write_tokens
from optjax.train.opt_mini.tokenizer import train_tokenizer

FOLDER = Path(optjax.__file__).parent / "assets" / "opt-mini"
WORDS = ["the", "house", "na\u00efve", "\U0001f600", "It's", "'ll", "2.5", "</s>", "\u3000", "\x85", "--", "\t", "Mr."]
SPACES = [" ", " ", " ", " ", "  ", "\n", "\n", "\n\n", " \n", "\n ", "\r\n", "\x0b", "\u2028", " \n\n", "\n  ", " \n "]


def some_text(seed: int, words: int) -> str:
    draw = random.Random(seed)
    return "".join(draw.choice(WORDS) + draw.choice(SPACES) for _ in range(words))


DOCUMENTS = [some_text(i, 5 + 7 * i) for i in range(20)] + ["", " \n\u3000", "  last. "]


def plain_ids(documents: list[str]) -> list[int]:
    plain = tokenizers.Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    stripped = [text.strip() for text in documents if text.strip()]
    return [i for text in stripped for i in [*plain.encode(text, add_special_tokens=False).ids, 2]]


def run(out: Path, *documents: str | Path, more: tuple[str, ...] = ("--workers", "1")) -> PackedText:
    command.main(["--documents", *map(str, documents), "--tokenizer", "opt-mini", "--out", str(out), "--quiet", *more])
    return PackedText(out, 5)


def lines(documents: list[str], field: str = "text") -> bytes:
    return "".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(documents)).encode()


def table(documents: list, kind: pa.DataType | None = None) -> pa.Table:
    column = pa.array(documents, kind or pa.string())
    return pa.table({"text": column, "meta": [{"text": "no"}] * len(documents)})


def write_arrow(path: Path, found: pa.Table, new: type = pa.ipc.RecordBatchStreamWriter) -> None:
    with pa.OSFile(str(path), "wb") as sink, new(sink, found.schema) as writer:
        writer.write_table(found, max_chunksize=4)


def write_inputs(folder: Path, kind: str) -> Path:
    """Files of DOCUMENTS, by pyarrow or by hand."""
    folder.mkdir()
    if kind == "txt":
        for i, text in enumerate(DOCUMENTS):
            (folder / f"{i:02d}.txt").write_text(text, newline="")
    elif kind == "jsonl":
        (folder / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines(DOCUMENTS[:9]) + b"\n  \n")
        (folder / "b.jsonl").write_bytes(lines(DOCUMENTS[9:])[:-1])
    elif kind == "gz":
        (folder / "a.json.gz").write_bytes(gzip.compress(lines(DOCUMENTS[:5])) + gzip.compress(lines(DOCUMENTS[5:])))
    elif kind == "zst":
        with pa.output_stream(str(folder / "a.jsonl.zst"), compression="zstd") as file:
            file.write(lines(DOCUMENTS))
    elif kind == "parquet":
        (folder / "data").mkdir()
        pa.parquet.write_table(table([*DOCUMENTS[:9], None]), folder / "data" / "0.parquet", row_group_size=3)
        pa.parquet.write_table(table(DOCUMENTS[9:], pa.large_string()), folder / "data" / "1.parquet")
        (folder / "info.json").write_text("{}")
    elif kind == "save_to_disk":
        names = ["data-00001-of-00002.arrow", "data-00000-of-00002.arrow"]  # the order is that of state.json
        write_arrow(folder / names[0], table(DOCUMENTS[:9]))
        write_arrow(folder / names[1], table(DOCUMENTS[9:], pa.dictionary(pa.int32(), pa.string())))
        (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": n} for n in names]}))
        (folder / "dataset_info.json").write_text("{}")
    else:
        write_arrow(folder / "a.arrow", table(DOCUMENTS, pa.string_view()), pa.ipc.RecordBatchFileWriter)
    return folder


@pytest.mark.parametrize("kind", ["txt", "jsonl", "gz", "zst", "parquet", "save_to_disk", "arrow"])
def test_every_input_gives_the_plain_ids(tmp_path, kind):
    more = ("--workers", "1", "--block-length", "7", "--shard-size", "0.0005")
    text = run(tmp_path / "out", write_inputs(tmp_path / "in", kind), more=more)
    universal = [text.replace("\r\n", "\n") for text in DOCUMENTS] if kind == "txt" else DOCUMENTS
    expected = plain_ids(universal)
    assert text.read(0, text.tokens).tolist() == expected
    written = [text for text in universal if text.strip()]
    assert text.about["bytes"] == sum(len(text.strip().encode()) for text in written)
    assert text.about["documents"] == len(written) and text.about["empty"] == len(DOCUMENTS) - len(written) + (
        kind == "parquet"
    )
    assert len(text.about["shards"]) > (1 if kind in ("gz", "zst") else 3) - (kind in ("gz", "zst"))
    for length in (1, 5, 6, 7, 8, 50):
        windows = PackedText(tmp_path / "out", length)
        assert len(windows) == (len(expected) - 1) // length
        for i in range(len(windows)):
            assert windows[i].tolist() == expected[i * length : (i + 1) * length + 1]
    with pytest.raises(IndexError):
        windows[len(windows)]


def test_wherever_lines_are_cut_each_is_read_once(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(["a", "bcd", "", "\u00e9\u00e9", "f" * 40]))
    for size in range(1, 70):
        [*slices] = (part for shard in inputs.plan([tmp_path / "a.jsonl"], "text", size, False) for part in shard)
        found = [part for each in slices for part in documents.read_documents(each, "text")]
        assert [part.text for part in found] == ["a", "bcd", "", "\u00e9\u00e9", "f" * 40], size
        assert sum(part.read for part in found) == (tmp_path / "a.jsonl").stat().st_size


@pytest.mark.parametrize("prefix", [False, True])
def test_a_long_text_is_cut_where_no_id_changes(tmp_path, monkeypatch, prefix):
    """In slices for the workers and in parts for the tokenizer, unless its rules for words forbid it."""
    monkeypatch.setattr(inputs, "LARGE", 300)
    monkeypatch.setattr(encode, "BATCH", 40)
    text = " \n" + some_text(1, 4000).replace("\r\n", "\n") + "\n" * 700
    (tmp_path / "a.txt").write_text(text, newline="\r\n" if prefix else "\n")
    (tmp_path / "b.txt").write_text(text.strip(), encoding="utf-8-sig")
    backend = train_tokenizer([text.replace("\u3000", "x")], 330)  # it has merges across spaces
    tokenizer = optjax.Tokenizer(backend, bos_token="</s>", eos_token="</s>", pad_token=None)
    tokenizer.backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    state = json.loads(tokenizer.backend.to_str())
    assert encode.splits_at_lines(state) is not prefix
    files = inputs.find_files([str(tmp_path / "[ab].txt")])
    slices = [part for shard in inputs.plan(files, "text", 1000, splits=not prefix) for part in shard]
    assert (len(slices) > 60) is not prefix
    packing.pack(files, tokenizer, tmp_path / "out", workers=1, shard_bytes=1000)
    packed = PackedText(tmp_path / "out", 5)
    whole = [*tokenizer.backend.encode(text.strip(), add_special_tokens=False).ids, 2]
    assert packed.read(0, packed.tokens).tolist() == whole * 2
    assert packed.about["documents"] == 2
    rest = state | {"added_tokens": [state["added_tokens"][0] | {"rstrip": True}]}
    assert not encode.splits_at_lines(rest) and not encode.splits_at_lines(state | {"normalizer": {"type": "NFC"}})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_killed_at_any_moment_it_ends_in_the_same_bytes(tmp_path):
    """By SIGKILL to the program alone: its workers have to see that it is gone, and its lock with it."""
    (tmp_path / "a.jsonl").write_bytes(lines([some_text(i, 4000) for i in range(48)]))
    shards = ("--shard-size", "0.05")
    run(tmp_path / "whole", tmp_path / "a.jsonl", more=("--workers", "1", *shards))
    expected = contents(tmp_path / "whole")
    assert len(expected) > 16
    out, draw = tmp_path / "killed", random.Random(4)
    program = ["-m", "optjax.train.pack", "--documents", str(tmp_path / "a.jsonl"), "--tokenizer", "opt-mini"]
    program = [sys.executable, *program, "--out", str(out), "--quiet", "--workers", "2", *shards]
    done = 0
    for _ in range(3):
        process = subprocess.Popen(program, start_new_session=True, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 120
        while len(list(out.glob("*.array_record"))) < done + 2:  # something new, then a moment more
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(draw.random() / 5)
        process.kill()
        process.communicate()
        while True:
            try:
                os.killpg(process.pid, 0)
            except ProcessLookupError:
                break
            assert time.monotonic() < deadline, "a worker outlives the program"
            time.sleep(0.02)
        done = len(list(out.glob("*.array_record")))
        assert process.returncode == -signal.SIGKILL and not (out / "about.json").exists()
        with pytest.raises(FileNotFoundError, match="not to the end"):
            PackedText(out, 5)
    first = min(out.glob("*.array_record"))
    first.write_bytes(first.read_bytes()[:-1] + b"!")  # a finished shard that the disk lost a byte of
    subprocess.run(program, check=True)
    assert contents(out) == expected


def test_what_is_damaged_is_named_and_made_again(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines([some_text(i, 400) for i in range(8)]))
    arguments = tmp_path / "out", tmp_path / "a.jsonl"
    more = ("--workers", "1", "--shard-size", "0.005")
    text = run(*arguments, more=more)
    expected = text.read(0, text.tokens)
    before = contents(tmp_path / "out")
    shard = tmp_path / "out" / "text-00001.array_record"
    whole = shard.read_bytes()
    middle = whole.index(whole[300:320])
    shard.write_bytes(whole[:middle] + bytes(b ^ 1 for b in whole[middle : middle + 20]) + whole[middle + 20 :])
    text = PackedText(tmp_path / "out", 5)
    first = text.shards[0].tokens
    assert text.read(0, first).tolist() == expected[:first].tolist()
    with pytest.raises(ValueError, match="text-00001.array_record is damaged"):
        text.read(first, first + 10)
    for damaged, message in ((whole[:-7], "text-00001.array_record is damaged.*bytes"), (None, "is not there")):
        shard.unlink() if damaged is None else shard.write_bytes(damaged)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            PackedText(tmp_path / "out", 5)
        run(*arguments, more=more)
        assert contents(tmp_path / "out") == before
    (tmp_path / "out" / "about.json").write_text('{"form')
    with pytest.raises(ValueError, match="about.json is damaged"):
        PackedText(tmp_path / "out", 5)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": "b"}\nnot json\n', "a.jsonl, line 3: not JSON"),
        ("a.jsonl", b'{"text": "a"}\n\n[1]\n', "line 3: expected a JSON object"),
        ("a.jsonl", b'{"text": "a"}\n{"body": 1}\n', "line 2: no 'text', only body; choose with --text-field"),
        ("a.jsonl", b'{"text": 3}\n', "line 1: 'text' is int"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\\ud800"}\n', "line 2: not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "line 2: not UTF-8"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n{]\n', mtime=0), "line 2: not JSON"),
        ("a.jsonl.gz", gzip.compress(bytes(range(256)) * 99, mtime=0)[:-9], "a.jsonl.gz"),
        ("a.txt", b"good\nbad \xff\n", "a.txt, line 2: not UTF-8"),
        ("a.parquet", b"PAR1 and so on", "a.parquet: not a parquet file"),
        ("a.arrow", b"ARROW1 and so on", "a.arrow: not an arrow file"),
        ("a.csv", b"text\n", "a.csv: expected .txt, .jsonl"),
        ("a.jsonl", b"\n\n", "nothing to pack"),
    ],
)
def test_bad_inputs_are_named_by_file_and_line(tmp_path, capsys, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path / "out", tmp_path / name, more=("--workers", "1", "--shard-size", "0.00001"))
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and re.search(message, said), said
    assert not (tmp_path / "out" / "about.json").exists()


def test_wrong_columns_folders_and_names_say_so(tmp_path, capsys):
    def refused(message: str, *documents: str | Path) -> None:
        with pytest.raises(SystemExit):
            run(tmp_path / "out", *documents)
        assert message in capsys.readouterr().err

    pa.parquet.write_table(pa.table({"body": ["a"], "n": [1]}), tmp_path / "a.parquet")
    refused("has no column 'text', only body, n", tmp_path / "a.parquet")
    refused("nowhere is not there", tmp_path / "nowhere")
    refused("no file fits", f"{tmp_path}/*.txt")
    refused("named twice", tmp_path / "a.parquet", f"{tmp_path}/*.parquet")
    (tmp_path / "b.txt").write_text("b")
    refused("several kinds: parquet, txt", tmp_path)
    (tmp_path / "dict").mkdir()
    (tmp_path / "dict" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    refused(f"name those meant: {tmp_path}/dict/train", tmp_path / "dict")
    assert not (tmp_path / "out").exists()


def test_a_bar_is_for_a_terminal(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.txt").write_text(some_text(0, 50))
    for shown in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda shown=shown: shown)
        run(tmp_path / str(shown), tmp_path / "a.txt", more=("--workers", "1", "--no-quiet"))
        assert ("packing" in capsys.readouterr().err) == shown


def test_another_text_in_the_folder_is_refused(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("It was raining. " * 9)
    run(tmp_path / "out", tmp_path / "a.txt")
    before = contents(tmp_path / "out")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "a.txt").write_text("It was raining. " * 10)
    for changed, *more in (("a.txt", "--block-length", "9"), ("a.txt", "--text-field", "body"), ("more",)):
        with pytest.raises(SystemExit):
            run(tmp_path / "out", tmp_path / changed, more=tuple(more))
        assert "holds another packed text" in capsys.readouterr().err
    with packing._alone(tmp_path / "out"), pytest.raises(SystemExit):
        run(tmp_path / "out", tmp_path / "a.txt")
    assert "another process is packing" in capsys.readouterr().err
    (tmp_path / "out" / "about.json").unlink()
    with pytest.raises(SystemExit):
        run(tmp_path / "out", tmp_path / "a.txt")
    assert "shards that are not of this text" in capsys.readouterr().err
    assert contents(tmp_path / "out").keys() == before.keys() - {"about.json"}


def test_ids_made_elsewhere_are_written_as_they_are(tmp_path):
    ids = np.arange(70000, dtype=np.int64)
    write_tokens(tmp_path, ids, vocab_size=70000, bytes=140000)
    text = PackedText(tmp_path, 999, 70000)
    assert (text.read(0, 70000) == ids).all() and text.bytes_per_token == 2
    for wrong in (ids + 1, ids - 1, ids[None], ids.astype(np.float32)):
        with pytest.raises(ValueError, match="ids should be|one row of integer ids"):
            write_tokens(tmp_path / "wrong", wrong, vocab_size=70000)

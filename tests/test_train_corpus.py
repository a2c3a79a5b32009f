"""From books to packed text: cleaning, splits, the tokenizer's conventions, packing, and bits per byte."""

import io
import json
import sys
import tarfile

import jax
import numpy as np
import pytest
import tokenizers
import torch
import transformers

from optjax import OPTConfig, init_params, save_params
from optjax.train import pack
from optjax.train.data import PackedText
from optjax.train.opt_mini import cleaning, corpus
from optjax.train.opt_mini.evaluate import total_nats, windows
from optjax.train.opt_mini.tokenizer import save_tokenizer, train_tokenizer

PROSE = "It was a long sentence about nothing in particular, said he, and went on to say it once more. " * 5


def test_quotes_dashes_and_spaces_have_one_spelling():
    raw = "\u201cOh\u2014don\u2019t  go,\u201d _he_ said--and\u00a0left.\tSo . . . so\u2026"
    assert cleaning.normalise(raw) == '"Oh - don\'t go," he said - and left. So ... so\u2026'


@pytest.mark.parametrize("blank_lines", [True, False])
def test_wrapped_paragraphs_are_joined(blank_lines):
    paragraphs = [
        "The first paragraph of the book is three lines long, when it is wrapped as it was in the files of old, and its"
        " last line is short enough to see that it ended.",
        '"Indeed?" said the other, who had not been listening at all to the story of the old man by the fire.',
        "Upon which they went to bed.",
    ]
    lines = []
    for paragraph in paragraphs:
        line = ""
        for word in paragraph.split():
            if len(line) + 1 + len(word) > 70:
                lines.append(line)
                line = ""
            line = f"{line} {word}".strip()
        lines += [line, ""] if blank_lines else [line]
    assert cleaning.paragraphs("\n".join(lines)) == paragraphs


def test_a_line_in_lower_case_goes_on_with_the_paragraph():
    long = "A paragraph that stands on one long line, as it does in many of the books, " * 3
    assert cleaning.paragraphs(f"{long}and was\n\nbroken in two.\n\n{long}")[0].endswith("and was broken in two.")


@pytest.mark.parametrize(
    "line, heading",
    [
        ("CHAPTER I.", True),
        ("Chapter 12", True),
        ("CHAPTER I - 'AT HOME' AT OLD JOLYON'S", True),
        ("XIV", True),
        ("THE WINDOW", True),
        ("Part of the house was dark.", False),
        ("Books were all she had.", False),
        ('"STOP!"', False),
        ("I.", True),
        ("I do not mean to describe myself.", False),
    ],
)
def test_headings(line, heading):
    assert cleaning.is_heading(line) is heading


def test_chapters_become_documents_without_their_headings():
    book = f"\ufeffA NOVEL\r\n\r\nCHAPTER I\r\n\r\n{PROSE}\r\n\r\nCHAPTER II\r\n\r\nII {PROSE}\r\n".encode()
    assert cleaning.documents(book) == [PROSE.strip(), f"II {PROSE.strip()}"]
    long = "\n\n".join([PROSE] * 200).encode()
    parts = cleaning.documents(long)
    assert len(parts) > 1 and max(map(len, parts)) < cleaning.MAX_DOCUMENT + 2 * len(PROSE)
    assert "\n\n".join(parts) == "\n\n".join([PROSE.strip()] * 200)
    with pytest.raises(ValueError, match="UTF-8"):
        cleaning.documents(b"\xff\xfe\x00")


def archive(path, names):
    with tarfile.open(path, "w:xz") as tar:
        for name in names:
            content = f"{name}\n\n{PROSE}".encode()
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def test_the_held_out_novel_and_its_author_are_not_trained_on(tmp_path, monkeypatch, capsys):
    novels = ["Doyle_Hound_1902", "Galsworthy_Man_1906", "Galsworthy_Saints_1919"]
    names = [f"corpora/novels/{n}.txt" for n in novels] + ["corpora/austen/emma.txt", "corpora/kjv/kjv.txt"]
    archive(tmp_path / "corpora.tar.xz", names)
    given = ["corpus", "--corpus", str(tmp_path / "corpora.tar.xz"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", given)
    corpus.main()
    said = capsys.readouterr()
    assert [line.split()[0] for line in said.out.splitlines()] == ["train", "validation", "heldout"] and not said.err
    sources = {}
    for split in ("train", "validation", "heldout"):
        lines = (tmp_path / "out" / f"{split}.jsonl").read_text().splitlines()
        sources[split] = {json.loads(line)["source"] for line in lines}
    assert sources["train"] == {"Doyle_Hound_1902", "emma"}
    assert sources["validation"] == {"Galsworthy_Saints_1919"} and sources["heldout"] == {"Galsworthy_Man_1906"}
    archive(tmp_path / "corpora.tar.xz", names[:1])
    with pytest.raises(SystemExit):
        corpus.main()
    assert "no text for the split" in capsys.readouterr().err


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer([PROSE, "Zebras quiver."], 300), folder, 64)
    return folder


def test_the_tokenizer_keeps_opts_conventions(tokenizer_folder):
    ours = tokenizers.Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    theirs = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    assert len(theirs) == ours.get_vocab_size() == 300
    assert theirs.convert_tokens_to_ids(["<s>", "<pad>", "</s>", "<unk>"]) == [0, 1, 2, 3]
    assert (theirs.bos_token_id, theirs.pad_token_id, theirs.eos_token_id, theirs.unk_token_id) == (2, 1, 2, 2)
    for text in ("It was a sentence.", "", "na\u00efve \U0001f600\n\n tabs\t", "\x00\x7f"):
        ids = ours.encode(text).ids
        assert ids[0] == 2 and ids.count(2) == 1 and theirs(text).input_ids == ids
        assert theirs.decode(ids, skip_special_tokens=True) == text
    assert ours.encode("a", "b").ids[0] == 2 and ours.encode("a", "b").ids.count(2) == 1
    slow = transformers.GPT2Tokenizer.from_pretrained(tokenizer_folder)  # from vocab.json and merges.txt
    assert slow(PROSE).input_ids == ours.encode(PROSE).ids
    with pytest.raises(ValueError, match="ask for fewer"):
        train_tokenizer(["few words"], 4000)


def test_packing_strips_documents_and_ends_each(tokenizer_folder, tmp_path, capsys):
    texts = ["  It was.\n", "", " \n ", "Zebras\nquiver."]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    pack.main(["--documents", str(tmp_path / "d.jsonl"), "--tokenizer", str(tokenizer_folder),
               "--out", str(tmp_path / "packed"), "--quiet"])  # fmt: skip
    text = PackedText(tmp_path / "packed", 4, 300)
    plain = tokenizers.Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    parts = [plain.encode(t.strip(), add_special_tokens=False).ids + [2] for t in texts if t.strip()]
    assert text.read(0, text.tokens).tolist() == sum(parts, [])
    assert text.bytes_per_token == pytest.approx((len("It was.") + len("Zebras\nquiver.")) / text.tokens)
    with pytest.raises(ValueError, match="300 entries"):
        PackedText(tmp_path / "packed", 4, 299)
    with pytest.raises(ValueError, match="one record"):
        PackedText(tmp_path / "packed", 4000, 300)
    (tmp_path / "d.jsonl").write_text('{"text": "a"}\nnot json\n')
    with pytest.raises(SystemExit):
        pack.main(["--documents", str(tmp_path / "d.jsonl"), "--tokenizer", str(tokenizer_folder),
                   "--out", str(tmp_path / "other"), "--quiet"])  # fmt: skip
    assert "line 2" in capsys.readouterr().err


def test_windows_count_every_label_once():
    for count in (1, 7, 8, 9, 30, 31):
        for stride in (1, 3, 8):
            counted = []
            for start, first in windows(count, min(8, count), stride):
                counted += range(start + first, start + min(8, count))
            assert counted == list(range(count)), (count, stride)


def test_total_nats_are_those_of_transformers_window_by_window(tmp_path):
    config = OPTConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, ffn_dim=32, num_attention_heads=2,
                       max_position_embeddings=8, dropout=0.0, init_std=0.3)  # fmt: skip
    params = init_params(config, jax.random.key(0))
    save_params(params, tmp_path)
    model = transformers.OPTForCausalLM.from_pretrained(tmp_path)
    tokens = np.random.default_rng(0).integers(2, 40, 21)
    expected = 0.0
    for label in range(1, 21):
        # Stride 3: label 9 + 3k to 11 + 3k share the window that ends before label 12 + 3k.
        end = label if label <= 8 else min(20, 8 + 3 * -(-(label - 8) // 3))
        start = max(0, end - 8)
        with torch.no_grad():
            logits = model(torch.tensor(tokens[None, start:end])).logits[0, label - 1 - start]
        expected -= torch.log_softmax(logits, -1)[tokens[label]].item()
    assert total_nats(params, tokens, stride=3, batch_size=4) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="stride"):
        total_nats(params, tokens, stride=9)

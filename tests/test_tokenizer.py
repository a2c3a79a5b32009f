"""The tokenizer against published ids, against transformers' two GPT-2 tokenizers, and its files and errors."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from tokenizers.processors import TemplateProcessing

from optjax.tokenizer import Tokenizer

# Published by transformers' own tests and by metaseq, BOS included.
KNOWN = {
    "A photo of a cat": [2, 250, 1345, 9, 10, 4758],
    "I like you.": [2, 100, 101, 47, 4],
    "Hello world! cécé herlolip": [2, 31414, 232, 328, 740, 1140, 12695, 69, 46078, 1588],
    "</s>bos": [2, 2, 31957],
    "Today is a beautiful day and I want": [2, 5625, 16, 10, 2721, 183, 8, 38, 236],
    "": [2],
    " ": [2, 1437],
    "\n": [2, 50118],
    "\n\n": [2, 50140],
    "naïve 😀 日本語": [2, 2133, 48350, 17841, 7471, 47416, 6800, 8210, 44636, 11582, 48537, 17772],
}
PAIR = [2, 12375, 21, 2488, 289, 13919, 116, 24021, 289, 13919, 21, 10, 2579, 29771]
NAMES = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}


@pytest.fixture(scope="module")
def vocabulary(shared_data: Path) -> Path:
    return shared_data / "tokenizer"


@pytest.fixture(scope="module")
def real(vocabulary: Path) -> Tokenizer:
    return Tokenizer.load(vocabulary)


@pytest.fixture(scope="module", params=["fast", "slow"])
def reference(request: pytest.FixtureRequest, vocabulary: Path):
    """transformers' tokenizer over the same two files; the fast one is converted from the slow one, as on the hub."""
    from transformers import GPT2Tokenizer, GPT2TokenizerFast
    from transformers.convert_slow_tokenizer import convert_slow_tokenizer

    files = [str(vocabulary / "vocab.json"), str(vocabulary / "merges.txt")]
    slow = GPT2Tokenizer(*files, add_bos_token=True, clean_up_tokenization_spaces=False, **NAMES)
    if request.param == "slow":
        return slow
    backend = convert_slow_tokenizer(slow)
    return GPT2TokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **NAMES)


def random_text(rng: random.Random, length: int) -> str:
    """Characters of every plane: half of them ASCII, the others of 2, 3 and 4 bytes, controls among them."""
    ranges = [(0x20, 0x7F), (0x00, 0x20), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000)]
    chosen = rng.choices(ranges, [60, 5, 10, 10, 5, 10], k=length)
    return "".join(chr(rng.randrange(*r)) if rng.random() < 0.9 else rng.choice(" \n\t'") for r in chosen)


def train(folder: Path | None = None) -> Backend:
    """A small byte-level BPE with OPT's four special tokens; its vocab.json and merges.txt go to `folder`."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator([Path(__file__).read_text(encoding="utf-8")], trainer)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        backend.model.save(str(folder))
    return backend


# Ids.


@pytest.mark.parametrize("text", KNOWN)
def test_known_ids(real: Tokenizer, text: str):
    assert real.encode(text) == KNOWN[text]
    assert real.encode(text, add_special_tokens=False) == KNOWN[text][1:]
    assert real.decode(KNOWN[text]) == text.replace("</s>", "")


def test_known_pair(real: Tokenizer):
    assert real.encode("Who was Jim Henson?", "Jim Henson was a nice puppet") == PAIR


def test_known_answers(real: Tokenizer, shared_data: Path):
    known = json.loads((shared_data / "known-answers" / "known_answers.json").read_text())
    scored = known["metaseq_opt125m_token_scores"]
    assert real.encode(scored["text"], add_special_tokens=False) == scored["prompt_ids"]
    greedy = known["ctranslate2_opt350m_greedy"]["expected_tokens"]
    ids = [real.backend.token_to_id(token) for token in greedy]
    assert real.decode(ids) == "\nThe following is a list of the most popular"


def test_special_ids_and_sizes(real: Tokenizer):
    assert (real.bos_token_id, real.eos_token_id, real.pad_token_id) == (2, 2, 1)
    assert real.vocab_size == len(real) == 50265
    assert real.unused_ids(50272) == list(range(50265, 50272))
    assert real.unused_ids(50265) == []


def test_random_text_equals_transformers(real: Tokenizer, reference):
    rng = random.Random(0)
    texts = [random_text(rng, rng.randrange(60)) for _ in range(1500)]
    texts += [
        f"{a}{rng.choice(['</s>', '<pad>', '<s>', '<unk>', '<mask>'])}{b}"
        for a, b in zip(texts[:50], texts[1:51], strict=True)
    ]
    for text in texts:
        ids = reference(text)["input_ids"]
        assert real.encode(text) == ids, text
        assert real.decode(ids, skip_special_tokens=False) == reference.decode(ids)
    if type(reference).__name__ == "GPT2Tokenizer":
        return  # the slow one puts a second BOS before the second text, against the published ids of a pair
    for first, second in zip(texts[:300], reversed(texts[:300]), strict=True):
        assert real.encode(first, second) == reference(first, second)["input_ids"]


def test_english_equals_transformers(real: Tokenizer, reference, shared_data: Path):
    wiki = (shared_data / "eval" / "wiki.test.raw").read_text(encoding="utf-8")[:200_000]
    lambada = (shared_data / "eval" / "lambada_test.jsonl").read_text(encoding="utf-8").splitlines()[:200]
    for text in [*wiki.split("\n"), *(json.loads(line)["text"] for line in lambada)]:
        ids = real.encode(text)
        assert ids == reference(text)["input_ids"]
        assert real.decode(ids) == text.replace("</s>", "").replace("<pad>", "")


def test_random_ids_decode_as_in_transformers(real: Tokenizer, reference):
    rng = random.Random(1)
    for _ in range(300):
        ids = [rng.randrange(len(real)) for _ in range(rng.randrange(20))]
        if type(reference).__name__ == "GPT2Tokenizer":
            # The slow one joins the pieces around special tokens itself; between them it decodes alike.
            ids = [i for i in ids if i not in (1, 2)]
        for skip in (True, False):
            assert real.decode(ids, skip) == reference.decode(ids, skip_special_tokens=skip)


# Batches.


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("truncation", [False, True, "left", "right"])
@pytest.mark.parametrize("multiple", [None, 8])
def test_batches_equal_transformers(real: Tokenizer, vocabulary: Path, padding, truncation, multiple):
    from transformers import GPT2Tokenizer

    files = [str(vocabulary / "vocab.json"), str(vocabulary / "merges.txt")]
    reference = GPT2Tokenizer(*files, add_bos_token=True, padding_side=padding, **NAMES)
    texts = ["one two three four five six seven", "", "one", "日本語 😀 one two"]
    limit = 6 if truncation else None
    ids, mask = real.encode_batch(
        texts, padding=padding, truncation=truncation, max_length=limit, pad_to_multiple_of=multiple
    )
    if truncation == "left":
        # transformers cuts before it adds the BOS, on the side asked for: the same rows, made by hand.
        rows = [real.encode(text)[:1] + real.encode(text)[1:][-5:] for text in texts]
    else:
        rows = reference(texts, truncation=bool(truncation), max_length=limit)["input_ids"]
    expected = reference.pad({"input_ids": rows}, padding=True, pad_to_multiple_of=multiple, return_tensors="np")
    assert ids.dtype == mask.dtype == np.int32
    np.testing.assert_array_equal(ids, expected["input_ids"])
    np.testing.assert_array_equal(mask, expected["attention_mask"])
    assert real.decode_batch(ids) == [real.decode(row) for row in rows]


def test_call_takes_one_text_or_many(real: Tokenizer):
    ids, mask = real("A photo of a cat")
    assert ids.tolist() == [KNOWN["A photo of a cat"]] and mask.tolist() == [[1] * 6]
    ids, mask = real(["a b", "a"], padding="right", add_special_tokens=False)
    assert ids.tolist() == [[102, 741], [102, 1]] and mask.tolist() == [[1, 1], [1, 0]]


@pytest.mark.parametrize(
    "texts, options, message",
    [
        ("text", {}, "one string"),
        ([], {}, "none"),
        (None, {}, "expected a list of texts, got NoneType"),
        (np.array([]), {}, "none"),
        (["a", None], {}, r"texts\[1\] is a NoneType"),
        (["a", "\ud800"], {}, r"texts\[1\] cannot be written in UTF-8"),
        (["a"], {"padding": "both"}, "'both'"),
        (["a"], {"truncation": "middle", "max_length": 3}, "'middle'"),
        (["a"], {"truncation": True}, "max_length"),
        (["a"], {"pad_to_multiple_of": 0}, "at least 1"),
        (["a", "a b c d"], {"max_length": 3}, r"texts\[1\] has 5 tokens, more than max_length 3"),
        (["a"], {"max_length": 0}, "special tokens"),
    ],
)
def test_bad_batches_are_refused(real: Tokenizer, texts, options, message):
    with pytest.raises(ValueError, match=message):
        real.encode_batch(texts, **options)


def test_texts_of_any_kind(real: Tokenizer):
    ids, mask = real(["a", "b c"])
    for texts in (np.array(["a", "b c"]), ("a", "b c"), (text for text in ("a", "b c"))):
        for found, expected in zip(real(texts), (ids, mask), strict=True):
            np.testing.assert_array_equal(found, expected)


def test_bad_input_is_refused(real: Tokenizer):
    with pytest.raises(ValueError, match="text is a int"):
        real.encode(3)
    with pytest.raises(ValueError, match="pair cannot be written in UTF-8"):
        real.encode("a", "\udfff")
    with pytest.raises(ValueError, match="id 50265 is not one of this tokenizer's 50265 entries.*suppress_tokens"):
        real.decode([5, 50265])
    with pytest.raises(ValueError, match="id -100"):
        real.decode([-100])
    with pytest.raises(ValueError, match=r"shape \(1, 2\).*decode_batch"):
        real.decode(np.array([[4, 5]]))
    with pytest.raises(ValueError, match="float"):
        real.decode(np.array([4.0]))
    for one in (5, None):
        with pytest.raises(ValueError, match="expected one row of ids"):
            real.decode(one)  # type: ignore[arg-type]
    assert real.decode([]) == "" and real.decode_batch(np.array([[4], [5]])) == [".", " the"]


# Streams.


def test_stream_equals_decode_for_random_ids(real: Tokenizer):
    rng = random.Random(2)
    vocabulary = real.backend.get_vocab()
    partial = [i for i in vocabulary.values() if "\ufffd" in real.decode([i], False)]
    assert len(partial) > 100  # tokens that hold a piece of a character
    for trial in range(1500):
        pool = [partial, range(len(real)), [*partial[:20], 1, 2, 4]][trial % 3]
        ids = [rng.choice(pool) for _ in range(rng.randrange(40))]
        skip = rng.random() < 0.5
        stream = real.stream_decoder(skip)
        assert "".join(map(stream.push, ids)) + stream.finish() == real.decode(ids, skip)
        assert stream.finish() == ""


def test_stream_never_shows_half_a_character(real: Tokenizer):
    rng = random.Random(3)
    stream = real.stream_decoder()
    for _ in range(300):
        text = random_text(rng, 30).replace("\ufffd", "")
        pieces = [stream.push(i) for i in real.encode(text)]
        assert stream.finish() == "" and "".join(pieces) == text
    halves = real.encode("😀", add_special_tokens=False)
    assert [stream.push(i) for i in halves] == [""] * (len(halves) - 1) + ["😀"]
    stream.push(halves[0])
    assert stream.finish() == "\ufffd"


def test_stream_speaks_as_soon_as_it_can(real: Tokenizer):
    stream = real.stream_decoder()
    assert [stream.push(i) for i in KNOWN["A photo of a cat"]] == ["", "A", " photo", " of", " a", " cat"]
    assert len(stream._ids) == 0  # what was said is forgotten: a long text costs no more per id than a short one
    with pytest.raises(ValueError, match="id 60000"):
        stream.push(60000)


def test_stream_without_byte_level_pieces(tmp_path: Path):
    backend = Backend(models.WordLevel({"</s>": 0, "▁one": 1, "▁two": 2, "x": 3}, unk_token="</s>"))
    backend.decoder = decoders.Metaspace()
    tokenizer = Tokenizer(backend, bos_token="</s>", eos_token="</s>", pad_token=None)
    stream = tokenizer.stream_decoder()
    assert [stream.push(i) for i in [1, 2, 3, 1]] == ["one", " two", "x", " one"]
    with pytest.raises(ValueError, match="no pad token"):
        tokenizer(["one", "one two"], add_special_tokens=False, pad_to_multiple_of=4)


# Files.


def save_config(folder: Path, name: str, **values) -> None:
    (folder / name).write_text(json.dumps(values))


def test_save_is_read_by_transformers_and_by_us(real: Tokenizer, tmp_path: Path):
    from transformers import AutoTokenizer

    real.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.backend.to_str() == real.backend.to_str() and repr(again) == repr(real)
    (tmp_path / "tokenizer.json").rename(tmp_path / "aside")
    from_pair = Tokenizer.load(tmp_path)
    readers = [AutoTokenizer.from_pretrained(tmp_path, use_fast=False)]
    (tmp_path / "aside").rename(tmp_path / "tokenizer.json")
    readers += [AutoTokenizer.from_pretrained(tmp_path)]
    assert [type(reader).__name__ for reader in readers] == ["GPT2Tokenizer", "GPT2TokenizerFast"]
    rng = random.Random(4)
    for text in [*KNOWN, *(random_text(rng, 30) for _ in range(100))]:
        assert from_pair.encode(text) == real.encode(text)
        for reader in readers:
            assert reader(text)["input_ids"] == real.encode(text)
    for reader in readers:
        assert len(reader) == 50265 and (reader.bos_token_id, reader.eos_token_id, reader.pad_token_id) == (2, 2, 1)


@pytest.mark.parametrize("normalizer", [normalizers.NFKC(), None])
def test_galactica_loads_as_it_is(tmp_path: Path, normalizer):
    """Galactica: four special tokens named by config.json alone, digits split, nothing before a text."""
    from transformers import AutoTokenizer

    backend = train()
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\d"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    save_config(tmp_path, "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    save_config(tmp_path, "special_tokens_map.json")
    save_config(tmp_path, "config.json", model_type="opt", bos_token_id=0, pad_token_id=1, eos_token_id=2)
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.encode("") == []
    reference = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.save(tmp_path / "saved")
    assert not (tmp_path / "saved" / "merges.txt").exists()  # they would not say all
    again, theirs = Tokenizer.load(tmp_path / "saved"), AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert (again.bos_token_id, again.pad_token_id, again.eos_token_id) == (0, 1, 2)
    for text in ["the year 1987", "</s>½ x<pad>", "naïve 😀 日本語"]:
        ids = reference(text)["input_ids"]
        assert tokenizer.encode(text) == again.encode(text) == theirs(text)["input_ids"] == ids


def test_save_leaves_no_file_of_an_earlier_tokenizer(tmp_path: Path):
    backend = train(tmp_path)
    save_config(tmp_path, "added_tokens.json", **{"[A]": backend.get_vocab_size()})
    first = Tokenizer.load(tmp_path)
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d"), "isolated")  # which the two files would not say
    Tokenizer(backend, bos_token="<s>", eos_token="</s>", pad_token=None).save(tmp_path)
    written = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    assert {path.name for path in tmp_path.iterdir()} == written
    first.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == written


def test_bos_is_added_once_whatever_the_file_does(tmp_path: Path):
    bare = train()
    bare.save(str(tmp_path / "tokenizer.json"))
    plain = bare.encode("the text").ids
    assert Tokenizer.load(tmp_path).encode("the text") == plain  # the file's word
    save_config(tmp_path, "tokenizer_config.json", add_bos_token=True, bos_token={"content": "</s>", "lstrip": False})
    assert Tokenizer.load(tmp_path).encode("the text") == [2, *plain]
    bare.post_processor = TemplateProcessing(single="</s> $A", pair="</s> $A $B", special_tokens=[("</s>", 2)])
    bare.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.load(tmp_path).encode("the text") == [2, *plain]
    (tmp_path / "tokenizer_config.json").unlink()
    assert Tokenizer.load(tmp_path).encode("the text") == [2, *plain]
    bare.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    bare.save(str(tmp_path / "tokenizer.json"))
    save_config(tmp_path, "tokenizer_config.json", add_bos_token=True, bos_token="<unk>")
    assert Tokenizer.load(tmp_path).encode("the text") == [0, *plain, 2]  # what a file adds already is left to it


def test_two_files_get_one_bos_unless_told(tmp_path: Path):
    plain = train(tmp_path).encode("the text").ids
    assert Tokenizer.load(tmp_path).encode("the text") == [2, *plain]
    save_config(tmp_path, "tokenizer_config.json", add_bos_token=False)
    assert Tokenizer.load(tmp_path).encode("the text") == plain
    save_config(tmp_path, "tokenizer_config.json", bos_token="<s>", add_prefix_space=True)
    assert Tokenizer.load(tmp_path).encode("the text") == Tokenizer.load(tmp_path).encode(" the text")
    assert Tokenizer.load(tmp_path).encode("")[0] == 0
    Tokenizer.load(tmp_path).save(tmp_path / "saved")
    assert Tokenizer.load(tmp_path / "saved").encode("the text") == Tokenizer.load(tmp_path).encode("the text")


def test_added_tokens_follow_the_vocabulary(tmp_path: Path):
    size = train(tmp_path).get_vocab_size()
    save_config(tmp_path, "added_tokens.json", **{"[B]": size + 1, "[A]": size, "</s>": 2})
    save_config(tmp_path, "tokenizer_config.json", pad_token="[B]")
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("x[A][B]")[-2:] == [size, size + 1] and tokenizer.pad_token_id == size + 1
    tokenizer.save(tmp_path / "saved")
    assert Tokenizer.load(tmp_path / "saved").encode("x[A][B]") == tokenizer.encode("x[A][B]")
    save_config(tmp_path, "added_tokens.json", **{"[A]": size + 5})
    with pytest.raises(
        ValueError, match=rf"added_tokens.json gives '\[A\]' id {size + 5}; after vocab.json it is {size}"
    ):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("kind", ["additional", "unk", "flags", "mask"])
def test_added_tokens_are_found_as_in_transformers(tmp_path: Path, kind):
    """Which are special, and which take the spaces beside them, of vocab.json and merges.txt alone."""
    from transformers import AddedToken, GPT2Tokenizer

    train(tmp_path)
    names = dict(bos_token="</s>", eos_token="</s>", unk_token="</s>", pad_token="<pad>", add_bos_token=True)
    if kind == "unk":
        names["unk_token"] = AddedToken("<unk>", rstrip=True)
    reference = GPT2Tokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"), **names)
    if kind == "additional":
        reference.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    elif kind == "flags":
        reference.add_tokens([AddedToken("word", single_word=True), AddedToken("<|user|>", rstrip=True, lstrip=True)])
    elif kind == "mask":
        reference.add_special_tokens({"mask_token": AddedToken("<|user|>", lstrip=True)})
    reference.save_pretrained(tmp_path / "theirs")
    tokenizer = Tokenizer.load(tmp_path / "theirs")
    tokenizer.save(tmp_path / "ours")
    again = [Tokenizer.load(tmp_path / "ours")]
    if (tmp_path / "ours" / "vocab.json").exists():
        (tmp_path / "ours" / "tokenizer.json").unlink()
        again.append(Tokenizer.load(tmp_path / "ours"))
    for text in ["a <unk> b", "x <|user|> the", "words word", "</s> the<pad>"]:
        ids = reference(text)["input_ids"]
        for each in (tokenizer, *again):
            assert each.encode(text) == ids
            special = {i for i in ids if each.decode([i]) == ""}
            assert special == set(ids) & set(reference.all_special_ids)


def test_the_most_specific_file_names_the_special_tokens(tmp_path: Path):
    train(tmp_path)

    def loaded() -> tuple[int, int, int | None]:
        tokenizer = Tokenizer.load(tmp_path)
        return tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id

    assert loaded() == (2, 2, 1)
    save_config(tmp_path, "config.json", bos_token_id=3, eos_token_id=[2, 0], pad_token_id=0)
    assert loaded() == (3, 2, 0)
    save_config(tmp_path, "special_tokens_map.json", bos_token="<pad>", eos_token={"content": "<s>"})
    assert loaded() == (1, 0, 0)
    save_config(tmp_path, "tokenizer_config.json", bos_token={"content": "<s>"}, eos_token=None)
    assert loaded() == (0, 0, 0)


def test_settings_of_an_earlier_run_do_not_come_along(tmp_path: Path):
    backend = train()
    backend.enable_truncation(2)
    backend.enable_padding(length=9)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.decode(tokenizer.encode("a whole sentence")) == "a whole sentence"


def test_missing_files_are_named(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"tokenizer.json, or vocab.json with merges.txt; found: config.json"):
        Tokenizer.load(tmp_path)
    train(tmp_path)
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(FileNotFoundError, match="found: config.json, vocab.json"):
        Tokenizer.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Tokenizer.load(tmp_path / "nowhere")


def test_a_weights_file_has_its_tokenizer_beside_it(tmp_path: Path):
    train(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert Tokenizer.load(tmp_path / "model.safetensors").encode("") == [2]


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("vocab.json", "{", "vocab.json is damaged: not JSON"),
        ("vocab.json", "[1]", "vocab.json is damaged: expected a JSON object, found a list"),
        ("vocab.json", '{"a": "b"}', "vocab.json is damaged: expected an object that gives each token an id"),
        ("vocab.json", '{"a": 0, "b": 0}', "an id of its own"),
        ("vocab.json", '{"a": 0, "b": 1}', "merges.txt is damaged or does not belong to .*vocab.json"),
        ("vocab.json", "[" * 100_000, "vocab.json is damaged"),
        ("vocab.json", b"\xff\xfe", "vocab.json is damaged: not JSON in UTF-8"),
        ("merges.txt", "#version: 0.2\nno_space\n", "merges.txt is damaged"),
        ("merges.txt", "#version: 0.2\nzz qq\n", "merges.txt is damaged or does not belong"),
        ("merges.txt", b"\xff\xfe\x00", "merges.txt is damaged"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": "y"}}', "should give ids their tokens"),
        ("tokenizer.json", "{}", "tokenizer.json is damaged"),
        ("tokenizer.json", "", "tokenizer.json is damaged"),
        ("tokenizer_config.json", "nonsense", "tokenizer_config.json is damaged"),
        ("tokenizer_config.json", '{"bos_token": "<nowhere>"}', "'<nowhere>'"),
        ("special_tokens_map.json", "3", "special_tokens_map.json is damaged: .* found a int"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, file, content, message):
    train(tmp_path)
    (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        Tokenizer.load(tmp_path)


def test_tokenizer_of_another_model_must_say_its_special_tokens(tmp_path: Path):
    backend = Backend(models.BPE(vocab={"a": 0, "<|endoftext|>": 1}, merges=[]))
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="does not say which token is the bos_token"):
        Tokenizer.load(tmp_path)
    save_config(tmp_path, "special_tokens_map.json", bos_token="<|endoftext|>", eos_token={"content": "<|endoftext|>"})
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 1, None)


def test_corrupted_files_never_crash(tmp_path: Path):
    """Bytes flipped, cut off or doubled: an error of ours, or a tokenizer that still encodes."""
    backend = train(tmp_path)
    backend.post_processor = TemplateProcessing(single="</s> $A", pair="</s> $A $B", special_tokens=[("</s>", 2)])
    backend.save(str(tmp_path / "tokenizer.json"))
    whole = {name: (tmp_path / name).read_bytes() for name in ["tokenizer.json", "vocab.json", "merges.txt"]}
    rng = random.Random(5)
    refused = 0
    for trial in range(400):
        name = ["tokenizer.json", "vocab.json", "merges.txt"][trial % 3]
        broken = bytearray(whole[name])
        place = rng.randrange(len(broken))
        match rng.randrange(3):
            case 0:
                del broken[place:]
            case 1:
                broken[place] ^= 1 << rng.randrange(8)
            case 2:
                broken[place:place] = broken[rng.randrange(len(broken)) :][:50]
        folder = tmp_path / str(trial)
        folder.mkdir()
        for other in ["vocab.json", "merges.txt"] if name != "tokenizer.json" else [name]:
            (folder / other).write_bytes(bytes(broken) if other == name else whole[other])
        try:
            tokenizer = Tokenizer.load(folder)
            tokenizer.decode(tokenizer.encode("naïve 😀 text"))
        except ValueError as error:
            assert str(folder) in str(error)
            refused += 1
    assert refused > 200

"""The model that ships in the package: its files, its agreement with transformers, and that it writes English."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import optjax
from optjax.train.data import encode_documents
from optjax.train.opt_mini import cleaning, corpus
from optjax.train.opt_mini.evaluate import total_nats

FOLDER = Path(optjax.__file__).parent / "assets" / "opt-mini"
PROMPTS = ["Once upon a time", "The old man opened the door, and", '"My dear Mrs. Forsyte," he said,', "It was raining"]


@pytest.fixture(scope="module")
def ours():
    return optjax.load("opt-mini", dtype=jnp.float32)


@pytest.fixture(scope="module")
def theirs():
    model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    return model, transformers.AutoTokenizer.from_pretrained(FOLDER)


def test_it_is_small_and_complete(ours):
    params, tokenizer = ours
    assert 5e6 <= optjax.count_params(params.config) <= 8e6
    assert sum(f.stat().st_size for f in FOLDER.rglob("*")) <= 20e6
    assert params.config.vocab_size == tokenizer.vocab_size and not tokenizer.unused_ids(params.config.vocab_size)
    assert {p.dtype for p in jax.tree.leaves(optjax.load_params("opt-mini"))} == {jnp.dtype("float16")}


def test_transformers_loads_it_and_gives_the_same_logits(ours, theirs):
    params, tokenizer = ours
    model, hf_tokenizer = theirs
    assert type(model) is transformers.OPTForCausalLM
    assert sum(p.numel() for p in model.parameters()) == optjax.count_params(params.config)
    text = "It was a bright cold day in April - \u201cna\u00efve\u201d, said he.\n\n" * 30
    ids = hf_tokenizer(text, truncation=True, max_length=512, return_tensors="np").input_ids
    assert ids.shape == (1, 512) and ids[0].tolist() == tokenizer.encode(text)[:512]
    with torch.no_grad():
        expected = model(torch.tensor(ids)).logits.numpy()
    found = np.array(optjax.causal_lm(params, ids).logits)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_greedy_text_is_that_of_transformers(ours, theirs):
    params, tokenizer = ours
    model, hf_tokenizer = theirs
    for prompt in PROMPTS:
        ids = hf_tokenizer(prompt, return_tensors="pt")
        expected = model.generate(**ids, do_sample=False, max_new_tokens=40)[0].numpy()
        found = np.array(optjax.generate(params, np.array([tokenizer.encode(prompt)]), max_new_tokens=40))[0]
        np.testing.assert_array_equal(found[: len(expected)], expected)


def test_what_it_writes_is_english(ours, shared_data):
    """At least 9 of 10 words it makes up are words of a text it has never seen; the bytes are whole characters."""
    params, tokenizer = ours
    known = set(re.findall(r"[a-z]+", (shared_data / "eval" / "wiki.test.raw").read_text(encoding="utf-8").lower()))
    ids, mask = tokenizer.encode_batch(PROMPTS * 4)
    length = ids.shape[1]
    out = optjax.generate(params, ids, mask, max_new_tokens=200, do_sample=True, temperature=0.8, key=jax.random.key(0))
    texts = tokenizer.decode_batch(np.array(out)[:, length:])
    assert not any("\ufffd" in text for text in texts)
    words = re.findall(r"[a-z]+", " ".join(texts).lower())
    assert len(words) > 1500 and len(set(words)) > 300
    assert sum(word in known for word in words) > 0.9 * len(words)


@pytest.fixture(scope="module")
def chapter(ours, shared_data):
    """Ids of the held-out novel's first chapter, </s> before and after it, and the number of its bytes."""
    books = corpus.books(shared_data / "corpora.tar.xz")
    novel = next(content for name, content in books if corpus.split_of(name) == "heldout")
    tokenizer = ours[1]
    packed, size = encode_documents(cleaning.documents(novel)[:1], tokenizer.backend, tokenizer.eos_token_id)
    return np.concatenate([[tokenizer.eos_token_id], packed]), size


def test_bits_per_byte_of_a_chapter_held_out(ours, chapter):
    """Well below an order-5 n-gram model of the same training text; train/opt_mini/README.md has the figures."""
    tokens, size = chapter
    assert total_nats(ours[0], tokens, stride=256) / np.log(2) / size < 2.0


def test_every_position_was_trained(ours, chapter):
    """Far into the window the model knows more, so it predicts at least about as well as near its beginning."""
    tokens, _ = chapter
    rows = [tokens[i : i + 513] for i in range(0, len(tokens) - 513, 128)]
    records = np.stack(rows).astype(np.int32)
    logits = optjax.causal_lm(ours[0], records[:, :-1]).logits
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), records[:, 1:, None], axis=-1)[..., 0].mean(0)
    early, late = float(losses[128:256].mean()), float(losses[384:].mean())
    assert late < early + 0.1, (early, late)

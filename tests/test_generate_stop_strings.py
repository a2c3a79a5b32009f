"""Stop strings beside a search in the decoded text, and beside transformers' StopStringCriteria."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import tokenizers
import transformers
from compilations import count_compilations
from generation_helpers import CONFIG, make_pair, pad, random_prompts

import optjax
from optjax.generation.stop_strings import find_stops, search_prompts, stop_table

V = CONFIG.vocab_size
ALPHABET = tokenizers.pre_tokenizers.ByteLevel.alphabet()


def small_tokenizer(rng: np.random.Generator, size: int = V) -> optjax.Tokenizer:
    """Random tokens of one to four bytes of few letters, some parts of ``é`` and ``€``, and three special ones."""
    letters = [ALPHABET_OF[byte] for byte in "ab\n é€".encode()]
    words = {"<s>", "<pad>", "</s>"}
    while len(words) < size:
        words.add("".join(rng.choice(letters, size=rng.integers(1, 5))))
    vocab = {word: i for i, word in enumerate(["<s>", "<pad>", "</s>", *sorted(words - {"<s>", "<pad>", "</s>"})])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "<pad>", "</s>"])
    return optjax.Tokenizer(backend, bos_token="</s>", eos_token="</s>", pad_token="<pad>")


def _alphabet() -> dict[int, str]:
    """The character of each byte, as the tokenizers library itself encodes it."""
    split = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    table = {}
    for text in [chr(i) for i in range(128)] + [chr(i) for i in range(128, 0x800)] + ["€", "\U0001f600"]:
        [(coded, _)] = split.pre_tokenize_str(text)
        table |= dict(zip(text.encode(), coded, strict=True))
    return table


ALPHABET_OF = _alphabet()


def first_stops(tokenizer, rows: list[list[int]], prompts: list[int], strings: list[str]) -> list[int]:
    """By brute force: how many ids of each row there are when a string is complete, the last id of it a new one."""
    ends = []
    for row, n in zip(rows, prompts, strict=True):
        ends.append(0)
        for end in range(n + 1, len(row) + 1):
            before = len(tokenizer.decode(row[: end - 1], skip_special_tokens=False).rstrip("\ufffd"))
            text = tokenizer.decode(row[:end], skip_special_tokens=False)
            if any(text.find(string, max(0, before - len(string) + 1)) >= 0 for string in strings):
                ends[-1] = end
                break
    return ends


@jax.jit
def search(table, ids, mask, new):
    """For each new token ``[B, N]``, whether a string is complete with it."""
    state = search_prompts(table, ids, mask)

    def step(state, token):
        return find_stops(table, state, token)

    return jax.lax.scan(step, state, new.T)[1].T


def ours(table, prompts: list[list[int]], new: list[list[int]]) -> list[int]:
    ids, mask = np.zeros((len(prompts), 8), np.int32), np.zeros((len(prompts), 8), bool)
    for row, prompt in enumerate(prompts):
        ids[row, 8 - len(prompt) :], mask[row, 8 - len(prompt) :] = prompt, True
    found = np.asarray(search(table, ids, mask, np.array(new, np.int32)))
    return [len(p) + int(hits.argmax()) + 1 if hits.any() else 0 for p, hits in zip(prompts, found, strict=True)]


def random_strings(rng, tokenizer, vocab_size: int) -> list[str]:
    """One to four pieces of decoded text, so that they do come, cut anywhere; some shorter ones are parts of others."""
    strings = set()
    while len(strings) < rng.integers(1, 5):
        text = tokenizer.decode(rng.integers(0, vocab_size, 6), skip_special_tokens=False)
        at = rng.integers(0, len(text))
        piece = text[at : at + rng.integers(1, 6)]
        if piece and "\ufffd" not in piece:
            strings.add(piece)
    return sorted(strings)


def test_small_vocabularies_by_brute_force():
    """30 vocabularies of parts of characters, 40 rows each: exactly where the text says so."""
    rng = np.random.default_rng(0)
    stopped = 0
    for _ in range(30):
        tokenizer = small_tokenizer(rng)
        strings = random_strings(rng, tokenizer, V)
        prompts = [rng.integers(0, V, rng.integers(1, 9)).tolist() for _ in range(40)]
        new = rng.integers(0, V, (40, 12)).tolist()
        rows = [a + b for a, b in zip(prompts, new, strict=True)]
        expected = first_stops(tokenizer, rows, [len(p) for p in prompts], strings)
        assert ours(stop_table(tuple(strings), tokenizer, V), prompts, new) == expected, strings
        stopped += sum(end > 0 for end in expected)
    assert 200 < stopped < 1150


def test_real_tokenizer(shared_data):
    """OPT's own 50265 tokens: sentences cut into random tokens, and stop strings that lie across their edges."""
    tokenizer = optjax.Tokenizer.load(shared_data / "tokenizer")
    vocabulary = tokenizer.backend.get_vocab()
    text = "It was late.\n\nUser: what's the naïve café's price?\n\nBot: 12 € — \U0001f600 perhaps.</s>\nUser: "
    pieces = "".join(ALPHABET_OF[byte] for byte in text.encode())
    rng = np.random.default_rng(1)

    def cut() -> list[int]:
        row, at = [], 0
        while at < len(pieces):
            ends = [at + n for n in range(1, 8) if pieces[at : at + n] in vocabulary]
            end = int(rng.choice(ends))
            row.append(vocabulary[pieces[at:end]])
            at = end
        return row

    stopped = 0
    for strings in (
        ["\n\n"],
        ["User:"],
        ["café", "€ —"],
        ["\U0001f600"],
        ["e", "late.\n\nUser: what's th"],
        ["nope", "</s>"],
    ):
        rows = [cut() for _ in range(30)]
        width = min(map(len, rows)) - 3
        prompts, new = [row[:3] for row in rows], [row[3 : 3 + width] for row in rows]
        expected = first_stops(tokenizer, [row[: 3 + width] for row in rows], [3] * 30, strings)
        table = stop_table(tuple(strings), tokenizer, 50272)
        assert ours(table, prompts, new) == expected, strings
        assert table.moves.size < 20_000 and table.classes.shape == (50272,)
        stopped += sum(end > 0 for end in expected)
    assert stopped > 100


def test_as_transformers(shared_data):
    """StopStringCriteria on rows of ASCII (of parts of characters it knows nothing), where a row has stopped or not."""
    theirs = transformers.GPT2TokenizerFast(
        str(shared_data / "tokenizer" / "vocab.json"), str(shared_data / "tokenizer" / "merges.txt")
    )
    tokenizer = optjax.Tokenizer.load(shared_data / "tokenizer")
    rng = np.random.default_rng(2)
    common = [i for i in tokenizer.encode("the that\n\n then, he said so. The\n end of this is near; is this") if i > 2]
    for strings in (["th"], ["\n\n"], ["he s", "is"], [" then, he said so."], ["t", "the"]):
        criteria = transformers.StopStringCriteria(theirs, strings)
        table = stop_table(tuple(strings), tokenizer, 50272)
        rows = rng.choice(common, (60, 9))
        for row in rows[:20]:
            row[:] = np.take(common, rng.integers(len(common)) + np.arange(9), mode="wrap")
        expected = np.stack([criteria(_torch(rows[:, : end + 1]), None).numpy() for end in range(1, 9)], 1)
        found = np.asarray(search(table, rows[:, :1].astype(np.int32), np.ones((60, 1), bool), rows[:, 1:]))
        np.testing.assert_array_equal(found, expected)
        assert found.any()


def _torch(array):
    import torch

    return torch.from_numpy(array)


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(5)
    tokenizer = small_tokenizer(rng)
    prompts = random_prompts(rng, 40, V, 8)
    return make_pair(CONFIG, seed=3)[1], tokenizer, prompts, pad(prompts, "holes", rng, V)


def test_generate_and_stream(case):
    """Each row ends with the token that completes a string in its text, and is the unstopped row up to there."""
    params, tokenizer, prompts, (ids, mask) = case
    rng = np.random.default_rng(6)
    options = dict(max_new_tokens=14, eos_token_id=[])
    free = np.asarray(optjax.generate(params, ids, mask, **options))[:, ids.shape[1] :]
    stopped = 0
    for strings in (random_strings(rng, tokenizer, V) for _ in range(8)):
        out = np.asarray(optjax.generate(params, ids, mask, stop_strings=strings, tokenizer=tokenizer, **options))
        rows = [[*prompt, *new] for prompt, new in zip(prompts, free, strict=True)]
        ends = first_stops(tokenizer, rows, [len(p) for p in prompts], strings)
        for new, whole, end, prompt in zip(out[:, ids.shape[1] :], free, ends, prompts, strict=True):
            n = end - len(prompt) if end else 14
            np.testing.assert_array_equal(new[:n], whole[:n])
            assert (new[n:] == 1).all()
        stopped += sum(end > 0 for end in ends)
        steps = list(optjax.stream(params, ids, mask, stop_strings=strings, tokenizer=tokenizer, **options))
        np.testing.assert_array_equal(np.stack(steps, 1), out[:, ids.shape[1] :][:, : len(steps)])
    assert 40 < stopped < 300


def test_other_strings_compile_nothing(case):
    params, tokenizer, _, (ids, mask) = case
    options = dict(max_new_tokens=14, tokenizer=tokenizer)
    optjax.generate(params, ids, mask, stop_strings="ab", **options)
    with count_compilations() as count:
        for strings in ("é", ["a\n", " b"], ("€",)):
            optjax.generate(params, ids, mask, stop_strings=strings, **options)
    assert count.compiled == 0


def test_refusals(case):
    params, tokenizer, _, (ids, mask) = case
    other = optjax.Tokenizer(
        tokenizers.Tokenizer(tokenizer.backend.model), bos_token="a", eos_token="a", pad_token=None
    )
    with count_compilations() as count:
        for options, part in (
            (dict(stop_strings="ab"), "stop_strings needs the tokenizer"),
            (dict(stop_strings=["a", ""], tokenizer=tokenizer), "at least one character, not ''"),
            (dict(stop_strings=[3], tokenizer=tokenizer), "at least one character, not 3"),
            (dict(stop_strings="\ud800", tokenizer=tokenizer), "which UTF-8 cannot write"),
            (dict(stop_strings="ab", tokenizer=other), "need a byte-level tokenizer"),
            (dict(stop_strings="ab", tokenizer=object()), "need a byte-level tokenizer"),
        ):
            with pytest.raises(ValueError, match=part):
                optjax.generate(params, ids, mask, max_new_tokens=3, **options)
    assert count.compiled == 0

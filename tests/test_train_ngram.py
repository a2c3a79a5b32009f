"""The n-gram yardstick: a proper distribution, and the numbers of the formula worked out another way."""

import math
from collections import Counter

import numpy as np
import pytest

from optjax.train.opt_mini.baselines import xz_size_after
from optjax.train.opt_mini.ngram import ByteNgram, check_distribution

TEXT = (
    b"It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a "
    b"wife. However little known the feelings or views of such a man may be on his first entering a neighbourhood, "
    b"this truth is so well fixed in the minds of the surrounding families, that he is considered as the rightful "
    b"property of some one or other of their daughters."
)


def by_the_formula(text: bytes, context: bytes, byte: int) -> float:
    """Chen and Goodman's equations with dictionaries, recursively."""
    longest = len(context)

    def counts(length: int) -> Counter:
        if length == longest + 1:
            return Counter(text[i : i + length] for i in range(len(text) - length + 1))
        return Counter(gram[1:] for gram in counts(length + 1))

    def p(context: bytes) -> float:
        table = counts(len(context) + 1)
        shorter = p(context[1:]) if context else 1 / 256
        total = sum(c for gram, c in table.items() if gram[:-1] == context)
        if total == 0:
            return shorter
        n = [None] + [sum(c == i for c in table.values()) for i in (1, 2, 3, 4)]
        y = n[1] / (n[1] + 2 * n[2])
        d = [0.0] + [min(max(i - (i + 1) * y * n[i + 1] / n[i], 0.0), i) for i in (1, 2, 3)]
        held = sum(d[min(c, 3)] for gram, c in table.items() if gram[:-1] == context)
        c = table[context + bytes([byte])]
        return (c - d[min(c, 3)] + held * shorter) / total

    return p(context)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_probabilities_are_those_of_the_formula(order):
    model = ByteNgram(TEXT, order)
    cases = [(TEXT[i : i + order], TEXT[i + order]) for i in (0, 17, 90, 200)]
    cases += [(b"th"[:order].rjust(order, b" "), ord("z")), (b"qzx"[:order], ord("e")), (b"\xff" * order, 0)]
    contexts = np.array([list(context) for context, _ in cases], np.uint8)
    found = model.probabilities(contexts, np.array([byte for _, byte in cases], np.uint8))
    np.testing.assert_allclose(found, [by_the_formula(TEXT, *case) for case in cases], rtol=1e-12)


@pytest.mark.parametrize("order", [1, 5, 7])
def test_probabilities_sum_to_one(order):
    model = ByteNgram(TEXT, order)
    noise = np.random.default_rng(0).integers(0, 256, 500, np.uint8).tobytes()
    assert check_distribution(model, [TEXT, noise]) < 1e-12


def test_bits_are_the_sum_over_bytes_and_chunks_do_not_matter(monkeypatch):
    whole = ByteNgram(TEXT, 3)
    text = b"a good wife"
    each = [whole.probabilities(np.array([list((b"\n\n\n" + text)[i : i + 3])], np.uint8), np.array([b], np.uint8))[0]
            for i, b in enumerate(text)]  # fmt: skip
    assert whole.bits(text) == pytest.approx(-sum(map(math.log2, each)))
    monkeypatch.setattr("optjax.train.opt_mini.ngram.CHUNK", 7)
    assert ByteNgram(TEXT, 3).bits(text) == pytest.approx(whole.bits(text), rel=1e-12)


def test_bad_orders_and_short_texts_are_refused():
    with pytest.raises(ValueError, match="1 to 7"):
        ByteNgram(TEXT, 8)
    with pytest.raises(ValueError, match="too few"):
        ByteNgram(b"abc", 3)


def test_xz_gains_from_what_it_has_read():
    novel = TEXT[100:300]
    assert xz_size_after(TEXT, novel) < 60 < xz_size_after(b"", novel)

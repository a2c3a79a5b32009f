"""Loaders: what they yield against the text cut by numpy, over processes, resumes and mixtures."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from optjax.train.data import Loader, open_examples, open_text, segments, text_batches, write_tokens

EOS = 2


def write(folder: Path, count: int, first: int = 10) -> np.ndarray:
    """A text in which every id is its place, so that a window says where it was cut."""
    ids = np.arange(first, first + count)
    write_tokens(folder, ids, vocab_size=5000, bytes=3 * count, block_length=64)
    return ids


def opened(sources, **changes) -> Loader:
    return open_text(sources, **({"length": 8, "batch_size": 6, "seed": 1, "vocab_size": 5000} | changes))


def starts(loader: Loader, batches: int) -> list[int]:
    """The first id of each row of the next batches, after a look at the rest of the row."""
    found = []
    for _ in range(batches):
        batch = next(loader)
        assert {array.dtype for array in batch.values()} == {np.dtype(np.int32)}
        first = batch["input_ids"][:, :1]
        np.testing.assert_array_equal(batch["input_ids"], first + np.arange(batch["input_ids"].shape[1]))
        np.testing.assert_array_equal(batch["labels"], batch["input_ids"] + 1)
        found += first[:, 0].tolist()
    return found


def test_every_epoch_has_every_window_once_in_an_order_of_its_own(tmp_path):
    ids = write(tmp_path, 8 * 20 + 5)
    with opened(tmp_path) as loader:
        drawn = starts(loader, 10)  # 60 windows: three epochs, which begin and end within batches
    epochs = [drawn[i : i + 20] for i in (0, 20, 40)]
    expected = [int(ids[i * 8]) for i in range(20)]
    assert all(sorted(epoch) == expected for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, expected]}) == 4
    with opened(tmp_path, seed=2) as other, opened(tmp_path, workers=0) as same:
        assert starts(other, 10) != drawn and starts(same, 10) == drawn
    assert (loader.tokens, loader.bytes_per_token, loader.length) == (165, 3.0, 8)


def test_processes_read_their_rows_of_the_same_batches(tmp_path):
    write(tmp_path / "a", 900)
    write(tmp_path / "b", 700, first=2000)
    sources = [(tmp_path / "a", 0.5), (tmp_path / "b", 1.5)]
    with opened(sources) as whole, opened(sources, rows=range(2)) as first, opened(sources, rows=range(2, 6)) as rest:
        for _ in range(7):
            parts = [next(first), next(rest)]
            for name, array in next(whole).items():
                np.testing.assert_array_equal(array, np.concatenate([part[name] for part in parts]))
        assert whole.get_state() == first.get_state() == rest.get_state()


def test_a_mixture_keeps_its_weights_all_along(tmp_path):
    for name, windows, first in (("a", 40, 1000), ("b", 300, 2000), ("c", 30, 0)):
        write(tmp_path / name, 8 * windows + 1, first=first)
    weights = {"a": 5, "b": 2.5, "c": 2.5}
    with opened([(tmp_path / name, weight) for name, weight in weights.items()]) as loader:
        drawn = ["cabb"[min(start // 1000, 3)] for start in starts(loader, 40)]
    for end in range(1, len(drawn) + 1):
        counted = Counter(drawn[:end])
        for name, weight in weights.items():
            assert abs(counted[name] - end * weight / 10) < 2
    assert loader.bytes_per_token == 3 and len(loader.about["sources"]) == 3


@pytest.mark.parametrize("drawn", [0, 1, 5])
def test_a_saved_place_is_where_the_loader_was(tmp_path, drawn):
    """What was read ahead does not count, and the state outlives a change of the batch and of the processes."""
    write(tmp_path / "a", 500)
    write(tmp_path / "b", 300, first=2000)
    sources = [(tmp_path / "a", 1), (tmp_path / "b", 1)]
    with opened(sources) as loader:
        starts(loader, drawn)
        state = json.loads(json.dumps(loader.get_state()))
        after = starts(loader, 10)
        loader.set_state(state)  # back to it
        assert starts(loader, 10) == after
    (tmp_path / "a").rename(tmp_path / "moved")
    sources[0] = (tmp_path / "moved", 1)
    with opened(sources, batch_size=4, workers=1) as other:
        other.set_state(state)
        assert other.get_state() == state and starts(other, 15) == after
    with opened(sources, seed=2) as other, pytest.raises(ValueError, match="seed 1, this loader's seed is 2"):
        other.set_state(state)
    with opened(sources) as other, pytest.raises(ValueError, match="not the state"):
        other.set_state({"drawn": 3})


def test_after_a_change_of_length_or_mixture_each_text_goes_on_from_its_tokens(tmp_path):
    write(tmp_path / "a", 8 * 50 + 1)
    write(tmp_path / "b", 8 * 70 + 1, first=2000)
    write(tmp_path / "c", 8 * 9 + 1, first=3000)
    both = [(tmp_path / "a", 1), (tmp_path / "b", 2)]
    with opened(both) as loader:
        before = starts(loader, 20)  # 40 of a, 80 of b
        state = loader.get_state()
    of_a = [start for start in before if start < 2000]
    with opened([(tmp_path / "c", 1), (tmp_path / "a", 1)]) as other:
        other.set_state(state)
        drawn = starts(other, 3)
        state = other.get_state()
        assert starts(other, 1) and json.loads(json.dumps(state)) == state
    rest = [start for start in drawn if start < 2000]
    assert len(rest) == 9 and not set(of_a) & set(rest), "a window of the first epoch came twice"
    with opened(tmp_path / "a", length=16) as longer:
        longer.set_state(state)  # 49 windows of 8 were drawn: 392 tokens, 24.5 windows of 16 of 25 an epoch
        with opened(tmp_path / "a", length=16, batch_size=25) as anew:
            starts(anew, 1)
            assert starts(longer, 4) == starts(anew, 1)[:24]


def test_documents_begin_with_their_end_of_text(tmp_path):
    draw = np.random.default_rng(0)
    ids = np.where(draw.random(2000) < 0.15, EOS, draw.integers(10, 99, 2000))
    write_tokens(tmp_path, ids, vocab_size=100, eos_token_id=EOS)
    with opened(tmp_path, boundaries=True, vocab_size=100) as loader:
        batch = next(loader)
    for row, found in zip(batch["input_ids"], batch["segment_ids"], strict=True):
        document, expected = 1, []
        for t, each in enumerate(row):
            document += each == EOS and t > 0
            expected.append(document)
        assert found.tolist() == expected
    assert batch["segment_ids"].max() > 1
    assert segments(np.array([[EOS, 5, EOS, EOS, 6]]), EOS).tolist() == [[1, 1, 2, 3, 3]]


@pytest.mark.parametrize("count", [2, 9, 10, 8 * 6, 8 * 6 + 1, 8 * 6 + 2, 321])
def test_validation_counts_every_label_once_in_order(tmp_path, count):
    ids = write(tmp_path, count)
    batches = text_batches(tmp_path, 8, 6, boundaries=True)
    parts = [text_batches(tmp_path, 8, 6, boundaries=True, rows=rows) for rows in (range(2), range(2, 6))]
    for _ in range(2):
        found = list(batches)
        assert len(found) == len(batches) and {batch["labels"].shape for batch in found} == {(6, 8)}
        labels = np.concatenate([batch["labels"].ravel() for batch in found])
        inputs = np.concatenate([batch["input_ids"].ravel() for batch in found])
        documents = np.concatenate([batch["segment_ids"].ravel() for batch in found])
        counted = labels != -100
        assert labels[counted].tolist() == ids[1:].tolist() and inputs[counted].tolist() == ids[:-1].tolist()
        assert (documents == counted).all() and (inputs[~counted] == 1).all()
        assert batches.tokens == counted.sum() and batches.bytes_per_token == 3
    for whole, *each in zip(found, *parts, strict=True):
        np.testing.assert_array_equal(whole["labels"], np.concatenate([part["labels"] for part in each]))
    short = text_batches(tmp_path, 8, 6, max_batches=2)
    assert len(list(short)) == min(2, len(found))
    assert short.tokens == sum((batch["labels"] != -100).sum() for batch in short)


def collate(examples: list[dict]) -> dict[str, np.ndarray]:
    return {"n": np.array([each["n"] for each in examples])}


def test_every_process_makes_the_same_shapes():
    rng = np.random.default_rng(0)
    examples = [{"ids": rng.integers(1, 9, n)} for n in rng.integers(1, 30, 20)]

    def padded(examples: list[dict]) -> dict[str, np.ndarray]:
        longest = max(len(each["ids"]) for each in examples)
        return {"ids": np.stack([np.pad(each["ids"], (0, longest - len(each["ids"]))) for each in examples])}

    def batches(rows: range | None):
        with open_examples(examples, batch_size=6, seed=1, rows=rows, collate=padded) as loader:
            return [next(loader)["ids"] for _ in range(5)]

    parts = zip(batches(range(2)), batches(range(2, 4)), batches(range(4, 6)), strict=True)
    for whole, part in zip(batches(None), parts, strict=True):
        np.testing.assert_array_equal(whole, np.concatenate(part))
    np.testing.assert_array_equal(batches(range(4, -1, -2))[0], batches(None)[0][[4, 2, 0]])


def test_examples_in_order_and_shuffled():
    examples = [{"n": i} for i in range(10)]
    once = {"batch_size": 4, "seed": 0, "shuffle": False, "repeat": False, "collate": collate}
    assert [b["n"].tolist() for b in open_examples(examples, **once)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 9, 9]]
    rows = open_examples(examples, **once, rows=range(1, 3))
    assert [b["n"].tolist() for b in rows] == [[1, 2], [5, 6], [9, 9]]
    with open_examples(examples, batch_size=4, seed=3, collate=collate) as loader:
        next(loader)
        state = json.loads(json.dumps(loader.get_state()))
        after = np.concatenate([next(loader)["n"] for _ in range(4)])
        loader.set_state(state)
        np.testing.assert_array_equal(after, np.concatenate([next(loader)["n"] for _ in range(4)]))
    assert sorted(after[6:16]) == list(range(10)), "the second epoch"
    with open_examples(examples[:9], batch_size=4, seed=3, collate=collate) as other:
        with pytest.raises(ValueError, match="examples 10, here 9"):
            other.set_state(state)
    with pytest.raises(ValueError, match="at least one example"):
        open_examples([], **once)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"batch_size": 63}, "a text of 62; ask for a smaller batch"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"length": 0}, "length is 0"),
        ({"length": 500}, "one record of length 500 needs 501"),
        ({"vocab_size": 4999}, "a tokenizer of 5000 entries, the model has 4999"),
        ({"seed": -1}, "seed is -1"),
        ({"rows": range(3, 7)}, "some of the 6 rows"),
        ({"workers": -1}, "workers is -1"),
    ],
)
def test_wrong_settings_say_so(tmp_path, changes, message):
    write(tmp_path, 500)
    with pytest.raises(ValueError, match=message):
        opened(tmp_path, **changes)


def test_wrong_mixtures_say_so(tmp_path):
    write(tmp_path / "a", 500)
    write_tokens(tmp_path / "b", np.arange(500), vocab_size=600)
    for sources, message in (
        ([(tmp_path / "a", 1), (tmp_path / "b", 1)], "different tokenizers: vocab_size"),
        ([(tmp_path / "a", 1), (tmp_path / "a", 1)], "named twice"),
        ([(tmp_path / "a", 0)], "weight of .* is 0"),
        ([], "at least one folder"),
    ):
        with pytest.raises(ValueError, match=message):
            opened(sources)
    with pytest.raises(FileNotFoundError, match="optjax.train.pack writes it"):
        opened(tmp_path / "nowhere")

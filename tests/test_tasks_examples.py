"""Files and texts as examples: beside transformers' tokenizer, and by hand where there is nothing to compare with."""

import json

import numpy as np
import pytest
import transformers
from transformers.data.processors.squad import _new_check_is_max_context

from optjax import OPTConfig, Tokenizer
from optjax.checkpoints.hub import resolve_source
from optjax.train.tasks.causal import Fields, collate, encode_examples, packed_rows
from optjax.train.tasks.labels import MULTI, REGRESSION, SINGLE, find_labels
from optjax.train.tasks.packing import pack
from optjax.train.tasks.source import labels_of, with_labels
from optjax.train.tasks.spans import windows
from optjax.train.tasks.squad import Question, read_squad
from optjax.train.tasks.table import Row, read_rows
from optjax.train.tasks.texts import collate as collate_texts
from optjax.train.tasks.texts import encode_texts


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load("opt-mini")


@pytest.fixture(scope="module")
def theirs():
    return transformers.AutoTokenizer.from_pretrained(resolve_source("opt-mini"))


def rows(*fields):
    return [Row(each, f"data, row {i}") for i, each in enumerate(fields, 1)]


# Tables.


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    fields = [{"text": 'He said "no",\nand left.', "label": "a"}, {"text": "Ünder\u2028 it", "label": "b"}]
    quoted = ['"' + f["text"].replace('"', '""') + '"' for f in fields]
    (tmp_path / "a.csv").write_text("\ufefftext,label\r\n" + f"{quoted[0]},a\r\n{quoted[1]},b\r\n", newline="")
    (tmp_path / "a.tsv").write_text("text\tlabel\n" + f"{quoted[0]}\ta\n{quoted[1]}\tb\n")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(f, ensure_ascii=False) + "\n\n" for f in fields))
    (tmp_path / "a.json").write_text(json.dumps(fields))
    for name in ("a.csv", "a.tsv", "a.jsonl", "a.json"):
        assert [row.fields for row in read_rows(tmp_path / name, ["label"])] == fields
    assert read_rows(tmp_path / "a.jsonl")[1].where == "a.jsonl, line 3"
    assert read_rows(tmp_path / "a.csv")[1].where == "a.csv, line 4"


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.csv", "text,label\nx,1,2\n", "line 2 has more cells"),
        ("a.csv", "text,label\n", "no rows"),
        ("a.csv", "text,label\nx,1\n", "no column 'words'; it has 'text', 'label'"),
        ("a.jsonl", '{"text": "x"}\n{"text": \n', "a.jsonl, line 2 is not JSON"),
        ("a.jsonl", '"x"\n', "line 1 should be an object"),
        ("a.json", '{"text": "x"}', "one list"),
        ("a.parquet", "", "should end in one of .csv"),
    ],
)
def test_unreadable_tables_say_where(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_rows(tmp_path / name, ["words"])
    with pytest.raises(FileNotFoundError, match="no file"):
        read_rows(tmp_path / "nowhere.csv")


# Causal language modelling.

PAIR = {"prompt": "The old house stood", "completion": " at the end of the road."}


def test_an_example_is_bos_prompt_completion_eos(tokenizer, theirs):
    (example,) = encode_examples(rows(PAIR), tokenizer, Fields(), 64)
    prompt = theirs(PAIR["prompt"])["input_ids"]
    completion = theirs(PAIR["completion"], add_special_tokens=False)["input_ids"]
    assert example.ids.tolist() == [*prompt, *completion, 2] and prompt[0] == 2
    arrays = example.arrays()
    np.testing.assert_array_equal(arrays["input_ids"], example.ids[:-1])
    assert arrays["labels"].tolist() == [-100] * (len(prompt) - 1) + [*completion, 2]
    np.testing.assert_array_equal(example.arrays(learn_prompt=True)["labels"], example.ids[1:])
    (text,) = encode_examples(rows({"story": PAIR["prompt"]}), tokenizer, Fields(text="story"), 64)
    assert text.ids.tolist() == [*prompt, 2] and (text.arrays()["labels"] != -100).all()


def test_what_is_too_long_is_refused_cut_split_or_dropped(tokenizer):
    long = {"text": PAIR["prompt"] + PAIR["completion"]}
    whole_pair, whole_text = (encode_examples(rows(row), tokenizer, Fields(), 99)[0].ids for row in (PAIR, long))
    with pytest.raises(ValueError, match="data, row 2 has .* tokens, the limit is 9"):
        encode_examples(rows({"text": "I"}, PAIR), tokenizer, Fields(), 8)
    with pytest.raises(ValueError, match="'split' does not part"):
        encode_examples(rows(PAIR), tokenizer, Fields(), 8, "split")
    with pytest.raises(ValueError, match="none of 1 rows fits"):
        encode_examples(rows(PAIR), tokenizer, Fields(), 8, "drop")
    completion = len(whole_pair) - 5
    (cut,) = encode_examples(rows(PAIR), tokenizer, Fields(), completion + 1, "cut")
    assert cut.ids.tolist() == [2, *whole_pair[-completion - 1 :]] and cut.first == 2
    (cut,) = encode_examples(rows(PAIR), tokenizer, Fields(), 4, "cut")
    assert cut.ids.tolist() == [2, *whole_pair[-completion:][:4]] and cut.first == 1
    parts = encode_examples(rows(long), tokenizer, Fields(), 4, "split")
    labels = np.concatenate([part.arrays()["labels"] for part in parts])
    np.testing.assert_array_equal(labels, whole_text[1:])
    assert {part.length for part in parts[:-1]} == {4}


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"prompt": "x"}, "row 1 has neither 'completion' nor 'text'"),
        ({"prompt": "x", "completion": ""}, "'completion' is empty"),
        ({"text": 3}, "'text' should be text, not int"),
    ],
)
def test_rows_without_text_are_refused(tokenizer, fields, message):
    with pytest.raises(ValueError, match=message):
        encode_examples(rows(fields), tokenizer, Fields(), 8)


def test_packing_loses_nothing_and_fills_rows():
    lengths = np.random.default_rng(0).integers(1, 100, 500).tolist()
    packed = pack(lengths, 128)
    assert sorted(i for row in packed for i in row) == list(range(500))
    assert max(sum(lengths[i] for i in row) for row in packed) <= 128
    assert len(packed) <= 1.03 * sum(lengths) / 128 + 1
    assert pack([3, 3, 2, 2, 2], 6) == [[0, 1], [2, 3, 4]]
    with pytest.raises(ValueError, match="1 to 6, got 2 to 7"):
        pack([2, 7], 6)


def test_packed_rows_hold_every_example_apart(tokenizer):
    texts = [{"text": "one two three"}, PAIR, {"text": "four"}, {"prompt": "five", "completion": " six"}]
    examples = encode_examples(rows(*texts), tokenizer, Fields(), 20)
    packed = packed_rows(examples, 20, pad_id=1)
    found = []
    for row in packed:
        assert (row["labels"][row["segment_ids"] == 0] == -100).all()
        assert (row["input_ids"][row["segment_ids"] == 0] == 1).all()
        for segment in range(1, row["segment_ids"].max() + 1):
            at = row["segment_ids"] == segment
            found.append((row["input_ids"][at].tolist(), row["labels"][at].tolist()))
    wanted = [tuple(example.arrays()[name].tolist() for name in ("input_ids", "labels")) for example in examples]
    assert sorted(found) == sorted(wanted) and len(packed) < len(examples)
    batch = collate(packed, 1, 20)
    assert {name: array.shape for name, array in batch.items()} == dict.fromkeys(packed[0], (len(packed), 20))


def test_padded_rows_come_in_few_shapes(tokenizer):
    examples = encode_examples(rows(PAIR, {"text": "four"}), tokenizer, Fields(), 20)
    arrays = [example.arrays() for example in examples]
    batch = collate(arrays, 1, 20)
    assert batch["input_ids"].shape == (2, 16)
    n = examples[1].length
    assert (batch["input_ids"][1, n:] == 1).all() and (batch["labels"][1, n:] == -100).all()


# Classification.


def test_texts_and_pairs_are_the_tokenizers_own(tokenizer, theirs):
    given = [{"a": "I like you.", "b": "You like me too, I think."}, {"a": "A much longer first text.", "b": "No."}]
    for columns, arguments in ((["a"], ["a"]), (["a", "b"], ["a", "b"])):
        for limit in (99, 6):
            ours = encode_texts(rows(*given), columns, tokenizer, limit, "cut")
            if limit == 99 or len(columns) == 1:
                wanted = [
                    theirs(*(g[c] for c in arguments), truncation=True, max_length=limit)["input_ids"] for g in given
                ]
                assert ours == wanted
            assert max(map(len, ours)) <= limit
    assert encode_texts(rows(*given), ["a"], tokenizer, 6, "drop")[1] is None
    with pytest.raises(ValueError, match="row 2 has 8 tokens, the limit is 6"):
        encode_texts(rows(*given), ["a"], tokenizer, 6)
    with pytest.raises(ValueError, match="row 1: 'a' hold no text"):
        encode_texts(rows({"a": ""}), ["a"], tokenizer, 6)


def test_a_pairs_longer_text_is_cut_first(tokenizer):
    text = "one two three four five six seven eight"
    short, long = tokenizer.encode("one", add_special_tokens=False), tokenizer.encode(text, add_special_tokens=False)
    (made,) = encode_texts(rows({"a": "one", "b": text}), ["a", "b"], tokenizer, 6, "cut")
    assert made == [2, *short, *long[: 5 - len(short)]]
    (made,) = encode_texts(rows({"a": text, "b": text}), ["a", "b"], tokenizer, 6, "cut")
    assert made == [2, *long[:2], *long[:3]]


def test_batches_of_texts_are_those_of_transformers_collator(tokenizer, theirs):
    ids = encode_texts(rows({"t": "one two"}, {"t": "three four five six"}), ["t"], tokenizer, 64)
    ours = collate_texts([{"input_ids": i, "labels": np.int32(j)} for j, i in enumerate(ids)], 1, 64)
    theirs.padding_side = "right"
    collator = transformers.DataCollatorWithPadding(theirs, padding="max_length", max_length=16)
    wanted = collator([{"input_ids": i, "labels": j} for j, i in enumerate(ids)])
    for name, array in wanted.items():
        np.testing.assert_array_equal(ours[name], array.numpy())


@pytest.mark.parametrize(
    "values, kind, names, wanted",
    [
        (["pos", "neg", "pos"], SINGLE, ("neg", "pos"), [1, 0, 1]),
        (["10", "9", "10"], SINGLE, ("9", "10"), [1, 0, 1]),
        ([2, 1, 1], SINGLE, ("1", "2"), [1, 0, 0]),
        (["0.5", "1", "-2"], REGRESSION, ("y",), [0.5, 1, -2]),
        ([["a", "b"], [], ["b"]], MULTI, ("a", "b"), [[1, 1], [0, 0], [0, 1]]),
    ],
)
def test_labels_are_found_by_what_they_are(values, kind, names, wanted):
    table = rows(*({"y": value} for value in values))
    labels = find_labels(table, ["y"])
    assert (labels.problem_type, labels.names) == (kind, names)
    encoded = labels.encode(table)
    assert encoded.tolist() == wanted and encoded.dtype == (np.int32 if kind == SINGLE else np.float32)


def test_equal_whole_numbers_are_in_one_order():
    """Not in that of a set, which changes from process to process."""
    same = ["0" * n + "7" for n in range(8)]
    labels = find_labels(rows(*({"y": value} for value in [*reversed(same), "12", "6"])), ["y"])
    assert labels.names == ("6", *sorted(same), "12")


def test_a_finished_classifier_names_its_labels():
    """Whatever they are called; those of a model that learned none are transformers' own, and no names."""
    for names in (("LABEL_0", "LABEL_1"), ("b", "a")):
        assert labels_of(with_labels(OPTConfig(), SINGLE, names)) == names
    unlearned = transformers.OPTConfig(num_labels=3).to_dict()
    assert labels_of(OPTConfig.from_dict(unlearned)) is None and labels_of(OPTConfig()) is None


def test_labels_of_several_columns_or_in_one_cell():
    table = rows({"y": "a; b", "u": 1, "v": "0"}, {"y": "", "u": 0, "v": "1"})
    labels = find_labels(table, ["y"], separator=";")
    assert labels.names == ("a", "b") and labels.encode(table).tolist() == [[1, 1], [0, 0]]
    labels = find_labels(table, ["u", "v"])
    assert (labels.problem_type, labels.names) == (MULTI, ("u", "v")) and labels.encode(table).tolist() == [
        [1, 0],
        [0, 1],
    ]
    labels = find_labels(table, ["u", "v"], REGRESSION)
    assert labels.encode(table).tolist() == [[1, 0], [0, 1]] and labels.names == ("u", "v")


@pytest.mark.parametrize(
    "values, options, message",
    [
        (["a", "", "b"], {}, "row 2 has no label: 'y' is empty"),
        (["a", None], {"separator": ","}, "row 2 has no label"),
        (["a", "a"], {}, "all 2 rows have one label, 'a'"),
        (["1", "b"], {"problem_type": REGRESSION}, "row 2: 'y' should be a number, not 'b'"),
        (["1", "b"], {"problem_type": "ranking"}, "not one of regression"),
    ],
)
def test_labels_that_make_no_sense(values, options, message):
    table = rows(*({"y": value} for value in values))
    with pytest.raises(ValueError, match=message):
        find_labels(table, ["y"], **options).encode(table)
    with pytest.raises(ValueError, match="row 1 has the label 'c', which is not one of a, b"):
        find_labels(rows({"y": "a"}, {"y": "b"}), ["y"]).encode(rows({"y": "c"}))


# Question answering.

CONTEXT = "The old house stood at the end of the road, and (a man) was in it all day long. He said so to me, and often."


def asked(question, answer):
    at = CONTEXT.index(answer)
    return Question("q", "t", question, CONTEXT, ((answer, at),))


@pytest.mark.parametrize("answer", ["the end of the road", "a man"])
@pytest.mark.parametrize("length, stride", [(64, 8), (20, 5), (14, 2)])
def test_windows_are_those_of_transformers_tokenizer(tokenizer, theirs, length, stride, answer):
    question = "Where did the house stand?"
    ours = windows([asked(question, answer)], tokenizer, length, stride)
    wanted = theirs(
        question, CONTEXT, truncation="only_second", max_length=length, stride=stride,
        return_overflowing_tokens=True, return_offsets_mapping=True,
    )  # fmt: skip
    assert [window.ids.tolist() for window in ours] == wanted["input_ids"]
    begin = CONTEXT.index(answer)
    stop = begin + len(answer)
    found = 0
    for i, window in enumerate(ours):
        inside = [id == 1 for id in wanted.sequence_ids(i)]
        np.testing.assert_array_equal(window.offsets[inside], np.array(wanted["offset_mapping"][i])[inside])
        assert (window.offsets[~np.array(inside)] == -1).all()
        whole = window.offsets[inside][0][0] <= begin and window.offsets[inside][-1][1] >= stop
        if whole:
            found += 1
            text = CONTEXT[window.offsets[window.start][0] : window.offsets[window.end][1]]
            assert text.strip() == answer
        else:
            assert (window.start, window.end) == (0, 0)
    assert found or length < 20
    # Every token of the context is central in one window, by BERT's rule.
    central = [tuple(o) for window in ours for o in window.offsets[window.central]]
    assert len(set(central)) == len(central) == len(theirs(CONTEXT, add_special_tokens=False)["input_ids"])
    sizes = [int((window.offsets[:, 0] >= 0).sum()) for window in ours]
    spans = [{"start": i * (sizes[0] - stride), "length": size} for i, size in enumerate(sizes)]
    for i, window in enumerate(ours):
        at = [spans[i]["start"] + n for n in range(sizes[i])]
        here = window.central[window.offsets[:, 0] >= 0]
        assert here.tolist() == [_new_check_is_max_context(spans, i, position) for position in at]


def test_what_is_cut_off_a_question_is_not_asked(tokenizer, theirs):
    """Cut as transformers' preprocessing of SQuAD cuts it, before the question meets its context."""
    question = "Where did the old house stand before all of it was taken down and nobody said so?"
    cut = theirs.encode(question, add_special_tokens=False, truncation=True, max_length=7)
    wanted = theirs(
        theirs.decode(cut), CONTEXT, truncation="only_second", max_length=20, stride=5, return_overflowing_tokens=True
    )
    ours = windows([asked(question, "a man")], tokenizer, 20, 5, max_question_length=7)
    assert len(ours) > 1 and [window.ids.tolist() for window in ours] == wanted["input_ids"]


def test_windows_need_room(tokenizer):
    with pytest.raises(ValueError, match="question 'q' of 6 tokens leaves 7 of --max-length 14 .* --doc-stride 8"):
        windows([asked("Where did the house stand?", "road")], tokenizer, 14, 8)


def squad(**question):
    return {
        "data": [{"title": "t", "paragraphs": [{"context": CONTEXT, "qas": [{"id": "q", "question": "?"} | question]}]}]
    }


def test_squad_files_are_read_and_checked(tmp_path):
    def read(content):
        (tmp_path / "squad.json").write_text(json.dumps(content))
        return read_squad(tmp_path / "squad.json")

    (question,) = read(squad(answers=[{"text": "a man", "answer_start": CONTEXT.index("a man")}]))
    assert question.answers == (("a man", CONTEXT.index("a man")),) and question.title == "t"
    (question,) = read(squad(answers=[{"text": "long", "answer_start": 3}]))
    assert question.answers == (("long", CONTEXT.index("long")),)
    (question,) = read(squad(answers=[{"text": "a man", "answer_start": 49}], is_impossible=True))
    assert question.answers == () and question.labelled and not read(squad())[0].labelled
    with pytest.raises(ValueError, match="'a dog' of question 'q' is not in its context"):
        read(squad(answers=[{"text": "a dog", "answer_start": 0}]))
    with pytest.raises(ValueError, match="SQuAD's format.*KeyError 'paragraphs'"):
        read({"data": [{"title": "t"}]})
    twice = squad()
    twice["data"] *= 2
    with pytest.raises(ValueError, match="id 'q' more than once"):
        read(twice)

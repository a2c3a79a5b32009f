"""The fine-tuning scripts from file to finished model, which transformers and scikit-learn look at."""

import json
import re
import sys

import jax
import numpy as np
import peft
import pytest
import sklearn.metrics
import torch
import transformers

from optjax import OPTConfig, Tokenizer, init_params, load_params, save_params
from optjax.train import answer, classify, export, finetune, interrupt, loop
from optjax.train.log import read_log
from optjax.train.optimizer import learning_rate
from optjax.train.options import StepOptions
from optjax.train.tasks import flags
from optjax.train.tasks.causal import Fields, collate, encode_examples, packed_rows
from optjax.train.tasks.language import evaluate
from optjax.train.tasks.table import Row, read_rows, write_rows

CONFIG = OPTConfig(
    vocab_size=8192,
    hidden_size=16,
    num_hidden_layers=1,
    ffn_dim=24,
    num_attention_heads=2,
    max_position_embeddings=96,
    dropout=0.0,
)


@pytest.fixture(scope="module", autouse=True)
def _no_curves():
    """The loop's own tests look at its report; here it would be a third of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "try_report", lambda folder: "")
        yield


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A model of random weights, with opt-mini's tokenizer."""
    folder = tmp_path_factory.mktemp("small")
    save_params(init_params(CONFIG, jax.random.key(0)), folder)
    Tokenizer.load("opt-mini").save(folder)
    return folder


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def command(model, folder, *more):
    log = ["--log-every", "1", "--quiet", "--no-tensorboard"]
    return [str(word) for word in ("--model", model, "--run", folder / "run", "--lr", "0.03", *log, *more)]


# Classification.

WORDS = {"good": "a fine and happy day", "bad": "a dark and dreary night", "odd": "some thing or other there"}


def reviews(count, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        label = str(rng.choice(list(WORDS)))
        text = " ".join(rng.choice(WORDS[label].split(), rng.integers(3, 9)))
        tags = [label] + (["short"] if len(text) < 20 else [])
        yield {"text": text, "label": label, "tags": "|".join(tags), "stars": len(text) / 10 + 0.5}


KINDS = {
    "single_label_classification": ["--label-column", "label"],
    "multi_label_classification": ["--label-column", "tags", "--label-separator", "|"],
    "regression": ["--label-column", "stars"],
}


def classifier(small, folder, kind, *more):
    """The folder of a finished run."""
    write_rows(folder / "data.csv", reviews(64))
    flags = ["--data", folder / "data.csv", "--validation-fraction", "0.2", "--epochs", "3", "--batch-size", "16"]
    classify.main(command(small, folder, *flags, *KINDS[kind], *more))
    return folder / "run"


@pytest.fixture(scope="module")
def single(small, tmp_path_factory):
    return classifier(small, tmp_path_factory.mktemp("single"), "single_label_classification")


@pytest.mark.parametrize("kind", KINDS)
def test_a_classifier_is_that_of_transformers(small, single, tmp_path, kind):
    run = single if kind.startswith("single") else classifier(small, tmp_path, kind)
    model = transformers.OPTForSequenceClassification.from_pretrained(run / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "model")
    names = list(model.config.id2label.values())
    assert model.config.problem_type == kind
    said = lines(run / "predictions.jsonl")
    assert len(said) == 13
    with torch.no_grad():
        logits = np.stack([model(**tokenizer(row["text"], return_tensors="pt")).logits[0].numpy() for row in said])
    found = json.loads((run / "metrics.json").read_text())
    if kind == "regression":
        np.testing.assert_allclose([row["prediction"] for row in said], logits[:, 0], rtol=1e-4, atol=1e-5)
        wanted = sklearn.metrics.mean_squared_error([float(row["stars"]) for row in said], logits[:, 0])
        assert found["mse"] == pytest.approx(wanted, rel=1e-4) == pytest.approx(found["loss"], rel=1e-4)
    else:
        shares = torch.softmax(torch.tensor(logits), 1) if run == single else torch.sigmoid(torch.tensor(logits))
        ours = [[row["probability"][name] for name in names] for row in said]
        np.testing.assert_allclose(ours, shares, rtol=1e-4, atol=1e-5)
        if run == single:
            true, predicted = ([row[name] for row in said] for name in ("label", "prediction"))
            assert names == sorted(WORDS) and predicted == [names[i] for i in logits.argmax(1)]
        else:
            true = [[name in row["tags"].split("|") for name in names] for row in said]
            predicted = [[name in row["prediction"] for name in names] for row in said]
            assert names == sorted([*WORDS, "short"])
        assert found["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(true, predicted))
        assert [line["label"] for line in found["labels"]] == names
    # The model is that of the best validation.
    figure, best = {"regression": ("mse", min), "multi_label_classification": ("f1_micro", max)}.get(
        kind, ("accuracy", max)
    )
    logged = [entry[f"validation_{figure}"] for entry in read_log(run) if f"validation_{figure}" in entry]
    assert len(logged) > 2 and found[figure] == pytest.approx(best(logged), rel=1e-5)


def test_a_finished_classifier_says_the_same_again(single, tmp_path):
    said = lines(single / "predictions.jsonl")
    write_rows(tmp_path / "new.jsonl", ({"text": row["text"]} for row in said))
    predict = ["--model", str(single / "model"), "--predict", str(tmp_path / "new.jsonl"), "--quiet"]
    assert classify.main([*predict, "--predictions", str(tmp_path / "said.csv")]) == 0
    again = [row.fields["prediction"] for row in read_rows(tmp_path / "said.csv")]
    assert again == [row["prediction"] for row in said]


@pytest.mark.parametrize("script, model, what", [(classify, "single", "classifying"), (answer, "answering", "reading")])
def test_who_watches_a_prediction_sees_how_far_it_is(request, tmp_path, monkeypatch, capsys, script, model, what):
    asked = questions(tmp_path) if script is answer else tmp_path / "new.jsonl"
    if script is classify:
        write_rows(asked, ({"text": text} for text in ("a", "b", "c")))
    finished = str(request.getfixturevalue(model) / "model")
    for watched in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda watched=watched: watched)
        more = LENGTHS if script is answer else []
        out = ["--predict", str(asked), "--predictions", str(tmp_path / "said.jsonl")]
        script.main(["--model", finished, *out, *map(str, more)])
        said = capsys.readouterr().err
        assert (what in said) == watched and "wrote" in said
        if watched:
            done, total = re.findall(r"(\d+)/(\d+)", said)[-1]
            assert done == total != "0"


def test_a_finished_run_is_not_exported_again(single, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        export.main(["--run", str(single), "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and "a run of optjax.train.classify" in said and str(single / "model") in said


def test_a_signal_is_another_status_than_an_end_as_asked(small, tmp_path, monkeypatch):
    monkeypatch.setattr(interrupt.Interrupt, "received", lambda self: True)
    write_rows(tmp_path / "data.csv", reviews(16))
    assert classify.main(command(small, tmp_path, "--data", tmp_path / "data.csv", "--epochs", "9")) == 75
    assert not (tmp_path / "run" / "model").exists()


def test_a_run_stops_on_eight_devices_and_goes_on_with_one(small, single, tmp_path):
    write_rows(tmp_path / "data.csv", reviews(64))
    flags = ["--data", tmp_path / "data.csv", "--validation-fraction", "0.2", "--epochs", "3", "--batch-size", "16"]
    mesh = ["--mesh", "fsdp=4,tensor=2", "--stop-at", "5"]
    assert classify.main(command(small, tmp_path, *flags, *mesh)) == 0  # an end as asked, as of pretrain
    assert not (tmp_path / "run" / "model").exists()
    assert classify.main(command(small, tmp_path, *flags)) == 0
    ours, wanted = ([e for e in read_log(run) if "loss" in e] for run in (tmp_path / "run", single))
    assert [entry["step"] for entry in ours] == [entry["step"] for entry in wanted] == list(range(1, 11))
    np.testing.assert_allclose([e["loss"] for e in ours], [e["loss"] for e in wanted], rtol=2e-4)


def test_a_classifier_learns_other_labels_with_a_new_head(single, tmp_path, capsys):
    write_rows(tmp_path / "data.csv", ({"text": f"text {i}", "label": "pq"[i % 2]} for i in range(8)))
    more = ["--data", tmp_path / "data.csv", "--validation-fraction", "0", "--epochs", "1", "--batch-size", "8"]
    with pytest.raises(SystemExit) as stopped:
        classify.main(command(single / "model", tmp_path, *more))
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and "learned bad, good, odd, the data has p, q: give --new-head" in said
    assert classify.main(command(single / "model", tmp_path, *more, "--new-head", "--lr", "1e-12")) == 0
    model = transformers.OPTForSequenceClassification.from_pretrained(tmp_path / "run" / "model")
    assert model.config.id2label == {0: "p", 1: "q"}
    before = transformers.OPTForSequenceClassification.from_pretrained(single / "model").model
    for ours, theirs in zip(model.model.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


# Causal language modelling.

PAIRS = [
    {"prompt": "Red is", "completion": " a warm color."},
    {"prompt": "Blue is", "completion": " cold"},
    {"prompt": "The green of leaves is", "completion": " neither"},
    {"prompt": "Grey is", "completion": " none at all"},
]


def test_the_loss_is_that_of_transformers_packed_or_not(small):
    """The mean over all completions' tokens, whatever rows they share."""
    tokenizer, params = Tokenizer.load(small), load_params(small)
    examples = encode_examples([Row(pair, "row") for pair in PAIRS], tokenizer, Fields(), 24)
    model = transformers.OPTForCausalLM.from_pretrained(small).eval()
    total, count = 0.0, 0
    for pair in PAIRS:
        prompt = tokenizer.encode(pair["prompt"])
        completion = [*tokenizer.encode(pair["completion"], add_special_tokens=False), 2]
        labels = torch.tensor([[-100] * len(prompt) + completion])
        with torch.no_grad():
            total += model(torch.tensor([prompt + completion]), labels=labels).loss.item() * len(completion)
        count += len(completion)

    def pad(rows):
        return collate(rows, 1, 24)

    packed = packed_rows(examples, 24, 1)
    assert len(packed) < len(examples)
    for rows, batch_size in ((packed, 4), ([example.arrays() for example in examples], 3)):
        found = evaluate(params, rows, pad, batch_size, StepOptions())
        assert found["loss"] == pytest.approx(total / count, rel=1e-5)
    assert found["perplexity"] == pytest.approx(np.exp(total / count), rel=1e-5)


def test_a_language_model_learns_its_completions(small, tmp_path):
    write_rows(tmp_path / "data.jsonl", PAIRS * 8)
    more = ["--data", tmp_path / "data.jsonl", "--validation", tmp_path / "data.jsonl", "--epochs", "40"]
    more += ["--eval-every", "80", "--max-length", "24", "--batch-size", "4", "--eval-batch-size", "3"]
    more += ["--max-new-tokens", "8"]
    finetune.main(command(small, tmp_path, *more))
    run = tmp_path / "run"
    said = lines(run / "predictions.jsonl")
    model = transformers.OPTForCausalLM.from_pretrained(run / "model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "model")
    for pair, row in zip(PAIRS, said, strict=False):
        ids = tokenizer(pair["prompt"], return_tensors="pt")["input_ids"]
        made = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=1)[0, ids.shape[1] :]
        assert row["prediction"] == tokenizer.decode(made, skip_special_tokens=True) == pair["completion"]
    # A finished model over other prompts, and what is not learned: the prompts.
    predict = ["--model", run / "model", "--predict", tmp_path / "data.jsonl", "--max-new-tokens", "8", "--quiet"]
    predict += ["--max-length", "24", "--eval-batch-size", "3"]
    finetune.main([str(word) for word in predict])
    assert [row["prediction"] for row in lines(tmp_path / "data.predictions.jsonl")] == [
        pair["completion"] for pair in PAIRS
    ] * 8
    assert json.loads((run / "metrics.json").read_text())["loss"] < 0.1


@pytest.mark.parametrize("total", [1, 2, 3, 50])
def test_the_learning_rate_falls_as_that_of_transformers(total):
    """Every step trains: the first too, which transformers gives a rate of 0 where there is a warm-up."""
    args = finetune._parser().parse_args(["--model", "opt-mini"])
    recipe = flags.recipe(args, total)
    warmup = recipe.warmup_steps
    assert warmup == round(0.06 * total)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=flags.LR)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, warmup, total)
    wanted = []
    for _ in range(total):
        wanted.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    ours = [float(learning_rate(recipe, step)) for step in range(total)]
    assert ours[0] > 0 and ours[-1] > 0
    np.testing.assert_allclose(ours[warmup:], wanted[warmup:], rtol=1e-5)
    np.testing.assert_allclose(ours[:warmup], wanted[1 : warmup + 1], rtol=1e-5)


# Adapters.


def test_adapters_are_those_of_peft(small, tmp_path):
    """Trained beside weights in 4 bits; beside the base model in torch, they and the new head are the model that was
    written whole."""
    write_rows(tmp_path / "data.csv", reviews(24))
    data = tmp_path / "data.csv"
    more = ["--data", data, "--validation", data, "--epochs", "2"]
    more += ["--batch-size", "8", "--lora-r", "3", "--lora-target", "q_proj", "fc2", "--quantize", "nf4"]
    classify.main(command(small, tmp_path, *more))
    run, ids = tmp_path / "run", torch.tensor([[2, 40, 500, 6000, 7]])
    base = transformers.OPTForSequenceClassification.from_pretrained(small, num_labels=3).eval()
    written = transformers.OPTForSequenceClassification.from_pretrained(run / "model").eval()
    with torch.no_grad():
        merged = written(ids).logits.numpy()
        before = written.score(base.model(ids).last_hidden_state[:, -1]).numpy()
        adapted = peft.PeftModel.from_pretrained(base, run / "adapter").eval()(ids).logits.numpy()
    assert np.abs(merged - before).max() > 1e-3  # by the low-rank part alone
    np.testing.assert_allclose(adapted, merged, rtol=1e-4, atol=1e-5)
    assert "validation_loss" in read_log(run)[-1]


# Question answering.

CONTEXTS = [
    f"The {thing} of {name} stood at the {place} of the old road, where nobody went."
    for thing, name, place in (
        ("house", "Anna", "end"),
        ("tree", "Mary", "bend"),
        ("stone", "Jane", "side"),
        ("mill", "Ruth", "foot"),
    )
]


def questions(folder, without=()):
    """Who and where, of each context; those whose number is among ``without`` have no answer."""
    data, number = [], 0
    for i, context in enumerate(CONTEXTS):
        asked = []
        for question, answer_ in (("Whose was it?", context.split()[3]), ("Where was it?", context.split()[7])):
            given = [] if number in without else [{"text": answer_, "answer_start": context.index(answer_)}]
            asked.append({"id": str(number), "question": question, "answers": given, "is_impossible": not given})
            number += 1
        data.append({"title": f"t{i}", "paragraphs": [{"context": context, "qas": asked}]})
    (folder / "squad.json").write_text(json.dumps({"version": "2", "data": data}))
    return folder / "squad.json"


@pytest.fixture(scope="module")
def answering(small, tmp_path_factory):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("answering")
    data = questions(folder)
    more = ["--data", data, "--validation", data, "--epochs", "30", "--eval-every", "30", "--batch-size", "4"]
    answer.main(command(small, folder, *more, *LENGTHS))
    return folder / "run"


LENGTHS = ["--max-length", "64", "--doc-stride", "4", "--max-answer-length", "6"]


def test_answers_are_the_best_spans_of_transformers_logits(answering):
    said = lines(answering / "predictions.jsonl")
    model = transformers.OPTForQuestionAnswering.from_pretrained(answering / "model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(answering / "model")
    for row, context in zip(said, np.repeat(CONTEXTS, 2), strict=True):
        inputs = tokenizer(row["question"], context, return_tensors="pt", return_offsets_mapping=True)
        offsets, inside = inputs.pop("offset_mapping")[0], np.array([id == 1 for id in inputs.sequence_ids(0)])
        with torch.no_grad():
            out = model(**inputs)
        start, end = (np.where(inside, logits[0].numpy(), -np.inf) for logits in (out.start_logits, out.end_logits))
        far = np.arange(len(start)) - np.arange(len(start))[:, None]
        sums = np.where((far >= 0) & (far < 6), start[:, None] + end[None], -np.inf)
        i, j = np.unravel_index(np.argmax(sums), sums.shape)
        assert row["answer"] == context[offsets[i][0] : offsets[j][1]].strip()
        assert row["nbest"][0]["score"] == pytest.approx(sums[i, j], rel=1e-4)
    found = json.loads((answering / "metrics.json").read_text())
    assert found["exact_match"] > 60 and found["f1"] >= found["exact_match"]


def test_a_finished_model_answers_the_same_again(answering, tmp_path):
    said = lines(answering / "predictions.jsonl")
    predict = ["--model", answering / "model", "--predict", questions(tmp_path), *LENGTHS]
    answer.main([str(word) for word in (*predict, "--predictions", tmp_path / "said.json")])
    assert json.loads((tmp_path / "said.json").read_text()) == {row["id"]: row["answer"] for row in said}


def test_no_answer_is_said_and_scored(answering, tmp_path, capsys):
    data = questions(tmp_path, without=(1, 4, 6))
    predict = ["--model", answering / "model", "--predict", data, "--null-threshold", "-99", *LENGTHS]
    answer.main([str(word) for word in predict])
    scored = dict(part.split() for part in capsys.readouterr().err.partition("; ")[2].strip().split(", "))
    assert float(scored["exact_match"]) == 37.5 and float(scored["no_answer_f1"]) == 100
    assert float(scored["has_answer_f1"]) == 0
    assert all(row["null_odds"] > -99 for row in lines(tmp_path / "squad.predictions.jsonl"))


# What is wrong is said before anything is compiled.


@pytest.mark.parametrize(
    "script, more, message",
    [
        (classify, ["--text-column", "words"], "no column 'words'; it has 'text', 'label'"),
        (classify, ["--label-column", "none"], "data.csv, line 2 has no label: 'none' is empty"),
        (classify, ["--max-length", "200"], "--max-length 200 should be at least 2 and at most max_position_emb"),
        (classify, ["--max-length", "3"], "the limit is 3: give --too-long cut"),
        (classify, ["--problem-type", "regression"], "'label' should be a number"),
        (classify, ["--model", "DATA"], "has no config.json; optjax convert writes a model that has one"),
        (classify, ["--lora-alpha", "3"], "--lora-alpha needs --lora-r"),
        (classify, ["--predict", "nowhere.csv"], "no file nowhere.csv"),
        (classify, ["--batch-size", "9", "--micro-batches", "2"], "2 micro-batches"),
        (classify, ["--validation-fraction", "0.99"], "--validation FILE"),
        (finetune, ["--text-field", "words"], "line 2 has neither 'completion' nor 'words'"),
        (finetune, ["--predict", "DATA", "--predictions", "x.txt"], "x.txt should end in .jsonl, .csv or .tsv"),
        (answer, [], "is not JSON"),
    ],
)
def test_wrong_options_say_so_without_a_traceback(small, tmp_path, capsys, script, more, message):
    write_rows(tmp_path / "data.csv", ({**row, "none": ""} for row in reviews(12)))
    more = [str(tmp_path / "data.csv") if word == "DATA" else word for word in more]
    with pytest.raises(SystemExit) as stopped:
        script.main(command(small, tmp_path, "--data", tmp_path / "data.csv", *more))
    assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_unfinished_model_predicts_nothing(small, tmp_path, capsys):
    write_rows(tmp_path / "data.csv", reviews(2))
    for script, data, message in (
        (classify, tmp_path / "data.csv", "is it a finished classifier"),
        (answer, questions(tmp_path), "qa_outputs"),
    ):
        with pytest.raises(SystemExit) as stopped:
            script.main(["--model", str(small), "--predict", str(data)])
        assert stopped.value.code == 2 and message in capsys.readouterr().err

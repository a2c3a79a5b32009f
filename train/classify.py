"""Fine-tunes a model to classify texts, or to give them numbers.

  python -m optjax.train.classify --model facebook/opt-125m --data train.csv --run runs/first

reads the columns `text` and `label`, holds a tenth of the rows out, and leaves the best model in runs/first/model, with
its scores (metrics.json) and what it says of the rows held out (predictions.jsonl). transformers loads that model as
OPTForSequenceClassification. What is learned follows from the labels:

  one label a row             --label-column label
  several labels a row        --label-column tags --label-separator ";"   (or a list, in JSON)
  several yes or no (1, 0)    --label-column rude threat insult
  a number                    --label-column stars --problem-type regression
  a relation of two texts     --text-column premise hypothesis

The same command goes on where a run was stopped. A finished model over other rows:

  python -m optjax.train.classify --model runs/first/model --predict new.csv --predictions said.csv
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from optjax import OPTConfig, Params, Tokenizer
from optjax.config import PROBLEM_TYPES

from .tasks import flags
from .tasks.classifier import Classifier
from .tasks.labels import Labels, as_before, find_labels
from .tasks.lengths import max_length
from .tasks.metrics import BETTER
from .tasks.source import labels_of, load_config, load_tokenizer, load_weights, pad_id, with_labels
from .tasks.split import hold_out
from .tasks.table import read_rows, write_rows
from .tasks.training import Task, figures, first_process, say, script, train, write_json
from .tasks.watch import bar

HEAD = "sequence_classification"


def _parser() -> argparse.ArgumentParser:
    parser = flags.make_parser("classify", __doc__)
    group = flags.add_model(parser, ".csv or .tsv with a header, .jsonl, .json")
    add = group.add_argument
    add("--text-column", nargs="+", default=["text"], metavar="NAME", help="one, or two that are read in turn (text)")
    add("--label-column", nargs="+", default=["label"], metavar="NAME", help="(label)")
    add("--problem-type", choices=PROBLEM_TYPES, help="(by what the labels are)")
    add("--label-separator", metavar="TEXT", help="between the labels of a cell; makes it multi-label")
    text = "learn with a new head where the model has one, as of another classifier (no)"
    add("--new-head", action=argparse.BooleanOptionalAction, default=False, help=text)
    flags.add_lengths(group, text="of a longer row: an error, its end cut off, or without it")
    flags.add_prediction(parser, "rows to classify; where all have labels too, they are scored")
    flags.add_training(parser, batch_size=32)
    flags.add_log(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    def body(args: argparse.Namespace) -> None:
        config = load_config(args)
        tokenizer = load_tokenizer(args, config)
        finished = _train(args, config, tokenizer) if args.data else _load(args, config, tokenizer)
        if finished is not None and args.predict:
            _predict(args, *finished)

    return script(_parser(), argv, body)


def _train(args: argparse.Namespace, config: OPTConfig, tokenizer: Tokenizer) -> tuple[Params, Classifier] | None:
    """The best model, and how it reads rows; None where ``--stop-at`` comes before its end."""
    columns = [*args.text_column, *args.label_column]
    rows = read_rows(args.data, columns)
    labels = find_labels(rows, args.label_column, args.problem_type, args.label_separator)
    labels = as_before(labels, None if args.new_head else labels_of(config))
    if args.validation is None:
        rows, held = hold_out(rows, args.validation_fraction, args.seed)
    else:
        held = read_rows(args.validation, columns)
    config = with_labels(config, labels.problem_type, labels.names)
    classifier = _classifier(args, config, tokenizer, labels)
    rows, examples = classifier.read(rows)
    held, validation = classifier.read(held) if held else ([], [])

    def evaluate(params: Params) -> dict[str, float]:
        return classifier.scores(classifier.logits(params, validation), validation)

    task = Task(
        name="classify",
        config=config,
        tokenizer=tokenizer,
        head=HEAD,
        examples=examples,
        collate=classifier.collate,
        longest=classifier.longest,
        evaluate=evaluate if held else None,
        better=BETTER[labels.problem_type],
        about={"text_column": args.text_column, "label_column": args.label_column},
    )
    say(args, f"{labels.problem_type} of {', '.join(labels.names)}; {len(rows)} rows to train on, {len(held)} held out")
    params = train(args, task)
    if params is None:
        return None
    if held:
        logits = classifier.logits(params, validation)
        found: dict[str, Any] = classifier.scores(logits, validation)
        say(args, f"on the rows held out: {figures(found)}")
        write_json(args.run / "metrics.json", found | {"labels": classifier.per_label(logits, validation)})
        if first_process():
            write_rows(args.run / "predictions.jsonl", classifier.records(held, logits))
    return params, classifier


def _load(args: argparse.Namespace, config: OPTConfig, tokenizer: Tokenizer) -> tuple[Params, Classifier]:
    """A finished model, and how it reads rows."""
    names = labels_of(config)
    if names is None or config.problem_type is None:
        raise ValueError(f"{args.model} does not name its labels and their problem_type: is it a finished classifier?")
    labels = Labels(config.problem_type, names, tuple(args.label_column), args.label_separator or ",")
    params = load_weights(args, config, HEAD, args.quantize, finished=True)
    return params, _classifier(args, config, tokenizer, labels)


def _predict(args: argparse.Namespace, params: Params, classifier: Classifier) -> None:
    path = flags.predictions_path(args)
    rows = read_rows(args.predict, args.text_column)
    labelled = classifier.labels.given(rows)
    rows, examples = classifier.read(rows, labelled)
    with bar("classifying", len(examples), args.quiet) as watch:
        logits = classifier.logits(params, examples, watch)
    if first_process():
        write_rows(path, classifier.records(rows, logits))
    said = f"; {figures(classifier.scores(logits, examples))}" if labelled else ""
    say(args, f"wrote {path}, {len(rows)} rows{said}")


def _classifier(args: argparse.Namespace, config: OPTConfig, tokenizer: Tokenizer, labels: Labels) -> Classifier:
    return Classifier(
        labels=labels,
        tokenizer=tokenizer,
        columns=args.text_column,
        longest=max_length(config, args.max_length),
        too_long=args.too_long,
        pad_id=pad_id(config, tokenizer),
        batch_size=args.eval_batch_size or args.batch_size,
    )


if __name__ == "__main__":
    sys.exit(main())

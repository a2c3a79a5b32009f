"""Fine-tunes a model to answer questions with words of a context.

  python -m optjax.train.answer --model facebook/opt-125m --data train-v1.1.json --validation dev-v1.1.json \\
    --run runs/first

reads SQuAD's format, 1.1 or 2.0, whose questions may have no answer, and leaves the model whose F1 is best in
runs/first/model, with its exact match and F1 (metrics.json) and its answers (predictions.jsonl). transformers loads
that model as OPTForQuestionAnswering. Without --validation a tenth of the articles is held out. Contexts longer than
--max-length are read in windows that overlap.

The same command goes on where a run was stopped. A finished model answers other questions:

  python -m optjax.train.answer --model runs/first/model --predict questions.json --predictions answers.jsonl
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from optjax import OPTConfig, Params, Tokenizer

from .tasks import flags
from .tasks.lengths import max_length
from .tasks.nbest import Answer
from .tasks.reader import Reader, has_unanswerable, score
from .tasks.source import load_config, load_tokenizer, load_weights, pad_id
from .tasks.split import hold_out
from .tasks.squad import Question, read_squad
from .tasks.table import write_rows
from .tasks.training import Task, figures, first_process, say, script, train, write_json
from .tasks.watch import bar

HEAD = "question_answering"


def _parser() -> argparse.ArgumentParser:
    parser = flags.make_parser("answer", __doc__)
    group = flags.add_model(parser, ".json in SQuAD's format")
    add = group.add_argument
    flags.add_lengths(group, too_long=None)
    add("--doc-stride", type=int, default=128, metavar="N", help="tokens of context that two windows share (128)")
    add("--max-question-length", type=int, default=64, metavar="N", help="tokens; the rest is cut off (64)")
    group = parser.add_argument_group("answers")
    add = group.add_argument
    add("--max-answer-length", type=int, default=30, metavar="N", help="tokens (30)")
    add("--n-best-size", type=int, default=20, metavar="N", help="candidates of each question (20)")
    text = "some questions have no answer (if the data says so of one)"
    add("--unanswerable", action=argparse.BooleanOptionalAction, help=text)
    text = "how far the score of none may be above that of an answer which is given all the same (0)"
    add("--null-threshold", type=float, default=0.0, metavar="X", help=text)
    text = "questions to answer; where they have answers too, those are scored. --predictions may be .json, SQuAD's own"
    flags.add_prediction(parser, text)
    flags.add_training(parser)
    flags.add_log(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    def body(args: argparse.Namespace) -> None:
        config = load_config(args)
        tokenizer = load_tokenizer(args, config)
        reader = _reader(args, config, tokenizer)
        if args.data:
            params = _train(args, config, reader)
        else:
            params = load_weights(args, config, HEAD, args.quantize, finished=True)
        if params is not None and args.predict:
            _predict(args, params, reader)

    return script(_parser(), argv, body)


def _reader(args: argparse.Namespace, config: OPTConfig, tokenizer: Tokenizer) -> Reader:
    return Reader(
        tokenizer=tokenizer,
        longest=max_length(config, args.max_length),
        doc_stride=args.doc_stride,
        max_question_length=args.max_question_length,
        n_best_size=args.n_best_size,
        max_answer_length=args.max_answer_length,
        null_threshold=args.null_threshold,
        pad_id=pad_id(config, tokenizer),
        batch_size=args.eval_batch_size or args.batch_size,
    )


def _train(args: argparse.Namespace, config: OPTConfig, reader: Reader) -> Params | None:
    """The best model; None where ``--stop-at`` comes before its end."""
    questions = _labelled(args.data)
    if args.validation is None:
        questions, held = hold_out(questions, args.validation_fraction, args.seed, group=lambda q: q.title)
    else:
        held = _labelled(args.validation)
    windows, kept = reader.windows(questions), reader.windows(held) if held else []
    none = has_unanswerable([*questions, *held]) if args.unanswerable is None else args.unanswerable

    def evaluate(params: Params) -> dict[str, float]:
        return score(held, reader.answers(params, held, kept, none))

    task = Task(
        name="answer",
        config=config,
        tokenizer=reader.tokenizer,
        head=HEAD,
        examples=[window.example() for window in windows],
        collate=reader.collate,
        longest=reader.longest,
        evaluate=evaluate if held else None,
        better=("f1", "max"),
        about={name: getattr(args, name) for name in ("max_length", "doc_stride", "max_question_length")},
    )
    say(args, f"{len(questions)} questions in {len(windows)} windows to train on; {len(held)} questions held out")
    params = train(args, task)
    if params is None or not held:
        return params
    found = reader.answers(params, held, kept, none)
    say(args, f"on the questions held out: {figures(score(held, found))}")
    write_json(args.run / "metrics.json", score(held, found))
    _write(args.run / "predictions.jsonl", held, found)
    return params


def _labelled(path: Path) -> list[Question]:
    questions = read_squad(path)
    missing = [question.id for question in questions if not question.labelled]
    if missing:
        raise ValueError(
            f"{path}: {len(missing)} questions have neither answers nor is_impossible, {missing[0]!r} first"
        )
    return questions


def _predict(args: argparse.Namespace, params: Params, reader: Reader) -> None:
    path = flags.predictions_path(args)
    questions = read_squad(args.predict)
    none = has_unanswerable(questions) if args.unanswerable is None else args.unanswerable
    windows = reader.windows(questions)
    with bar("reading", len(windows), args.quiet) as watch:
        found = reader.answers(params, questions, windows, none, watch)
    _write(path, questions, found)
    said = f"; {figures(score(questions, found))}" if all(question.labelled for question in questions) else ""
    say(args, f"wrote {path}, {len(questions)} answers{said}")


def _write(path: Path, questions: Sequence[Question], found: Sequence[Answer]) -> None:
    if path.suffix == ".json":
        write_json(path, {answer.id: answer.text for answer in found})
    elif first_process():
        pairs = zip(questions, found, strict=True)
        write_rows(path, ({"question": question.question} | answer.record() for question, answer in pairs))


if __name__ == "__main__":
    sys.exit(main())

"""What fine-tuning reaches: opt-mini beside TF-IDF with logistic regression on film reviews; and on XQuAD.

    python -m bench.fine_tuning polarity       # some minutes on a CPU
    python -m bench.fine_tuning answers        # likewise
    python -m bench.fine_tuning polarity answers --save     # also writes bench/results/fine_tuning.md

polarity: 10,662 sentences of film reviews, half of them favorable (Pang and Lee 2005). A tenth, drawn with a fixed
seed, is the test set, which neither side sees before the end. Of the rest `python -m optjax.train.classify` holds a
tenth out to choose its epoch by; the logistic regression, over words and pairs of words, chooses its C there by
cross-validation in five parts, and learns from all of it.

answers: the English part of XQuAD (Artetxe et al. 2020), 48 articles with 1,190 questions. Every fifth article is the
test set. The answers of `python -m optjax.train.answer` are scored by transformers' SQuAD metrics too. A model that
always answers with the first words of the context shows what chance gives.

The data is read from ../shared/data, or from where --data says.
"""

from __future__ import annotations

import argparse
import csv
import json
import shlex
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from bench import report
from bench.arguments import Parser

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
SAVED = ROOT / "bench" / "results" / "fine_tuning.md"
POLARITY = "--epochs 2 --lr 1e-3 --batch-size 32 --dropout 0.2 --weight-decay 0.1"
ANSWERS = "--epochs 4 --lr 5e-4 --batch-size 16 --max-length 384"


def main() -> None:
    parser = Parser("fine_tuning", __doc__)
    parser.add_argument("what", nargs="+", choices=["polarity", "answers"])
    parser.add_argument("--data", type=Path, default=DATA, metavar="FOLDER")
    parser.add_argument("--model", default="opt-mini")
    parser.add_argument("--rows", type=int, help="of polarity, the first so many of the shuffled ones (all)")
    parser.add_argument("--flags", help="of the training, in place of the script's own")
    parser.add_argument("--out", type=Path, default=Path("build/fine_tuning"), help="runs and splits go here")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every figure")
    parser.add_argument("--save", action="store_true", help="also write bench/results/fine_tuning.md")
    args = parser.parse_args()
    found = {what: {"polarity": polarity, "answers": answers}[what](args) for what in args.what}
    if args.json:
        args.json.write_text(json.dumps(found, indent=2))
    text = "\n".join(f"{title}\n\n{table(lines)}" for title, lines in (each for each in found.values()))
    print(text)
    if args.save:
        about = report.machine()
        SAVED.write_text(
            f"# Fine-tuning {args.model}\n\n"
            f"`python -m bench.fine_tuning {' '.join(args.what)}`, on {about['cores']} cores of {about['processor']}, "
            f"{about['date']}. What is compared is explained in [bench/fine_tuning.py](../fine_tuning.py).\n\n{text}"
        )


def polarity(args: argparse.Namespace) -> tuple[str, list[dict[str, Any]]]:
    rows = sentences(args.data / "classification" / "sentence_polarity.zip")[: args.rows]
    count = len(rows) // 10
    for name, part in (("test", rows[:count]), ("train", rows[count:])):
        write_csv(args.out / f"polarity_{name}.csv", part)
    flags = args.flags or POLARITY
    seconds = run(args, "classify", "polarity", f"{flags} --data {args.out}/polarity_train.csv")
    said = args.out / "polarity.jsonl"
    run(args, "classify", "polarity/model", f"--predict {args.out}/polarity_test.csv --predictions {said}")
    predicted = [json.loads(line) for line in said.read_text().splitlines()]
    ours = sum(row["prediction"] == row["label"] for row in predicted) / len(predicted)
    start = time.perf_counter()
    theirs = logistic_regression(rows[count:], rows[:count])
    lines = [
        {"": f"{args.model}, `{flags}`", "accuracy": f"{ours:.1%}", "seconds to train": f"{seconds:.0f}"},
        {
            "": "TF-IDF, logistic regression",
            "accuracy": f"{theirs:.1%}",
            "seconds to train": f"{time.perf_counter() - start:.0f}",
        },
    ]
    return f"## Sentence polarity, {len(rows) - count:,} sentences to train on, {count:,} to test", lines


def sentences(path: Path) -> list[tuple[str, str]]:
    """Texts and labels, in an order that is always the same."""
    with zipfile.ZipFile(path) as archive:
        found = [
            (line.strip(), label)
            for label in ("neg", "pos")
            for line in archive.read(f"sentence_polarity/rt-polarity.{label}").decode("latin-1").splitlines()
            if line.strip()
        ]
    return [found[i] for i in np.random.default_rng(0).permutation(len(found))]


def write_csv(path: Path, rows: list[tuple[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *rows])


def logistic_regression(train: list[tuple[str, str]], test: list[tuple[str, str]]) -> float:
    """The accuracy on the test set."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline

    features = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    model = make_pipeline(features, LogisticRegression(max_iter=1000))
    search = GridSearchCV(model, {"logisticregression__C": [0.3, 1, 3, 10, 30]}, cv=5)
    search.fit(*zip(*train, strict=True))
    score: Any = search.score(*zip(*test, strict=True))
    return float(score)


def answers(args: argparse.Namespace) -> tuple[str, list[dict[str, Any]]]:
    articles = json.loads((args.data / "qa" / "xquad.en.json").read_text())["data"]
    parts = {
        "test": articles[::5],
        "train": [article for i, article in enumerate(articles) if i % 5],
    }
    args.out.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        (args.out / f"answers_{name}.json").write_text(json.dumps({"version": "1.1", "data": part}))
    flags = args.flags or ANSWERS
    test = args.out / "answers_test.json"
    seconds = run(args, "answer", "answers", f"{flags} --data {args.out}/answers_train.json")
    said = args.out / "answers.json"
    printed = args.out / "answers" / "printed"
    run(args, "answer", "answers/model", f"--predict {test} --predictions {said}", printed)
    predicted = json.loads(said.read_text())
    questions = [(q, p["context"]) for a in parts["test"] for p in a["paragraphs"] for q in p["qas"]]
    first = {q["id"]: " ".join(context.split()[:3]) for q, context in questions}
    lines = [
        {"": f"{args.model}, `{flags}`, scored by optjax", **own_scores(printed), "seconds to train": f"{seconds:.0f}"},
        {"": "the same answers, scored by transformers", **their_scores(questions, predicted)},
        {"": "always the first three words, scored by transformers", **their_scores(questions, first)},
    ]
    asked = {name: sum(len(p["qas"]) for a in part for p in a["paragraphs"]) for name, part in parts.items()}
    return f"## XQuAD in English, {asked['train']} questions to train on, {asked['test']} to test", lines


def own_scores(printed: Path) -> dict[str, str]:
    """From the line that the script ended with."""
    words = printed.read_text().split()
    return {title: f"{float(words[words.index(name) + 1].strip(',')):.2f}" for name, title in SCORES.items()}


SCORES = {"exact_match": "exact match", "f1": "F1"}


def their_scores(questions: list[tuple[dict[str, Any], str]], predicted: dict[str, str]) -> dict[str, str]:
    from transformers.data.metrics.squad_metrics import squad_evaluate
    from transformers.data.processors.squad import SquadExample

    examples = [SquadExample(q["id"], q["question"], "", None, None, "", q["answers"]) for q, _ in questions]
    found = squad_evaluate(examples, predicted)
    return {"exact match": f"{found['exact']:.2f}", "F1": f"{found['f1']:.2f}"}


def run(args: argparse.Namespace, script: str, name: str, flags: str, printed: Path | None = None) -> float:
    """Runs a script of optjax.train, training into a folder, or with the model that is there; seconds."""
    trains = "--data" in flags
    where = ["--model", args.model, "--run", str(args.out / name)] if trains else ["--model", str(args.out / name)]
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", f"optjax.train.{script}", *where, *shlex.split(flags)], stderr=subprocess.PIPE, text=True
    )
    print(done.stderr, file=sys.stderr)
    done.check_returncode()
    if printed is not None:
        printed.write_text(done.stderr)
    return time.perf_counter() - start


def table(lines: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for line in lines for name in line))
    rows = [names, ["-", *["-:"] * (len(names) - 1)], *([line.get(name, "") for name in names] for line in lines)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


if __name__ == "__main__":
    main()

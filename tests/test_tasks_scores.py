"""Scores beside those of scikit-learn, SciPy and transformers."""

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
from transformers.data.metrics.squad_metrics import squad_evaluate
from transformers.data.processors.squad import SquadExample

from optjax import Tokenizer
from optjax.train.tasks.labels import MULTI, REGRESSION, SINGLE
from optjax.train.tasks.metrics import per_label, predictions, probabilities, scores
from optjax.train.tasks.nbest import answers
from optjax.train.tasks.spans import windows
from optjax.train.tasks.squad import Question, squad_scores

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("classes, missing", [(2, None), (5, None), (5, 3)])
def test_single_labels(classes, missing):
    logits = RNG.standard_normal((60, classes))
    labels = RNG.integers(0, classes, 60)
    if missing is not None:  # a label that is neither there nor said
        logits[:, missing], labels[labels == missing] = -9, 0
    said = predictions(SINGLE, logits)
    found = scores(SINGLE, said, labels)
    assert found["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(labels, said))
    for kind in ("macro", "micro"):
        assert found[f"f1_{kind}"] == pytest.approx(sklearn.metrics.f1_score(labels, said, average=kind))
    each = sklearn.metrics.precision_recall_fscore_support(labels, said, labels=range(classes), zero_division=0)
    ours = per_label(SINGLE, said, labels, [str(i) for i in range(classes)])
    for name, column in zip(("precision", "recall", "f1", "support"), each, strict=True):
        np.testing.assert_allclose([line[name] for line in ours], column)
    np.testing.assert_allclose(probabilities(SINGLE, logits), scipy.special.softmax(logits, axis=1))


def test_several_labels():
    logits = RNG.standard_normal((40, 4))
    labels = (RNG.random((40, 4)) < 0.3).astype(np.float32)
    labels[:, 2] = 0
    said = predictions(MULTI, logits)
    found = scores(MULTI, said, labels)
    assert found["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(labels, said))
    for kind in ("macro", "micro"):
        wanted = sklearn.metrics.f1_score(labels, said, average=kind, zero_division=0)
        assert found[f"f1_{kind}"] == pytest.approx(wanted)
    np.testing.assert_allclose(probabilities(MULTI, logits), scipy.special.expit(logits))


def test_numbers():
    labels = np.round(RNG.standard_normal(50), 1).astype(np.float32)  # with ties
    logits = (labels + RNG.standard_normal(50).round(1)).astype(np.float32)[:, None]
    found = scores(REGRESSION, predictions(REGRESSION, logits), labels)
    assert found["mse"] == pytest.approx(sklearn.metrics.mean_squared_error(labels, logits[:, 0]), rel=1e-5)
    assert found["pearson"] == pytest.approx(scipy.stats.pearsonr(labels, logits[:, 0]).statistic, rel=1e-5)
    assert found["spearman"] == pytest.approx(scipy.stats.spearmanr(labels, logits[:, 0]).statistic, rel=1e-5)
    assert scores(REGRESSION, np.ones(50, np.float32), labels)["pearson"] == 0.0


# Answers.

WORDS = ["The", "an", "Panthers", "defense,", "3.5", "points", "—", "naïve", "U.S.", "points", "a", "…"]


def test_answers_are_scored_as_by_transformers():
    """Of random texts with articles, punctuation, repeated words, several true answers, and none."""

    def text(most):
        return " ".join(RNG.choice(WORDS, RNG.integers(0, most)))

    ours, theirs, said = [], [], {}
    for i in range(300):
        id, true = str(i), [text(5) for _ in range(RNG.integers(0, 3))]
        said[id] = str(RNG.choice(true)) if true and RNG.random() < 0.4 else text(4)
        ours.append(Question(id, "t", "?", "", tuple((t, 0) for t in true)))
        theirs.append(SquadExample(id, "?", "", None, None, "t", [{"text": t} for t in true], not true))
    wanted, found = squad_evaluate(theirs, said), squad_scores(ours, said)
    for prefix, name in (("", ""), ("HasAns_", "has_answer_"), ("NoAns_", "no_answer_")):
        assert found[f"{name}exact_match"] == pytest.approx(wanted[f"{prefix}exact"])
        assert found[f"{name}f1"] == pytest.approx(wanted[f"{prefix}f1"])
    assert 10 < found["exact_match"] < found["f1"] < 90
    assert "has_answer_f1" not in squad_scores([q for q in ours if q.answers], said)
    assert squad_scores(ours[:1], {})["f1"] == 0.0


CONTEXT = "The old house stood at the end of the road, and a man was in it all day long. He said so."


def test_the_best_spans_are_those_of_a_search_through_all():
    tokenizer = Tokenizer.load("opt-mini")
    question = Question("q", "t", "Where did it stand?", CONTEXT, ())
    made = windows([question], tokenizer, 18, 4)
    assert len(made) > 2
    start, end = ([RNG.standard_normal(len(w.ids) + 3) for w in made] for _ in range(2))
    found = []
    for w, window in enumerate(made):
        for i in range(len(window.ids)):
            for j in range(i, min(i + 5, len(window.ids))):
                if window.central[i] and window.offsets[j, 0] >= 0:
                    text = CONTEXT[window.offsets[i, 0] : window.offsets[j, 1]]
                    found.append((start[w][i] + end[w][j], text.strip()))
    best = sorted(found, reverse=True)[:7]
    (answer,) = answers([question], made, start, end, n_best_size=7, max_answer_length=5)
    assert [span.text for span in answer.nbest] == [text for _, text in best] and answer.text == best[0][1]
    np.testing.assert_allclose(answer.probabilities, scipy.special.softmax([score for score, _ in best]))
    assert all(CONTEXT[span.start : span.end] == span.text for span in answer.nbest)
    # None is an answer where the first token is, by the threshold, the better place in every window.
    none = min(s[0] + e[0] for s, e in zip(start, end, strict=True))
    for threshold, text in ((none - best[0][0] - 0.1, ""), (none - best[0][0] + 0.1, best[0][1])):
        (answer,) = answers([question], made, start, end, max_answer_length=5, with_null=True, null_threshold=threshold)
        assert answer.text == text and answer.null_odds == pytest.approx(none - best[0][0])
        assert any(span.text == "" for span in answer.nbest)

"""`optjax score`: figures beside those of transformers' model on torch; where texts come from; what is refused."""

from __future__ import annotations

import io
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_helpers import check_error, runner, write_model

import optjax
from optjax.cli import main
from optjax.cli.perplexity import windows

POSITIONS = 64


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), max_position_embeddings=POSITIONS)


@pytest.fixture(scope="module")
def log_p(model):
    """Log-probabilities ``[n - 1, V]`` of what follows each token but the last, by torch in float64."""
    from transformers import OPTForCausalLM

    theirs = OPTForCausalLM.from_pretrained(model).eval()

    def log_p(ids: list[int]) -> np.ndarray:
        with torch.no_grad():
            return torch.log_softmax(theirs(torch.tensor([ids])).logits[0, :-1].double(), -1).numpy()

    return log_p


@pytest.fixture
def run(monkeypatch, capsys):
    return runner(monkeypatch, capsys)


def lines(result) -> list[dict]:
    assert result.status == 0, result.err
    return [json.loads(line) for line in result.out.split("\n")[:-1]]


def chosen(log_p: np.ndarray, ids: list[int]) -> np.ndarray:
    return np.take_along_axis(log_p, np.array(ids)[1:, None], 1)[:, 0]


def test_tokens_and_alternatives_as_torch(run, model, log_p, tmp_path):
    texts = ["the old house 日", "dog"]
    (tmp_path / "texts").write_text("\n\n".join(texts))
    found = lines(run("score", "--model", model, "--file", tmp_path / "texts", "--top-n", 3, "--jsonl"))
    tokenizer = optjax.Tokenizer.load(model)
    assert [line["text"] for line in found] == texts and "prompt" not in found[0]
    for line in found:
        ids = tokenizer.encode(line["text"])
        all_p = log_p(ids)
        expected = chosen(all_p, ids)
        assert line["ids"] == ids and line["tokens"][0] == "</s>"
        assert line["token_logprobs"][0] is None and line["top_logprobs"][0] is None
        np.testing.assert_allclose(line["token_logprobs"][1:], expected, atol=1e-4)
        np.testing.assert_allclose(line["logprob"], expected.sum(), atol=1e-4)
        np.testing.assert_allclose(line["perplexity"], np.exp(-expected.mean()), rtol=1e-4)
        for top, row in zip(line["top_logprobs"][1:], all_p, strict=True):
            assert [each["id"] for each in top] == np.argsort(-row)[:3].tolist()
            np.testing.assert_allclose([each["logprob"] for each in top], np.sort(row)[:-4:-1], atol=1e-4)
        names = {each["id"]: each["token"] for top in line["top_logprobs"][1:] for each in top}
        for i, name in names.items():
            if i >= tokenizer.vocab_size:
                assert name == f"<id {i}>"
    # A character of three tokens: its bytes.
    assert "".join(found[0]["tokens"]).endswith(r" \xe6\x97\xa5")


def test_continuations_as_torch(run, model, log_p, tmp_path):
    """Of one text, of each line of a file, and of JSON lines; a space at the end of a text goes to what follows."""
    prompts, ends = ["the old", "a dog "], [" house", " road and", "the"]
    tokenizer = optjax.Tokenizer.load(model)

    def check(line: dict, prompt: str, end: str) -> None:
        given = prompt.rstrip(" ")
        before = tokenizer.encode(given)
        ids = tokenizer.encode(prompt[len(given) :] + end, add_special_tokens=False)
        expected = chosen(log_p(before + ids), before + ids)[-len(ids) :]
        assert (line["prompt"], line["ids"]) == (given, ids)
        np.testing.assert_allclose(line["token_logprobs"], expected, atol=1e-4)
        np.testing.assert_allclose(line["logprob"], expected.sum(), atol=1e-4)

    found = lines(run("score", "--model", model, "--jsonl", prompts[1], *ends))
    for line, end in zip(found, ends, strict=True):
        check(line, prompts[1], end)
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    result = run("score", "--model", model, "--jsonl", "--file", tmp_path / "prompts.txt", *ends, "--batch-size", 4)
    assert "oldthe" in result.err
    for line, (prompt, end) in zip(lines(result), [(p, e) for p in prompts for e in ends], strict=True):
        check(line, prompt, end)
    questions = [{"prompt": prompts[0], "continuation": ends[0]}, {"prompt": prompts[1], "continuations": ends[:2]}]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, [*questions, {"text": "road"}])))
    found = lines(run("score", "--model", model, "--jsonl", "--file", tmp_path / "q.jsonl"))
    for line, (i, j) in zip(found[:3], [(0, 0), (1, 0), (1, 1)], strict=True):
        check(line, prompts[i], ends[j])
    assert found[3]["text"] == "road" and "prompt" not in found[3]


def test_tables(run, model):
    result = run("score", "--model", model, "the\told", "--top-n", 2)
    rows = result.out.split("\n")
    assert [rows[2].split()[0], *(row.split("’")[0] for row in rows[3:6])] == ["</s>", "‘the", r"‘\t", "‘o"]
    # The token itself and two others, be they text, special, or rows that the tokenizer lacks.
    assert "rather" in rows[0] and all(row.count("%") == 3 for row in rows[3:6])
    assert rows[-2].startswith("log p -") and "bits per byte" in rows[-2]
    result = run("score", "--model", model, "the", " old", " house")
    rows = [row for row in result.out.split("\n") if row.startswith("‘ ")]
    # Shares of the two, in whole percent.
    assert len(rows) == 2 and 99 <= sum(float(row.split("%")[0].split()[-1]) for row in rows) <= 101


@pytest.mark.parametrize(("length", "stride", "tokens"), [(64, None, 64 + 2 * 63), (40, 10, 100), (16, 15, 9)])
def test_perplexity_as_torch_in_windows(run, model, log_p, tmp_path, length, stride, tokens):
    """Windows as transformers' guide to perplexity has them, which is where they fit the text exactly."""
    text = "the old house stood " * 100
    tokenizer = optjax.Tokenizer.load(model)
    while len(tokenizer.encode(text)) > tokens:
        text = text[:-1]
    ids = tokenizer.encode(text)
    step = stride or length - 1
    assert len(ids) == tokens and (tokens <= length or (tokens - length) % step == 0)
    total, done = 0.0, 1
    for begin in range(0, max(1, tokens - length + 1), step):
        window = ids[begin : begin + length]
        total += chosen(log_p(window), window)[-(begin + len(window) - done) :].sum()
        done = begin + len(window)
    assert done == tokens
    (tmp_path / "text").write_text(text)
    options = ["--file", tmp_path / "text"] + (["--max-length", length, "--stride", stride] if stride else [])
    [found] = lines(run("score", "--model", model, "--perplexity", "--jsonl", *options, "--batch-size", 2))
    np.testing.assert_allclose(found["logprob"], total, rtol=1e-5)
    assert (found["tokens"], found["bytes"]) == (tokens - 1, len(text.encode()))
    np.testing.assert_allclose(found["perplexity"], math.exp(-total / (tokens - 1)), rtol=1e-5)
    np.testing.assert_allclose(found["bits_per_byte"], -total / math.log(2) / len(text), rtol=1e-5)
    said = run("score", "--model", model, "--perplexity", *options, "--batch-size", 2).out
    assert f"perplexity {found['perplexity']:,.4f}\n{found['bits_per_byte']:.4f} bits per byte" in said


def test_windows_count_each_token_once():
    for tokens in range(2, 30):
        for length in range(2, 12):
            for stride in range(1, length):
                counted = []
                for begin, first, end in windows(tokens, length, stride):
                    assert 0 <= begin < first < end <= tokens and end - begin == min(length, tokens)
                    assert begin == 0 or first - begin >= length - stride
                    counted += range(first, end)
                assert counted == list(range(1, tokens))


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["the", ""], 2, ["continuation is empty"]),
        (["the " * 70], 1, ["64 positions", "--perplexity"]),
        (["the", "--stride", "3"], 2, ["--stride", "--perplexity"]),
        (["--attn-implementation", "flash", "the old"], 1, ["flash", "cannot be had"]),
        (["--attn-implementation", "flash", "--perplexity", "the old"], 1, ["flash", "cannot be had"]),
        (["--perplexity", "the", "old"], 2, ["one text"]),
        (["--perplexity", "the", "--top-n", "2"], 2, ["--top-n"]),
        (["--perplexity", "the old", "--max-length", "65"], 2, ["--max-length", "64 positions", "65"]),
        (["--perplexity", "the old", "--max-length", "8", "--stride", "8"], 2, ["--stride", "1 to 7"]),
        (["--perplexity", "--file", "{tmp}/empty"], 2, ["empty"]),
        (["--file", "{tmp}/empty"], 2, ["holds no text"]),
        (["--file", "{tmp}/wrong.jsonl"], 1, ["line 4", '{{"prompt": 1}}', "continuations"]),
        (["--file", "{tmp}/broken.jsonl"], 1, ["line 1", "no JSON"]),
        (["--file", "{tmp}/wrong.jsonl", " yes"], 2, [".jsonl", "continuations"]),
    ],
)  # fmt: skip
def test_errors_are_one_line(run, model, tmp_path, words, status, said):
    (tmp_path / "empty").write_text("")
    (tmp_path / "wrong.jsonl").write_text('\n{"text": "the"}\n \n{"prompt": 1}\n')
    (tmp_path / "broken.jsonl").write_text("{")
    words = [word.format(tmp=tmp_path) for word in words]
    check_error(run("score", *words, "--model", model), status, *(each.format() for each in said))


def test_streams_that_are_closed_or_not_utf_8(model, monkeypatch):
    words = ["score", "--model", str(model), "--no-compile-cache", "-q", "the old house"]
    for encoding in ("ascii", "latin-1", "utf-8"):
        out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", out)
        assert main(words) == 0
        assert "log p" in out.buffer.getvalue().decode(encoding)
    monkeypatch.setattr(sys, "stdout", None)
    assert main(words) == 0 and sys.stdout is None
    monkeypatch.setattr(sys, "stderr", None)
    assert main([word for word in words if word != "-q"]) == 0
    assert main(["score", "--model", str(model / "none"), "a"]) == 1

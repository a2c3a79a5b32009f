"""Fine-tuning by the same command in two processes, which none tells of a mesh."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from processes import environments

from optjax import OPTConfig, Tokenizer, init_params, load_params, save_params
from optjax.train.log import read_log
from optjax.train.tasks import flags
from optjax.train.tasks.table import write_rows

CONFIG = OPTConfig(
    vocab_size=8192, hidden_size=16, num_hidden_layers=1, ffn_dim=24, num_attention_heads=2, dropout=0.1,
    max_position_embeddings=96,
)  # fmt: skip


def test_two_processes_fine_tune_as_one_does(tmp_path):
    save_params(init_params(CONFIG, jax.random.key(0)), tmp_path / "small")
    Tokenizer.load("opt-mini").save(tmp_path / "small")
    texts = [f"The {word} {other} stood by the road." for word in ("old", "red", "tall") for other in ("house", "tree")]
    texts[2] += " It was there when the road was made, and it will be when all the roads have gone." * 2
    write_rows(tmp_path / "data.jsonl", ({"text": text} for text in texts * 3))
    words = ["--model", "small", "--data", "data.jsonl", "--validation", "data.jsonl", "--batch-size", "6"]
    words += ["--epochs", "2", "--lr", "0.03", "--lora-r", "2", "--log-every", "1", "--no-tensorboard", "--no-packing"]
    for processes in (1, 2):
        command = [sys.executable, "-m", "optjax.train.finetune", *words, "--run", str(processes)]
        options = dict(cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        started = [subprocess.Popen(command, env=each, **options) for each in environments(processes, devices=2)]
        said = [process.communicate(timeout=300)[0] for process in started]
        assert [process.returncode for process in started] == [0] * processes, said
    one, two = (read_log(tmp_path / str(processes)) for processes in (1, 2))
    losses = [[entry["loss"] for entry in entries if "loss" in entry] for entries in (one, two)]
    assert len(losses[0]) == 6 and losses[0][-1] < losses[0][0]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    figures = [json.loads((tmp_path / str(processes) / "metrics.json").read_text()) for processes in (1, 2)]
    assert figures[1]["perplexity"] == pytest.approx(figures[0]["perplexity"], rel=1e-4)
    assert json.loads((tmp_path / "2" / "settings.json").read_text())["mesh"] == "fsdp=-1"
    assert "mesh" not in json.loads((tmp_path / "1" / "settings.json").read_text())
    for a, b in zip(*(jax.tree.leaves(load_params(tmp_path / n / "model")) for n in ("1", "2")), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_of_one_process_one_device(monkeypatch):
    for processes, mesh in ((1, None), (2, "fsdp=-1")):
        monkeypatch.setattr(jax, "process_count", lambda processes=processes: processes)
        assert flags.default_mesh() == mesh

"""The command that pretrains: presets, settings, and from a text file to a model that others load."""

import json
import shutil
import subprocess
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers
from processes import environments

import optjax
from optjax import OPTConfig
from optjax.train import pack, pretrain, settings
from optjax.train.data.store import read_about
from optjax.train.run_file import load_run
from optjax.train.sources import parse_source, tokenizer_of

CONFIG = OPTConfig(
    vocab_size=8192,
    hidden_size=16,
    num_hidden_layers=2,
    ffn_dim=32,
    num_attention_heads=2,
    max_position_embeddings=64,
)


def resolved(*words: str) -> types.SimpleNamespace:
    args = settings.parse(pretrain._parser(), ["--data", "x", *words], pretrain.beaten)
    pretrain.resolve(args)
    return types.SimpleNamespace(**vars(args))


def test_a_preset_is_the_papers_run():
    args = resolved("--preset", "opt-1.3b")
    assert (args.config, args.length, args.batch_size, args.run) == ("opt-1.3b", 2048, 512, Path("runs/opt-1.3b"))
    assert args.steps == -(-300_000_000_000 // 2**20) and args.warmup == -(-375_000_000 // 2**20)
    assert (args.lr, args.dtype, args.remat, args.stacked, args.mesh) == (2e-4, "bfloat16", "full", True, None)
    recipe = pretrain._recipe(args)
    assert recipe.decay_from == recipe.warmup_steps and recipe.final_fraction == 0.1
    assert resolved("--preset", "opt-175b").warmup == 2000


def test_flags_change_a_preset():
    args = resolved("--preset", "opt-125m", "--steps", "50", "--lr", "1", "--no-stacked", "--dropout", "0.3")
    assert (args.steps, args.warmup, args.lr, args.stacked) == (50, 5, 1.0, False)  # a tenth, not 715 steps
    assert pretrain._config(args).dropout == 0.3 and args.betas == [0.9, 0.95]
    # Half the batch, as many tokens.
    args = resolved("--preset", "opt-125m", "--batch-size", "128")
    assert args.steps == -(-300_000_000_000 // 2**18) and args.warmup == -(-375_000_000 // 2**18)
    args = resolved("--config", "opt-125m", "--tokens", "1e6", "--length", "100", "--warmup-tokens", "5e4")
    assert (args.steps, args.warmup, args.batch_size, args.dtype) == (625, 32, 16, "float32")


def over(saved: types.SimpleNamespace, folder: Path, *words: str) -> types.SimpleNamespace:
    """Flags over the settings that a run has saved."""
    folder.mkdir(exist_ok=True)
    (folder / "settings.json").write_text(json.dumps(settings.resolved(saved)))
    args = settings.parse(pretrain._parser(), ["--settings", str(folder), *words], pretrain.beaten)
    pretrain.resolve(args)
    return types.SimpleNamespace(**vars(args))


def test_flags_beat_what_a_run_has_saved(tmp_path):
    first = resolved("--preset", "opt-125m", "--eps", "1e-6")
    assert settings.resolved(over(first, tmp_path)) == settings.resolved(first)
    other = over(first, tmp_path, "--preset", "opt-350m")
    wanted = resolved("--preset", "opt-350m", "--eps", "1e-6")
    assert {**vars(other), "settings": None} == {**vars(wanted), "settings": None}
    # A second time over what was saved again.
    assert over(over(first, tmp_path), tmp_path, "--steps", "100").warmup == 10
    assert over(first, tmp_path, "--warmup-tokens", "1e9").warmup == -(-1_000_000_000 // 2**19)
    args = over(first, tmp_path, "--tokens", "1e9")
    assert (args.steps, args.warmup) == (-(-1_000_000_000 // 2**19), 190)
    args = over(first, tmp_path, "--batch-size", str(2 * first.batch_size))
    assert (args.steps, args.batch_size) == (-(-first.steps // 2), 2 * first.batch_size)
    # What was given stays, unless it is what a flag says in another way.
    given = resolved("--config", "opt-125m", "--tokens", "1e8", "--warmup", "50", "--lr", "0.5")
    args = over(given, tmp_path, "--steps", "100")
    assert (args.steps, args.warmup, args.lr) == (100, 50, 0.5)
    assert over(given, tmp_path, "--preset", "opt-125m").config == "opt-125m"
    # A file that does not list what was filled in.
    del first.filled
    args = over(first, tmp_path, "--preset", "opt-350m")
    assert (args.config, args.lr, args.eps) == ("opt-350m", 3e-4, 1e-6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config", "opt-125m", "--steps", "9", "--warmup", "5", "--warmup-tokens", "5"], "--warmup or --warmup-tok"),
        (["--steps", "5"], "which model"),
        (["--config", "opt-125m"], "how long"),
        (["--preset", "opt-5b"], "no recipe for 'opt-5b'"),
        (["--preset", "opt-125m", "--steps", "5", "--tokens", "5"], "not both"),
    ],
)
def test_what_is_missing_is_said(words, message):
    with pytest.raises(ValueError, match=message):
        resolved(*words)


def test_sources_may_have_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a=0.5").touch()
    assert parse_source("a=0.5") == ("a=0.5", 1.0)  # there is a file of that name
    assert parse_source("b=0.5") == ("b", 0.5) and parse_source("b=c") == ("b=c", 1.0) == parse_source("b=c")
    with pytest.raises(ValueError, match="above 0"):
        parse_source("b=0")


def test_from_text_to_a_model(tmp_path, monkeypatch):
    """Packs, trains over eight devices, writes samples and settings, and exports what transformers computes alike; the
    settings it saved go on where it stopped."""
    monkeypatch.chdir(tmp_path)
    CONFIG.to_json("config.json")
    lines = [{"text": f"Chapter {i}. " + "It was a dark and stormy night. " * 40} for i in range(12)]
    Path("train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    Path("validation.txt").write_text("It was a bright and quiet morning. " * 60)
    Path("run.toml").write_text(
        'config = "config.json"\ndata = ["train.jsonl=1"]\nvalidation = "validation.txt"\ntokenizer = "opt-mini"\n'
        'run = "run"\nsteps = 6\nbatch_size = 8\nlength = 32\nlr = 0.01\nlog_every = 2\neval_every = 3\n'
        'boundaries = true\nstacked = true\nexport = "out"\nprompts = ["It was", "Chapter 3"]\nquiet = true\n'
        'export_dtype = "float16"\n'
    )
    assert pretrain.main(["--settings", "run.toml", "--stop-at", "4"]) == 0
    assert not Path("out").exists()
    assert pretrain.main(["--settings", "run", "--stop-at", "6"]) == 0
    saved = json.loads(Path("run/settings.json").read_text())
    assert saved["lr"] == 0.01 and saved["betas"] == [0.9, 0.95] and saved["warmup"] == 1 and "mesh" not in saved

    texts = {path.name.rpartition("-")[0]: read_about(path) for path in Path("run/text").iterdir()}
    assert texts.keys() == {"train", "validation"} and texts["train"]["documents"] == 12
    entries = [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()]
    looked = [entry for entry in entries if "validation_loss" in entry]
    assert [entry["step"] for entry in looked] == [3, 6]
    for entry in looked:
        assert entry["validation_perplexity"] == pytest.approx(np.exp(entry["validation_loss"]))
        begun = zip(entry["samples"], ("It was", "Chapter 3"), strict=True)
        assert all(text.startswith(prompt) and len(text) > len(prompt) for text, prompt in begun)

    params, tokenizer = optjax.load("out")
    trained = load_run("run")
    for mine, exported in zip(jax.tree.leaves(trained), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(np.asarray(mine, np.float16), exported)
    ids, mask = tokenizer(["It was a dark", "night"])
    model = transformers.AutoModelForCausalLM.from_pretrained("out", dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = model(torch.tensor(np.array(ids)), attention_mask=torch.tensor(np.array(mask))).logits
    ours = optjax.causal_lm(jax.tree.map(lambda w: w.astype("float32"), params), ids, attention_mask=mask).logits
    real = np.asarray(mask) != 0
    np.testing.assert_allclose(np.asarray(ours)[real], theirs.numpy()[real], atol=1e-4)


def test_prompts_that_leave_no_room_are_left_out(tmp_path, monkeypatch, capsys):
    """A model of 8 positions cannot continue the prompts that are there by default; a tokenizer with more entries than
    the model, or a folder packed with one that cannot be had, is said before anything is trained."""
    monkeypatch.chdir(tmp_path)
    CONFIG.replace(max_position_embeddings=8).to_json("config.json")
    CONFIG.replace(vocab_size=100).to_json("small.json")
    Path("text.txt").write_text("a b c " * 200)
    words = ["--data", "text.txt", "--steps", "1", "--batch-size", "8", "--run", "run", "--eval-every", "1"]
    tokenizer = ["--tokenizer", "opt-mini"]
    assert (
        pretrain.main([*words, *tokenizer, "--config", "config.json", "--prompts", "It", "It was a dark night. " * 3])
        == 0
    )
    [entry] = [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()][-1:]
    assert [text.startswith("It") for text in entry["samples"]] == [True]
    with pytest.raises(SystemExit) as stopped:
        pretrain.main([*words, *tokenizer, "--config", "small.json"])
    assert stopped.value.code == 2 and "the tokenizer has 8192 entries, the model only 100" in capsys.readouterr().err
    [packed] = Path("run/text").iterdir()
    about = json.loads((packed / "about.json").read_text())
    (packed / "about.json").write_text(json.dumps(about | {"tokenizer": "/no/such/folder"}))
    assert tokenizer_of([(packed, 1.0)], None) is None
    assert "no sample texts" in (said := capsys.readouterr().err) and "/no/such/folder" in said


def test_validation_is_in_the_tokens_of_the_data(tmp_path, monkeypatch, capsys):
    """Text beside a packed one is packed by the same tokenizer, found where the packed one says; no text is measured
    in the tokens of another."""
    monkeypatch.chdir(tmp_path)
    CONFIG.to_json("config.json")
    Path("text.txt").write_text("a b c " * 200)
    pack.main("--documents text.txt --tokenizer opt-mini --out data --quiet --workers 1".split())
    words = "--config config.json --length 16 --batch-size 8 --steps 1 --quiet --prompts --run run".split()

    def refused(*more: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            pretrain.main([*words, *more])
        assert stopped.value.code == 2
        return capsys.readouterr().err

    assert pretrain.main([*words, "--data", "data", "--validation", "text.txt"]) == 0
    [made] = Path("run/text").iterdir()
    assert read_about(made)["tokenizer_sha256"] == read_about(Path("data"))["tokenizer_sha256"]

    about = read_about(Path("data"))
    for folder, changes in (("moved", {"tokenizer": "no/where"}), ("silent", {"tokenizer": ""}),
                            ("other", {"tokenizer": "other", "tokenizer_sha256": "0"}),
                            ("newer", {"tokenizer_sha256": "0"})):  # fmt: skip
        shutil.copytree("data", folder)
        Path(folder, "about.json").write_text(json.dumps(about | changes))
    Path("more.txt").write_text("a b c " * 200)
    assert "no/where, to pack more.txt with, cannot be had" in refused("--data", "moved", "--validation", "more.txt")
    assert "silent beside it does not say" in refused("--data", "silent", "--validation", "more.txt")
    said = refused("--data", "data", "--validation", "other")
    assert "data and other were packed with different tokenizers: tokenizer_sha256" in said
    nameless = {"tokenizer": None}
    for folder, changes in (("one", nameless), ("two", nameless | {"tokenizer_sha256": "0"})):
        shutil.copytree("data", folder)
        Path(folder, "about.json").write_text(json.dumps(about | changes))
    assert "one and two were packed with different tokenizers" in refused("--data", "one", "--validation", "two")
    # Of one name it is the same, written by another version of the library.
    assert pretrain.main([*words, "--data", "data", "--validation", "newer", "--run", "again"]) == 0


PACKER = """
import sys
from jax.experimental import multihost_utils
from optjax.sharding import initialize
from optjax.train import sources

def too_short(*_):
    raise RuntimeError("a collective on CPU does not wait for a process that packs")

initialize()
multihost_utils.process_allgather = multihost_utils.assert_equal = multihost_utils.sync_global_devices = too_short
for _ in range(2):
    print(sources.packed([sys.argv[1]], "opt-mini", "text", quiet=True))
"""


@pytest.mark.parametrize("name", ["text.txt", "nowhere.txt"])
def test_processes_wait_for_the_one_that_packs(tmp_path, name):
    """And hear when it cannot."""
    (tmp_path / "text.txt").write_text("a b c " * 200)
    options = {"cwd": tmp_path, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    command = [sys.executable, "-c", PACKER, name]
    started = [subprocess.Popen(command, env=each, **options) for each in environments(2, devices=2)]
    said = [process.communicate(timeout=120)[0] for process in started]
    codes = [process.returncode for process in started]
    if name == "text.txt":
        assert codes == [0, 0] and all(text.count("PosixPath('text/text-") == 2 for text in said), said
    else:
        assert 0 not in codes and "nowhere.txt" in said[0], said
        assert "the first process has not packed nowhere.txt" in said[1], said


def test_begins_with_the_weights_of_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    params = optjax.init_params(CONFIG, jax.random.key(3))
    optjax.save_params(params, "first")
    Path("text.txt").write_text("a b c " * 2000)
    words = ["--config", "first", "--weights", "first", "--data", "text.txt", "--tokenizer", "opt-mini", "--run", "run"]
    words += ["--steps", "1", "--lr", "1e-12", "--batch-size", "8", "--length", "16", "--stacked", "--quiet"]
    assert pretrain.main(words) == 0
    for mine, first in zip(jax.tree.leaves(load_run("run")), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(mine, first, atol=1e-9)
    about = json.loads(Path("run/run.json").read_text())
    assert about["weights"] == "first"

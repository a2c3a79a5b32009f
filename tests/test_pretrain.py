"""Pretraining: the recipe, and a run against itself interrupted."""

import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from optjax import OPTConfig, init_params
from optjax.params import unstack_layers
from optjax.train.checkpoint import Checkpoints
from optjax.train.data import text_batches, write_tokens
from optjax.train.interrupt import STOPPED
from optjax.train.job import LoopOptions
from optjax.train.log import read_log
from optjax.train.loss import evaluate, next_token_loss
from optjax.train.optimizer import Recipe, decayed, learning_rate
from optjax.train.options import StepOptions
from optjax.train.pretrain import main
from optjax.train.pretraining import Options, pretrain
from optjax.train.run_file import load_run
from optjax.train.state import init_state, train_step

CONFIG = OPTConfig(
    vocab_size=61,
    hidden_size=16,
    num_hidden_layers=2,
    ffn_dim=24,
    num_attention_heads=2,
    max_position_embeddings=12,
    dropout=0.0,
)
RECIPE = Recipe(peak_lr=1e-2, total_steps=8, warmup_steps=2, decay_from=4, clip_norm=0.5)


# No <pad>: transformers gives its row no gradient, and no text holds it.
TOKENS = np.random.default_rng(0).integers(2, CONFIG.vocab_size, 4000)
RECORDS = np.stack([TOKENS[i : i + 13] for i in range(0, 3900, 12)]).astype(np.int32)


def as_batch(records: np.ndarray) -> dict[str, np.ndarray]:
    return {"input_ids": records[:, :-1], "labels": records[:, 1:]}


def text_folder(folder: Path, count: int = 1000) -> Path:
    write_tokens(folder, TOKENS[:count], vocab_size=CONFIG.vocab_size, bytes=4 * count)
    return folder


def weights_by_name(params) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(unstack_layers(params).weights)
    return {".".join(str(getattr(s, "key", getattr(s, "idx", None))) for s in path): np.array(x) for path, x in leaves}


def test_decay_is_on_matrices_only():
    for stacked in (False, True):
        flags = decayed(CONFIG, stacked=stacked)
        for name, flag in weights_by_name_of_flags(flags).items():
            assert flag == (name.endswith("weight") and "norm" not in name), name


def weights_by_name_of_flags(flags) -> dict[str, bool]:
    leaves = jax.tree_util.tree_leaves_with_path(flags.weights)
    return {".".join(str(getattr(s, "key", getattr(s, "idx", None))) for s in path): flag for path, flag in leaves}


def test_learning_rate_follows_the_recipe():
    recipe = Recipe(peak_lr=2.0, total_steps=100, warmup_steps=10)
    rates = [float(learning_rate(recipe, step)) for step in range(101)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == pytest.approx(2.0)
    np.testing.assert_allclose(np.diff(rates[10:100]), -1.8 / 90, rtol=1e-3)
    assert rates[99] == rates[100] == pytest.approx(0.2)


@pytest.mark.parametrize(
    "wrong", [{"warmup_steps": 9}, {"decay_from": 1}, {"peak_lr": 0.0}, {"beta1": 1.0}, {"final_fraction": 2.0}]
)
def test_recipe_refuses_nonsense(wrong):
    with pytest.raises(ValueError, match="expected|should"):
        Recipe(**({"peak_lr": 1e-3, "total_steps": 8, "warmup_steps": 2} | wrong))


def test_half_precision_weights_are_refused():
    with pytest.raises(ValueError, match="float32.*bfloat16"):
        init_state(init_params(CONFIG, jax.random.key(0), dtype="bfloat16"))


def test_one_batch_can_be_learned_by_heart():
    recipe = Recipe(peak_lr=1e-2, total_steps=150, warmup_steps=5)
    state = init_state(init_params(CONFIG, jax.random.key(0)))
    batch = as_batch(RECORDS[:4])
    first = float(next_token_loss(state.params, batch))
    for _ in range(150):
        state, metrics = train_step(state, batch, recipe)
    assert first > 3.9 and float(metrics["loss"]) < 0.2


def test_evaluate_is_the_mean_over_records(tmp_path):
    params = init_params(CONFIG, jax.random.key(1))
    batches = text_batches(text_folder(tmp_path), 12, 8, 3)
    found = evaluate(params, batches, bytes_per_token=batches.bytes_per_token)
    each = [float(next_token_loss(params, as_batch(RECORDS[i : i + 1]))) for i in range(24)]
    assert found["loss"] == pytest.approx(np.mean(each), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(found["loss"] / np.log(2) / 4.0)


DROPOUT = CONFIG.replace(dropout=0.2)


LOOP = [field.name for field in dataclasses.fields(LoopOptions)]


def run(folder, config=DROPOUT, **changes):
    loop = {"total_steps": RECIPE.total_steps, "save_every": 3, "log_every": 1, "tensorboard": False, "quiet": True}
    loop |= {name: changes.pop(name) for name in LOOP if name in changes}
    options = Options(**({"batch_size": 4, "length": 12} | changes))
    validation = text_folder(folder.with_name("validation"), 200)
    text = text_folder(folder.with_name("text"))
    return pretrain(config, RECIPE, options, text, folder, LoopOptions(**loop), validation=validation)


def test_resuming_continues_bit_for_bit(tmp_path):
    """Dropout on: the order of the data and the masks both have to be the same."""
    whole = run(tmp_path / "whole")
    run(tmp_path / "parts", stop_at=2)
    run(tmp_path / "parts", stop_at=5)
    parts = run(tmp_path / "parts")
    assert int(parts.step) == 8
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_array_equal(a, b)
    logs = [[{k: e[k] for k in ("step", "loss", "grad_norm", "lr")} for e in read_log(tmp_path / f)]
                 for f in ("whole", "parts")]  # fmt: skip
    assert logs[0] == logs[1] and [e["step"] for e in logs[0]] == list(range(1, 9))
    with Checkpoints(tmp_path / "parts") as checkpoints:
        assert checkpoints.latest == 8
    kept = {path.name for path in (tmp_path / "whole" / "checkpoints").glob("[0-9]*")}
    assert kept == {"3", "6", "8"}  # two that were due, and the last
    loaded = load_run(tmp_path / "parts")
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(whole.params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_micro_batches_are_validated_on_the_same_text(tmp_path):
    for parts in (1, 4):
        once = {"stop_at": 1, "eval_every": 1, "eval_batches": 2}
        run(tmp_path / str(parts), CONFIG, step=StepOptions(micro_batches=parts), **once)
    one, four = (read_log(tmp_path / name)[0]["validation_loss"] for name in ("1", "4"))
    assert four == pytest.approx(one, rel=1e-4)


def test_a_run_over_devices_goes_on_over_others(tmp_path):
    """Every batch, mask and update as on one device, up to rounding; what resumes on the same mesh is the same bits."""
    levers = StepOptions(micro_batches=2, remat="full", loss_chunks=3)
    config = DROPOUT.replace(vocab_size=64)
    spread = {"stacked": True, "step": levers, "batch_size": 8, "config": config}
    alone = run(tmp_path / "alone", **spread)
    for folder, stops in (("whole", [8]), ("parts", [3, 8])):
        for stop in stops:
            whole = run(tmp_path / folder, **spread, mesh="fsdp=4,tensor=2", rules="fsdp+tensor", stop_at=stop)
    run(tmp_path / "moved", **spread, mesh="fsdp=4,tensor=2", rules="fsdp+tensor", stop_at=3)
    moved = run(tmp_path / "moved", **spread)
    logs = {name: [e["loss"] for e in read_log(tmp_path / name)] for name in ("alone", "whole", "parts", "moved")}
    assert logs["parts"] == logs["whole"] and len(logs["alone"]) == 8
    for name in ("whole", "moved"):
        np.testing.assert_allclose(logs[name], logs["alone"], rtol=1e-4)
    assert whole.params["layers"]["fc1"]["weight"].sharding.num_devices == 8
    np.testing.assert_allclose(
        moved.params["embed_tokens"]["weight"], alone.params["embed_tokens"]["weight"], rtol=0, atol=1e-3
    )
    assert load_run(tmp_path / "whole").placement is None


def test_dropout_may_change_on_resume(tmp_path):
    run(tmp_path / "run", stop_at=1)
    rates = {"dropout": 0.0, "attention_dropout": 0.1, "layerdrop": 0.1}
    state = run(tmp_path / "run", CONFIG.replace(**rates), stop_at=2)
    assert int(state.step) == 2 and state.params.config.attention_dropout == 0.1
    assert load_run(tmp_path / "run").config == DROPOUT
    with pytest.raises(ValueError, match=r"another run \(config.activation_function was 'relu', is 'gelu'\);"):
        run(tmp_path / "run", DROPOUT.replace(activation_function="gelu"))


def test_another_run_in_the_same_folder_is_refused(tmp_path):
    run(tmp_path, stop_at=1)
    with pytest.raises(ValueError, match="another run.*seed was 0, is 1"):
        run(tmp_path, seed=1)
    with pytest.raises(FileNotFoundError, match="run.json"):
        load_run(tmp_path / "nowhere")


def packed(folder: Path) -> Path:
    (folder / "config.json").write_text(CONFIG.to_json())
    return text_folder(folder / "text", 4000)


def command(folder: Path, *more: str) -> list[str]:
    return ["--config", str(folder / "config.json"), "--data", str(packed(folder)), "--run", str(folder / "run"),
            "--batch-size", "8", "--warmup", "1", "--lr", "1e-3", "--log-every", "1", *more]  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_and_the_same_command_goes_on(tmp_path, number):
    """Sent twice, as a scheduler may."""
    before = signal.signal(number, signal.SIG_DFL)  # a child inherits that a signal is ignored, as under nohup
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "optjax.train.pretrain", *command(tmp_path, "--steps", "1000000")],
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        signal.signal(number, before)
    try:
        deadline = time.monotonic() + 120
        while not read_log(tmp_path / "run"):
            assert process.poll() is None and time.monotonic() < deadline, "the run never took a step"
            time.sleep(0.05)
        process.send_signal(number)
        process.send_signal(number)
        _, said = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == STOPPED and "stopped after step" in said, said
    steps = [entry["step"] for entry in read_log(tmp_path / "run")]
    with Checkpoints(tmp_path / "run") as checkpoints:
        assert checkpoints.latest == steps[-1]
    target = steps[-1] + 2
    assert main(command(tmp_path, "--steps", str(target), "--quiet")) == 0
    assert [entry["step"] for entry in read_log(tmp_path / "run")] == list(range(1, target + 1))


@pytest.mark.parametrize(
    "more, message",
    [
        (["--data", "nowhere", "--tokenizer", "opt-mini"], "nowhere"),
        (["--length", "13"], "the model's 12 positions"),
        (["--config", "opt-9b"], "no preset"),
        (["--steps", "0"], "warmup_steps"),
        (["--mesh", "fsdp=3"], "there are 8"),
        (["--mesh", "fsdp=8", "--micro-batches", "2"], "multiple of 16"),
        (["--stepz", "3"], "unrecognized arguments: --stepz"),
        (["--tokens", "1e6"], "--steps or --tokens, not both"),
        (["--data", "text=-1"], "weight should be above 0"),
        (["--dtype", "float8"], "invalid choice"),
        (["--micro-batches", "3"], "3 micro-batches"),
    ],
)
def test_wrong_options_say_so_without_a_traceback(tmp_path, capsys, more, message):
    with pytest.raises(SystemExit) as stopped:
        main(command(tmp_path, "--steps", "5", *more))
    assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_log_survives_a_torn_last_line(tmp_path):
    (tmp_path / "log.jsonl").write_text(json.dumps({"step": 1}) + '\n{"st')
    assert read_log(tmp_path) == [{"step": 1}]

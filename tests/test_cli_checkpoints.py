"""`optjax convert` and `optjax info`: files in, files and figures out."""

import json
import shutil
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

import optjax
from optjax.checkpoints import hub, save
from optjax.checkpoints.tensors import FileTensor
from optjax.cli import main

CONFIG = optjax.OPTConfig(
    vocab_size=512, hidden_size=64, num_hidden_layers=6, ffn_dim=256, num_attention_heads=4, max_position_embeddings=64,
    word_embed_proj_dim=32, init_std=0.1,
)  # fmt: skip
TOKENIZER = {name: name.encode() for name in ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json")}


@pytest.fixture(scope="module")
def params() -> optjax.Params:
    return optjax.init_params(CONFIG, jax.random.key(0))


@pytest.fixture
def source(params, tmp_path) -> Path:
    """A checkpoint with what looks like a tokenizer, which is copied and not read."""
    optjax.save_params(params, tmp_path / "source")
    for name, content in TOKENIZER.items():
        (tmp_path / "source" / name).write_bytes(content)
    return tmp_path / "source"


@pytest.fixture
def run(capsys):
    """Runs a command: its exit status, standard output and standard error."""

    def run(*words: object) -> tuple[int, str, str]:
        status = main([str(word) for word in words])
        return status, *capsys.readouterr()

    return run


def assert_same(left: optjax.Params, right: optjax.Params) -> None:
    assert left.config == right.config and left.head == right.head
    jax.tree.map(np.testing.assert_array_equal, left.weights, right.weights)


def test_formats_round_trip_bit_for_bit(run, source, params, tmp_path):
    flax, back = tmp_path / "flax", tmp_path / "deep" / "back"
    assert run("convert", source, flax, "--format", "flax")[0] == 0
    assert (flax / "flax_model.msgpack").is_file() and not list(flax.glob("*.safetensors"))
    status, out, err = run("convert", flax, back, "--max-shard-size", "100KB")
    assert status == 0 and out == "" and "from flax" in err
    assert len(list(back.glob("model-*-of-*.safetensors"))) > 5
    assert_same(optjax.load_params(back), params)
    for folder in (flax, back):
        assert {name: (folder / name).read_bytes() for name in TOKENIZER} == TOKENIZER
    # Nothing but the two folders was left behind.
    assert {path.name for path in tmp_path.iterdir()} == {"source", "flax", "deep"}
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["back"]


def test_transformers_loads_the_result(run, source, params, tmp_path):
    import torch
    from transformers import OPTForCausalLM

    # Cast, and from one file of several.
    assert run("convert", source / "model.safetensors", tmp_path / "new", "--dtype", "bfloat16")[0] == 0
    model = OPTForCausalLM.from_pretrained(tmp_path / "new", dtype=torch.bfloat16)
    cast = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    ours = np.asarray(cast["layers"][3]["fc1"]["weight"].astype(jnp.float32))
    theirs = model.model.decoder.layers[3].fc1.weight.detach().float().numpy()
    np.testing.assert_array_equal(ours, theirs)
    assert_same(optjax.load_params(tmp_path / "new"), cast)


def test_weights_pass_through_memory_one_at_a_time(run, source, tmp_path):
    run("convert", source, tmp_path / "first", "--format", "flax")  # imports what there is to import
    total = (source / "model.safetensors").stat().st_size
    for form in ("flax", "safetensors"):
        tracemalloc.start()
        assert run("convert", source, tmp_path / form, "--format", form, "--dtype", "float16")[0] == 0
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < total / 2, f"{form}: a peak of {peak} bytes for a checkpoint of {total}"


def test_heads(run, source, tmp_path):
    assert run("convert", source, tmp_path / "base", "--head", "base")[0] == 0
    assert optjax.load_params(tmp_path / "base").head is None
    status, _, err = run("convert", source, tmp_path / "other", "--head", "question_answering")
    assert status == 1 and "qa_outputs.weight" in err and "choose another --head" in err
    assert not (tmp_path / "other").exists()


def test_the_config_may_be_named(run, source, params, tmp_path):
    (source / "config.json").rename(tmp_path / "config.json")
    assert run("convert", source, tmp_path / "new", "--config", tmp_path / "config.json")[0] == 0
    assert_same(optjax.load_params(tmp_path / "new"), params)
    status, _, err = run("convert", source, tmp_path / "other", "--config", "opt-125m")
    assert status == 1 and "does not fit its config" in err


def test_a_destination_in_use_is_refused(run, source, tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "thesis.txt").write_text("chapter one")
    status, _, err = run("convert", source, tmp_path / "new")
    assert status == 2 and "--force" in err
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["thesis.txt"]
    status, _, err = run("convert", source, source / "config.json", "--force")
    assert status == 2 and "is a file" in err
    assert run("convert", source, tmp_path / "new", "--force")[0] == 0
    assert (tmp_path / "new" / "thesis.txt").read_text() == "chapter one"
    optjax.load_params(tmp_path / "new")


def test_a_checkpoint_may_be_converted_in_place(run, source, params):
    assert run("convert", source, source, "--force", "--dtype", "float16")[0] == 0
    assert_same(optjax.load_params(source), jax.tree.map(lambda w: w.astype(jnp.float16), params))
    assert {name: (source / name).read_bytes() for name in TOKENIZER} == TOKENIZER
    before = sorted(path.name for path in source.iterdir())
    status, _, err = run("convert", source, source, "--force", "--format", "flax")
    assert status == 2 and "would lose model.safetensors" in err
    assert sorted(path.name for path in source.iterdir()) == before


def test_another_model_is_replaced_as_a_whole(run, source, params, tmp_path):
    """Neither weights of another format nor files of another tokenizer stay to be read."""
    dest = tmp_path / "dest"
    assert run("convert", source, dest)[0] == 0
    (dest / "added_tokens.json").write_text("{}")
    other = optjax.init_params(CONFIG.replace(ffn_dim=64), jax.random.key(1))
    optjax.save_params(other, tmp_path / "other")
    status, _, err = run("convert", tmp_path / "other", dest, "--force", "--format", "flax")
    assert status == 0 and "what there is in DEST stays" in err and (dest / "added_tokens.json").exists()
    assert_same(optjax.load_params(dest), other)
    another = ("vocab.json", "merges.txt", "tokenizer_config.json")
    for name in another:
        (tmp_path / "other" / name).write_bytes(b"another")
    assert run("convert", tmp_path / "other", dest, "--force")[0] == 0
    tokenizer = {path.name for path in dest.iterdir()} & {*TOKENIZER, "added_tokens.json", "special_tokens_map.json"}
    assert tokenizer == set(another)
    assert (dest / "vocab.json").read_bytes() == b"another"
    assert_same(optjax.load_params(dest), other)


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failure_leaves_nothing(run, source, tmp_path, monkeypatch, error):
    written = []

    def write(out, entries):
        written.append(out.write(b"half"))
        raise error

    _, entries = save._FORMATS["safetensors"]
    monkeypatch.setitem(save._FORMATS, "safetensors", (write, entries))
    status, _, err = run("convert", source, tmp_path / "new")
    assert written and status == (130 if isinstance(error, KeyboardInterrupt) else 1) and "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_full_disk_is_seen_beforehand(run, source, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    status, _, err = run("convert", source, tmp_path / "a" / "new")
    assert status == 1 and "1000 B left" in err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_tokenizer_from_elsewhere(run, source, tmp_path):
    for name in TOKENIZER:
        (source / name).rename(tmp_path / name)
    _, _, err = run("convert", source, tmp_path / "without")
    assert "no tokenizer" in err
    assert run("convert", source, tmp_path / "with", "--tokenizer", tmp_path)[0] == 0
    assert {name: (tmp_path / "with" / name).read_bytes() for name in TOKENIZER} == TOKENIZER
    status, _, err = run("convert", source, tmp_path / "other", "--tokenizer", source)
    assert status == 1 and "tokenizer.json" in err and not (tmp_path / "other").exists()


def test_a_vocabulary_and_merges_alone_are_a_tokenizer_with_a_bos_to_transformers_too(run, source, tmp_path):
    """As metaseq's and Alpa's users have them; transformers makes GPT-2's tokenizer of the two, without a BOS."""
    for name in TOKENIZER:
        (source / name).unlink()
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(hub.resolve_source("opt-mini") / name, tmp_path)
    assert run("convert", source, tmp_path / "with", "--tokenizer", tmp_path)[0] == 0
    ids = optjax.Tokenizer.load("opt-mini").encode("The old house")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "with")
    assert theirs("The old house").input_ids == ids == optjax.Tokenizer.load(tmp_path / "with").encode("The old house")
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token) == ("</s>", "</s>", "<pad>")

    (tmp_path / "merges.txt").write_text("")
    status, _, err = run("convert", source, tmp_path / "with", "--tokenizer", tmp_path, "--force", "--dtype", "float16")
    assert status == 1 and "merges.txt is damaged" in err
    assert optjax.load_params(tmp_path / "with").dtype == np.float32


# What a size or a checkpoint needs.

# Parameters with the tied head, and KiB of KV cache a token in bfloat16: the paper's table 1, and transformers' models.
SIZES = {
    "opt-125m": (125_239_296, 36),
    "opt-350m": (331_196_416, 96),
    "opt-1.3b": (1_315_758_080, 192),
    "opt-2.7b": (2_651_596_800, 320),
    "opt-6.7b": (6_658_473_984, 512),
    "opt-13b": (12_853_473_280, 800),
    "opt-30b": (29_974_540_288, 1344),
    "opt-66b": (65_719_701_504, 2304),
    "opt-175b": (174_604_468_224, 4608),
}


def test_published_sizes(run):
    status, out, _ = run("info", *SIZES, "--json")
    models = json.loads(out)
    assert status == 0 and [model["name"] for model in models] == list(SIZES)
    for model, (total, kib) in zip(models, SIZES.values(), strict=True):
        groups = dict(model["parameters"])
        assert groups.pop("total") == total == sum(groups.values())
        memory = model["memory"]
        assert memory["weights"] == {"float32": 4 * total, "bfloat16": 2 * total, "int8": total}
        assert memory["kv_cache"]["bytes_per_token"] == kib * 1024
        assert memory["kv_cache"]["bytes"] == kib * 1024 * 2048
        assert memory["training_state"] == 12 * total
        assert model["checkpoint"] is None
        assert optjax.OPTConfig.from_dict(model["config"]) == optjax.OPTConfig.preset(model["name"])


def test_tables(run):
    _, out, _ = run("info")
    rows = {line.split()[0]: line.split() for line in out.split("\n") if line.strip()}
    assert rows["opt-175b"][1:4] == ["175B", "96", "12288"]
    assert rows["opt-175b"][4:] == ["650", "GiB", "325", "GiB", "9.00", "GiB", "1.91", "TiB"]
    assert len([name for name in rows if name.startswith("galactica-")]) == 5
    _, out, _ = run("info", "facebook/opt-350m", "galactica-6.7b")
    rows = [line.split() for line in out.split("\n")]
    assert ["total", "331,196,416", "6,655,647,744"] in rows
    assert ["layer", "norm", "after", "before"] in rows and ["embedding", "width", "512", "–"] in rows


def test_a_checkpoint_is_described_by_its_headers(run, source, monkeypatch):
    from safetensors.numpy import load_file

    tensors = load_file(source / "model.safetensors")
    monkeypatch.setattr(FileTensor, "read", lambda *_: pytest.fail("a weight was read"))
    status, out, _ = run("info", source, "--json")
    [model] = json.loads(out)
    assert status == 0
    by_name = {name: array.size for name, array in tensors.items()}
    assert model["parameters"] == {
        "embeddings": sum(n for name, n in by_name.items() if "embed_" in name or "project_" in name),
        "attention": sum(n for name, n in by_name.items() if "_attn." in name),
        "mlp": sum(n for name, n in by_name.items() if ".fc" in name),
        "norms": sum(n for name, n in by_name.items() if "layer_norm" in name),
        "head": 0,
        "total": sum(by_name.values()),
    }
    file = (source / "model.safetensors").stat().st_size
    assert model["checkpoint"] == {
        "format": "safetensors", "files": 1, "bytes": file, "dtypes": ["float32"], "quantization": None,
        "weights": sum(array.nbytes for array in tensors.values()), "tokenizer": True,
    }  # fmt: skip
    assert model["memory"]["kv_cache"]["tokens"] == 64
    # A pipe is not as narrow as a terminal: no name is cut.
    assert str(source) in run("info", source)[1]


def test_a_config_without_weights(run, source):
    (source / "model.safetensors").unlink()
    [model] = json.loads(run("info", source, "--json")[1])
    assert model["checkpoint"] is None and model["parameters"]["total"] == optjax.count_params(CONFIG)


def test_a_hub_model_is_described_by_its_config(run, source, monkeypatch):
    asked = []

    def download(repo, revision, token, weights):
        asked.append((repo, revision, weights))
        (source / "model.safetensors").unlink()
        return source

    monkeypatch.setattr(hub, "_download", download)
    [model] = json.loads(run("info", "someone/something", "--revision", "v2", "--json")[1])
    assert asked == [("someone/something", "v2", None)]
    assert model["parameters"]["total"] == optjax.count_params(CONFIG)


def test_a_broken_checkpoint(run, source):
    data = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(data[:-100])
    status, out, err = run("info", source)
    assert status == 1 and out == "" and "truncated" in err and "Traceback" not in err

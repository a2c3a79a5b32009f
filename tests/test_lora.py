"""Adapters applied, merged, saved and loaded: PEFT's on torch is the measure."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
import safetensors.numpy
import transformers
from cli_helpers import check_error, runner, write_model
from hf_models import assert_close, padded_masks
from peft_models import load, outputs, quietly, random_adapter

import optjax
from optjax import LoraConfig, OPTConfig
from optjax.layer import linear
from optjax.lora.weight import with_dropout
from optjax.sharding import make_mesh
from optjax.train.state import init_state

CONFIG = OPTConfig(
    vocab_size=43,
    hidden_size=12,
    num_hidden_layers=3,
    num_attention_heads=3,
    ffn_dim=20,
    max_position_embeddings=24,
    num_labels=3,
    dropout=0.0,
)
ODD = CONFIG.replace(word_embed_proj_dim=6, do_layer_norm_before=False, tie_word_embeddings=False)
EVERY = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
PATTERNS = dict(
    rank_pattern={"layers.0.self_attn.q_proj": 5, "fc1": 2, r".*\.[12]\.fc2": 1},
    alpha_pattern={r"layers\.1\..*": 3},
)
CASES = {
    "default": (CONFIG, "causal_lm", dict(r=4)),
    "rslora, patterns": (CONFIG, "causal_lm", dict(target_modules=EVERY, use_rslora=True, r=3, **PATTERNS)),
    "projections, untied": (ODD, "causal_lm", dict(target_modules=["project_in", "project_out", "lm_head", "fc1"])),
    "all-linear, score": (ODD, "sequence_classification", dict(target_modules="all-linear", r=2, lora_alpha=5)),
    "some layers, answers": (CONFIG, "question_answering", dict(target_modules=["fc2"], layers_to_transform=[0, 2])),
    "expression, biases, no head": (CONFIG, None, dict(target_modules=r".*layers\.[01]\.fc\d", bias="all")),
    "norms": (CONFIG, "causal_lm", dict(exclude_modules=["layers.1.fc2"], target_modules=["fc2"],
                                        modules_to_save=["layer_norm"])),
}  # fmt: skip
FUNCTIONS = {
    "causal_lm": optjax.causal_lm,
    "sequence_classification": optjax.sequence_classification,
    "question_answering": optjax.question_answering,
    None: optjax.forward,
}


def batch(config: OPTConfig, rows: int = 3, length: int = 9):
    rng = np.random.default_rng(3)
    ids = rng.integers(3, config.vocab_size, (rows, length))
    mask = padded_masks(rng, rows, length)
    return np.where(mask, ids, config.pad_token_id), mask


def ours(params, ids, mask) -> list[np.ndarray]:
    out = FUNCTIONS[params.head](params, ids, attention_mask=mask)
    if params.head == "question_answering":
        return [np.asarray(out.start_logits), np.asarray(out.end_logits)]
    return [np.asarray(out.last_hidden_state if params.head is None else out.logits)]


def real(array, mask):
    """Where a padded token has nothing to be compared."""
    return mask if array.shape[:2] == mask.shape else None


@pytest.mark.parametrize(
    ("case", "stacked"), [(case, i % 2 == 0) for i, case in enumerate(CASES)] + [("rslora, patterns", True)]
)
def test_of_peft_here_and_back(case, stacked, tmp_path):
    """PEFT's adapter has PEFT's outputs here, applied and merged; ours, saved, has them there."""
    config, head, options = CASES[case]
    adapted, plain, params = random_adapter(config, head, tmp_path / "theirs", stacked=stacked, **options)
    ids, mask = batch(config)
    adapters = optjax.load_adapters(tmp_path / "theirs")
    theirs, before = outputs(adapted, ids, mask), outputs(plain, ids, mask)
    assert np.abs(theirs[0] - before[0]).max() > 0.05 * np.abs(before[0]).max()
    for made in (optjax.with_adapters(params, adapters), optjax.merge_adapters(params, adapters)):
        for one, other in zip(ours(made, ids, mask), theirs, strict=True):
            assert_close(one, other, real(one, mask))
    fresh = {name: value for name, value in options.items() if name != "task_type"}
    made = optjax.init_adapters(params, LoraConfig(init_lora_weights=False, **fresh), jax.random.key(0))
    assert made.stacked == stacked
    optjax.save_adapters(made, tmp_path / "ours")
    theirs = outputs(load(plain, tmp_path / "ours"), ids, mask)
    for one, other in zip(ours(optjax.with_adapters(params, made), ids, mask), theirs, strict=True):
        assert_close(one, other, real(one, mask))


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_quantized_base_is_its_dequantized_one(kind, tmp_path, no_digits):
    """Logits are those of PEFT over the dequantized weights; of int8, which tables always are, without digits."""
    params = optjax.quantize(optjax.init_params(CONFIG.replace(init_std=0.3), jax.random.key(1)), kind)
    ids, mask = batch(CONFIG)
    plain = params_of_torch(optjax.dequantize(params), tmp_path / "base")
    made = optjax.init_adapters(
        params, LoraConfig(r=3, target_modules=EVERY, init_lora_weights=False), jax.random.key(0)
    )
    optjax.save_adapters(made, tmp_path / "adapter")
    model = load(plain, tmp_path / "adapter")
    adapted = optjax.with_adapters(params, made)
    assert adapted.quantization == params.quantization
    assert_close(ours(adapted, ids, mask)[0], outputs(model, ids, mask)[0], mask)
    with pytest.raises(ValueError, match=f"quantized to {kind}, and what is merged would be lost"):
        optjax.merge_adapters(params, made)


def params_of_torch(params, folder):
    """transformers' model of params."""
    optjax.save_params(params, folder)
    return transformers.OPTForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def random_adapters(params, key: int = 0, **options):
    """Adapters that change the model from the start."""
    config = LoraConfig(**dict(r=3, target_modules=EVERY, init_lora_weights=False) | options)
    return optjax.init_adapters(params, config, jax.random.key(key))


@pytest.mark.parametrize("options", [{}, dict(num_beams=2)])
def test_generate(options):
    """The ids are those of the merged model; layers in a list or stacked, on the device or its host; and `stream`."""
    params = optjax.init_params(CONFIG.replace(init_std=0.3), jax.random.key(2))
    adapters = random_adapters(params)
    ids, mask = batch(CONFIG)
    wanted = optjax.generate(optjax.merge_adapters(params, adapters), ids, mask, max_new_tokens=6, **options)
    assert (np.asarray(wanted) != optjax.generate(params, ids, mask, max_new_tokens=6, **options)).any()
    for base in (params,) if options else (params, optjax.stack_layers(params), optjax.offload(params)):
        adapted = optjax.with_adapters(base, adapters)
        np.testing.assert_array_equal(optjax.generate(adapted, ids, mask, max_new_tokens=6, **options), wanted)
    if not options:
        streamed = list(optjax.stream(optjax.with_adapters(params, adapters), ids, mask, max_new_tokens=6))
        np.testing.assert_array_equal(np.stack(streamed, 1), np.asarray(wanted)[:, ids.shape[1] :])


def test_over_devices():
    """Eight devices give the logits that one gives; and the adapters lie as their weights do."""
    config = CONFIG.replace(
        vocab_size=64, hidden_size=32, num_attention_heads=8, ffn_dim=48, init_std=0.2, num_hidden_layers=2
    )
    mesh = make_mesh("fsdp=2,sequence=2,tensor=2", jax.devices()[:8])
    one = optjax.init_params(config, jax.random.key(0), stacked=True)
    many = optjax.init_params(config, jax.random.key(0), stacked=True, mesh=mesh)
    ids = np.random.default_rng(0).integers(3, 64, (8, 16))
    adapters = [random_adapters(params, rank_pattern={"fc1": 2}) for params in (one, many)]
    for a, b in zip(*map(jax.tree.leaves, adapters), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    q, fc2 = adapters[1]["layers"]["self_attn"]["q_proj"], adapters[1]["layers"]["fc2"]
    for array, shape in (
        (q["lora_A"], (2, 3, 32 // 4)),
        (q["lora_B"], (2, 32 // 4 // 2, 3)),
        (fc2["lora_A"], (2, 3, 48 // 4 // 2)),
        (fc2["lora_B"], (2, 32 // 4, 3)),
    ):
        assert array.addressable_shards[0].data.shape == shape

    found, wanted = (
        optjax.causal_lm(optjax.with_adapters(params, each), ids).logits
        for params, each in zip((many, one), reversed(adapters), strict=True)
    )
    assert_close(found, wanted)
    made, alone = (
        optjax.generate(optjax.with_adapters(params, each), ids, max_new_tokens=4, eos_token_id=[])
        for params, each in zip((many, one), reversed(adapters), strict=True)
    )
    np.testing.assert_array_equal(made, alone)


def test_on_the_command_line(tmp_path, monkeypatch, capsys):
    """`generate` and `score` with an adapter are those of the model into which `convert` merged it."""
    run = runner(monkeypatch, capsys)
    folder = write_model(tmp_path / "model")
    params = optjax.load_params(folder)
    adapters = random_adapters(params, bias="all")
    optjax.save_adapters(adapters, tmp_path / "adapter")
    assert run("convert", folder, tmp_path / "merged", "--adapter", tmp_path / "adapter").status == 0
    merged = optjax.merge_adapters(params, adapters)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), optjax.load_params(tmp_path / "merged"), merged
    )
    for command in (("generate", "the old", "--greedy", "-n", "6"), ("score", "the old", " road")):
        one = run(*command, "-m", folder, "--adapter", tmp_path / "adapter")
        other = run(*command, "-m", tmp_path / "merged")
        assert one.status == other.status == 0 and one.out == other.out != run(*command, "-m", folder).out
    alone = run("generate", "a", "-m", tmp_path / "adapter", "--tokenizer", folder)
    check_error(alone, 1, "holds an adapter, and no model", "--adapter")
    disk = run("generate", "a", "-m", folder, "--adapter", tmp_path / "adapter", "--offload", "disk")
    check_error(disk, 2, "--adapter", "merge it first")


def test_a_classifier_from_a_language_model_and_its_adapter(tmp_path, monkeypatch, capsys):
    """`convert` takes the head from the adapter, labels and all; transformers reads the result."""
    config = CONFIG.replace(num_labels=5)
    adapted, plain, _ = random_adapter(config, "sequence_classification", tmp_path / "adapter", r=2)
    plain.base_model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    run = runner(monkeypatch, capsys)
    result = run("convert", tmp_path / "model", tmp_path / "merged", "--adapter", tmp_path / "adapter")
    assert result.status == 0, result.err
    model = transformers.OPTForSequenceClassification.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    ids, mask = batch(config)
    assert_close(outputs(model.eval(), ids, mask)[0], outputs(adapted, ids, mask)[0])


def test_dropout_of_what_goes_into_an_adapter():
    """By a `dropout_key` only; in the mean, over keys, of a linear map, nothing changes; each weight drops its own."""
    config = CONFIG.replace(num_hidden_layers=1)
    params = optjax.init_params(config, jax.random.key(0))
    ids, _ = batch(config, rows=2)
    adapters = random_adapters(params, target_modules=["v_proj"], lora_dropout=0.4)
    still, moving = (random_adapters(params, lora_dropout=rate) for rate in (0.0, 0.4))

    @jax.jit
    def logits(adapters, key):
        return optjax.causal_lm(optjax.with_adapters(params, adapters), ids, dropout_key=key).logits

    key = jax.random.key(1)
    np.testing.assert_array_equal(logits(still, key), logits(still, None))
    np.testing.assert_array_equal(logits(moving, None), logits(still, None))
    assert (logits(moving, key) != logits(still, None)).any()
    np.testing.assert_array_equal(logits(moving, key), logits(moving, key))

    # What an adapter alone adds to v is linear in what is kept: its mean over masks is what it adds without dropout.
    weight = optjax.with_adapters(params, adapters)["layers"][0]["self_attn"]["v_proj"]["weight"]
    x = jax.random.normal(key, (1, 5, 12))

    def added(key):
        own = with_dropout({"weight": weight}, key)
        return linear(x, own, placement=None) - linear(x, {"weight": weight.base}, placement=None)

    keys = jax.random.split(key, 4000)
    drawn = np.asarray(jax.jit(jax.vmap(added))(keys))
    error = drawn.std(0) / len(keys) ** 0.5
    assert (np.abs(drawn.mean(0) - added(None)) < 5 * error).all() and (error > 0).all()
    zeros = jax.vmap(lambda key: with_dropout([weight, weight], key)[0].key)(keys[:2])
    assert (jax.random.key_data(zeros[0]) != jax.random.key_data(zeros[1])).any()


def with_bad_file(change):
    """`load_adapters` of a good adapter's folder that ``change`` has spoiled."""

    def call(params, folder):
        optjax.save_adapters(random_adapters(params, target_modules=["fc1"]), folder)
        config, tensors = folder / "adapter_config.json", folder / "adapter_model.safetensors"
        entries = json.loads(config.read_text())
        arrays = safetensors.numpy.load_file(tensors)
        change(entries, arrays)
        config.write_text(json.dumps(entries))
        safetensors.numpy.save_file(arrays, tensors)
        optjax.load_adapters(folder)

    return call


def first(arrays):
    return next(iter(arrays))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, f: LoraConfig(use_dora=True), "no weight-decomposed adapters .DoRA.: leave use_dora out"),
        (lambda p, f: LoraConfig(r=0), "r should hold integers of 1 or more, not 0"),
        (lambda p, f: LoraConfig(rank_pattern={"fc1": 2.5}), "rank_pattern should hold integers"),
        (lambda p, f: LoraConfig(rank_pattern={"(": 2}), "is no regular expression"),
        (lambda p, f: LoraConfig(lora_dropout=1), "lora_dropout should lie in"),
        (lambda p, f: LoraConfig(bias="some"), "bias should be one of 'none', 'all', 'lora_only'"),
        (lambda p, f: LoraConfig(task_type="SEQ_2_SEQ_LM"), "task_type should be one of CAUSAL_LM"),
        (lambda p, f: LoraConfig(init_lora_weights="pissa"), "changes the base model's weights too"),
        (lambda p, f: LoraConfig(target_modules="fc1", layers_to_transform=1), "goes with a list of target_modules"),
        (lambda p, f: random_adapters(p, target_modules=["q_prj"]), "no linear module 'q_prj'; it has: q_proj, k_proj"),
        (lambda p, f: random_adapters(p, target_modules=["embed_tokens"]), "only linear modules are adapted"),
        (lambda p, f: random_adapters(p, target_modules=["lm_head"]), "tie_word_embeddings"),
        (lambda p, f: random_adapters(p, layers_to_transform=[3]), "names layer 3, and there are 3, from 0"),
        (lambda p, f: random_adapters(p, modules_to_save=["embed_tokens"]), "which PEFT would take apart"),
        (lambda p, f: random_adapters(p, modules_to_save=["scor"]), "the model has no module 'scor'"),
        (lambda p, f: random_adapters(p, task_type="SEQ_CLS"), "'SEQ_CLS' is not that of params with head 'causal_lm'"),
        (lambda p, f: optjax.init_adapters(p, {"r": 8}, jax.random.key(0)), "an optjax.LoraConfig, not dict"),
        (lambda p, f: random_adapters(p, init_lora_weights="eva"), "should be True, False or 'gaussian', not 'eva'"),
        (lambda p, f: optjax.with_adapters(p, p), "what init_adapters or load_adapters return, not Params"),
        (lambda p, f: random_adapters(optjax.with_adapters(p, random_adapters(p))), "get no second ones"),
        (lambda p, f: optjax.with_adapters(other(), random_adapters(p)), r"lora_A \(3, 12\) does not fit .*\(8, 8\)"),
        (
            lambda p, f: optjax.with_adapters(other(hidden_size=12, ffn_dim=20), random_adapters(p)),
            "has 1 layers",
        ),
        (lambda p, f: optjax.save_params(optjax.with_adapters(p, random_adapters(p)), f), "save_adapters writes"),
        (lambda p, f: optjax.quantize(optjax.with_adapters(p, random_adapters(p))), "not quantized with them"),
        (lambda p, f: init_state(optjax.with_adapters(p, random_adapters(p))), "train by themselves: adapter_step"),
        (lambda p, f: optjax.unmerge_adapters(p, random_adapters(p, bias="all")), "hold all of .*bias"),
        (lambda p, f: optjax.load_adapters(f), "holds no adapter: looked for adapter_config.json"),
        (with_bad_file(lambda c, t: c.update(use_dora=True)), "adapter_config.json: optjax has no weight-decomposed"),
        (with_bad_file(lambda c, t: c.update(magic=[1])), "does not know magic of an adapter's config"),
        (with_bad_file(lambda c, t: c.update(peft_type="LOHA")), "peft_type is 'LOHA'"),
        (with_bad_file(lambda c, t: c.update(r=2)), r"lora_A.weight \(3, 12\): the config says rank 2"),
        (with_bad_file(lambda c, t: t.pop(first(t))), "has only one of lora_A and lora_B"),
        (with_bad_file(lambda c, t: t.update({"a.b": t[first(t)]})), "of no module that optjax adapts:\n  a.b"),
        (with_bad_file(lambda c, t: t.update({first(t): t[first(t)].astype(int)})), "int64"),
    ],
)
def test_errors(call, message, tmp_path):
    params = optjax.init_params(CONFIG, jax.random.key(0))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        call(params, tmp_path)


def other(**fields):
    """A model of another size."""
    config = CONFIG.replace(**dict(num_hidden_layers=1, hidden_size=8, num_attention_heads=2, ffn_dim=8) | fields)
    return optjax.init_params(config.replace(num_attention_heads=2), jax.random.key(0))


def test_bin_files_and_what_stays_when_saved(tmp_path):
    """PEFT's older .bin is read too; unmerging undoes merging; a config comes back as it was."""
    adapted, _, params = random_adapter(CONFIG, "causal_lm", tmp_path / "new", r=2, lora_dropout=0.25)
    quietly(lambda folder: adapted.save_pretrained(folder, safe_serialization=False), tmp_path / "old")
    new, old = (optjax.load_adapters(tmp_path / name) for name in ("new", "old"))
    assert not (tmp_path / "old" / "adapter_model.safetensors").exists() and old.config == new.config
    jax.tree.map(np.testing.assert_array_equal, old.weights, new.weights)
    again = optjax.unmerge_adapters(optjax.merge_adapters(params, new), new)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), again.weights, params.weights)
    mine = random_adapters(params, rank_pattern={"fc1": 2}, layers_to_transform=1, bias="lora_only")
    optjax.save_adapters(mine, tmp_path / "mine")
    back = optjax.load_adapters(tmp_path / "mine", "bfloat16")
    assert back.config == mine.config and back["layers"][1]["fc1"]["lora_A"].dtype == "bfloat16"
    assert jax.tree.structure(back) == jax.tree.structure(mine) and mine.count == sum(
        leaf.size for leaf in jax.tree.leaves(mine)
    )

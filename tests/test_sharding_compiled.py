"""What the compiler makes of decoding and training over devices: which collectives there are, and what they move."""

from __future__ import annotations

import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import optjax
from optjax.generation.decode import _decode_step, _prefill
from optjax.generation.loop import run_generate
from optjax.generation.settings import as_settings
from optjax.sharding import RULES, make_mesh
from optjax.sharding.plan.collectives import collectives
from optjax.sharding.plan.generation import abstract_cache
from optjax.train.optimizer import Recipe
from optjax.train.options import StepOptions
from optjax.train.state import abstract_state, train_step

B, S, D = 8, 64, 64


def config(layers: int, embed: int = D) -> optjax.OPTConfig:
    sizes = dict(vocab_size=256, hidden_size=D, num_attention_heads=4, ffn_dim=128, word_embed_proj_dim=embed)
    return optjax.OPTConfig(num_hidden_layers=layers, **sizes)


def abstract(layers: int, rules: str, mesh: str, embed: int = D):
    return optjax.abstract_params(config(layers, embed), mesh=make_mesh(mesh, jax.devices()[:8]), rules=rules)


def step(layers: int, rules: str = "tensor", mesh: str = "data=2,tensor=4", rows: int = B, embed: int = D) -> list:
    """The collectives of one decode step."""
    return step_of(abstract(layers, rules, mesh, embed), rows)


def step_of(params: optjax.Params, rows: int = B) -> list:
    placement = params.placement
    ids = jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=placement.fitting((rows,), ("batch",)))
    cache = abstract_cache(params.config, placement, rows, S, "float32")
    text = _decode_step.lower(params, ids, cache).compile().as_text()
    return collectives(text, dict(placement.mesh.shape))


def prefill(layers: int, rules: str, mesh: str, rows: int = B, length: int = S, embed: int = D) -> list:
    """The collectives of reading prompts into an empty cache."""
    params = abstract(layers, rules, mesh, embed)
    placement = params.placement
    lies = placement.fitting((rows, length), ("batch", None))
    prompt = [jax.ShapeDtypeStruct((rows, length), dtype, sharding=lies) for dtype in (jnp.int32, jnp.bool_)]
    cache = abstract_cache(params.config, placement, rows, S, "float32")
    text = _prefill.lower(params, *prompt, cache, None, "eager", True).compile().as_text()
    return collectives(text, dict(placement.mesh.shape))


def count(found: list, kind: str, axes: tuple[str, ...] | None = None) -> int:
    return sum(c.count for c in found if c.kind == kind and axes in (None, c.axes))


@pytest.mark.parametrize("rules", ["tensor", "fsdp+tensor+sequence"])
def test_two_sums_a_layer(rules):
    """One after attention, one after the feed-forward layer, of an activation's size; and one of the embedding's."""
    two, three = step(2, rules), step(3, rules)
    assert count(three, "all-reduce", ("tensor",)) - count(two, "all-reduce", ("tensor",)) == 2
    assert count(two, "all-reduce") <= 2 * 2 + 1
    assert all(c.kind == "all-reduce" for c in two + three), two
    assert max(c.bytes for c in three) <= B * D * 4


@pytest.mark.parametrize(
    ("rules", "mesh"),
    [("fsdp", "fsdp=8"), ("fsdp", "data=2,fsdp=2,sequence=2"), ("fsdp+tensor", "fsdp=4,tensor=2")],
)
@pytest.mark.parametrize("rows", [B, 1])
def test_to_decode_no_matrix_is_gathered(rules, mesh, rows):
    """The rows come to the parts of a matrix instead; a matrix is larger than what they have of the widest layer."""
    found = step(2, rules, mesh, rows, embed=32)
    assert max(c.bytes for c in found if c.kind == "all-gather") <= B * 128 * 4 < D * D // 2 * 4
    assert max(c.bytes for c in found) <= B * 256 * 4  # their logits


def test_to_decode_no_codes_are_gathered():
    found = step_of(optjax.quantize(abstract(2, "fsdp+tensor", "data=2,fsdp=2,tensor=2", embed=32), "int8"))
    # Looked-up rows are summed over the parts of the vocabulary: 16 codes for each of a device's rows.
    codes = [c for c in found if any(shape.startswith("s8") for shape in c.shapes)]
    assert all(c.kind == "all-reduce" and c.bytes <= B // 2 * 16 for c in codes), codes
    assert 0 < max(c.bytes for c in found if c.kind == "all-gather") <= B * 128 * 4


def test_to_read_many_tokens_a_weight_is_gathered_once():
    """Fully sharded: each matrix once, and no activation is summed over what splits the rows."""
    two, three = (prefill(layers, "fsdp", "fsdp=8") for layers in (2, 3))
    # q, k, v, out, fc1 and fc2, and what is small: norms, biases.
    more = count(three, "all-gather") - count(two, "all-gather")
    large = [sum(c.bytes >= D * D * 4 for c in found if c.kind == "all-gather") for found in (two, three)]
    assert 6 == large[1] - large[0] <= more <= 6 + 6 + 4, three
    assert max(c.bytes for c in three) <= 256 * D * 4
    assert count(three, "all-reduce") == count(two, "all-reduce")
    few = prefill(2, "fsdp", "fsdp=8", length=8)
    assert max(c.bytes for c in few if c.kind == "all-gather") <= B * 8 * 128 * 4 and count(few, "all-to-all") > 4


@pytest.mark.parametrize("options", [{}, dict(do_sample=True, top_k=5, top_p=0.9)], ids=["greedy", "sampled"])
def test_the_loop_of_generate_moves_no_weight(options):
    """Beside the sums of each layer there is what choosing a token takes: less than the logits of all rows."""
    params = abstract(2, "tensor", "data=2,tensor=4")
    settings = as_settings(params.config, options)
    key = jax.eval_shape(lambda: jax.random.key(0)) if settings.do_sample else None
    prompt = [jax.ShapeDtypeStruct((B, 16), dtype) for dtype in (jnp.int32, jnp.bool_)]
    number = jax.ShapeDtypeStruct((), jnp.int32)
    text = run_generate.lower(params, *prompt, settings, key, number, room=16).compile().as_text()
    found = collectives(text, dict(params.placement.mesh.shape))
    # The prompt's activations are the largest, in the prefill before the loop.
    assert max(c.bytes for c in found) <= max(B * 16 * D * 4, B * 256 * 4), found


def compile_training(layers: int, rules: str, mesh: str, **options):
    """A train step of ``B`` rows of 64 tokens, compiled; and its mesh."""
    placed = make_mesh(mesh, jax.devices()[:8])
    levers = StepOptions(remat="full", **options)
    state = abstract_state(config(layers).replace(dropout=0.0), levers, stacked=True, mesh=placed, rules=rules)
    rows = B * levers.micro_batches
    lies = state.params.placement.fitting((rows, 64), ("batch", None))
    ids = jax.ShapeDtypeStruct((rows, 64), jnp.int32, sharding=lies)
    recipe = Recipe(peak_lr=1e-3, total_steps=10, warmup_steps=1)
    return train_step.lower(state, {"input_ids": ids, "labels": ids}, recipe, 0, levers).compile(), dict(placed.shape)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_training_gathers_a_weight_twice(micro_batches):
    """Fully sharded: once forward, once backward, for each micro-batch; nothing of a weight's size is summed whole."""
    gathered = []
    for layers in (2, 3):
        compiled, mesh = compile_training(layers, "fsdp", "fsdp=8", micro_batches=micro_batches)
        found = collectives(compiled.as_text(), mesh)
        gathered.append(sum(c.total for c in found if c.kind == "all-gather"))
        # Not the table of positions, nor its gradient: to look up tokens their rows are exchanged, there and back.
        assert max(c.bytes for c in found) < 2050 * D * 4, found
        assert count(found, "all-to-all") == 2 * micro_batches
    layer = sum(weight.size for weight in optjax.declare(config(1)) if weight.per_layer) * 4
    assert layer <= (gathered[1] - gathered[0]) / micro_batches <= 2 * layer * 1.01


SILENT = """
import sys
sys.path.insert(0, "tests")
import test_sharding_compiled as tests
for rules, mesh in tests.SPREADS.items():
    print(rules, flush=True)
    tests.compile_training(2, rules, mesh, micro_batches=2)
    if rules != "data":
        tests.step(2, rules, mesh)
for rules, mesh, rows, length in tests.FEW_TOKENS:
    tests.prefill(2, rules, mesh, rows, length, embed=32)
"""
SPREADS = {
    "data": "data=2,fsdp=2,tensor=2",
    "fsdp": "data=2,fsdp=4",
    "tensor": "data=2,tensor=4",
    "fsdp+tensor": "fsdp=2,tensor=4",
    "fsdp+tensor+sequence": "data=2,fsdp=2,tensor=2",
}
# That come to the weights, in every way that rows and their length divide or not.
FEW_TOKENS = [
    ("fsdp", "fsdp=8", 1, 4),
    ("fsdp", "data=2,fsdp=2,sequence=2", 8, 4),
    ("fsdp", "data=2,fsdp=2,sequence=2", 1, 8),
    ("fsdp+tensor", "fsdp=4,tensor=2", 8, 2),
    ("fsdp+tensor+sequence", "fsdp=4,tensor=2", 1, 8),
    ("fsdp+tensor+sequence", "fsdp=2,sequence=2,tensor=2", 8, 4),
    ("fsdp+tensor+sequence", "fsdp=2,sequence=2,tensor=2", 3, 4),
]


def test_nothing_is_rematerialized_involuntarily(repository):
    """Where the partitioner knows no better than to gather an array whole, it says so on standard error."""
    assert SPREADS.keys() == RULES.keys()
    assert all(math.prod(int(part.split("=")[1]) for part in mesh.split(",")) == 8 for mesh in SPREADS.values())
    run = subprocess.run([sys.executable, "-c", SILENT], cwd=repository, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.split() == list(SPREADS)
    assert "rematerialization" not in run.stderr, run.stderr[-3000:]

"""Meshes and rules: what they make, and what they refuse."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

import optjax
from optjax import OPTConfig
from optjax.presets import PRESETS
from optjax.sharding import (
    AXES,
    LOGICAL_AXES,
    RULES,
    Placement,
    choose_mesh,
    make_mesh,
    make_placement,
    meshes,
    parse_mesh,
)
from optjax.sharding.fitting import MeshShape, misfit
from optjax.sharding.rules import as_rules

TINY = OPTConfig(vocab_size=64, hidden_size=24, num_hidden_layers=2, num_attention_heads=6, ffn_dim=48)


def eight() -> list:
    return jax.devices()[:8]


def test_sizes_of_a_mesh():
    assert parse_mesh("fsdp=16, tensor=8") == {"data": 1, "fsdp": 16, "sequence": 1, "tensor": 8}
    assert parse_mesh("fsdp=-1,tensor=2", 8)["fsdp"] == 4
    assert parse_mesh(None, 8) == parse_mesh({"fsdp": 8}) == parse_mesh("fsdp=8", 8)
    mesh = make_mesh("fsdp=2,tensor=4", eight())
    assert dict(mesh.shape) == {"data": 1, "fsdp": 2, "sequence": 1, "tensor": 4}
    assert mesh.axis_names == tuple(AXES) and set(mesh.axis_types) == {AxisType.Auto}
    assert sorted(d.id for d in mesh.devices.flat) == [d.id for d in eight()]


@pytest.mark.parametrize(
    ("spec", "devices", "message"),
    [
        ("fsdp=3", 8, "mesh fsdp=3 is for 3 devices, and there are 8"),
        ("fsdp=-1,tensor=3", 8, "a multiple of 3 devices"),
        ("model=8", 8, "no axis 'model'; there are: data, fsdp, sequence, tensor"),
        ("fsdp", 8, "'fsdp' is not axis=size"),
        ("fsdp=two", 8, "'fsdp=two' is not axis=size"),
        ("fsdp=0", 8, "should be a positive integer"),
        ({"fsdp": 2.0}, 8, "should be a positive integer"),
        ("fsdp=2,fsdp=4", 8, "named twice"),
        ("fsdp=-1,tensor=-1", 8, "only one mesh axis can be -1"),
        ("fsdp=-1", None, "depends on the number of devices"),
        (8, 8, "a mesh is given like 'fsdp=16,tensor=8'"),
        (["fsdp"], 8, "a mesh is given like 'fsdp=16,tensor=8'"),
    ],
)
def test_meshes_that_make_no_sense(spec, devices, message):
    with pytest.raises(ValueError, match=message):
        parse_mesh(spec, devices)


def test_a_mesh_of_no_devices():
    for spec in (None, "fsdp=1"):
        with pytest.raises(ValueError, match="at least one device, and there are none"):
            make_mesh(spec, [])


@pytest.mark.parametrize("rule", [3, {"tensor": 1}, ["tensor", 3]])
def test_a_rule_of_no_axes(rule):
    with pytest.raises(ValueError, match="the rule for 'mlp' should be a mesh axis, a tuple of them or None"):
        make_placement(make_mesh("tensor=8", eight()), {**RULES["tensor"], "mlp": rule}, TINY, None)


def test_every_mesh_of_so_many_devices():
    found = meshes(8, ("fsdp", "tensor"))
    assert [(m["fsdp"], m["tensor"]) for m in found] == [(1, 8), (2, 4), (4, 2), (8, 1)]
    assert len(meshes(8)) == 20  # of 2³ on four axes: 3 indistinguishable balls into 4 boxes
    assert all(np.prod(list(m.values())) == 8 for m in meshes(8))


def refuse(message, mesh="fsdp=2,tensor=4", rules=None, config=TINY, head="causal_lm"):
    mesh = make_mesh(mesh, eight()) if isinstance(mesh, str) else mesh
    with pytest.raises(ValueError, match=message):
        make_placement(mesh, rules, config, head)


def test_rules_that_make_no_sense():
    base = dict(RULES["tensor"])
    refuse("no rule set 'megatron'; there are: data, fsdp", rules="megatron")
    refuse("a name or a dict, not list", rules=[("mlp", "tensor")])
    refuse("no logical axis is named 'mpl'; did you mean 'mlp'", rules=base | {"mpl": "tensor"})
    refuse(
        "the rules say nothing of vocab, model", rules={k: v for k, v in base.items() if k not in ("vocab", "model")}
    )
    refuse("the rule for 'mlp' names mesh axis 'tensr'", rules=base | {"mlp": "tensr"})
    refuse("names a mesh axis twice", rules=base | {"mlp": ("tensor", "tensor")})
    refuse("splits 'batch' and 'heads', which are dimensions of the same", rules=base | {"batch": ("fsdp", "tensor")})
    refuse("no rule uses mesh axis 'tensor': its 4 groups", rules="fsdp")
    refuse("mesh should be a jax.sharding.Mesh", mesh=["cpu"])
    with pytest.raises(ValueError, match="pass mesh= too"):
        make_placement(None, "fsdp", TINY, None)
    assert make_placement(None, None, TINY, None) is None


def test_weights_that_do_not_fit():
    words = r"layers.self_attn.q_proj.weight \(24, 24\): heads = 6 does not divide into tensor=4"
    work = "fsdp=4,tensor=2; data=2,fsdp=2,tensor=2; data=4,tensor=2; fsdp=8; data=2,fsdp=4; data=4,fsdp=2 …"
    refuse(f"{words}; meshes of 8 devices that work: {work}")
    refuse("embed_tokens.weight .*: vocab = 50 does not divide into tensor=4", config=TINY.replace(vocab_size=50))
    rules = RULES["tensor"] | {"model": "tensor"}
    config = TINY.replace(num_attention_heads=8)
    words = "layers.self_attn.q_proj.weight .* 'tensor' splits both 'heads' and 'model'"
    refuse(words, mesh="tensor=8", rules=rules, config=config)
    # A part of each head's outputs, on every device.
    config = TINY.replace(num_attention_heads=2, hidden_size=12)
    words = r"q_proj.weight \(12, 12\): heads and model = 12 does not divide into tensor=2 × fsdp=4"
    refuse(f"{words}; meshes of 8 devices that work: data=2,fsdp=2,tensor=2", mesh="fsdp=4,tensor=2", config=config)
    odd = TINY.replace(num_attention_heads=3, hidden_size=21)
    refuse("embed = 21 does not divide into fsdp=8", mesh="fsdp=8", rules="fsdp", config=odd)


def test_matrices_with_heads_are_split_along_their_rows():
    """Over tensor by heads, and within a part over fsdp; so that what is gathered over fsdp are neighbouring rows."""
    mesh = make_mesh("fsdp=4,tensor=2", eight())
    placement = make_placement(mesh, None, TINY.replace(hidden_size=48), None)
    sharding = placement.sharding(next(w for w in optjax.declare(TINY) if "q_proj" in w.path).axes)
    for device, (rows, columns) in sharding.devices_indices_map((48, 48)).items():
        _, fsdp, _, tensor = (int(i[0]) for i in np.nonzero(mesh.devices == device))
        assert (rows.start, rows.stop) == (24 * tensor + 6 * fsdp, 24 * tensor + 6 * fsdp + 6)
        assert columns == slice(None)


def test_their_columns_are_split_on_a_tpu(monkeypatch):
    monkeypatch.setattr(Placement, "platform", "tpu")
    placement = make_placement(make_mesh("fsdp=4,tensor=2", eight()), None, TINY, None)
    axes = next(weight for weight in optjax.declare(TINY) if "fc1.weight" in weight.path).axes
    assert placement.sharding((None, *axes)).spec == PartitionSpec(None, "tensor", "fsdp")
    assert placement.gathered(axes).spec == PartitionSpec("tensor", None)


def test_errors_come_before_a_weight_is_made():
    mesh = make_mesh("tensor=8", eight())
    for make in (partial(optjax.init_params, TINY, jax.random.key(0)), partial(optjax.abstract_params, TINY)):
        with pytest.raises(ValueError, match="heads = 6 does not divide"):
            make(mesh=mesh)
        with pytest.raises(ValueError, match="pass mesh= too"):
            make(rules="fsdp")
    with pytest.raises(ValueError, match="does not divide into tensor=8"):
        optjax.load_params("opt-mini", mesh=mesh, rules=RULES["tensor"])


@pytest.mark.parametrize("name", PRESETS)
def test_published_sizes_fit_the_meshes_that_the_arithmetic_allows(name):
    """Powers of two that divide heads and vocabulary, and no others."""
    config = OPTConfig.preset(name)
    for tensor in (1, 2, 4, 8):
        placed = None
        try:
            placed = make_placement(
                make_mesh(f"fsdp={8 // tensor},tensor={tensor}", eight()), None, config, "causal_lm"
            )
        except ValueError as error:
            assert "does not divide" in str(error)
        assert (placed is not None) == (config.num_attention_heads % tensor == 0 and config.vocab_size % tensor == 0)


def test_every_logical_axis_of_a_weight_has_a_rule():
    for config in (TINY, TINY.replace(word_embed_proj_dim=12)):
        for head in ("causal_lm", "sequence_classification", "question_answering"):
            for weight in optjax.declare(config, head):
                assert weight.logical, weight.path
                assert set(weight.logical) <= LOGICAL_AXES.keys()
    assert all(set(rules) == set(LOGICAL_AXES) for rules in RULES.values())


def test_a_mesh_of_ones_own():
    """Explicit axes, as jax.make_mesh makes them, and other names."""
    devices = np.array(eight()).reshape(2, 4)
    explicit = Mesh(devices, ("fsdp", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    config = TINY.replace(num_attention_heads=8)
    params = optjax.init_params(config, jax.random.key(0), mesh=explicit)
    assert optjax.generate(params, np.full((2, 3), 5), max_new_tokens=2).shape == (2, 5)
    named = Mesh(devices, ("rows", "columns"))
    rules = dict.fromkeys(LOGICAL_AXES) | {"batch": "rows", "mlp": "columns"}
    params = optjax.init_params(config, jax.random.key(0), mesh=named, rules=rules)
    fc1 = params["layers"][0]["fc1"]["weight"]
    assert fc1.sharding.shard_shape(fc1.shape) == (12, 24)
    refuse(
        "does not divide into columns=4; choose other sizes",
        mesh=named,
        rules=rules | {"labels": "columns"},
        head="question_answering",
        config=config,
    )


def test_tokens_travel_while_they_are_less_than_the_weights():
    """By the numbers that devices of OPT-66b send where fsdp splits columns; and by the tokens of those that share."""
    width, layer = 9216, [(9216, 9216)] * 4 + [(4 * 9216, 9216), (9216, 4 * 9216)]
    for mesh, n, t, apart in (("fsdp=4,tensor=2", 4, 2, 1), ("fsdp=2,tensor=4", 2, 4, 1), ("data=2,fsdp=4", 4, 1, 2)):
        placement = make_placement(make_mesh(mesh, eight()), "fsdp+tensor", OPTConfig.preset("opt-66b"), None)
        weights = sum(rows * columns for rows, columns in layer) / t
        # The layer's input and the feed-forward's come in columns, and so leave; within, heads and F are in parts.
        token = 4 * width / n + (3 + 1 + 4 + 4) * width / t
        even = 1.5 * weights / token * apart
        few, many = (8, int(even * 0.99 / 8)), (8, int(even * 1.01 / 8))
        assert placement.tokens_travel(few, width) and not placement.tokens_travel(many, width)
        # Of an odd row every group of `data` has a copy.
        assert placement.tokens_of_sharing((8, 4)) == 32 / apart and placement.tokens_of_sharing((1, 4)) == 4
        # The head's outputs are many: it travels sooner.
        head = placement.tokens_travel_to_head
        assert head((8, 300 * apart), 50272, width) and not head(few, 50272, width)
    alone = make_placement(make_mesh("data=2,tensor=4", eight()), "fsdp+tensor", OPTConfig.preset("opt-66b"), None)
    assert not alone.tokens_travel((1, 1), width)  # nothing is gathered there


@pytest.mark.parametrize("name", PRESETS)
def test_a_mesh_for_a_size(name):
    """Whatever is chosen fits, and makes up the devices."""
    config = OPTConfig.preset(name)
    for job in ("train", "generate"):
        sizes = choose_mesh(config, 8, job)
        assert make_placement(make_mesh(sizes, eight()), None, config, "causal_lm") is not None
    small, large = OPTConfig.preset("opt-125m"), OPTConfig.preset("opt-175b")
    assert choose_mesh(small, 64, "generate") == parse_mesh("data=64")
    assert choose_mesh(small, 64) == parse_mesh("fsdp=64")
    assert choose_mesh(large, 16, "generate", memory=95e9) == parse_mesh("data=2,tensor=8")
    assert choose_mesh(large, 16, "generate", memory=77e9, fast=8) == parse_mesh("data=2,tensor=8")
    # Two groups of eight, of which none could hold all weights.
    assert choose_mesh(large, 16, "generate", memory=31e9, fast=8) == parse_mesh("fsdp=2,tensor=8")
    assert choose_mesh(large, 256)["tensor"] > 1
    # By rules that leave tensor idle, as by those that spread no weight over fsdp.
    assert choose_mesh(large, 256, rules="fsdp") == parse_mesh("fsdp=256")
    assert choose_mesh(large, 16, "generate", memory=31e9, rules="fsdp") == parse_mesh("fsdp=16")
    assert choose_mesh(large, 8, "generate", memory=95e9, rules=RULES["tensor"]) == parse_mesh("tensor=8")
    odd = RULES["fsdp"] | {"position": ("data", "fsdp")}  # no mesh of four fits them, which others say
    assert choose_mesh(large, 4, rules=odd) == choose_mesh(large, 4, "generate", rules=odd) == parse_mesh("data=4")
    with pytest.raises(ValueError, match="no rule set 'fdsp'"):
        choose_mesh(large, 256, rules="fdsp")
    with pytest.raises(ValueError, match="no rule uses mesh axis 'data'"):
        choose_mesh(large, 256, rules=RULES["fsdp"] | {"batch": "fsdp"})
    for bad in ((0, "train"), (8, "sing")):
        with pytest.raises(ValueError, match="at least one device|no job"):
            choose_mesh(large, *bad)


@pytest.mark.parametrize(
    ("sizes", "devices", "expected"),
    [
        # 14 rows of fc1 over two devices, not four; and 768 of queries over 256, however many devices there are.
        (dict(hidden_size=12, num_attention_heads=4, ffn_dim=14, vocab_size=96), 4, "data=2,fsdp=2"),
        (PRESETS["opt-125m"], 512, "data=2,fsdp=256"),
        # Ten columns of a table; nothing over seven.
        (
            dict(hidden_size=24, num_attention_heads=3, ffn_dim=48, vocab_size=51, word_embed_proj_dim=10),
            6,
            "fsdp=2,tensor=3",
        ),
        (dict(hidden_size=24, num_attention_heads=3, ffn_dim=48, vocab_size=51), 7, "data=7"),
    ],
)
def test_a_mesh_for_a_size_that_does_not_divide(sizes, devices, expected):
    """Of as many devices as every weight divides over, in copies."""
    config = OPTConfig(**sizes)
    assert choose_mesh(config, devices) == parse_mesh(expected)
    for job in ("train", "generate"):
        for memory in (16e9, 1e3):
            shape: Any = MeshShape(choose_mesh(config, devices, job, memory=memory))
            assert shape.size == devices
            assert misfit(Placement(shape, as_rules(None, shape)), config, "causal_lm") is None

"""Collectives read from compiled programs: counted, measured and attributed to mesh axes."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from optjax.sharding.plan.collectives import collectives
from optjax.sharding.plan.groups import axes_of, first_group
from optjax.sharding.plan.hlo import parse, parts, size
from optjax.sharding.plan.loops import runs

SIZES = {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 devices: XLA_FLAGS=--xla_force_host_platform_device_count=8")
    devices = np.array(jax.devices()[:8]).reshape(tuple(SIZES.values()))
    return Mesh(devices, tuple(SIZES), axis_types=(AxisType.Auto,) * 3)


def compiled(mesh: Mesh, function) -> str:
    """Of a function of one device's array, [16, 8] float32, 512 bytes, for all devices of the mesh."""
    mapped = jax.jit(jax.shard_map(function, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False))
    return mapped.lower(jax.ShapeDtypeStruct((16, 8), jnp.float32)).compile().as_text()


def seen(text: str, mesh: dict[str, int] = SIZES) -> Counter:
    """(kind, axes, bytes each time) and how often."""
    count: Counter = Counter()
    for each in collectives(text, mesh):
        count[each.kind, each.axes, each.bytes] += each.count
    return count


@pytest.mark.parametrize(
    "axes", [("data",), ("fsdp",), ("tensor",), ("data", "tensor"), ("fsdp", "tensor"), tuple(SIZES)]
)
def test_each_kind_over_each_axis(mesh: Mesh, axes: tuple[str, ...]):
    n = 2 ** len(axes)

    def gather(x):
        return jax.lax.all_gather(x, axes)

    def scatter(x):
        return jax.lax.psum_scatter(x, axes, tiled=True)

    def exchange(x):
        return jax.lax.all_to_all(x, axes, 0, 0, tiled=True)

    assert seen(compiled(mesh, lambda x: jax.lax.psum(x, axes))) == {("all-reduce", axes, 512): 1}
    assert seen(compiled(mesh, gather)) == {("all-gather", axes, 512 * n): 1}
    assert seen(compiled(mesh, scatter)) == {("reduce-scatter", axes, 512): 1}
    assert seen(compiled(mesh, exchange)) == {("all-to-all", axes, 512): 1}


def test_a_permutation_is_over_the_axis_of_its_ring(mesh: Mesh):
    text = compiled(mesh, lambda x: jax.lax.ppermute(x, "fsdp", [(0, 1), (1, 0)]))
    assert seen(text) == {("collective-permute", ("fsdp",), 512): 1}


def test_loops_multiply(mesh: Mesh):
    """Seven turns around five, three in another loop, and one outside."""

    def function(x):
        def inner(x, _):
            return jnp.sin(jax.lax.psum(x, "tensor")), None

        def outer(x, _):
            x, _ = jax.lax.scan(inner, x, None, length=5)
            return jnp.cos(jax.lax.psum(x, "data")), None

        x, _ = jax.lax.scan(outer, x, None, length=7)
        x = jax.lax.fori_loop(2, 5, lambda i, x: jnp.sin(jax.lax.all_gather(x, "fsdp", tiled=True)[:16]), x)
        return jax.lax.psum(x, ("data", "fsdp"))

    assert seen(compiled(mesh, function)) == {
        ("all-reduce", ("tensor",), 512): 35,
        ("all-reduce", ("data",), 512): 7,
        ("all-gather", ("fsdp",), 1024): 3,
        ("all-reduce", ("data", "fsdp"), 512): 1,
    }


def test_the_partitioners_own_collectives_are_seen(mesh: Mesh):
    """A product whose inner dimension is split over tensor, of weights that are split over fsdp too, in 3 layers."""

    @partial(jax.jit, out_shardings=NamedSharding(mesh, P("data", None)))
    def function(x, weights):
        def layer(x, weight):
            x = jax.lax.with_sharding_constraint(x @ weight, NamedSharding(mesh, P("data", None)))
            return jnp.tanh(x), None

        return jax.lax.scan(layer, x, weights)[0]

    def argument(shape, *spec):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))

    text = function.lower(argument((8, 16), "data", None), argument((3, 16, 16), None, "tensor", "fsdp")).compile()
    found = seen(text.as_text())
    assert found["all-reduce", ("tensor",), 4 * 4 * 16] == 3  # a device's rows of x, [4, 16]
    assert found["all-gather", ("fsdp",), 4 * 8 * 16] == 3  # its part of a weight, [8, 16]


def test_a_program_without_collectives_has_none():
    text = jax.jit(lambda x: (x @ x).sum()).lower(jnp.ones((8, 8))).compile().as_text()
    assert collectives(text, SIZES) == []


# What TPU and GPU programs look like, cut down to what is read; checked by hand.

HEAD = "HloModule jit_step, is_scheduled=true\n\n"


def entry(body: str) -> str:
    return "ENTRY %main (p: f32[8]) -> f32[8] {\n" + textwrap.indent(textwrap.dedent(body).strip("\n"), "  ") + "\n}\n"


def test_a_reduce_scatter_of_tpu_is_a_fusion():
    text = (
        HEAD
        + textwrap.dedent("""\
            %all-reduce-scatter.1 (input.1: bf16[8,512,2048]) -> bf16[8,128,2048] {
              %input.1 = bf16[8,512,2048]{2,1,0:T(8,128)(2,1)} parameter(0)
              %all-reduce.76 = bf16[8,512,2048]{2,1,0:T(8,128)(2,1)} all-reduce(%input.1), channel_id=11, replica_groups={{0,1,2,3},{4,5,6,7}}, use_global_device_ids=true, to_apply=%add.3.clone
              %partition-id = u32[]{:T(128)} partition-id()
              ROOT %dynamic-slice.384 = bf16[8,128,2048]{2,1,0:T(8,128)(2,1)S(1)} dynamic-slice(%all-reduce.76, %c, %i, %c), dynamic_slice_sizes={8,128,2048}
            }

        """)  # noqa: E501
        + entry("""
            %p = bf16[8,512,2048]{2,1,0:T(8,128)(2,1)} parameter(0)
            ROOT %fusion.1 = bf16[8,128,2048]{2,1,0:T(8,128)(2,1)S(1)} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1, metadata={op_name="jit(step)/mlp/dot_general"}
        """)  # noqa: E501
    )
    [found] = collectives(text, {"fsdp": 2, "tensor": 4})
    assert (found.kind, found.axes, found.bytes) == ("reduce-scatter", ("tensor",), 2 * 8 * 512 * 2048)
    assert found.op_name == "jit(step)/mlp/dot_general"


def test_fusions_that_start_and_finish_a_collective_repeat_it():
    collective = "all-gather(%x), channel_id=4, replica_groups=[4,8]<=[8,4]T(1,0), dimensions={0}"
    start, done = "%async-collective-start", "%async-collective-done"
    text = (
        HEAD
        + textwrap.dedent(f"""\
            %fused.1 (x: bf16[128,64]) -> (bf16[1024,64], u32[]) {{
              %x = bf16[128,64]{{1,0}} parameter(0)
              %all-gather.1 = bf16[1024,64]{{1,0:T(8,128)(2,1)}} {collective}
              ROOT %tuple.1 = (bf16[1024,64], u32[]) tuple(%all-gather.1, %x)
            }}

            %fused.2 (x.1: bf16[128,64]) -> bf16[1024,64] {{
              %x = bf16[128,64]{{1,0}} parameter(0)
              ROOT %all-gather.2 = bf16[1024,64]{{1,0:T(8,128)(2,1)}} {collective}
            }}

        """)
        + entry(f"""
            %p = bf16[128,64]{{1,0}} parameter(0)
            {start}.1 = (bf16[1024,64], u32[]) fusion(%p), kind=kCustom, calls=%fused.1
            ROOT {done}.1 = bf16[1024,64] fusion({start}.1), kind=kCustom, calls=%fused.2
        """)
    )
    [found] = collectives(text, {"fsdp": 8, "tensor": 4})
    assert (found.kind, found.axes, found.bytes, found.count) == ("all-gather", ("fsdp",), 2 * 1024 * 64, 1)
    assert found.overlapped


def test_a_line_may_be_broken_within_an_attribute():
    """As the metadata of a Pallas kernel is; what follows it still counts."""
    text = HEAD + entry("""
        %p = bf16[128,64]{1,0} parameter(0)
        %kernel = bf16[128,64] custom-call(%p), frontend_attributes={kernel_metadata={
    BREAK"block_q": 512
    BREAK}}, metadata={op_name="attend"}
        ROOT %all-gather.1 = bf16[1024,64]{1,0} all-gather(%kernel), replica_groups=[4,8]<=[8,4]T(1,0), dimensions={0}
    """)
    text = re.sub(r"\n *BREAK", "\n", text)
    assert "\n}}, metadata" in text
    host = '%host (q: f32[8]) -> f32[8] {\n  ROOT %q = f32[8] parameter(0)\n}, execution_thread="host"\n'
    text = text.replace("ENTRY", host + "ENTRY")
    [found] = collectives(text, {"fsdp": 8, "tensor": 4})
    assert (found.kind, found.bytes) == ("all-gather", 2 * 1024 * 64)
    module = parse(text)
    assert list(module.computations["host"].instructions) == ["q"]
    assert 'op_name="attend"' in module.computations[module.entry].instructions["kernel"].attributes


def test_two_halves_are_one_collective():
    text = HEAD + entry("""
        %p = bf16[128]{0} parameter(0)
        %ag = (bf16[128]{0}, bf16[512]{0:T(512)}) all-gather-start(%p), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
        %ag2 = ((bf16[128]{0}, f32[2]{0}), (bf16[512]{0}, /*index=1*/f32[8]{0})) all-gather-start(%p, %q), channel_id=2, replica_groups={{0,1,2,3}}, dimensions={0}
        %ar = (bf16[512]{0}, f32[8]{0}) all-reduce-start(%a, %b), channel_id=3, replica_groups={{0,1,2,3}}, to_apply=%add
        %cp = (bf16[128]{0:T(128)S(1)}, bf16[128]{0:T(128)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%p), channel_id=4, source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
        %d1 = bf16[512]{0} all-gather-done(%ag)
        %d2 = (bf16[512]{0}, f32[8]{0}) all-gather-done(%ag2)
        %d3 = (bf16[512]{0}, f32[8]{0}) all-reduce-done(%ar)
        %a2a = ((bf16[4,32]{1,0}), bf16[4,32]{1,0}) all-to-all-start(%p), channel_id=5, replica_groups={{0,1,2,3}}, dimensions={0}
        %d4 = bf16[128]{0} collective-permute-done(%cp)
        ROOT %d5 = bf16[4,32]{1,0} all-to-all-done(%a2a)
    """)  # noqa: E501
    found = collectives(text, {"tensor": 4})
    assert [each.bytes for each in found] == [1024, 1024 + 32, 1024 + 32, 256, 256]
    assert all(each.overlapped and each.axes == ("tensor",) for each in found)


def test_a_wrapped_collective_is_one():
    text = (
        HEAD
        + textwrap.dedent("""\
            %wrapped (x: f32[64]) -> f32[16] {
              %x = f32[64]{0} parameter(0)
              ROOT %rs = f32[16]{0} reduce-scatter(%x), channel_id=9, replica_groups=[1,4]<=[4], dimensions={0}, to_apply=%add
            }

        """)  # noqa: E501
        + entry("""
            %p = f32[64]{0} parameter(0)
            %s = ((f32[64]{0}), f32[16]{0}, u32[]) async-start(%p), calls=%wrapped
            %u = ((f32[64]{0}), f32[16]{0}, u32[]) async-update(%s), calls=%wrapped
            ROOT %d = f32[16]{0} async-done(%u), calls=%wrapped
        """)
    )
    [found] = collectives(text, {"tensor": 4})
    assert (found.kind, found.bytes, found.overlapped) == ("reduce-scatter", 256, True)


LOOP = """\
%cond (t: (u32[], f32[8])) -> pred[] {
  %t = (u32[], f32[8]{0}) parameter(0)
  %limit = u32[]{:T(128)} constant(%LIMIT)
  %i = u32[]{:T(128)} get-tuple-element(%t), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%body (t.1: (u32[], f32[8])) -> (u32[], f32[8]) {
  %t.1 = (u32[], f32[8]{0}) parameter(0)
  %i.1 = u32[]{:T(128)} get-tuple-element(%t.1), index=0
  %x = f32[8]{0} get-tuple-element(%t.1), index=1
  %ar = f32[8]{0} all-reduce(%x), channel_id=1, replica_groups={}, to_apply=%add
  %step = u32[]{:T(128)} constant(%STEP)
  %next = u32[]{:T(128)} add(%i.1, %step)
  ROOT %tuple = (u32[], f32[8]{0}) tuple(%next, %ar)
}

"""


@pytest.mark.parametrize(
    ("start", "limit", "step", "turns"), [(0, 96, 1, 96), (0, 8, 2, 4), (1, 8, 2, 4), (3, 3, 1, 0)]
)
def test_a_loops_turns_are_read_from_its_condition(start: int, limit: int, step: int, turns: int):
    """TPU programs do not note them; the compiler unrolls some loops, which then count by more than one."""
    text = (
        HEAD
        + LOOP.replace("%LIMIT", str(limit)).replace("%STEP", str(step))
        + entry(f"""
            %p = f32[8]{{0}} parameter(0)
            %start = u32[]{{:T(128)}} constant({start})
            %t0 = (u32[]{{:T(128)}}, /*index=1*/f32[8]{{0}}) tuple(%start, %p)
            %w = (u32[]{{:T(128)}}, f32[8]{{0}}) while(%t0), condition=%cond, body=%body
            ROOT %r = f32[8]{{0}} get-tuple-element(%w), index=1
        """)
    )
    found = collectives(text, {"tensor": 4})
    assert sum(each.count for each in found) == turns
    assert runs(parse(text))["body"] == turns


def test_a_noted_trip_count_goes_first():
    note = 'backend_config={"known_trip_count":{"n":"12"},"known_init_step":{"init":"0","step":"1"}}'
    text = (
        HEAD
        + LOOP.replace("%LIMIT", "99").replace("%STEP", "1")
        + entry(f"""
            %p = f32[8]{{0}} parameter(0)
            %t0 = (u32[], f32[8]{{0}}) tuple(%zero, %p)
            %w = (u32[], f32[8]{{0}}) while(%t0), condition=%cond, body=%body, {note}
            ROOT %r = f32[8]{{0}} get-tuple-element(%w), index=1
        """)
    )
    assert [each.count for each in collectives(text, {"tensor": 4})] == [12]


MESH = {"data": 2, "fsdp": 4, "tensor": 8}


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("{{0,1,2,3,4,5,6,7},{8,9,10,11,12,13,14,15}}", ("tensor",)),
        ("{{0,8,16,24},{1,9,17,25}}", ("fsdp",)),
        ("{{0,32},{1,33}}", ("data",)),
        ("{}", ("data", "fsdp", "tensor")),
        ("[8,8]<=[64]", ("tensor",)),
        ("[16,4]<=[2,4,8]T(0,2,1)", ("fsdp",)),
        ("[32,2]<=[2,32]T(1,0)", ("data",)),
        ("[8,8]<=[8,8]T(1,0)", ("data", "fsdp")),
        ("mesh['a'=8,'b'=8] {'b'}", ("tensor",)),
        ("mesh['a'=8,'b'=8] {'a'}", ("data", "fsdp")),
        ("mesh['a'=2,'b'=4,'c'=8] {'a','c'}", ("data", "tensor")),
        ("mesh['a'=64] {'a':(2)4}", ("fsdp",)),
        ("mesh['a'=64] {'a':(1)2,'a':(8)8}", ("data", "tensor")),
        ("mesh['a'=8,'b'=8], device_ids=([8,8]T(1,0)) {'a'}", ("tensor",)),
        ("mesh['a'=4,'b'=1,'c'=16], device_ids=([2,4,8]T(1,0,2)) {'a','b'}", ("fsdp",)),
        ("mesh['a'=4,'b'=1,'c'=16], device_ids=([2,4,8]T(1,0,2)) {'c'}", ("data", "tensor")),
    ],
)
def test_groups_in_every_form(groups: str, axes: tuple[str, ...]):
    group = first_group(f", channel_id=1, replica_groups={groups}, dimensions={{0}}", MESH)
    assert axes_of(group, MESH) == axes
    assert len(group) == np.prod([MESH[name] for name in axes])


def test_groups_in_a_form_that_is_not_known_are_an_error():
    with pytest.raises(ValueError, match="unknown form"):
        first_group(", replica_groups=<something new>", MESH)


def test_shapes():
    assert size("bf16[8,2048]{1,0:T(8,128)(2,1)S(1)}") == 2 * 8 * 2048
    assert size("(f32[2]{0}, /*index=1*/s8[3]{0}, pred[], u32[]{:T(128)})") == 8 + 3 + 1 + 4
    assert size("s4[16]") == 8 and size("f8e4m3fn[16]") == 16 and size("token[]") == 0
    assert parts("((f32[2]{0:T(2)}, s8[3]), f32[1,2]{1,0})") == ["(f32[2]{0:T(2)}, s8[3])", "f32[1,2]{1,0}"]


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        parse("nothing")

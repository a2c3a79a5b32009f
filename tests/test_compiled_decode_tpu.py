"""Decoding as the TPU compiler sees it: two layers of OPT-1.3b's width in bfloat16, for a v5e that is not there.

Needs the libtpu wheel (``pip install 'jax[tpu]'``), and no TPU: nothing is run.
"""

from __future__ import annotations

import itertools
import json

import pytest
from decode_programs import BUFFER_BYTES, COLUMNS, LAYERS, ROWS, check_codes, report
from tpu_compiler import ask

SEARCHES = {"beams": dict(num_beams=4), "contrastive": dict(penalty_alpha=0.6, top_k=4)}


pytestmark = pytest.mark.tpu_compiler


kinds = pytest.mark.parametrize("kind", ["eager", "auto"])


@pytest.fixture(scope="module")
def programs() -> dict:
    return ask(__file__)


@pytest.mark.parametrize("program", ["flat", "flat by a kernel"])
def test_a_step_has_no_temporary_of_the_caches_size(programs, program):
    assert programs[program]["temporary"] < 0.1 * BUFFER_BYTES
    assert programs[program]["kernels"] == (LAYERS if program.endswith("kernel") else 0)


@kinds
def test_the_cache_is_never_copied(programs, kind):
    """In the step, and in the body of generate's loop; moving a buffer into fast memory is no copy."""
    assert programs["flat" if kind == "eager" else "flat by a kernel"]["copies"] == 0
    assert programs[f"loop {kind}"]["copies"] == 0
    assert programs[f"loop {kind}"]["kernels"] == (0 if kind == "eager" else LAYERS)


@kinds
@pytest.mark.parametrize("search", SEARCHES)
def test_no_search_copies_the_cache(programs, search, kind):
    """Beams and candidates are queries of one row, and the flat keys serve them where they lie."""
    assert programs[f"{search} {kind}"]["copies"] == 0
    assert programs[f"{search} {kind}"]["kernels"] == (0 if kind == "eager" else LAYERS)


def test_an_int8_cache_is_read_as_it_is(programs):
    check_codes(programs["v5e int8"], programs["v5e bfloat16"])


def test_a_prompt_holds_the_keys_of_a_layer_at_a_time(programs):
    """They are written to the cache at once: two layers more take no more memory, where theirs would be 134 MB."""
    assert programs["prompt, 4 layers"]["temporary"] < programs["prompt, 2 layers"]["temporary"] + 20e6


def test_an_int8_cache_takes_less_time(programs):
    """By the compiler's own estimate of a step that reads weights, too."""
    assert programs["v5e int8"]["cycles"] < 0.8 * programs["v5e bfloat16"]["cycles"]


def test_the_flat_layout_is_why_it_is_there(programs):
    """By the compiler's own estimate a step over heads takes longer by half at least."""
    assert programs["heads"]["cycles"] > 1.5 * programs["flat"]["cycles"]


def test_one_row_goes_to_the_matrix_unit(programs):
    """By the compiler's own estimate a step of one row takes less time than one of eight, whose cache is larger."""
    assert programs["one row"]["cycles"] < programs["flat"]["cycles"]


def test_the_best_score_stays_float32(programs):
    """An argmax whose maximum nobody reads is declared bfloat16 by the compiler: see generation/draw.py."""
    assert programs["loop auto"]["bfloat16 maxima"] == 0


def prompts_on_many(described) -> dict:
    """Prompts into an empty cache, over chips that share the heads: while they talk, the compiler moves what it can."""
    import jax
    import jax.numpy as jnp

    import optjax
    from optjax.generation.decode import _prefill
    from optjax.sharding import make_mesh

    mesh, found = make_mesh("tensor=4", described), {}
    for layers in (2, 4):
        config = optjax.OPTConfig.preset("opt-1.3b", num_hidden_layers=layers)
        params = optjax.abstract_params(config, jnp.bfloat16, mesh=mesh)

        def place(x, placement=params.placement):
            axes = {0: (), 1: ("batch",), 2: ("batch", None), 3: ("batch", None, "heads")}[x.ndim]
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placement.fitting(x.shape, axes))

        empty = jax.eval_shape(lambda: optjax.init_cache(config, 32, 1024, jnp.bfloat16, layout="flat"))  # noqa: B023
        ids = place(jax.ShapeDtypeStruct((32, 512), jnp.int32))
        program = _prefill.lower(params, ids, None, jax.tree.map(place, empty), None, "auto", no_past=True)
        found[f"prompt, {layers} layers"] = report(program.compile())
    return found


def main() -> None:
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    import optjax
    from optjax.generation.beam import run_beams
    from optjax.generation.decode import _decode_step
    from optjax.generation.loop import run_generate
    from optjax.generation.settings import as_settings
    from optjax.sharding import make_mesh

    chips = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    # A mesh of one chip tells the model what it is compiled for.
    mesh = make_mesh("", chips[:1])
    there = jax.NamedSharding(mesh, jax.P())

    def place(tree):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there), tree)

    config = optjax.OPTConfig.preset("opt-1.3b", num_hidden_layers=LAYERS)
    params = optjax.abstract_params(config, jnp.bfloat16, mesh=mesh)
    found = prompts_on_many(chips)
    for layout in ("heads", "flat"):
        empty = jax.eval_shape(lambda: optjax.init_cache(config, ROWS, COLUMNS, jnp.bfloat16, layout=layout))  # noqa: B023
        ids = jax.ShapeDtypeStruct((ROWS,), jnp.int32, sharding=there)
        found[layout] = report(_decode_step.lower(params, ids, place(empty), "eager").compile())
    found["flat by a kernel"] = report(_decode_step.lower(params, ids, place(empty)).compile())
    one = jax.eval_shape(lambda: optjax.init_cache(config, 1, COLUMNS, jnp.bfloat16, layout="flat"))
    ids = jax.ShapeDtypeStruct((1,), jnp.int32, sharding=there)
    found["one row"] = report(_decode_step.lower(params, ids, place(one), "eager").compile())
    prompt = [jax.ShapeDtypeStruct((ROWS, 64), dtype, sharding=there) for dtype in (jnp.int32, jnp.bool_)]
    number = jax.ShapeDtypeStruct((), jnp.int32, sharding=there)
    for (name, options), kind in itertools.product(({"loop": {}} | SEARCHES).items(), ("eager", "auto")):
        settings = as_settings(config, options | {"attn_implementation": kind})
        run = run_generate if settings.beams is None else run_beams
        columns = (COLUMNS - 64) // 4 if settings.beams else COLUMNS - 64 - (4 if settings.contrastive else 0)
        loop = run.lower(params, *prompt, place(settings), None, number, room=columns).compile()
        found[f"{name} {kind}"] = report(loop, body_of_loop=True)
    for dtype in ("bfloat16", "int8"):
        empty = jax.eval_shape(lambda: optjax.init_cache(config, ROWS, COLUMNS, dtype, layout="flat"))  # noqa: B023
        ids = jax.ShapeDtypeStruct((ROWS,), jnp.int32, sharding=there)
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((empty.keys, empty.values)))
        compiled = _decode_step.lower(params, ids, place(empty), "eager").compile()
        found[f"v5e {dtype}"] = report(compiled) | {"cache": size}
    print(json.dumps(found))


if __name__ == "__main__":
    main()

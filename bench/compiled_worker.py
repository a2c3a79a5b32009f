"""Compiles decode steps for chips that are not here. Run as a process of its own by `bench.decode_compiled`.

Reads a list of `Case`s in JSON on standard input; prints a line of JSON for each program: what the compiler says of it.
libtpu reads its environment when jax is imported, and a compiler may crash.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
import traceback
from dataclasses import dataclass
from functools import partial
from typing import Any

SLICES = {"v5e": "v5e:1x1", "v5p": "v5p:2x2x1", "v6e": "v6e:1x1", "h100": "h100:1"}
DEAREST = 3


@dataclass(frozen=True)
class Case:
    """A decode step: one more token for each row, over a cache of ``context`` columns, all of which are attended to.

    Attributes:
      side: ``"optjax"``, ``"flax"``, or ``"products"``: no model, but a plain product with each matrix and each cache.
      size: of `optjax.OPTConfig.preset`, without ``opt-``.
      chip: one of `SLICES`.
      batch, context: rows, and columns of the cache.
      layers: how many the program has.
      dtype: of weights, cache and computation.
      quantization, cache_dtype: of optjax's side alone; None for ``dtype``.
    """

    side: str
    size: str
    chip: str
    batch: int
    context: int
    layers: int
    dtype: str = "bfloat16"
    quantization: str | None = None
    cache_dtype: str | None = None


def main() -> None:
    # What compilers and libraries print goes to standard error: the answers are alone on standard output.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for each in json.load(sys.stdin):
        try:
            found = look(Case(**each))
        except Exception as error:
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        print(json.dumps(found), file=answers, flush=True)


def look(case: Case) -> dict[str, Any]:
    """Compiles a case: bytes, temporaries, and the compiler's estimate."""
    import jax

    import optjax
    from optjax.sharding import make_mesh
    from optjax.sharding.plan import described_devices, estimated_cycles, parse_topology

    topology = parse_topology(SLICES[case.chip])
    gpu = topology.chip.platform == "gpu"
    mesh = make_mesh("", described_devices(topology)[:1])  # tells optjax what it is compiled for
    config = optjax.OPTConfig.preset(
        "opt-" + case.size,
        num_hidden_layers=case.layers,
        max_position_embeddings=max(2048, case.context),
    )
    sharding = jax.NamedSharding(mesh, jax.P())
    step, arguments, donated, groups = SIDES[case.side](case, config, mesh)
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments)
    start = time.perf_counter()
    lowered = jax.jit(step, donate_argnums=donated).lower(*placed)
    compiled = lowered.compile()
    memory: Any = compiled.memory_analysis()
    found = {
        "temporaries": memory.temp_size_in_bytes,
        "peak": memory.peak_memory_in_bytes,
        "seconds": time.perf_counter() - start,
        **{name: nbytes(tree) for name, tree in groups.items()},
    }
    if not gpu:
        operations = estimated_cycles(compiled.as_text() or "")
        found["cycles"] = sum(each.cycles for each in operations)
        found["accessed"] = int((compiled.cost_analysis() or {}).get("bytes accessed", 0))
        found["dearest"] = [[each.cycles, each.name, each.shape, each.source] for each in operations[:DEAREST]]
    return found


def optjax_step(case: Case, config: Any, mesh: Any) -> tuple[Any, tuple, Any, dict[str, Any]]:
    """Function, arguments, which is donated, and what a step must read: weights and cache."""
    import jax
    import jax.numpy as jnp

    import optjax

    params = optjax.abstract_params(config, case.dtype, mesh=mesh)
    if case.quantization:
        params = optjax.quantize(params, case.quantization)
    layout = "heads" if case.chip == "h100" else "flat"
    kept = case.cache_dtype or case.dtype
    cache = jax.eval_shape(lambda: optjax.init_cache(config, case.batch, case.context, kept, layout=layout))
    read = {name: each for name, each in params.weights.items() if name != "embed_positions"}
    ids = jax.ShapeDtypeStruct((case.batch,), jnp.int32)
    # By the plain path: of what a kernel takes the compiler has no estimate.
    step = partial(optjax.decode_step, attn_implementation="eager")
    return step, (params, ids, cache), 2, {"weights": read, "cache": cache}


def products(case: Case, config: Any, mesh: Any) -> tuple[Any, tuple, Any, dict[str, Any]]:
    """One plain product with each matrix, and with each row's keys and values, of shapes as a decode step has them.

    No norms, biases or softmax, and no product waits for another: what reading all that costs at least, by the same
    estimate.
    """
    import jax
    import jax.numpy as jnp

    import optjax

    params = optjax.abstract_params(config, case.dtype, mesh=mesh)
    cache = jax.eval_shape(lambda: optjax.init_cache(config, case.batch, case.context, case.dtype, layout="flat"))
    read = {name: each for name, each in params.weights.items() if name != "embed_positions"}
    matrices = [leaf for leaf in jax.tree.leaves(read) if len(leaf.shape) == 2]
    rows = max(case.batch, 8)  # a product with one row would not be on the matrix unit

    def some(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, case.dtype)

    tokens = [some(rows, matrix.shape[1]) for matrix in matrices]
    heads, width = config.num_attention_heads, config.hidden_size
    queries = [some(case.batch, width, heads) for _ in cache.keys]
    weights = [some(case.batch, heads, case.context) for _ in cache.keys]

    def multiply(matrices, keys, values, tokens, queries, weights):
        projected = [jnp.einsum("ri,oi->ro", x, matrix) for x, matrix in zip(tokens, matrices, strict=True)]
        scores = [jnp.einsum("bsd,bdh->bhs", k, q) for k, q in zip(keys, queries, strict=True)]
        sums = [jnp.einsum("bhs,bsd->bhd", w, v) for w, v in zip(weights, values, strict=True)]
        return projected, scores, sums

    arguments = matrices, cache.keys, cache.values, tokens, queries, weights
    return multiply, arguments, (), {"weights": matrices, "cache": [cache.keys, cache.values]}


def flax_step(case: Case, config: Any, mesh: Any) -> tuple[Any, tuple, Any, dict[str, Any]]:
    """The body of FlaxOPT's generate, without the choice of a token: its model over a cache and a static mask."""
    import jax
    import jax.numpy as jnp
    import transformers

    transformers.logging.set_verbosity_error()
    model: Any = transformers.FlaxOPTForCausalLM(
        transformers.OPTConfig(**config.to_dict()), dtype=jnp.dtype(case.dtype), _do_init=False
    )

    def some(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    made = jax.eval_shape(
        model.module.init, jax.eval_shape(lambda: jax.random.key(0)), some(1, 1), some(1, 1), some(1, 1)
    )
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, case.dtype), made["params"])
    cache = jax.eval_shape(lambda: model.init_cache(case.batch, case.context))

    def step(params, ids, attention_mask, position_ids, cache):
        out = model(ids, attention_mask=attention_mask, position_ids=position_ids, params=params, past_key_values=cache)
        return out.logits[:, -1], out.past_key_values

    arguments = params, some(case.batch, 1), some(case.batch, case.context), some(case.batch, 1), cache
    decoder = params["model"]["decoder"]
    read = {name: each for name, each in decoder.items() if name != "embed_positions"}
    return step, arguments, 4, {"weights": read, "cache": cache}


SIDES = {"optjax": optjax_step, "flax": flax_step, "products": products}


def nbytes(tree: Any) -> int:
    import jax
    import jax.numpy as jnp

    def one(x: Any) -> int:
        bits = jnp.iinfo(x.dtype).bits if jnp.issubdtype(x.dtype, jnp.integer) else 8 * x.dtype.itemsize
        return -(-math.prod(x.shape) * bits // 8)

    return sum(map(one, jax.tree.leaves(tree)))


if __name__ == "__main__":
    main()

"""What XLA makes of decoding: no temporary of the cache's size, no copy of a weight, in any compiled decode step."""

from __future__ import annotations

import math
import re

import jax
import jax.numpy as jnp
import pytest
from compilations import AS_USERS_DO

import optjax
from optjax.attention_products import BLOCK
from optjax.cache import init_cache
from optjax.generation.beam import run_beams
from optjax.generation.decode import _decode_step, _prefill
from optjax.generation.loop import run_generate
from optjax.generation.settings import as_settings

# Two layers of OPT-125m's width. Numbers of elements tell the cache's buffers, the weights and all else apart.
CONFIG = optjax.OPTConfig.preset("opt-125m", num_hidden_layers=2, vocab_size=4096)
D, LAYERS = CONFIG.hidden_size, CONFIG.num_hidden_layers
COLUMNS = 1088


def buffer_size(rows: int, columns: int = COLUMNS) -> int:
    """Elements of the keys or values of one layer."""
    return rows * columns * D


def compile_step(rows: int, dtype=None):
    params = optjax.abstract_params(CONFIG)
    cache = jax.eval_shape(lambda: init_cache(CONFIG, rows, COLUMNS, dtype, layout="heads"))
    return _decode_step.lower(params, jax.ShapeDtypeStruct((rows,), jnp.int32), cache).compile(
        compiler_options=AS_USERS_DO
    )


def compile_loop(rows: int, room: int = 64, **options):
    settings = as_settings(CONFIG, options)
    new = room
    if settings.beams:
        new *= settings.beams.num_beams
    if settings.contrastive:
        new += settings.contrastive.candidates
    shape = rows, COLUMNS - new
    run = run_generate if settings.beams is None else run_beams
    ids, mask = jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.bool_)
    key = jax.eval_shape(lambda: jax.random.key(0)) if settings.do_sample else None
    number = jax.ShapeDtypeStruct((), jnp.int32)
    params = optjax.abstract_params(CONFIG)
    return run.lower(params, ids, mask, settings, key, number, room=room).compile(compiler_options=AS_USERS_DO)


def computations(text: str) -> dict[str, list[str]]:
    """The lines of each computation of a program, by its name; ``ENTRY`` is the program's own."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith((" ", "HloModule")):
            name = "ENTRY" if line.startswith("ENTRY") else line.split(" ")[0]
            found[name] = lines = []
        elif line.startswith(" "):
            lines.append(line.strip())
    return found


def large_results(lines: list[str], least: int) -> list[tuple[str, int, str]]:
    """Operation, elements and line of each instruction that makes an array of ``least`` elements or more."""
    made = []
    for line in lines:
        match = re.match(r"(?:ROOT )?%\S+ = \w+\[([\d,]*)\]\S* ([\w-]+)\(", line)
        if match and match[2] not in ("parameter", "get-tuple-element", "bitcast", "constant"):
            size = 1
            for n in filter(None, match[1].split(",")):
                size *= int(n)
            if size >= least:
                made.append((match[2], size, line))
    return made


def check_body(
    lines: list[str], every: dict[str, list[str]], rows: int, times: int = 1, columns: int = COLUMNS
) -> None:
    """Of results as large as a weight or a buffer there are the writes of keys and values, one (or ``times``) each a
    layer."""
    least = min(D * D, buffer_size(rows, columns))
    writes = 0
    for operation, size, line in large_results(lines, least):
        called = re.search(r"calls=(%[\w.]+)", line)
        steps = large_results(every[called[1]], least) if called else [(operation, size, line)]
        is_write = [step[:2] for step in steps] == [("dynamic-update-slice", buffer_size(rows, columns))]
        assert is_write, f"not a write: {line[:250]}"
        writes += 1
    assert writes == 2 * LAYERS * times, f"{writes} writes of keys and values in {LAYERS} layers"


@pytest.mark.parametrize("rows", [1, 8])
def test_decode_step(rows):
    compiled = compile_step(rows)
    memory = compiled.memory_analysis()
    assert memory is not None
    # All buffers of the cache are updated in place.
    assert memory.alias_size_in_bytes >= 2 * LAYERS * buffer_size(rows) * 4
    assert memory.temp_size_in_bytes < min(0.1 * buffer_size(rows) * 4, D * D * 4)
    every = computations(compiled.as_text())
    check_body(every["ENTRY"], every, rows)


@pytest.mark.parametrize("rows", [2, 8])
def test_a_few_rows_are_multiplied_from_the_left(rows):
    """In every product of a weight with a few rows the weight comes first: so XLA reads it up to twice as fast."""
    text = compile_step(rows).as_text()
    shapes = dict(re.findall(r"(%\S+) = f32\[([\d,]*)\]", text))
    operands = re.findall(r" dot\((?:f32\S+ )?(%[^ ,]+), (?:f32\S+ )?(%[^ ,)]+)\)", text)
    products = [(shapes[a], shapes[b]) for a, b in operands]
    weights = [pair for pair in products if any(shape.count(",") == 1 and D * D <= _size(shape) for shape in pair)]
    assert len(weights) == 6 * LAYERS + 1
    assert all(_size(left) > _size(right) for left, right in weights), weights


def _size(shape: str) -> int:
    return math.prod(map(int, shape.split(",")))


@pytest.mark.parametrize("rows", [1, 8])
def test_decode_step_with_an_int8_cache(rows):
    """Codes are written in place, and cast a few heads at a time: never a buffer of them at once."""
    compiled = compile_step(rows, "int8")
    memory = compiled.memory_analysis()
    assert memory is not None
    scales = rows * CONFIG.num_attention_heads * COLUMNS
    assert memory.alias_size_in_bytes >= 2 * LAYERS * (buffer_size(rows) + 4 * scales)
    assert memory.temp_size_in_bytes < 8 * BLOCK
    every = computations(compiled.as_text())
    check_body(every["ENTRY"], every, rows)


SAMPLED = dict(do_sample=True, top_p=0.9, typical_p=0.9, repetition_penalty=1.2, no_repeat_ngram_size=3)


@pytest.mark.parametrize("rows, options", [(1, {}), (8, {}), (1, SAMPLED)], ids=["1", "8", "1, sampled"])
def test_loop_of_generate(rows, options):
    """The while loop's body: copies of the cache may stand before the loop, not in it."""
    every = computations(compile_loop(rows, **options).as_text())
    # The prompt has loops of its own, over blocks of queries.
    loops = [line for line in every["ENTRY"] if re.search(r" while\(", line) and "prefill" not in line]
    [loop] = [line for line in loops if f",{COLUMNS},64]" in line]
    body = re.search(r"body=(%[\w.]+)", loop)
    assert body is not None
    check_body(every[body[1]], every, rows)


@pytest.mark.parametrize("rows", [1, 8])
def test_a_long_loop_begins_with_a_small_cache(rows):
    """Two loops, over half of the columns and over all, and neither copies a buffer."""
    every = computations(compile_loop(rows, room=1024).as_text())
    loops = [line for line in every["ENTRY"] if re.search(r" while\(", line) and "prefill" not in line]
    for columns in (COLUMNS // 2, COLUMNS):
        buffer = f"f32[{CONFIG.num_attention_heads},{columns},64]" if rows == 1 else f",{columns},64]"
        [loop] = [line for line in loops if buffer in line]
        body = re.search(r"body=(%[\w.]+)", loop)
        assert body is not None
        check_body(every[body[1]], every, rows, columns=columns)


# Of contrastive search the candidates' columns are written, then the chosen one's.
SEARCHES = [
    (1, dict(num_beams=4), 1),
    (3, dict(num_beams=4, num_beam_groups=2, diversity_penalty=1.0), 1),
    (1, dict(penalty_alpha=0.6, top_k=4), 2),
]


@pytest.mark.parametrize("rows, options, times", SEARCHES, ids=["beams", "groups", "contrastive"])
def test_loop_of_a_search(rows, options, times):
    """Beams are never reordered by moving keys and values, and candidates are no rows of their own."""
    every = computations(compile_loop(rows, **options).as_text())
    [loop] = [line for line in every["ENTRY"] if re.search(r" while\(", line) and f",{COLUMNS},64]" in line]
    body = re.search(r"body=(%[\w.]+)", loop)
    assert body is not None
    # The hidden states that candidates are compared with are written in place, too.
    context = f"dynamic-update-slice_fusion.1 = f32[{rows},{COLUMNS - 4},{D}]"
    check_body([line for line in every[body[1]] if context not in line], every, rows, times)


def test_the_check_sees_copies():
    """A step that copies one weight, or keeps the old cache, is found out."""
    params = optjax.abstract_params(CONFIG)
    cache = jax.eval_shape(lambda: init_cache(CONFIG, 8, COLUMNS, layout="heads"))
    ids = jax.ShapeDtypeStruct((8,), jnp.int32)
    kept = (
        jax.jit(_decode_step.__wrapped__).lower(params, ids, cache).compile(compiler_options=AS_USERS_DO)
    )  # not donated
    every = computations(kept.as_text())
    with pytest.raises(AssertionError, match="not a write"):
        check_body(every["ENTRY"], every, 8)
    stacked = _decode_step.lower(optjax.abstract_params(CONFIG, stacked=True), ids, cache).compile(
        compiler_options=AS_USERS_DO
    )
    every = computations(stacked.as_text())
    with pytest.raises(AssertionError, match="not a write"):
        check_body(every["ENTRY"], every, 8)


@pytest.mark.parametrize("layout", ["heads", "flat"])
def test_a_prompt_looks_at_its_own_columns(layout):
    """Nothing else is in an empty cache, however long it is, and whether it rounds them or not."""
    tokens, columns = 48, COLUMNS

    def scores(dtype, no_past: bool) -> bool:
        params, ids = optjax.abstract_params(CONFIG), jax.ShapeDtypeStruct((2, tokens), jnp.int32)
        cache = jax.eval_shape(lambda: init_cache(CONFIG, 2, columns, dtype, layout=layout))
        text = _prefill.lower(params, ids, None, cache, None, "eager", no_past).compile().as_text()
        return re.search(rf"f32\[(\d+,)*{tokens},{columns}\]", text) is not None

    assert not scores(None, no_past=True)
    assert not scores("bfloat16", no_past=True) and not scores("int8", no_past=True)
    assert scores(None, no_past=False) and scores("int8", no_past=False)

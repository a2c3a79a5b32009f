"""bfloat16 and float16: close to float32, finite where transformers is not, and float32 where it matters."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hf_models import params_from, state_of, torch_model

import optjax
from optjax import OPTConfig
from optjax.attention_products import key_products

CONFIG = OPTConfig(
    vocab_size=60,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    ffn_dim=64,
    max_position_embeddings=12,
    num_labels=3,
)
HALVES = {jnp.bfloat16: torch.bfloat16, jnp.float16: torch.float16}
MASK = np.ones((3, 8), int)
MASK[0, :3] = 0
MASK[1, 6:] = 0
IDS = np.random.default_rng(0).integers(3, 60, size=MASK.shape)


@pytest.mark.parametrize(("dtype", "before"), [(jnp.bfloat16, True), (jnp.float16, True), (jnp.bfloat16, False)])
def test_close_to_float32(dtype, before):
    """By two yardsticks: the rounding that the layers do, and the error of torch in the same dtype."""
    config = CONFIG.replace(do_layer_norm_before=before)
    model = torch_model(config, "causal_lm", seed=6, dtype=HALVES[dtype]).float()  # weights that dtype holds exactly
    params = params_from(state_of(model), config, "causal_lm")
    exact = np.asarray(optjax.causal_lm(params, IDS, attention_mask=MASK).logits)[MASK > 0]
    half = jax.tree.map(lambda x: x.astype(dtype), params)
    out = optjax.causal_lm(half, IDS, attention_mask=MASK, output_attentions=True)
    assert out.logits.dtype == jnp.float32
    assert {a.dtype for a in out.attentions} == {jnp.dtype(jnp.float32)}
    with torch.no_grad():
        theirs = model.to(HALVES[dtype])(torch.from_numpy(IDS), attention_mask=torch.from_numpy(MASK)).logits

    error = np.abs(np.asarray(out.logits)[MASK > 0] - exact)
    torch_error = np.abs(theirs.float().numpy()[MASK > 0] - exact)
    # About ten roundings a layer, of relative size eps/2 each, that add like a random walk; 4 of its deviations.
    walk = float(jnp.finfo(dtype).eps) / 2 * (10 * config.num_hidden_layers) ** 0.5
    assert error.max() <= 4 * walk * np.abs(exact).max()
    assert error.mean() <= 1.25 * torch_error.mean()


@pytest.mark.parametrize(
    ("dtype", "layout"),
    [
        (jnp.float32, "none"),
        (jnp.bfloat16, "none"),
        (jnp.float16, "none"),
        (jnp.float16, "heads"),
        (jnp.float16, "flat"),
    ],
)
def test_a_fully_masked_row_is_finite(dtype, layout):
    """Also where scores are past float16's largest number (transformers #17433), and for its gradients."""
    model = torch_model(CONFIG, "causal_lm", seed=7)
    state = {
        name: w * 300 if "q_proj.weight" in name or "k_proj.weight" in name else w
        for name, w in state_of(model).items()
    }
    params = params_from(state, CONFIG, "causal_lm", dtype=dtype)
    mask = MASK.copy()
    mask[2] = 0

    cache = None if layout == "none" else optjax.init_cache(params, 3, 10, layout=layout)
    out = optjax.causal_lm(params, IDS, attention_mask=mask, cache=cache, output_attentions=True)
    assert np.isfinite(out.logits).all()
    for weights in out.attentions:
        np.testing.assert_allclose(np.sum(weights, -1), 1, rtol=1e-5)
    if cache is None:
        x = np.asarray(params["embed_tokens"]["weight"], np.float32)[IDS]
        x = x + np.asarray(params["embed_positions"]["weight"], np.float32)[np.cumsum(mask, 1) * mask + 1]
        y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        q, k = (
            y @ np.asarray(params["layers"][0]["self_attn"][n]["weight"], np.float32).T for n in ("q_proj", "k_proj")
        )
        scores = np.einsum("bthk,bshk->bhts", q.reshape(3, 8, 4, 8), k.reshape(3, 8, 4, 8)) * 8**-0.5
        assert np.abs(scores).max() > 65504

        grads = jax.grad(lambda p: optjax.causal_lm(p, IDS, attention_mask=mask, labels=IDS).loss)(params)
        assert all(np.isfinite(np.asarray(g, np.float32)).all() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("dtype", HALVES)
def test_logits_and_losses_are_float32(dtype):
    classify, answer = (
        jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), optjax.abstract_params(CONFIG, dtype, head))
        for head in ("sequence_classification", "question_answering")
    )
    out = optjax.sequence_classification(classify, IDS, labels=np.array([0, 1, 2]))
    assert out.logits.dtype == out.loss.dtype == jnp.float32
    spans = np.array([0, 1, 2])
    out = optjax.question_answering(answer, IDS, start_positions=spans, end_positions=spans)
    assert out.start_logits.dtype == out.end_logits.dtype == out.loss.dtype == jnp.float32
    hidden = optjax.forward(answer, IDS, cache=optjax.init_cache(answer, 3, 8))
    assert hidden.last_hidden_state.dtype == hidden.cache.keys[0].dtype == dtype


def test_a_cache_of_another_dtype():
    """A bfloat16 cache under float32 weights is float32 up to the rounding of keys and values."""
    params = params_from(state_of(torch_model(CONFIG, "causal_lm", seed=8)), CONFIG, "causal_lm")
    exact = optjax.causal_lm(params, IDS).logits
    for layout in ("heads", "flat"):
        cache = optjax.init_cache(params, 3, 8, jnp.bfloat16, layout=layout)
        first = optjax.causal_lm(params, IDS[:, :7], cache=cache)
        out = optjax.causal_lm(params, IDS[:, 7:], cache=first.cache)
        assert out.cache.keys[0].dtype == jnp.bfloat16 and out.logits.dtype == jnp.float32
        error = np.abs(out.logits[:, 0] - exact[:, 7]).max()
        assert 0 < error < 0.02 * np.abs(exact).max()


@pytest.mark.parametrize("dtype", HALVES)
def test_loops_on_a_cpu_keep_float32(dtype):
    """Their keys and values are those of 16 bits, held in 32: a step copies none of them, and rounds once less."""
    params = params_from(state_of(torch_model(CONFIG, "causal_lm", seed=8)), CONFIG, "causal_lm")
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    exact = optjax.causal_lm(jax.tree.map(lambda x: x.astype(jnp.float32), params), IDS).logits[:, -1]
    errors = {}
    for kept in (None, dtype):
        logits, cache = optjax.prefill(params, IDS[:, :7], max_length=64, cache_dtype=kept)
        assert cache.dtype == (jnp.float32 if kept is None else dtype)
        step = jax.jit(optjax.decode_step).lower(params, IDS[:, 7], cache)
        heads = f"[3,{CONFIG.num_attention_heads},64,{CONFIG.head_dim}]"
        text = step.compile().as_text()
        assert (f"bf16{heads}" in text or f"f16{heads}" in text) == (kept is not None)
        logits, _ = optjax.decode_step(params, IDS[:, 7], cache)
        assert logits.dtype == jnp.float32
        errors[kept] = np.sqrt(np.mean((logits - exact) ** 2))
    assert 0 < errors[None] < 1.2 * errors[dtype] < 0.05 * np.abs(exact).max()


@pytest.mark.parametrize("dtype", HALVES)
def test_a_prefix_stays_in_its_dtype(dtype):
    """And is widened for the loops that follow, unless they are to keep its dtype; which tells the same ids."""
    params = params_from(state_of(torch_model(CONFIG, "causal_lm", seed=8)), CONFIG, "causal_lm")
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    prefix = optjax.read_prefix(params, IDS[:1, :3])
    assert prefix.cache.dtype == dtype
    rest = {}
    for kept in (None, dtype):
        logits, cache = optjax.prefill(params, IDS[:, 3:6], max_length=5, prefix=prefix, cache_dtype=kept)
        assert cache.dtype == (jnp.float32 if kept is None else dtype)
        options = dict(max_new_tokens=3, eos_token_id=[], prefix=prefix, cache_dtype=kept)
        rest[kept] = logits, optjax.generate(params, IDS[:, 3:6], **options)
    (wide, ids), (narrow, same) = rest.values()
    np.testing.assert_array_equal(ids, same)
    assert np.abs(wide - narrow).max() < 0.02 * np.abs(wide).max()


@pytest.mark.parametrize(
    "kind, head, labels",
    [
        ("int8", "causal_lm", {"labels": IDS}),
        ("nf4", "sequence_classification", {"labels": np.array([0, -100, 2])}),
        (None, "question_answering", {"start_positions": np.array([0, 1, 9]), "end_positions": np.array([3, 1, 9])}),
    ],
)
def test_where_jax_promotes_no_dtype(kind, head, labels):
    """Every cast is explicit: in a head and its loss, over a cache of each dtype, beside adapters, backwards."""
    lora = optjax.LoraConfig(r=2, target_modules=("q_proj", "fc2"), lora_dropout=0.1)

    def loss(adapters, params, cache=None):
        options = labels | {"attention_mask": MASK, "cache": cache, "dropout_key": jax.random.key(2)}
        return getattr(optjax, head)(optjax.with_adapters(params, adapters), IDS, **options).loss

    with jax.numpy_dtype_promotion("strict"):
        params = optjax.init_params(CONFIG, jax.random.key(0), jnp.bfloat16, head)
        params = params if kind is None else optjax.quantize(params, kind)
        adapters = optjax.init_adapters(params, lora, jax.random.key(1))
        assert jax.eval_shape(jax.grad(loss), adapters, params).count == adapters.count
        for dtype in ("int8", "float32", "bfloat16"):
            cache = optjax.init_cache(params, *IDS.shape, dtype)
            assert jax.eval_shape(loss, adapters, params, cache).dtype == jnp.float32


@pytest.mark.parametrize("dtype", HALVES)
def test_scores_have_a_derivative_in_16_bits(dtype):
    """On a GPU it is made of no product in float32, and that of float32 but for rounding; backward, forward, both."""
    rng = np.random.default_rng(0)
    q, k, kept = (jnp.asarray(rng.standard_normal(shape)) for shape in ((2, 5, 4, 8), (2, 4, 5, 8), (2, 4, 5, 5)))
    half = q.astype(dtype), k.astype(dtype)

    def loss(q, k):
        return (jax.nn.softmax(key_products(q, k, on_gpu=True)) * kept).sum()

    gradients = jax.make_jaxpr(jax.grad(loss, (0, 1)))(*half)
    products = [each for each in gradients.jaxpr.eqns if each.primitive.name == "dot_general"]
    assert len(products) == 2
    assert {var.aval.dtype for each in products for var in each.invars} == {jnp.dtype(dtype)}
    exact = [x.astype(jnp.float32) for x in half]
    for derivative in (jax.grad, jax.jacfwd, lambda f, of: jax.grad(lambda *x: jax.jvp(f, x, x)[1], of)):
        ours, theirs = derivative(loss, (0, 1))(*half), derivative(loss, (0, 1))(*exact)
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(one.astype(jnp.float32), other, atol=0.02 * np.abs(other).max())

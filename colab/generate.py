# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Text from OPT, as a function
#
# optjax is OPT, Meta's open language models, as pure JAX functions over a pytree of weights. This notebook goes from
# installing it to text, and then to what a plain function makes easy: probabilities, gradients with respect to a
# prompt, and which attention heads a prediction hangs on.
#
# It runs on a CPU in about a minute with *opt-mini*, a small model that ships in the package: no download, no GPU. In
# Colab, or wherever the Hugging Face hub can be reached, the last section does the same with OPT-125m.

# %% [markdown]
# ## 1. Install
#
# Nothing happens here if optjax is installed already. In Colab, upload a wheel of it first (`python -m build --wheel`
# in the repository makes one in `dist/`). The versions that matter are pinned to those this notebook is tested with; if
# Colab asks for a restart of the session after that, do it and go on from here.

# %%
import importlib.util
import os
import shutil
import subprocess
import sys
from glob import glob

VERSIONS = ["jax==0.10.2", "jaxlib==0.10.2", "flax==0.12.8", "tokenizers==0.22.2", "huggingface_hub==0.36.2"]

if importlib.util.find_spec("optjax") is None:
    wheels = sorted(glob("optjax-*.whl"))
    if not wheels:
        raise FileNotFoundError("no optjax-*.whl beside this notebook: upload one, then run this cell again")
    device = (
        "[cuda]" if shutil.which("nvidia-smi") else "[tpu]" if any(n.startswith("TPU_") for n in os.environ) else ""
    )
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", wheels[-1] + device, *VERSIONS], check=True)

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import optjax

print(f"optjax {optjax.__version__}, jax {jax.__version__} on {jax.devices()[0].device_kind}")

# %% [markdown]
# ## 2. A model and a prompt
#
# `load` takes a folder, a hub id such as `"facebook/opt-125m"`, or `"opt-mini"`. It gives the weights and the
# tokenizer. The weights are a pytree that carries its config along, so nothing else is ever needed.

# %%
params, tokenizer = optjax.load("opt-mini", dtype=jnp.float32)

print(f"{sum(w.size for w in jax.tree.leaves(params)):,} parameters")
print(f"{params.config.num_hidden_layers} layers of width {params.config.hidden_size}, {tokenizer}")
print(params["layers"][0]["fc1"]["weight"].shape)

# %% [markdown]
# The tokenizer makes a rectangle of ids and a mask that tells text from padding. Every text starts with `</s>`, as OPT
# was trained.

# %%
ids, mask = tokenizer("The old house stood at the end of the road, and")
print(ids)
print([tokenizer.decode([i], skip_special_tokens=False) for i in ids[0]])

# %% [markdown]
# `generate` continues the prompt. It takes the most probable token each time unless told otherwise, and a small model
# left to that soon turns in circles. The first call compiles; a later one of about the same size does not.

# %%
out = optjax.generate(params, ids, mask, max_new_tokens=60)
print(tokenizer.decode(out[0]))

# %% [markdown]
# ## 3. Sampling
#
# The options have transformers' names and meanings. A key of JAX's random numbers makes the draws: the same key gives
# the same text. `num_return_sequences` continues one prompt in several ways, and reads it only once.
#
# Some models have rows in their embedding that no tokenizer can decode (OPT itself has seven). `unused_ids` lists them,
# so that they can be ruled out.

# %%
options = dict(
    do_sample=True,
    temperature=0.8,
    top_k=50,
    top_p=0.95,
    suppress_tokens=tokenizer.unused_ids(params.config.vocab_size),
)


def show(texts):
    for text in texts:
        print("·", " ".join(text.split()), end="\n\n")


out = optjax.generate(params, ids, mask, max_new_tokens=60, key=jax.random.key(0), num_return_sequences=3, **options)
show(tokenizer.decode_batch(out))

# %% [markdown]
# A low temperature keeps to the beaten track; a high one leaves it altogether. Changing a number compiles nothing.

# %%
for temperature in (0.3, 0.8, 1.5):
    sampled = options | {"temperature": temperature}
    out = optjax.generate(params, ids, mask, max_new_tokens=40, key=jax.random.key(1), **sampled)
    print(f"temperature {temperature}")
    show(tokenizer.decode_batch(out[:, ids.shape[1] :]))

# %% [markdown]
# ## 4. Many prompts at once
#
# Prompts of different lengths make one batch, padded on the left or on the right as you like. What a row gets depends
# neither on its neighbours nor on its padding, and that is easily checked.

# %%
prompts = [
    "It was",
    "My dear Watson, said Holmes,",
    "The captain looked out over the sea, and saw that the storm was coming; so he",
]
batch, batch_mask = tokenizer(prompts)
print(batch.shape, "ids, of which real:", batch_mask.sum(axis=1))

together = optjax.generate(params, batch, batch_mask, max_new_tokens=30)
show(tokenizer.decode_batch(together))

for row, prompt in zip(together, prompts, strict=True):
    alone = optjax.generate(params, *tokenizer(prompt), max_new_tokens=30)
    assert (row[-30:] == alone[0, -30:]).all()

# %% [markdown]
# ## 5. Text as it comes
#
# `stream` yields the same ids, one step at a time. The stream decoder turns them into text that is certain: it never
# shows half a character.

# %%
decoder = tokenizer.stream_decoder()
print("Once upon a time", end="", flush=True)
for token in optjax.stream(params, *tokenizer("Once upon a time"), max_new_tokens=80, key=jax.random.key(2), **options):
    print(decoder.push(int(token[0])), end="", flush=True)
print(decoder.finish())

# %% [markdown]
# ## 6. What the model expects
#
# `causal_lm` is the function below `generate`: ids in, logits out. The last position's logits are the next token's.

# %%
logits = optjax.causal_lm(params, ids, attention_mask=mask).logits
probabilities = np.asarray(jax.nn.softmax(logits[0, -1]))
best = np.argsort(probabilities)[::-1][:12]

figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
axes.barh([repr(tokenizer.decode([i])) for i in best], probabilities[best])
axes.invert_yaxis()
axes.set(xlabel="probability", title=f"What follows “{tokenizer.decode(ids[0])}”")
plt.show()

# %% [markdown]
# With labels there is a loss: the mean surprise, in nats, at each token given those before it. Here it is token by
# token. Where the bars are low, the model saw the word coming.


# %%
def surprise(params, ids):
    """-log p of each token of ids [1, T] but the first, in bits: [T - 1]."""
    log_p = jax.nn.log_softmax(optjax.causal_lm(params, ids).logits[0, :-1])
    return -jnp.take_along_axis(log_p, ids[0, 1:, None], axis=1)[:, 0] / jnp.log(2)


sentence = jnp.asarray(tokenizer("He put his hand in his pocket and took out a piece of paper.")[0])
words = [tokenizer.decode([i]) for i in np.asarray(sentence[0])]
bits = surprise(params, sentence)

figure, axes = plt.subplots(figsize=(7, 2.8), layout="constrained")
axes.bar(range(len(bits)), bits)
axes.set_xticks(range(len(bits)), words[1:], rotation=60, ha="right")
axes.set(ylabel="bits", title=f"Surprise at each token, {bits.mean():.1f} bits on average")
plt.show()

loss = optjax.causal_lm(params, sentence, labels=sentence).loss
np.testing.assert_allclose(loss / np.log(2), bits.mean(), rtol=1e-5)

# %% [markdown]
# ## 7. Gradients of a prompt
#
# Which words does a prediction hang on? Everything is a plain function, so `jax.grad` answers: take the word
# embeddings as the input (`inputs_embeds` in place of ids), and differentiate the log-probability of the most probable
# next token with respect to them. Gradient times input, summed over the width, says how much each token speaks for
# (red) or against (blue) that prediction, to first order.


# %%
def log_probability(embeds, target):
    logits = optjax.causal_lm(params, inputs_embeds=embeds).logits[0, -1]
    return jax.nn.log_softmax(logits)[target]


prompt = jnp.asarray(tokenizer("The king and the queen sat upon the throne. The people bowed before the")[0])
embeds = params["embed_tokens"]["weight"][prompt]
target = optjax.causal_lm(params, prompt).logits[0, -1].argmax()

gradient = jax.grad(log_probability)(embeds, target)
influence = (gradient * embeds).sum(-1)  # [1, T]

words = [tokenizer.decode([i], skip_special_tokens=False) for i in np.asarray(prompt[0])]
limit = float(jnp.abs(influence).max())
figure, axes = plt.subplots(figsize=(9, 1.8), layout="constrained")
picture = axes.imshow(influence, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
axes.set_xticks(range(len(words)), words, rotation=60, ha="right")
axes.set_yticks([])
axes.set_title(f"Why {tokenizer.decode([int(target)])!r} comes next")
figure.colorbar(picture)
plt.show()

# %% [markdown]
# A gradient is only the slope. Here is the check: push the embeddings a little way along it, and the log-probability
# should rise by the step times the gradient's squared length.

# %%
step = 1e-3 / jnp.sum(gradient**2)
before, after = (log_probability(e, target) for e in (embeds, embeds + step * gradient))
print(f"expected to rise by 0.001, rose by {after - before:.6f}")
assert abs(after - before - 1e-3) < 1e-4

# %% [markdown]
# The same for attention heads: `head_mask` multiplies each head's weights, and the gradient of the loss with respect
# to it says which heads this sentence would miss (Michel et al. 2019, *Are Sixteen Heads Really Better than One?*).


# %%
def sentence_loss(head_mask):
    return optjax.causal_lm(params, sentence, labels=sentence, head_mask=head_mask).loss


shape = (params.config.num_hidden_layers, params.config.num_attention_heads)
importance = -jax.grad(sentence_loss)(jnp.ones(shape))

limit = float(jnp.abs(importance).max())
figure, axes = plt.subplots(figsize=(4, 3), layout="constrained")
picture = axes.imshow(importance, cmap="RdBu_r", vmin=-limit, vmax=limit)
axes.set(xlabel="head", ylabel="layer", xticks=range(shape[1]), yticks=range(shape[0]))
axes.set_title("What each head takes off the loss")
figure.colorbar(picture)
plt.show()

# %% [markdown]
# ## 8. Scores of what was generated
#
# With `return_dict_in_generate`, each new token comes with its log-probability. That ranks several answers.

# %%
made = optjax.generate(
    params,
    *tokenizer("She opened the door and"),
    max_new_tokens=20,
    key=jax.random.key(3),
    num_return_sequences=6,
    return_dict_in_generate=True,
    **options,
)
scores = np.asarray(made.logprobs.sum(axis=1))
for i in np.argsort(-scores):
    print(f"{scores[i]:7.1f}  {' '.join(tokenizer.decode(made.sequences[i]).split())}")

# %% [markdown]
# ## 9. A larger model
#
# Any OPT of the hub loads the same way, from safetensors, PyTorch's, Flax's or TensorFlow's files. OPT-125m is a
# download of about 250 MB; without a network this section is left out. On a GPU or TPU use `dtype=jnp.bfloat16`, on a
# T4 or V100, which have none, `jnp.float16`.

# %%
try:
    params, tokenizer = optjax.load("facebook/opt-125m", dtype=jnp.float32)
except FileNotFoundError as error:
    print(f"left out: {error}")
else:
    ids, mask = tokenizer(["The capital of France is", "In the beginning there was"])
    options["suppress_tokens"] = tokenizer.unused_ids(params.config.vocab_size)
    out = optjax.generate(params, ids, mask, max_new_tokens=40, key=jax.random.key(4), **options)
    show(tokenizer.decode_batch(out))

# %% [markdown]
# ## Where to go from here
#
# - `optjax generate --help`, `optjax convert --help` and `optjax info` do this from a shell.
# - `optjax.save_params(params, folder)` writes what transformers loads too.
# - `optjax.prefill` and `optjax.decode_step` are for decoding loops of your own.
# - `help(optjax.generation.Options)` has every option of `generate`.

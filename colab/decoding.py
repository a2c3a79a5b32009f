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
# # One prompt, every way to continue it
#
# A language model says how probable each next token is. What becomes of that is up to the decoding: take the best,
# draw, look several tokens ahead, keep away from what was said, have somebody guess. This notebook continues one prompt
# in each of these ways, draws the beams of a beam search as a tree, counts the passes that guessing saves, and shows
# how probable a model finds a text, token by token.
#
# It runs on a CPU in about a minute with *opt-mini*, the small model that ships in the package. Names of options are
# those of transformers' `generate`; each way is one compiled program.

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
# ## 2. The ways side by side
#
# Each line below is one call of `generate`. For each we print the text, and of the new tokens: how probable the model
# finds them (the mean of log p, by `optjax.score`), how many of their triples were there before, and the passes of the
# model that they took.

# %%
params, tokenizer = optjax.load("opt-mini", dtype=jnp.float32)
ids, mask = tokenizer("The old house stood at the end of the road, and")
NEW = 40

ways = {
    "greedy": {},
    "sampling": dict(do_sample=True, temperature=0.8, top_k=0, top_p=0.95),
    "4 beams, no triple twice": dict(num_beams=4, no_repeat_ngram_size=3),
    "2 groups of 2 beams": dict(num_beams=4, num_beam_groups=2, diversity_penalty=1.0),
    "contrastive search": dict(penalty_alpha=0.6, top_k=5),
    "guidance": dict(guidance_scale=1.5),
    "prompt lookup": dict(prompt_lookup_num_tokens=5),
}


def repeated(new):
    """The share of triples that were there before."""
    triples = list(zip(new, new[1:], new[2:], strict=False))
    return 1 - len(set(triples)) / len(triples)


made = {}
for name, options in ways.items():
    key = jax.random.key(0) if options.get("do_sample") else None
    out = optjax.generate(
        params, ids, mask, max_new_tokens=NEW, key=key, eos_token_id=[], return_dict_in_generate=True, **options
    )
    made[name] = np.asarray(out.sequences)[0, ids.shape[1] :]
    [score] = optjax.score(params, [ids[0]], [made[name]])
    figures = f"log p {score.token_logprobs.mean():.2f}, {repeated(made[name].tolist()):.0%} repeated"
    passes = "" if out.passes is None else f", {int(out.passes)} passes"
    print(f"{name}: {figures}{passes}\n    {' '.join(tokenizer.decode(made[name]).split())}\n")

# %% [markdown]
# What a small model finds most probable is to repeat itself. Sampling, contrastive search and `no_repeat_ngram_size`
# keep it from that, for less probable texts. Prompt lookup gives the greedy text, token for token, in fewer passes; of
# that more below.

# %%
assert (made["prompt lookup"] == made["greedy"]).all()

# %% [markdown]
# ## 3. Beams, as a tree
#
# A beam search follows several continuations at once and drops those that fall behind. Here are the six that were left
# after nine tokens, joined where they agree; a line is as thick as its token is probable, and the best one is coloured.
# Below it, three groups of two beams: a group pays (`diversity_penalty`) for each token that a group before it has just
# said, so that they part early.


# %%
def draw_tree(axes, sequences, logprobs, title):
    """Hypotheses [n, N], the best one first, and the log-probability of each token [n, N]."""
    rows = [tuple(row) for row in sequences.tolist()]
    best = rows[0]
    # Side by side what begins alike, and of that first what holds the better one.
    first = {row[:k]: i for i, row in reversed(list(enumerate(rows))) for k in range(len(row) + 1)}
    order = sorted(rows, key=lambda row: [first[row[:k]] for k in range(len(row) + 1)])
    height = {row: y for y, row in enumerate(order)}
    chance = {rows[i][: k + 1]: np.exp(logprobs[i, k]) for i in range(len(rows)) for k in range(len(rows[i]))}

    def place(prefix):
        """A node stands in the middle of what continues it."""
        ends = [y for row, y in height.items() if row[: len(prefix)] == prefix]
        return len(prefix), (min(ends) + max(ends)) / 2

    for prefix, p in chance.items():
        (x0, y0), (x1, y1) = place(prefix[:-1]), place(prefix)
        is_best = best[: len(prefix)] == prefix
        bend = np.linspace(0, 1, 20)
        ys = y0 + (y1 - y0) * (3 * bend**2 - 2 * bend**3)
        axes.plot(x0 + bend * (x1 - x0), ys, color="tab:orange" if is_best else "0.6", linewidth=0.5 + 5 * p, zorder=1)
        label = tokenizer.decode([prefix[-1]]).replace("\n", "↵").strip()
        box = dict(boxstyle="round,pad=0.15", facecolor="white", edgecolor="none", alpha=0.85)
        axes.text(x1, y1, label, ha="center", va="center", fontsize=8, bbox=box, zorder=2)
    axes.set(title=title, yticks=[], xticks=range(1, sequences.shape[1] + 1), xlim=(-0.1, sequences.shape[1] + 0.5))
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.spines[["top", "right", "left"]].set_visible(False)


figure, panels = plt.subplots(2, 1, figsize=(10, 6), layout="constrained")
for axes, title, groups in (
    (panels[0], "Six beams", {}),
    (panels[1], "Three groups of two beams", dict(num_beam_groups=3, diversity_penalty=2.0)),
):
    out = optjax.generate(
        params, ids, mask, max_new_tokens=9, eos_token_id=[], num_beams=6, num_return_sequences=6,
        return_dict_in_generate=True, **groups,
    )  # fmt: skip
    draw_tree(axes, np.asarray(out.sequences)[:, ids.shape[1] :], np.asarray(out.logprobs), title)
panels[1].set_xlabel("new tokens")
plt.show()

# %% [markdown]
# ## 4. Fewer passes, the same text
#
# Decoding waits for the weights, which are read once for each token. If somebody guesses the next few, one pass of the
# model checks all of them, and those that it would have said itself are kept. The text stays the same; when drawing,
# its distribution does.
#
# *Prompt lookup* guesses what followed the last tokens before: good where a text repeats itself. *Speculative decoding*
# has a smaller model guess (`assistant_model`), such as OPT-125m for OPT-6.7b. Here it is opt-mini's own copy in 4
# bits, which agrees with it nearly always and shows how it works, though it is not faster.

# %%
repetitive, its_mask = tokenizer("The sea was blue, the sky was blue, and the sea was blue, the sky was")
assistant = optjax.quantize(params, "int4")

counts = {}
texts = []
for name, options in {
    "one at a time": {},
    "prompt lookup, 5 at a time": dict(prompt_lookup_num_tokens=5),
    "assistant, 5 at a time": dict(assistant_model=assistant, num_assistant_tokens=5),
}.items():
    out = optjax.generate(
        params, repetitive, its_mask, max_new_tokens=NEW, eos_token_id=[], return_dict_in_generate=True, **options
    )
    counts[name] = int(out.passes)
    texts.append(np.asarray(out.sequences)[0])

assert all((text == texts[0]).all() for text in texts)
print(tokenizer.decode(texts[0]))

figure, axes = plt.subplots(figsize=(7, 1.7), layout="constrained")
bars = axes.barh(list(counts), list(counts.values()), color=["0.6", "tab:orange", "tab:blue"])
axes.bar_label(bars, padding=3)
axes.invert_yaxis()
axes.set_title(f"Passes of the model for the same {NEW} tokens")
axes.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# ## 5. How probable is a text?
#
# `score` gives the log-probability of each token of a text after all before it. What was written by people surprises
# the model now and then; what it says itself by greedy decoding hardly does; what is drawn lies between.


# %%
def draw_strip(axes, score, width=96):
    """A text, each token on the colour of its surprise in bits."""
    x = y = 0
    for i, logprob in zip(score.ids.tolist(), score.token_logprobs.tolist(), strict=True):
        if np.isnan(logprob):  # nothing predicts the first one
            continue
        token = tokenizer.decode([i], skip_special_tokens=False).replace("\n", "↵")
        if x + len(token) > width:
            x, y = 0, y + 1
        bits = -logprob / np.log(2)
        axes.add_patch(plt.Rectangle((x, y), len(token), 0.92, color=colours(norm(bits))))
        style = dict(ha="center", va="center", family="monospace", fontsize=10, color="white" if bits > 10 else "black")
        for n, character in enumerate(token):
            axes.text(x + n + 0.5, y + 0.48, character, **style)
        x += len(token)
    axes.set(xlim=(0, width), ylim=(max(3, y + 1), 0), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


colours, norm = plt.get_cmap("OrRd"), plt.Normalize(0, 16, clip=True)
own = ids[0].tolist()
shown = {
    "A novel (Dickens, Great Expectations)": tokenizer.encode(
        "My father's family name being Pirrip, and my Christian name Philip, my infant tongue could make of both names "
        "nothing longer or more explicit than Pip."
    ),
    "opt-mini, drawn": own + made["sampling"].tolist(),
    "opt-mini, greedy": own + made["greedy"].tolist(),
}
scores = optjax.score(params, list(shown.values()))
figure, panels = plt.subplots(3, 1, figsize=(10, 4), layout="constrained")
for axes, name, score in zip(panels, shown, scores, strict=True):
    bits = -score.logprob / np.log(2) / (len(score.ids) - 1)
    draw_strip(axes, score)
    axes.set_title(f"{name}: {bits:.1f} bits a token", loc="left", fontsize=10)
figure.colorbar(plt.cm.ScalarMappable(norm, colours), ax=panels, label="bits", shrink=0.8)
plt.show()

# %% [markdown]
# With `top_logprobs`, also what the model would rather have read. A column for each token, its best five from above;
# the one that was written has a frame, where it is among them.

# %%
sentence = tokenizer.encode("He put his hand in his pocket and took out a letter.")
[score] = optjax.score(params, [sentence], top_logprobs=5)
top_ids, top_p = score.top_ids[1:], np.exp(score.top_logprobs[1:])
written = [tokenizer.decode([i]).strip() for i in sentence[1:]]

figure, axes = plt.subplots(figsize=(10, 3), layout="constrained")
picture = axes.imshow(top_p.T, cmap="Blues", vmin=0, vmax=0.6, aspect="auto")
for column, (row, its_p) in enumerate(zip(top_ids, top_p, strict=True)):
    for place, (i, p) in enumerate(zip(row.tolist(), its_p, strict=True)):
        label = f"{tokenizer.decode([i]).strip()}\n{p:.0%}"
        axes.text(column, place, label, ha="center", va="center", fontsize=8, color="white" if p > 0.4 else "black")
        if i == score.ids[column + 1]:
            axes.add_patch(plt.Rectangle((column - 0.48, place - 0.46), 0.96, 0.92, fill=False, color="tab:red", lw=2))
axes.set_xticks(range(len(written)), written, fontweight="bold")
axes.set_yticks(range(5), ["1st", "2nd", "3rd", "4th", "5th"])
axes.xaxis.tick_top()
figure.colorbar(picture, label="probability")
plt.show()

# %% [markdown]
# Continuations of a prompt are scored the same way, which answers questions of multiple choice.

# %%
prompt = tokenizer.encode("The king sat upon his")
answers = [" horse", " throne", " bicycle"]
scores = optjax.score(params, [prompt] * 3, [tokenizer.encode(each, add_special_tokens=False) for each in answers])
for answer, score in sorted(zip(answers, scores, strict=True), key=lambda pair: -pair[1].logprob):
    print(f"{score.logprob:7.2f} {answer}")

# %% [markdown]
# ## Where to go from here
#
# - `help(optjax.generation.Options)` has every option of `generate`, `optjax.stream` gives tokens as they come.
# - In a shell: `optjax generate --num-beams 4`, or `--penalty-alpha 0.6`, `--assistant-model`, `--guidance-scale`.
# - `optjax score --top-n 3 "A text"` prints these probabilities, and `optjax score --perplexity --file novel.txt` reads
#   texts of any length.

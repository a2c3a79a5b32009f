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
# # Plan a size, then spread a model over devices
#
# What does OPT-175B need to be trained? Which slice of TPUs is large enough, and what would bound its speed? The real
# compilers can say so on a machine that has no TPU and no GPU. This notebook asks them, and then does on eight devices
# that a CPU emulates what it would do on that slice: the same mesh, the same rules, the same functions.
#
# It runs on a CPU in about two minutes. Nothing is downloaded but the TPU compiler, which the plans need.

# %% [markdown]
# ## 1. Install
#
# Nothing happens here if optjax is installed already. In Colab, upload a wheel of it first (`python -m build --wheel`
# in the repository makes one in `dist/`). The versions that matter are pinned to those this notebook is tested with; if
# Colab asks for a restart of the session after that, do it and go on from here.

# %%
import importlib.util
import os
import subprocess
import sys
from glob import glob

VERSIONS = ["jax==0.10.2", "jaxlib==0.10.2", "flax==0.12.8", "tokenizers==0.22.2", "matplotlib==3.11.2"]

if importlib.util.find_spec("optjax") is None:
    wheels = sorted(glob("optjax-*.whl"))
    if not wheels:
        raise FileNotFoundError("no optjax-*.whl beside this notebook: upload one, then run this cell again")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", wheels[-1] + "[plan-tpu]", *VERSIONS], check=True
    )

# %% [markdown]
# Eight devices out of one CPU. Both lines have to come before jax is imported.

# %%
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import display
from matplotlib.patches import Rectangle

import optjax
from optjax.sharding import RULES, make_mesh
from optjax.sharding.plan import parse_topology, plan

print(
    f"optjax {optjax.__version__}, jax {jax.__version__}, {len(jax.devices())} devices of {jax.devices()[0].platform}"
)

# %% [markdown]
# ## 2. What can be rented
#
# A topology is a kind of chip and a shape. A shape that does not exist is an error that lists those that do.

# %%
for text in ("v5e:4x4", "v5p:4x4x8", "h100:64"):
    topology = parse_topology(text)
    chip = topology.chip
    print(
        f"{text:9}  {topology.devices:3} devices of {chip.title}: {chip.flops / 1e12:.0f} TFLOP/s, "
        f"{chip.capacity / 2**30:.0f} GiB at {chip.hbm_bandwidth / 1e9:.0f} GB/s each"
    )
try:
    parse_topology("v5e:2x2x2")
except ValueError as error:
    print(error)

# %% [markdown]
# ## 3. A plan
#
# `plan` compiles the train step of OPT-125m for four chips of a TPU v5e, in a process of its own. The table says what a
# device holds at the worst moment, what is sent between the devices, and the least time that a step takes at the chip's
# peak rates. On the command line it is `optjax plan opt-125m --topology v5e:2x2 --batch 32`.


# %%
def planned(*arguments, **options):
    """A plan; None where the compiler is not installed."""
    try:
        return plan(*arguments, **options)
    except ImportError as error:
        print(f"left out: {error}")


training = planned("opt-125m", "v5e:2x2", mesh="fsdp=2,tensor=2", batch=32)
if training:
    display(training)

# %% [markdown]
# The same as a picture. Below the dashed line it fits.

# %%
if training:
    display(training.plot())

# %% [markdown]
# ## 4. Other levers
#
# What a step keeps for its backward pass, and in how many parts its batch is taken, trade memory for time. OPT-175B
# takes minutes to compile, and is planned in just this way: `plan("opt-175b", "v5p:4x4x8", mesh="fsdp=32,tensor=4")`.
# `optjax plan opt-175b --topology v5p:4x4x8 --search` tries meshes and levers and ranks what fits.

# %%
for remat in ("none", "full") if training else ():
    for parts in (1, 8):
        made = plan("opt-125m", "v5e:2x2", mesh="fsdp=4", batch=32, remat=remat, micro_batches=parts)
        size, bound = made.peak / 2**30, made.main.roofline.bound
        print(
            f"remat {remat:4}, {parts} parts: {size:5.1f} GiB, {'fits' if made.fits else 'too much'}; bound by {bound}"
        )

# %% [markdown]
# ## 5. The same rules, on devices that are here
#
# A mesh gives the devices names: here 4 groups along `fsdp`, each of 2 along `tensor`. Rules say which dimensions of
# the weights are split along which of these; they are a dict.

# %%
mesh = make_mesh("fsdp=4,tensor=2")
RULES["fsdp+tensor+sequence"]

# %% [markdown]
# Loaded with a mesh, each device reads and keeps its own part of each weight. Here are some of them: a rectangle is a
# part, its color and number the device that has it. Two numbers in a part are two devices that both have it.

# %%
params = optjax.load_params("opt-mini", dtype=jnp.float32, mesh=mesh)
tokenizer = optjax.Tokenizer.load("opt-mini")

layer = params["layers"][0]
shown = {
    "embed_tokens [V, D]": params["embed_tokens"]["weight"],
    "q_proj [D, D]": layer["self_attn"]["q_proj"]["weight"],
    "out_proj [D, D]": layer["self_attn"]["out_proj"]["weight"],
    "fc1 [F, D]": layer["fc1"]["weight"],
    "fc2 [D, F]": layer["fc2"]["weight"],
    "fc1's bias [F]": layer["fc1"]["bias"][:, None],
}


def draw(axes, array, title):
    """The parts of a matrix, each with the devices that hold it."""
    rows, columns = array.shape
    holders = {}
    for shard in array.addressable_shards:
        (top, bottom, _), (left, right, _) = (s.indices(n) for s, n in zip(shard.index, array.shape, strict=True))
        holders.setdefault((left, top, right - left, bottom - top), []).append(shard.device.id)
    for (left, top, width, height), ids in holders.items():
        axes.add_patch(Rectangle((left, top), width, height, facecolor=plt.cm.tab10(ids[0]), edgecolor="white"))
        text = ", ".join(map(str, sorted(ids)))
        axes.text(left + width / 2, top + height / 2, text, ha="center", va="center", color="white")
    axes.set_xlim(0, columns)
    axes.set_ylim(rows, 0)
    axes.set_xticks([0, columns])
    axes.set_yticks([0, rows])
    axes.set_title(title, fontsize="medium")


figure, axes = plt.subplots(2, 3, figsize=(10, 6), layout="constrained")
for cell, (title, array) in zip(axes.flat, shown.items(), strict=True):
    draw(cell, array, title)
plt.show()

# %% [markdown]
# How much that is on each device, of the whole model:

# %%
held = np.zeros(len(jax.devices()))
for leaf in jax.tree.leaves(params):
    for shard in leaf.addressable_shards:
        held[shard.device.id] += shard.data.nbytes
whole = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
print(f"the model: {whole / 2**20:.2f} MiB; on a device: {held.min() / 2**20:.2f} to {held.max() / 2**20:.2f} MiB")

plt.figure(figsize=(6, 2.5), layout="constrained")
plt.bar(range(len(held)), held / 2**20, color=[plt.cm.tab10(i) for i in range(len(held))])
share = whole / len(held) / 2**20
plt.axhline(share, color="black", linestyle="--", linewidth=1, label=f"one part in {len(held)} of the model")
plt.xlabel("device")
plt.ylabel("MiB")
plt.legend(loc="lower right")
plt.show()

# %% [markdown]
# ## 6. Nothing else changes
#
# `generate`, `forward`, every head and the train step take params that are spread as they take others, and the text is
# the same.

# %%
ids, mask = tokenizer(["The old house stood at the end of the road, and"] * 4)
spread = optjax.generate(params, ids, mask, max_new_tokens=24)
alone = optjax.generate(optjax.load_params("opt-mini", dtype=jnp.float32), ids, mask, max_new_tokens=24)
print(tokenizer.decode(spread[0]))
print("the same on one device:", bool((spread == alone).all()))

# %% [markdown]
# The cache of keys and values is spread too: rows along `fsdp`, heads along `tensor`.

# %%
_, cache = optjax.prefill(params, ids, mask, max_length=64)
print(cache.keys[0].shape, cache.keys[0].sharding.spec)
jax.debug.visualize_array_sharding(cache.keys[0][:, :, 0, 0])

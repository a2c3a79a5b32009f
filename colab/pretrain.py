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
# # From text to a model
#
# Packs a text, trains a small OPT on it over several devices, kills the run half way to see it go on as if nothing had
# happened, and lets the model write. The text is Python's own standard library, which is on every machine; put any
# other in its place.
#
# On a TPU it takes its chips. On a CPU that plays eight devices it takes a few minutes.

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
        [sys.executable, "-m", "pip", "install", "--quiet", wheels[-1] + "[train,plot]", *VERSIONS], check=True
    )

# %% [markdown]
# Training runs in processes of its own, and a TPU belongs to one process at a time: jax is imported here at the end
# only, when they are done. Where there is no TPU, one CPU plays eight devices.

# %%
if glob("/dev/accel[0-9]*") or glob("/dev/vfio/[0-9]*"):
    MESH = "fsdp=-1"
else:
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    MESH = "fsdp=4,tensor=2"
STEPS = int(os.environ.get("OPTJAX_NOTEBOOK_STEPS", "400"))


def run(*words):
    """Runs `python -m …`, and shows what it says."""
    done = subprocess.run(
        [sys.executable, "-m", *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    print(done.stdout)
    assert done.returncode == 0, f"exit status {done.returncode}"


# %% [markdown]
# ## 2. Text
#
# One JSON object a line, with the text under `text`: each line is a document. Every twentieth is kept for validation.

# %%
import json
from pathlib import Path

library = sorted(Path(os.__file__).parent.glob("*.py"))
documents = [path.read_text(encoding="utf-8", errors="ignore") for path in library]
for name, part in (("validation", documents[::20]), ("train", [d for i, d in enumerate(documents) if i % 20])):
    with open(f"{name}.jsonl", "w", encoding="utf-8") as lines:
        lines.writelines(json.dumps({"text": text}) + "\n" for text in part)
print(f"{len(documents)} documents, {sum(map(len, documents)):,} characters")

# %% [markdown]
# Tokenized, each document ended by `</s>`, and all of them joined to one long row that is cut up where it is read
# (packing, as in the OPT paper). `pretrain` would do it by itself; done alone it serves many runs.

# %%
for name in ("train", "validation"):
    run(
        "optjax.train.pack",
        "--documents",
        f"{name}.jsonl",
        "--tokenizer",
        "opt-mini",
        "--out",
        f"packed/{name}",
        "--quiet",
    )

# %% [markdown]
# ## 3. A model
#
# A config is a Hugging Face `config.json`. For OPT's own sizes there is `--preset opt-125m` … `opt-175b`, which brings
# the paper's learning rate, batch, schedule and dropout along.

# %%
config = {
    "model_type": "opt",
    "vocab_size": 8192,
    "hidden_size": 128,
    "ffn_dim": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "dropout": 0.0,
}
Path("config.json").write_text(json.dumps(config))

# All settings of a run in one file; flags on the command line would beat it.
Path("run.toml").write_text(f"""\
config = "config.json"
data = ["packed/train"]
validation = "packed/validation"
tokenizer = "opt-mini"
run = "runs/python"
mesh = "{MESH}"
steps = {STEPS}
batch_size = 16
length = 128
lr = 3e-3
save_every = {max(1, STEPS // 8)}
eval_every = {max(1, STEPS // 4)}
log_every = {max(1, STEPS // 40)}
prompts = ["def ", "import "]
export = "python-opt"
""")

# %% [markdown]
# ## 4. Train, and kill it
#
# The run starts, and is killed (SIGKILL: no chance to save) when it is half way. It has its checkpoints.

# %%
import time

with open("begun.txt", "w", encoding="utf-8") as said:
    begun = subprocess.Popen(
        [sys.executable, "-m", "optjax.train.pretrain", "--settings", "run.toml", "--quiet"],
        stdout=said,
        stderr=subprocess.STDOUT,
    )
log = Path("runs/python/log.jsonl")


def last_step():
    """Of the log so far."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    return json.loads(lines[-1]).get("step", 0) if lines else 0


while begun.poll() is None and last_step() < STEPS // 2:
    time.sleep(0.2)
assert begun.poll() in (None, 0), Path("begun.txt").read_text(encoding="utf-8")
begun.kill()
begun.wait()
saved = sorted(path.name for path in Path("runs/python/checkpoints").glob("*"))
print(f"killed after step {last_step()} of {STEPS}; checkpoints:", saved)

# %% [markdown]
# The same command goes on from the newest checkpoint, and ends in the very bits that an undisturbed run ends in.

# %%
run("optjax.train.pretrain", "--settings", "run.toml")

# %% [markdown]
# ## 5. Look
#
# `log.jsonl` has an entry every few steps. `runs/python/report.html` shows the same curves, and needs nothing but a
# browser.

# %%
import matplotlib.pyplot as plt

entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
losses = [entry for entry in entries if "loss" in entry]
checked = [entry for entry in losses if "validation_loss" in entry]

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
left.plot([entry["step"] for entry in losses], [entry["loss"] for entry in losses], label="training")
left.plot(
    [entry["step"] for entry in checked], [entry["validation_loss"] for entry in checked], "o-", label="validation"
)
left.set_xlabel("step")
left.set_ylabel("nats per token")
left.legend()
right.plot([entry["step"] for entry in losses], [entry["grad_norm"] for entry in losses])
right.set_xlabel("step")
right.set_ylabel("norm of the gradient")
plt.show()
print(f"loss {losses[0]['loss']:.2f} -> {losses[-1]['loss']:.2f}")

# %% [markdown]
# ## 6. Write
#
# `--export` wrote the weights in Hugging Face's layout: `transformers` and every function of optjax load them.

# %%
import jax

import optjax

params, tokenizer = optjax.load("python-opt")
ids, mask = tokenizer(["def ", "import ", "class "])
made = optjax.generate(
    params,
    ids,
    mask,
    max_new_tokens=48,
    do_sample=True,
    temperature=0.7,
    top_p=0.95,
    key=jax.random.key(0),
    suppress_tokens=tokenizer.unused_ids(params.config.vocab_size),
)
for row in made:
    print(tokenizer.decode(row))
    print("---")

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
# # Fine-tuning: a classifier, and LoRA
#
# Teaches opt-mini, the model that comes with optjax, to tell which package of Python's standard library a docstring is
# from; then to write docstrings, by adapters of a few thousand numbers beside weights that stay as they are. Where the
# hub can be reached, a real OPT does the first of the two as well.
#
# It runs on a CPU in some minutes, faster on a GPU or TPU.

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
# Training runs in processes of its own. A TPU belongs to one process at a time, so jax is imported here at the end
# only; of a GPU each takes what it needs.

# %%
os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
EXAMPLES = int(os.environ.get("OPTJAX_NOTEBOOK_EXAMPLES", "2000"))


def run(*words):
    """Runs `python -m …`, and shows what it says."""
    done = subprocess.run(
        [sys.executable, "-m", *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    print(done.stdout)
    assert done.returncode == 0, f"exit status {done.returncode}"


# %% [markdown]
# ## 2. Data
#
# The first paragraph of every docstring in six packages, with the `def` or `class` line that it belongs to.

# %%
import ast
import random
from pathlib import Path

PACKAGES = ("asyncio", "email", "http", "multiprocessing", "unittest", "xml")


def docstrings(package):
    """(line, first paragraph) of each function and class of a package."""
    for path in sorted((Path(os.__file__).parent / package).rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and ast.get_docstring(node):
                paragraph = ast.get_docstring(node).split("\n\n")[0]
                yield source.split("\n")[node.lineno - 1].strip(), " ".join(paragraph.split())[:200]


found = [(package, line, text) for package in PACKAGES for line, text in docstrings(package) if text]
random.Random(0).shuffle(found)
found = found[:EXAMPLES]
for package, line, text in found[:4]:
    print(f"{package}: {line}\n    {text}")
print(f"{len(found)} docstrings")

# %% [markdown]
# ## 3. A classifier
#
# A CSV file with a header is all that `classify` needs; JSON Lines will do as well. It holds a tenth of the rows out,
# looks at them after every epoch, and keeps the best model.

# %%
import csv

with open("docstrings.csv", "w", encoding="utf-8", newline="") as file:
    csv.writer(file).writerows([("text", "label"), *((text, package) for package, _, text in found)])

run(
    *("optjax.train.classify", "--model", "opt-mini", "--data", "docstrings.csv", "--run", "runs/classifier"),
    *("--epochs", 4, "--lr", 1e-3, "--batch-size", 32, "--too-long", "cut", "--max-length", 64),
)

# %% [markdown]
# The folder of the run has the curves (`report.html` shows them in a browser), the scores of each label, and what the
# best model says of each row that was held out.

# %%
import json

import matplotlib.pyplot as plt
import numpy as np

scores = json.loads(Path("runs/classifier/metrics.json").read_text())
print(f"accuracy {scores['accuracy']:.3f}, F1 {scores['f1_macro']:.3f}")

said = [json.loads(line) for line in Path("runs/classifier/predictions.jsonl").read_text().splitlines()]
counts = np.zeros((len(PACKAGES), len(PACKAGES)), int)
for row in said:
    counts[PACKAGES.index(row["label"]), PACKAGES.index(row["prediction"])] += 1

figure, axes = plt.subplots(figsize=(5, 4), layout="constrained")
axes.imshow(counts, cmap="Blues")
for (i, j), count in np.ndenumerate(counts):
    axes.text(j, i, count, ha="center", va="center", color="white" if count > counts.max() / 2 else "black")
axes.set_xticks(range(len(PACKAGES)), PACKAGES, rotation=45, ha="right")
axes.set_yticks(range(len(PACKAGES)), PACKAGES)
axes.set_xlabel("said")
axes.set_ylabel("true")
plt.show()

# %% [markdown]
# The finished model is a Hugging Face checkpoint, which transformers loads as `OPTForSequenceClassification`. Over
# other texts:

# %%
texts = ["Return the text of the Subject header, decoded.", "Wait until the future is done, then cancel the task."]
with open("new.csv", "w", encoding="utf-8", newline="") as file:
    csv.writer(file).writerows([("text",), *((text,) for text in texts)])
run(
    *("optjax.train.classify", "--model", "runs/classifier/model"),
    *("--predict", "new.csv", "--predictions", "said.jsonl"),
)
for line in Path("said.jsonl").read_text().splitlines():
    row = json.loads(line)
    print(f"{row['prediction']} ({row['probability'][row['prediction']]:.0%}): {row['text']}")

# %% [markdown]
# ## 4. LoRA
#
# Now a language model: the prompt is the line of the `def`, the completion its docstring. Only the completion is
# learned. With `--lora-r` the weights stay, and pairs of thin matrices beside them learn (`--quantize nf4` would keep
# the weights in 4 bits: QLoRA).

# %%
with open("pairs.jsonl", "w", encoding="utf-8") as file:
    for _, line, text in found:
        file.write(json.dumps({"prompt": line, "completion": f'\n    """{text}"""'}) + "\n")

run(
    *("optjax.train.finetune", "--model", "opt-mini", "--data", "pairs.jsonl", "--run", "runs/docstrings"),
    *("--lora-r", 8, "--lora-target", "all-linear", "--epochs", 2, "--lr", 5e-3, "--batch-size", 8),
    *("--max-length", 256, "--too-long", "drop", "--max-new-tokens", 40, "--log-every", 5),
)

# %% [markdown]
# `runs/docstrings/adapter` holds the adapters as PEFT writes and reads them, and `runs/docstrings/model` the weights
# with the adapters added in. Here they stand beside the model, and can be taken away again.

# %%
import jax

import optjax

params, tokenizer = optjax.load("opt-mini", dtype="float32")
adapters = optjax.load_adapters("runs/docstrings/adapter")
adapted = optjax.with_adapters(params, adapters)
whole = sum(leaf.size for leaf in jax.tree.leaves(params))
print(f"{adapters.count:,} numbers were trained beside {whole:,}")

prompts = ["def open_file(name, mode):", "class ServerError(Exception):"]
ids, mask = tokenizer(prompts)
unused = tokenizer.unused_ids(params.config.vocab_size)
for name, model in (("opt-mini", params), ("with its adapters", adapted)):
    print(f"--- {name}")
    for row in optjax.generate(model, ids, mask, max_new_tokens=40, suppress_tokens=unused):
        print(tokenizer.decode(row))

# %% [markdown]
# ## 5. A real OPT
#
# The same command with `--model facebook/opt-125m`, if the hub can be reached: 250 MB to download, and on a CPU some
# minutes more.

# %%
try:
    optjax.Tokenizer.load("facebook/opt-125m")
except (FileNotFoundError, ConnectionError) as error:
    print(f"left out: {error}")
else:
    run(
        *(
            "optjax.train.classify",
            "--model",
            "facebook/opt-125m",
            "--data",
            "docstrings.csv",
            "--run",
            "runs/opt-125m",
        ),
        *("--epochs", 2, "--batch-size", 32, "--too-long", "cut", "--max-length", 64),
    )

"""What quantization costs in exactness: logits and perplexity on text, beside the same model in float32.

    python -m bench.quantization                        # opt-mini on WikiText-2 and a novel: some minutes
    python -m bench.quantization --model facebook/opt-125m --text my.txt --windows 32 --calibration other.txt
    python -m bench.quantization --save                 # also writes bench/results/quantization.md

A text is cut into windows of the model's length (2048 tokens at most), each predicted from its own beginning; windows
are taken evenly over the text. Both models see the same windows, so that the change is that of the weights alone, or
of the keys and values: with an int8 cache every token is read by way of it, so that each attends to codes only. The
largest error is that of any logit of any token, as a share of the largest logit; the mean one is the root of the mean
square, as a share of the logits' standard deviation.

Kinds with +gptq are rounded by what calibration texts bring (`optjax.gptq`): 128 windows of others than are measured.
Without --calibration these are a novel by Dickens, one by Austen and the passages of LAMBADA.

Without --text, the texts are read from ../shared/data, if they are there: WikiText-2's test set, and a novel of which
opt-mini has read nothing (Galsworthy, The Man of Property).
"""

from __future__ import annotations

import argparse
import json
import math
import tarfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench import report
from bench.arguments import Parser

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
SAVED = ROOT / "bench" / "results" / "quantization.md"
NOVEL = "Galsworthy_Man_1906"
CALIBRATION = ("Dickens_Bleak_1853", "austen/emma")
CALIBRATED, WINDOWS = "+gptq", 128
CACHE = "+cache"  # what is said of a kind whose keys and values are in 8 bits as well
KINDS = (
    *("float32+cache", "int8", "int8+cache", "int4", "int4:32", "nf4", "nf4:32"),
    *("int8+gptq", "int4+gptq", "int4:32+gptq", "nf4+gptq", "nf4:32+gptq"),
)
COLUMNS = ("", "weights, MB", "largest error", "mean error", "same first choice", "perplexity", "change")


def main() -> None:
    parser = Parser("quantization", __doc__)
    parser.add_argument("--model", default="opt-mini")
    parser.add_argument("--text", nargs="+", type=Path, default=[])
    parser.add_argument("--calibration", nargs="+", type=Path, default=[], help="texts for the kinds with +gptq")
    text = "such as int8, int4, or int4:32 for groups of 32; +gptq by a calibration text; +cache with an int8 cache"
    parser.add_argument("--kinds", nargs="+", default=KINDS, help=text)
    parser.add_argument("--windows", type=int, default=64, help="of each text; 0 for all")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every figure")
    parser.add_argument("--save", action="store_true", help="also write bench/results/quantization.md")
    args = parser.parse_args()
    texts = {path.name: path.read_text(encoding="utf-8") for path in args.text} or dict(shared_texts())
    if not texts:
        parser.error(f"no texts in {DATA}; name some with --text")
    calibration = [path.read_text(encoding="utf-8") for path in args.calibration] or list(shared_calibration())
    if not calibration and any(kind.endswith(CALIBRATED) for kind in args.kinds):
        parser.error(f"no calibration texts in {DATA}; name some with --calibration, or leave kinds with +gptq out")
    import optjax

    params, tokenizer = optjax.load(args.model, "float32")
    windows = {name: cut(args, params.config, name, tokenizer.encode(text)) for name, text in texts.items()}
    models = {kind: make_model(params, tokenizer, kind, calibration) for kind in args.kinds}
    results = [result for name, ids in windows.items() for result in compare(args, params, models, name, ids)]
    if args.json:
        args.json.write_text(json.dumps(results, indent=2))
    if args.save:
        about = report.machine()
        SAVED.write_text(
            f"# Quantized weights beside float32: {args.model}\n\n"
            f"`python -m bench.quantization{'' if args.model == 'opt-mini' else f' --model {args.model}'}`, "
            f"{about['date']}. Columns are explained in [bench/quantization.py](../quantization.py).\n"
            + tables(results)
        )


def shared_texts():
    """The texts by their names, as far as they are here."""
    if (DATA / "eval" / "wiki.test.raw").is_file():
        yield "WikiText-2, test", (DATA / "eval" / "wiki.test.raw").read_text(encoding="utf-8")
    if (DATA / "corpora.tar.xz").is_file():
        with tarfile.open(DATA / "corpora.tar.xz") as archive:
            for member in archive:
                file = archive.extractfile(member) if NOVEL in member.name else None
                if file is not None:
                    yield "The Man of Property", file.read().decode("utf-8-sig").replace("\r\n", "\n")
                    return


def shared_calibration():
    """Texts to go by that are not among those measured, as far as they are here."""
    if (DATA / "corpora.tar.xz").is_file():
        with tarfile.open(DATA / "corpora.tar.xz") as archive:
            for member in archive:
                file = archive.extractfile(member) if any(name in member.name for name in CALIBRATION) else None
                if file is not None:
                    yield file.read().decode("utf-8-sig").replace("\r\n", "\n")
    if (DATA / "eval" / "lambada_test.jsonl").is_file():
        lines = (DATA / "eval" / "lambada_test.jsonl").read_text(encoding="utf-8").splitlines()
        yield "\n".join(json.loads(line)["text"] for line in lines)


def make_model(params: Any, tokenizer: Any, kind: str, calibration: list[str]) -> Any:
    """The params of a kind."""
    import optjax

    name, size, calibrated = _parts(kind)
    if name == "float32":
        return params
    how = optjax.Quantization(name, int(size)) if size else optjax.Quantization(name)
    if not calibrated:
        return optjax.quantize(params, how)
    # As `optjax convert --calibration` has them: each window behind a BOS.
    length = min(params.config.max_position_embeddings, 2048) - 1
    tokens = [id for text in calibration for id in tokenizer.encode(text, add_special_tokens=False)]
    ids = evenly(tokens, length, WINDOWS)
    return optjax.gptq(params, np.pad(ids, ((0, 0), (1, 0)), constant_values=tokenizer.bos_token_id), how)


def _parts(kind: str) -> tuple[str, str, bool]:
    """The name of a kind, its group size, and whether it is calibrated."""
    kind = kind.removesuffix(CACHE)
    name, _, size = kind.removesuffix(CALIBRATED).partition(":")
    return name, size, kind.endswith(CALIBRATED)


def cut(args: argparse.Namespace, config: Any, name: str, tokens: list[int]) -> np.ndarray:
    """A text's windows ``[N, T]``."""
    length = min(config.max_position_embeddings, 2048)
    if len(tokens) < length:
        raise SystemExit(f"{name} has {len(tokens)} tokens, and a window {length}: name a longer text")
    return evenly(tokens, length, args.windows or len(tokens))


def evenly(tokens: list[int], length: int, count: int) -> np.ndarray:
    """``count`` windows of a text, or all if there are not as many."""
    ids = np.asarray(tokens[: len(tokens) // length * length], np.int32).reshape(-1, length)
    return ids[np.linspace(0, len(ids) - 1, min(count, len(ids))).round().astype(int)]


def compare(
    args: argparse.Namespace, params: Any, models: dict[str, Any], name: str, ids: np.ndarray
) -> list[dict[str, Any]]:
    """The figures of each kind on a text; float32's own come first."""
    import jax
    import jax.numpy as jnp

    import optjax

    batches = [ids[i : i + args.batch_size] for i in range(0, len(ids), args.batch_size)]

    @partial(jax.jit, static_argnames="cached")
    def look(params, batch, *, cached=False):
        rows, columns = batch.shape
        cache = optjax.init_cache(params, rows, columns, "int8") if cached else None
        out = optjax.causal_lm(params, batch, labels=batch, cache=cache)
        return out.logits, out.loss

    @jax.jit
    def differ(ours, theirs):
        error = ours - theirs
        same = (ours.argmax(-1) == theirs.argmax(-1)).mean()
        return jnp.abs(error).max(), jnp.abs(theirs).max(), jnp.square(error).mean(), theirs.var(-1).mean(), same

    def megabytes(params) -> float:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / 1e6

    found: dict[str, list] = {kind: [] for kind in models}
    losses: dict[str, list[float]] = {kind: [] for kind in ("float32", *models)}
    for batch in batches:
        theirs, loss = look(params, batch)
        losses["float32"].append(float(loss) * len(batch))
        for kind, model in models.items():
            ours, loss = look(model, batch, cached=kind.endswith(CACHE))
            losses[kind].append(float(loss) * len(batch))
            found[kind].append([float(x) for x in differ(ours, theirs)])
    mean = {kind: sum(each) / len(ids) for kind, each in losses.items()}
    results: list[dict[str, Any]] = [
        {"text": name, "tokens": int(ids.size), "kind": "float32", "megabytes": megabytes(params)}
        | {"perplexity": math.exp(mean["float32"])}
    ]
    for kind, model in models.items():
        each = np.asarray(found[kind])
        results.append(
            {
                "text": name,
                "tokens": int(ids.size),
                "kind": kind,
                "megabytes": megabytes(model),
                "largest_error": each[:, 0].max() / each[:, 1].max(),
                "mean_error": math.sqrt(each[:, 2].mean() / each[:, 3].mean()),
                "same_first_choice": each[:, 4].mean(),
                "perplexity": math.exp(mean[kind]),
                "change": math.exp(mean[kind] - mean["float32"]) - 1,
            }
        )
    print(tables(results), flush=True)
    return results


def tables(results: list[dict[str, Any]]) -> str:
    """One table a text."""
    lines: list[str] = []
    for i, r in enumerate(results):
        if i == 0 or results[i - 1]["text"] != r["text"]:
            lines += ["", f"## {r['text']}, {r['tokens']:,} tokens", "", f"| {' | '.join(COLUMNS)} |"]
            lines += ["|-|" + "-:|" * (len(COLUMNS) - 1)]
        kind, size, calibrated = _parts(r["kind"])
        name = (f"{kind}, groups of {size}" if size else kind) + ", GPTQ" * calibrated
        cells = [name + ", int8 cache" * r["kind"].endswith(CACHE), f"{r['megabytes']:.2f}"]
        if "change" in r:
            cells += [f"{r[name]:.2%}" for name in ("largest_error", "mean_error", "same_first_choice")]
            cells += [f"{r['perplexity']:.3f}", f"{r['change']:+.3%}"]
        else:
            cells += ["", "", "", f"{r['perplexity']:.3f}", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()

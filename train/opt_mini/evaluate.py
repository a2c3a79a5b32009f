"""Bits per byte of a model on the held-out novel, to stand beside the baselines.

  python -m optjax.train.opt_mini.evaluate --model opt-mini --documents build/opt-mini/heldout.jsonl

The novel's documents are joined as in training, </s> before the first and after each. A window slides over them so that
every token but the first few is predicted from at least `window - stride` tokens before it. Bits per byte is the sum of
the bits of all tokens, those of </s> included, over the bytes of the text: it compares with what a compressor of the
text gets, whatever the tokenizer.
"""

import argparse
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from optjax.heads import causal_lm
from optjax.params import Params

from ..data import encode_documents
from .corpus import read_documents, whole_text


def windows(count: int, window: int, stride: int) -> list[tuple[int, int]]:
    """Where each window begins, and the first of its labels that counts, for `count` labels: each counts once."""
    if count <= window:
        return [(0, 0)]
    found, done = [(0, 0)], window
    while done < count:
        end = min(done + stride, count)
        found.append((end - window, window - (end - done)))
        done = end
    return found


@jax.jit
def _nats(params: Params, inputs: jax.Array, labels: jax.Array, first: jax.Array) -> jax.Array:
    logits = causal_lm(params, inputs).logits
    picked = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    counts = jnp.arange(labels.shape[1]) >= first[:, None]
    return jnp.where(counts, jax.nn.logsumexp(logits, axis=-1) - picked, 0.0).sum(axis=1)


def total_nats(params: Params, tokens: np.ndarray, stride: int, batch_size: int = 8, show: bool = False) -> float:
    """Nats of all tokens but the first: `tokens` `[N]`, read in windows of the model's length.

    Raises:
      ValueError: a stride that is not from 1 to the window's length, or fewer than two tokens.
    """
    window = min(params.config.max_position_embeddings, len(tokens) - 1)
    if window < 1 or not 1 <= stride <= params.config.max_position_embeddings:
        raise ValueError(
            f"stride should be from 1 to {params.config.max_position_embeddings}, and tokens 2 or more, "
            f"not {stride} and {len(tokens)}"
        )
    from rich.console import Console
    from rich.progress import track

    found = windows(len(tokens) - 1, window, stride)
    total = 0.0
    starts = range(0, len(found), batch_size)
    for at in track(starts, description="reading", console=Console(stderr=True), disable=not show):
        batch = found[at : at + batch_size]
        batch += [(0, window)] * (batch_size - len(batch))  # counts nothing; one shape, one compiled program
        records = np.stack([tokens[s : s + window + 1] for s, _ in batch]).astype(np.int32)
        first = np.array([f for _, f in batch])
        total += float(np.asarray(_nats(params, records[:, :-1], records[:, 1:], first), np.float64).sum())
    return total


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m optjax.train.opt_mini.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="opt-mini", help="folder, hub id or opt-mini (%(default)s)")
    parser.add_argument("--documents", type=Path, required=True, help="heldout.jsonl of the corpus program")
    parser.add_argument("--stride", type=int, default=128, help="tokens the window moves on (%(default)s)")
    args = parser.parse_args()
    if not args.documents.is_file():
        parser.error(f"{args.documents} is not there; make it with python -m optjax.train.opt_mini.corpus")
    import optjax

    try:
        params, tokenizer = optjax.load(args.model)
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
        texts = read_documents(args.documents)
        eos = tokenizer.eos_token_id
        packed, _ = encode_documents(texts, tokenizer.backend, eos)
        tokens = np.concatenate([[eos], packed])
        nats = total_nats(params, tokens, args.stride, show=sys.stderr.isatty())
    except (ValueError, FileNotFoundError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    size = len(whole_text(texts))
    print(f"{len(packed):,} tokens, {size:,} bytes; {nats / len(packed):.4f} nats per token")
    print(f"{nats / math.log(2) / size:.4f} bits per byte")


if __name__ == "__main__":
    main()

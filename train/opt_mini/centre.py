"""Moves the token embeddings so that their mean is zero, and the position embeddings by as much the other way.

  python -m optjax.train.opt_mini.centre --model runs/opt-mini/model --out opt-mini

The model stays what it is. Its input, the sum of both tables' rows, does not change; and as the table is the head too,
all logits of a token move by the same amount, which a softmax does not see. But training pushes the rows of tokens that
never come far away in one direction, all logits with them, and int8 codes have a step in proportion to a row's largest
number: about the mean, which lies in that direction, codes are nearer to what they stand for.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import jax.numpy as jnp

import optjax
from optjax.params import Params

from ..export import export


def centre(params: Params) -> Params:
    """The same model about its mean row, in the dtype of ``params``.

    Raises:
      ValueError: the head is not the table, or the table has a width of its own.
    """
    config = params.config
    if not config.tie_word_embeddings or config.has_projections:
        raise ValueError("only a table that is the head as well, and as wide as the model, can be moved")
    tokens, positions = (params.weights[name]["weight"] for name in ("embed_tokens", "embed_positions"))
    mean = tokens.astype(jnp.float32).mean(0)
    moved = {
        "embed_tokens": {"weight": (tokens - mean).astype(tokens.dtype)},
        "embed_positions": {"weight": (positions + mean).astype(positions.dtype)},
    }
    return dataclasses.replace(params, weights={**params.weights, **moved})


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m optjax.train.opt_mini.centre",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="folder of a checkpoint in float32, with its tokenizer")
    parser.add_argument("--out", required=True, type=Path, help="of the checkpoint in float16 that is written")
    args = parser.parse_args()
    params, tokenizer = optjax.load(args.model, "float32")
    export(centre(params), args.out, "float16", tokenizer)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()

"""Writes the weights of a pretraining run as a Hugging Face checkpoint, which optjax and transformers load.

  python -m optjax.train.export --run runs/first --out my-opt --dtype float16 --tokenizer folder

takes the newest checkpoint; the run may still be going on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp

from optjax import save_params, unstack_layers
from optjax.params import Params
from optjax.tokenizer import Tokenizer


def export(params: Params, folder: str | Path, dtype: str = "float32", tokenizer: Tokenizer | None = None) -> None:
    """Writes params in a dtype, layers in a list, and the tokenizer along.

    Raises:
      ValueError: a weight is too large for the dtype.
    """
    cast = jax.tree.map(lambda leaf: leaf.astype(dtype), unstack_layers(params))
    if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(cast)):
        raise ValueError(f"some weights are not finite in {dtype}; export in float32 or bfloat16")
    save_params(cast, folder)
    if tokenizer is not None and jax.process_index() == 0:
        tokenizer.save(folder)


def _check(folder: Path) -> None:
    """ValueError where the run is one of fine-tuning, which has no need of this."""
    path = folder / "run.json"
    script = json.loads(path.read_text(encoding="utf-8")).get("script") if path.is_file() else None
    if script is not None:
        raise ValueError(
            f"{folder} is a run of optjax.train.{script}, which at its end writes its model to {folder / 'model'}; "
            "only runs of optjax.train.pretrain are exported"
        )


def main(argv: list[str] | None = None) -> None:
    from .run_file import load_run

    parser = argparse.ArgumentParser(
        prog="python -m optjax.train.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, metavar="FOLDER", help="of optjax.train.pretrain")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="made if need be")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="(float32)")
    parser.add_argument("--tokenizer", metavar="SOURCE", help="to write along: folder, hub id or opt-mini")
    args = parser.parse_args(argv)
    try:
        _check(args.run)
        tokenizer = None if args.tokenizer is None else Tokenizer.load(args.tokenizer)
        export(load_run(args.run), args.out, args.dtype, tokenizer)
    except (ValueError, FileNotFoundError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()

"""What others make of the held-out novel, in bits per byte: xz, and n-gram models of the training text.

  python -m optjax.train.opt_mini.baselines --data build/opt-mini

`xz -9e` sees the novel alone. The fairer figure beside it lets xz know as much of the training text as its dictionary
of 64 MiB holds: the size of (training text + novel) less the size of the training text. The n-gram models are
interpolated modified Kneser-Ney models over bytes, of all of the training text; "order-5" has 5 bytes of context.
"""

import argparse
import lzma
import random
import zlib
from pathlib import Path

from .corpus import read_documents, whole_text
from .ngram import ByteNgram, check_distribution

DICTIONARY = 64 << 20


def xz_size(text: bytes) -> int:
    """Bytes of `xz -9e`."""
    return len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))


def xz_size_after(known: bytes, text: bytes) -> int:
    """Bytes that `text` adds to `known` where xz has read that before, as far back as its dictionary reaches."""
    known = known[max(0, len(known) + len(text) - DICTIONARY) :]
    return xz_size(known + text) - xz_size(known)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m optjax.train.opt_mini.baselines",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of optjax.train.opt_mini.corpus")
    parser.add_argument("--orders", type=int, nargs="+", default=[4, 5], help="of the n-gram models (4 5)")
    parser.add_argument("--seed", type=int, default=0, help="of the order in which xz reads the training documents (0)")
    args = parser.parse_args()
    for name in ("train.jsonl", "heldout.jsonl"):
        if not (args.data / name).is_file():
            parser.error(f"{args.data / name} is not there; make it with python -m optjax.train.opt_mini.corpus")
    from rich.console import Console
    from rich.table import Table

    console = Console()
    documents = read_documents(args.data / "train.jsonl")
    random.Random(args.seed).shuffle(documents)  # so that the part xz can hold is no particular author's
    known, novel = whole_text(documents), whole_text(read_documents(args.data / "heldout.jsonl"))
    table = Table(title=f"The held-out novel: {len(novel):,} bytes, after {len(known):,} bytes of training text")
    table.add_column("model")
    table.add_column("bits per byte", justify="right")

    def row(name: str, bits: float) -> None:
        table.add_row(name, f"{bits / len(novel):.3f}")

    with console.status("compressing, counting") as status:
        row("zlib -9", 8 * len(zlib.compress(novel, 9)))
        row("xz -9e, the novel alone", 8 * xz_size(novel))
        for order in args.orders:
            status.update(f"counting, order {order}")
            model = ByteNgram(known, order)
            off = check_distribution(model, [known, novel])
            assert off < 1e-9, f"the probabilities of an order-{order} context sum to 1 ± {off}"
            row(f"order-{order} n-gram", model.bits(novel))
        status.update("compressing 64 MiB, twice")
        row("xz -9e, after training text", 8 * xz_size_after(known, novel))
    console.print(table)


if __name__ == "__main__":
    main()

"""Tokenizes documents and packs them for training.

  python -m optjax.train.pack --documents train.jsonl --tokenizer opt-mini --out packed/train

Documents come as

  .txt              one document a file
  .jsonl            one a line, a JSON object with the text under --text-field (also .json of that kind)
  .parquet, .arrow  one a row
  a folder          of such files, or of a Hugging Face dataset saved with save_to_disk
  "books/*.txt"     a pattern

.txt and .jsonl may be compressed (.gz, .zst). Each document is stripped, tokenized, and followed by </s>; all are
joined, and lie in --out as ArrayRecord shards with an about.json. A length to train with is chosen when they are read.

What was stopped or killed goes on with the same command, and ends in the same bytes.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m optjax.train.pack", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--documents", nargs="+", required=True, metavar="PATH", help="files, folders or patterns")
    parser.add_argument("--tokenizer", required=True, metavar="SOURCE", help="folder, hub id or opt-mini")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder to write")
    parser.add_argument("--text-field", default="text", metavar="NAME", help="field or column of the text (text)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (one for each core)")
    parser.add_argument("--block-length", type=int, default=8192, metavar="N", help="tokens per record on disk (8192)")
    parser.add_argument(
        "--shard-size", type=float, metavar="MIB", help="text per shard (a sixty-fourth of all, from 4 to 1024)"
    )
    parser.add_argument("--quiet", action=argparse.BooleanOptionalAction, default=False, help="no progress bar")
    from .settings import parse

    args = parse(parser, argv)
    from optjax.tokenizer import Tokenizer

    from .data.packing import pack

    try:
        tokenizer = Tokenizer.load(args.tokenizer)
        with _bar(args.quiet) as progress:
            about = pack(
                args.documents,
                tokenizer,
                args.out,
                text_field=args.text_field,
                workers=args.workers,
                block_length=args.block_length,
                shard_bytes=None if args.shard_size is None else max(1, int(args.shard_size * 2**20)),
                tokenizer_name=args.tokenizer,
                progress=progress,
            )
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "stopped; the same command goes on from there\n")
    tokens, size, documents = about["tokens"], about["bytes"], about["documents"]
    left = f" ({about['empty']:,} empty ones left out)" if about["empty"] else ""
    print(
        f"{args.out}: {tokens:,} tokens of {size:,} bytes, {size / max(1, tokens):.3f} bytes/token, "
        f"{documents:,} documents{left}"
    )


@contextmanager
def _bar(quiet: bool) -> Iterator:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("packing"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=quiet or not sys.stderr.isatty()) as bar:
        task = bar.add_task("packing", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


if __name__ == "__main__":
    main()

"""Tokenizes documents and packs them for `pretrain`.

  python -m optjax.train.pack --documents train.jsonl --tokenizer folder --out train.npy

Documents come as .jsonl (one object a line, the text under "text") or as a .txt file, which is one document.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from . import data


def read_documents(path: Path) -> Iterator[str]:
    """The texts of a .jsonl or .txt file, one at a time.

    Raises:
      ValueError: a line is not JSON or has no text.
    """
    if path.suffix == ".txt":
        yield path.read_text(encoding="utf-8")
        return
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield json.loads(line)["text"]
            except (json.JSONDecodeError, KeyError, TypeError):
                raise ValueError(f'{path}, line {number}: expected a JSON object with a "text"') from None


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m optjax.train.pack", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--documents", type=Path, required=True, metavar="FILE", help=".jsonl or .txt")
    parser.add_argument("--tokenizer", required=True, metavar="SOURCE", help="folder, hub id or opt-mini")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help=".npy to write")
    args = parser.parse_args(argv)
    if not args.documents.is_file():
        parser.error(f"{args.documents} is not there")
    if args.out.suffix != ".npy":
        parser.error(f"--out should end in .npy, not {args.out.name}")
    from rich.progress import track

    from optjax.tokenizer import Tokenizer

    try:
        tokenizer = Tokenizer.load(args.tokenizer)
        documents = track(read_documents(args.documents), description="packing", total=None)
        tokens, size = data.pack(documents, tokenizer.backend, tokenizer.eos_token_id)
    except (ValueError, FileNotFoundError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    data.write_packed(args.out, tokens, size, tokenizer.backend.get_vocab_size())
    print(f"{args.out}: {len(tokens):,} tokens of {size:,} bytes, {size / max(1, len(tokens)):.3f} bytes/token")


if __name__ == "__main__":
    main()

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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=Path, required=True, metavar="FILE", help=".jsonl or .txt")
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="FOLDER", help="folder with tokenizer.json")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help=".npy to write")
    parser.add_argument("--eos", default="</s>", help="token that ends a document (default: %(default)s)")
    args = parser.parse_args(argv)
    from rich.progress import track
    from tokenizers import Tokenizer

    file = args.tokenizer / "tokenizer.json"
    for needed in (args.documents, file):
        if not needed.is_file():
            parser.error(f"{needed} is not there")
    if args.out.suffix != ".npy":
        parser.error(f"--out should end in .npy, not {args.out.name}")
    tokenizer = Tokenizer.from_file(str(file))
    eos = tokenizer.token_to_id(args.eos)
    if eos is None:
        parser.error(f"the tokenizer has no token {args.eos!r}")
    documents = track(read_documents(args.documents), description="packing", total=None)
    tokens, size = data.pack(documents, tokenizer, eos)
    data.write_packed(args.out, tokens, size, tokenizer.get_vocab_size())
    print(f"{args.out}: {len(tokens):,} tokens of {size:,} bytes, {size / max(1, len(tokens)):.3f} bytes/token")


if __name__ == "__main__":
    main()

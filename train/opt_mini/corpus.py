"""Reads the books from an archive, cleans them, and writes the three splits that opt-mini is made from.

  python -m optjax.train.opt_mini.corpus --corpus corpora.tar.xz --out build/opt-mini

writes train.jsonl, validation.jsonl and heldout.jsonl, one document a line: {"source": file, "text": text}.

The held-out novel is Galsworthy's "The Man of Property" (1906). Neither the model nor its tokenizer sees it, nor any
other text by its author: his second novel in the archive, "Saint's Progress", is the validation split.
"""

import argparse
import json
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

from . import cleaning

HELD_OUT = "Galsworthy_Man_1906"
VALIDATION = "Galsworthy_Saints_1919"
FOLDERS = ("novels", "austen", "grimm")
"""Prose. Plays, sonnets and scripture have layouts of their own, which a model this small would mix into everything."""


def split_of(name: str) -> str:
    """The split ("train", "validation" or "heldout") of a book, by its file name."""
    stem = Path(name).stem
    return {HELD_OUT: "heldout", VALIDATION: "validation"}.get(stem, "train")


def books(archive: Path) -> Iterator[tuple[str, bytes]]:
    """(name, content) of every book of the folders used, in the order of their names."""
    with tarfile.open(archive) as tar:
        found = {m.name: m for m in tar.getmembers() if m.isfile() and Path(m.name).parent.name in FOLDERS}
        contents = {}
        for name in found:  # in archive order: seeking back in an xz stream decompresses it again
            member = tar.extractfile(found[name])
            assert member is not None
            contents[name] = member.read()
    yield from sorted(contents.items())


def read_documents(path: Path) -> list[str]:
    """The texts of a split written by this program."""
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def whole_text(texts: list[str]) -> bytes:
    """A split as one text, as compressors and the n-gram model see it: documents joined by a blank line, UTF-8."""
    return "\n\n".join(texts).encode()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m optjax.train.opt_mini.corpus",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--corpus", type=Path, required=True, help="tar archive (any compression) of the books")
    parser.add_argument("--out", type=Path, required=True, help="folder for the three .jsonl files")
    args = parser.parse_args()
    if not args.corpus.is_file():
        parser.error(f"{args.corpus} is not a file; expected the archive of books")
    from rich.console import Console
    from rich.progress import track

    args.out.mkdir(parents=True, exist_ok=True)
    splits: dict[str, list[tuple[str, str]]] = {"train": [], "validation": [], "heldout": []}
    bar = {"console": Console(stderr=True), "disable": not sys.stderr.isatty()}
    for name, raw in track(list(books(args.corpus)), description="cleaning", **bar):
        splits[split_of(name)] += [(Path(name).stem, text) for text in cleaning.documents(raw)]
    for split, found in splits.items():
        if not found:
            parser.error(
                f"{args.corpus} has no text for the split {split!r}: expected {HELD_OUT} and {VALIDATION} in it"
            )
        with open(args.out / f"{split}.jsonl", "w", encoding="utf-8") as out:
            for source, text in found:
                out.write(json.dumps({"source": source, "text": text}, ensure_ascii=False) + "\n")
        size = len(whole_text([text for _, text in found]))
        print(f"{split:12s}{len({s for s, _ in found}):5d} books{len(found):7d} documents{size:13,d} bytes")


if __name__ == "__main__":
    main()

"""Plain-text books into clean documents: one chapter each, one line per paragraph, a blank line between paragraphs.

The books come from many hands: with and without a byte-order mark, CRLF, hard-wrapped or one line per paragraph, with
blank lines between paragraphs or none. What is done to them, in this order:

1. characters: straight quotes, one kind of dash (" - "), no italics marks, no form feeds, single spaces
2. paragraphs: hard-wrapped lines are joined again
3. chapters: a heading ends a document and is dropped, so that documents begin as a reader's prompt would: with prose
"""

import re

MAX_DOCUMENT = 24_000
"""Characters. Chapters longer than this (and books without recognisable headings) are cut between paragraphs."""

_CHARACTERS = str.maketrans({
    "\ufeff": None, "\u00a0": " ", "\t": " ", "\x0c": "\n\n", "\u2018": "'", "\u2019": "'", "`": "'",
    "\u201c": '"', "\u201d": '"', "_": None, "*": None, "\u017f": "s",
})  # fmt: skip
_HEADING = re.compile(r"(chapter|book|part|volume|letter|canto|section)\b.{0,70}$", re.IGNORECASE)
_HEADING_WORDS = re.compile(r"(chapter|book|part|volume|letter)\s+([ivxlc]+|\d+|[a-z]+)\W*$|chapter\b", re.IGNORECASE)
_NUMERAL = re.compile(r"[\divxlc]+\W*$", re.IGNORECASE)


def normalise(text: str) -> str:
    """One spelling of quotes, dashes and white space; the lines stay as they are."""
    text = text.replace("\r\n", "\n").translate(_CHARACTERS)
    text = re.sub(r" *(?:--+|\u2014|\u2013) *", " - ", text)
    text = re.sub(r"(?:\. ){2,}\.", "...", text)  # ". . ." costs five tokens and says what "..." says
    return re.sub(r" {2,}", " ", text)


def paragraphs(text: str) -> list[str]:
    """The paragraphs of a normalised text, each on one line.

    In a hard-wrapped text a blank line ends a paragraph; so does a line after which the next word would still have
    fitted well within the wrap width, which finds the paragraphs of the books that have no blank lines, and keeps
    verses apart. A line that begins in lower case never begins a paragraph.
    """
    lines = [line.strip() for line in text.split("\n")]
    lengths = sorted(len(line) for line in lines if line)
    if not lengths:
        return []
    width = lengths[int(len(lengths) * 0.95)]
    wrapped = width <= 130  # otherwise one line per paragraph
    found: list[str] = []
    previous = ""  # the last line, "" if blank
    for line in lines:
        if line:
            goes_on = wrapped and previous and not _ends_paragraph(previous, line, width)
            if found and (goes_on or line[0].islower()):
                hyphenated = found[-1].endswith("-") and found[-1][-2:-1].isalpha()  # "sitting-" / "room"
                found[-1] += line if hyphenated else " " + line
            else:
                found.append(line)
        previous = line
    return found


def _ends_paragraph(line: str, following: str, width: int) -> bool:
    short = len(line) + 1 + len(following.split(" ", 1)[0]) < width - 10
    return short and (line[-1] in ".!?:\"'-;," or is_heading(line))


def is_heading(paragraph: str) -> bool:
    """True for chapter headings, numerals that stand alone, and short lines in capitals."""
    if len(paragraph) > 90:
        return False
    if _NUMERAL.match(paragraph) or (_HEADING.match(paragraph) and _HEADING_WORDS.match(paragraph)):
        return True
    letters = [c for c in paragraph if c.isalpha()]
    return len(letters) > 3 and all(c.isupper() for c in letters) and paragraph[0] not in "\"'"


def documents(raw: bytes) -> list[str]:
    """The documents of one book, given as the bytes of its file (UTF-8).

    Raises:
      ValueError: if the bytes are not UTF-8.
    """
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"expected a book in UTF-8, found a byte that is not ({error}); convert the file first"
        ) from None
    found: list[list[str]] = [[]]
    for paragraph in paragraphs(normalise(text)):
        if is_heading(paragraph):
            found.append([])
            continue
        if sum(map(len, found[-1])) > MAX_DOCUMENT:
            found.append([])
        found[-1].append(paragraph)
    joined = ["\n\n".join(document) for document in found]
    return [document for document in joined if len(document) > 300]  # title pages and tables of contents go

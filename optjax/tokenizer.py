"""Text to ids and back: byte-level BPE in OPT's conventions, over the `tokenizers` library.

OPT's vocabulary is GPT-2's with four tokens in front: ``<s>`` 0, ``<pad>`` 1, ``</s>`` 2, ``<unk>`` 3; bos, eos and
unk are all ``</s>``. One ``</s>`` stands before a text and none after it. GPT-2's own tokenizer puts nothing there:
hence the setting ``add_bos_token`` in OPT's files.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from optjax import tokenizer_files

if TYPE_CHECKING:
    import tokenizers

Side = Literal["left", "right"]


class Tokenizer:
    """A `tokenizers.Tokenizer` with its special ids. Made by `Tokenizer.load`; it is not changed by any method."""

    def __init__(self, backend: tokenizers.Tokenizer, *, bos_token: str, eos_token: str, pad_token: str | None):
        """Wraps a ready-made tokenizer; what it puts before a text is its own post-processor's affair.

        Raises:
          ValueError: a special token is not in its vocabulary.
        """
        self.backend = backend
        self.bos_token, self.eos_token, self.pad_token = bos_token, eos_token, pad_token
        self.bos_token_id = self._id_of("bos_token", bos_token)
        self.eos_token_id = self._id_of("eos_token", eos_token)
        self.pad_token_id = None if pad_token is None else self._id_of("pad_token", pad_token)
        self._ids = frozenset(backend.get_vocab(with_added_tokens=True).values())

    @classmethod
    def load(cls, source: str | Path, *, revision: str | None = None, token: str | bool | None = None) -> Tokenizer:
        """The tokenizer of a folder, of a hub id such as ``facebook/opt-125m``, or of ``"opt-mini"``.

        ``tokenizer.json`` is taken where there is one, and its own post-processor decides what is put before a text
        (Galactica's puts nothing there). There is one exception: where ``tokenizer_config.json`` says ``add_bos_token``
        and the file does not add the BOS, as in some copies of OPT, it is added. From ``vocab.json`` and ``merges.txt``
        the tokenizer is built as OPT's, with one BOS unless ``add_bos_token`` is false, and the tokens that
        ``added_tokens.json``, ``tokenizer_config.json`` and ``special_tokens_map.json`` add. BOS, EOS and padding are
        those of ``tokenizer_config.json``, else of ``special_tokens_map.json``, else the ids of ``config.json``, else
        OPT's.

        Args:
          revision, token: branch, tag or commit, and access token, where ``source`` is a hub id.

        Raises:
          FileNotFoundError: neither ``tokenizer.json`` nor ``vocab.json`` with ``merges.txt`` is there.
          ValueError: a file is damaged, or the files do not belong together.
        """
        return cls(**tokenizer_files.read(tokenizer_files.locate(source, revision, token)))

    def save(self, folder: str | Path) -> None:
        """Writes the files from which `load` and transformers' AutoTokenizer make this tokenizer again.

        ``tokenizer.json``, ``tokenizer_config.json`` and ``special_tokens_map.json``; for a tokenizer of GPT-2's build,
        which OPT's is, also ``vocab.json`` and ``merges.txt``. Files of these names, and ``added_tokens.json``, that
        another tokenizer left in the folder go.
        """
        names = {"bos_token": self.bos_token, "eos_token": self.eos_token}
        if self.pad_token is not None:
            names["pad_token"] = self.pad_token
        tokenizer_files.write(self.backend, names, Path(folder), adds_bos=self.encode("") == [self.bos_token_id])

    # Sizes and special ids.

    @property
    def vocab_size(self) -> int:
        """How many entries there are; 50265 for OPT, whose embedding has 50272 rows (see `unused_ids`)."""
        return len(self._ids)

    def __len__(self) -> int:
        return self.vocab_size

    def unused_ids(self, vocab_size: int) -> list[int]:
        """The rows of an embedding of ``vocab_size`` rows that this tokenizer cannot decode: 50265–50271 for OPT.

        A model may give them probability all the same (transformers issue 18268): pass them to `generate` as
        ``suppress_tokens``.
        """
        return [i for i in range(vocab_size) if i not in self._ids]

    # Text to ids.

    def encode(self, text: str, pair: str | None = None, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text, with OPT one BOS first; with ``pair``, its ids follow after those of ``text``.

        Special tokens written out in the text are recognised: ``"</s>bos"`` gives BOS, ``</s>``, ``bos``.

        Raises:
          ValueError: not a string, or one that UTF-8 cannot hold (a lone surrogate).
        """
        _check_text(text, "text")
        if pair is not None:
            _check_text(pair, "pair")
        return self.backend.encode(text, pair, add_special_tokens=add_special_tokens).ids

    def encode_batch(
        self,
        texts: Iterable[str] | np.ndarray,
        *,
        padding: Side = "left",
        max_length: int | None = None,
        truncation: bool | Side = False,
        pad_to_multiple_of: int | None = None,
        add_special_tokens: bool = True,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Texts as one rectangle of ids and the mask that tells text (1) from padding (0).

        Args:
          texts: [B] strings.
          padding: the side on which shorter texts are padded with ``pad_token_id``.
          max_length: most ids a text may have, special tokens included.
          truncation: what to do with longer ones: ``"right"`` (or True) drops their end, ``"left"`` their beginning,
            never the special tokens; False refuses them.
          pad_to_multiple_of: T becomes a multiple of this, so that fewer shapes are compiled.

        Returns:
          ids and mask, both [B, T] int32, T the longest text's length.

        Raises:
          ValueError: no texts, a single string, a text longer than ``max_length`` without truncation, no pad token.
        """
        if isinstance(texts, str):
            raise ValueError("expected a list of texts, got one string; pass [text], or use encode(text)")
        try:
            texts = list(texts)
        except TypeError:
            raise ValueError(f"expected a list of texts, got {type(texts).__name__}") from None
        if not texts:
            raise ValueError("expected at least one text, got none")
        if padding not in ("left", "right"):
            raise ValueError(f"padding is {padding!r}; expected 'left' or 'right'")
        if truncation not in (False, True, "left", "right"):
            raise ValueError(f"truncation is {truncation!r}; expected False, True, 'left' or 'right'")
        if truncation and max_length is None:
            raise ValueError("truncation needs max_length")
        if pad_to_multiple_of is not None and pad_to_multiple_of < 1:
            raise ValueError(f"pad_to_multiple_of is {pad_to_multiple_of}; expected at least 1")
        for i, text in enumerate(texts):
            _check_text(text, f"texts[{i}]")

        rows = self.backend.encode_batch(texts, add_special_tokens=False)
        if max_length is not None:
            added = self.backend.num_special_tokens_to_add(False) if add_special_tokens else 0
            room = max_length - added
            if room < 0:
                raise ValueError(f"max_length is {max_length}, which does not hold the {added} special tokens")
            for i, row in enumerate(rows):
                if len(row) > room and not truncation:
                    raise ValueError(
                        f"texts[{i}] has {len(row) + added} tokens, more than max_length {max_length}; "
                        "shorten it or pass truncation='left' or 'right'"
                    )
                if truncation:
                    row.truncate(room, direction="left" if truncation == "left" else "right")
        rows = [self.backend.post_process(row, None, add_special_tokens).ids for row in rows]

        width = max(map(len, rows))
        if pad_to_multiple_of:
            width = -(-width // pad_to_multiple_of) * pad_to_multiple_of
        if self.pad_token_id is None and any(len(row) < width for row in rows):
            raise ValueError("these texts need padding, and this tokenizer has no pad token; encode them one by one")
        ids = np.full((len(rows), width), self.pad_token_id or 0, np.int32)
        mask = np.zeros((len(rows), width), np.int32)
        for i, row in enumerate(rows):
            place = slice(width - len(row), width) if padding == "left" else slice(len(row))
            ids[i, place] = row
            mask[i, place] = 1
        return ids, mask

    def __call__(self, texts: str | Iterable[str] | np.ndarray, **options: Any) -> tuple[np.ndarray, np.ndarray]:
        """`encode_batch` that also takes one string: ``optjax.generate(params, *tokenizer("Hello"), …)``."""
        return self.encode_batch([texts] if isinstance(texts, str) else texts, **options)

    # Ids to text.

    def decode(self, ids: Iterable[int] | np.ndarray, skip_special_tokens: bool = True) -> str:
        """The text of one row of ids; bytes that are not UTF-8 become U+FFFD.

        Raises:
          ValueError: more than one row, or an id that is not in the vocabulary.
        """
        return self.backend.decode(self._known(ids), skip_special_tokens=skip_special_tokens)

    def decode_batch(self, rows: Iterable[Iterable[int]] | np.ndarray, skip_special_tokens: bool = True) -> list[str]:
        """The texts of many rows of ids, [B, T] or a list of rows."""
        return [self.decode(row, skip_special_tokens) for row in rows]

    def stream_decoder(self, skip_special_tokens: bool = True) -> DecodeStream:
        """A decoder that is given ids one by one and returns text as soon as it is certain."""
        return DecodeStream(self, skip_special_tokens)

    def __repr__(self) -> str:
        return (
            f"Tokenizer({self.vocab_size} entries, bos {self.bos_token!r} {self.bos_token_id}, "
            f"eos {self.eos_token!r} {self.eos_token_id}, pad {self.pad_token!r} {self.pad_token_id})"
        )

    def _known(self, ids: Iterable[int] | np.ndarray) -> list[int]:
        try:
            array = np.asarray(ids if hasattr(ids, "__array__") else list(ids))
        except TypeError:
            raise ValueError(f"expected one row of ids, got {type(ids).__name__}; for a single id pass [id]") from None
        if array.ndim != 1:
            raise ValueError(f"expected one row of ids, got shape {array.shape}; for many rows use decode_batch")
        if array.size and not np.issubdtype(array.dtype, np.integer):
            raise ValueError(f"expected integer ids, got {array.dtype}")
        known = array.tolist()
        for i in known:
            if i not in self._ids:
                raise ValueError(
                    f"id {i} is not one of this tokenizer's {self.vocab_size} entries; if a model generated it, "
                    "pass suppress_tokens=tokenizer.unused_ids(config.vocab_size) to generate"
                )
        return known

    def _id_of(self, role: str, token: str) -> int:
        found = self.backend.token_to_id(token)
        if found is None:
            raise ValueError(
                f"{role} {token!r} is not in the tokenizer's vocabulary of {self.backend.get_vocab_size()}"
            )
        return found


class DecodeStream:
    """Text from ids as they come: all that `push` and `finish` return, joined, is `Tokenizer.decode` of all ids.

    One character may need several ids, each holding some of its bytes. An unfinished character decodes to U+FFFD at the
    end of the text, so that end is held back until a later id settles it.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True):
        from tokenizers.decoders import ByteLevel

        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        # Byte-level pieces decode independently between whole characters, so what is settled can be forgotten.
        self._forgets = isinstance(tokenizer.backend.decoder, ByteLevel)
        self._ids: list[int] = []
        self._returned = 0

    def push(self, id: int) -> str:
        """The text that this id makes certain; often one word, ``""`` within a character.

        Raises:
          ValueError: an id that is not in the vocabulary.
        """
        self._ids += self._tokenizer._known([id])
        text = self._text()
        settled = text.rstrip("\ufffd")
        new = settled[self._returned :]
        self._returned = max(self._returned, len(settled))
        if self._forgets and len(settled) == len(text):
            self._ids, self._returned = [], 0
        return new

    def finish(self) -> str:
        """What was held back, with U+FFFD for bytes that never became a character; then the stream starts anew."""
        text = self._text()[self._returned :]
        self._ids, self._returned = [], 0
        return text

    def _text(self) -> str:
        return self._tokenizer.backend.decode(self._ids, skip_special_tokens=self._skip)


def _check_text(text: Any, what: str) -> None:
    if not isinstance(text, str):
        raise ValueError(f"{what} is a {type(text).__name__}; expected a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} cannot be written in UTF-8 ({error.reason} at {error.start})") from None

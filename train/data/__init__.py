"""What training reads: packed text, mixtures of it, and examples in memory, as batches for each process."""

from .encode import encode_documents
from .examples import open_examples
from .loader import Loader
from .store import PackedText, write_tokens
from .text import TextBatches, TextLoader, open_text, segments, text_batches

__all__ = [
    "Loader",
    "PackedText",
    "TextBatches",
    "TextLoader",
    "encode_documents",
    "open_examples",
    "open_text",
    "segments",
    "text_batches",
    "write_tokens",
]

"""Examples for a causal language model: a prompt and its completion, or a text, as ids and labels.

``input_ids[t]`` is followed by ``labels[t]``; a label of -100 is not learned. An example is what the tokenizer puts
before a text (with OPT ``</s>``), the text, and ``</s>``; a prompt's labels are left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from optjax.heads import IGNORE_INDEX
from optjax.tokenizer import Tokenizer

from .lengths import padded
from .packing import pack
from .table import Row

TOO_LONG = ("error", "cut", "split", "drop")


@dataclasses.dataclass(frozen=True)
class Fields:
    """The names of a row's fields. A row that has a completion is a prompt with its completion, else it is a text."""

    prompt: str = "prompt"
    completion: str = "completion"
    text: str = "text"


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """Ids ``[N + 1]`` of N inputs and N labels; those before ``first`` are the prompt."""

    ids: np.ndarray
    first: int
    where: str

    @property
    def length(self) -> int:
        return len(self.ids) - 1

    def arrays(self, learn_prompt: bool = False) -> dict[str, np.ndarray]:
        """``input_ids`` and ``labels``, ``[N]`` int32."""
        labels = self.ids[1:].copy()
        if not learn_prompt:
            labels[: max(0, self.first - 1)] = IGNORE_INDEX
        return {"input_ids": self.ids[:-1], "labels": labels}


def encode_examples(
    rows: Sequence[Row], tokenizer: Tokenizer, fields: Fields, longest: int, too_long: str = "error"
) -> list[Example]:
    """The rows as examples of at most ``longest`` inputs.

    Args:
      too_long: of a longer row. ``"cut"`` takes away the beginning of its prompt, then the end of its completion or
        text; ``"split"`` makes several of a text; ``"drop"`` leaves it out.

    Raises:
      ValueError: a row without text, or too long; none is left.
    """
    made = [part for row in rows for part in _fitting(_encode(row, tokenizer, fields), longest, too_long, fields)]
    if not made:
        raise ValueError(f"none of {len(rows)} rows fits into {longest} tokens")
    return made


def _encode(row: Row, tokenizer: Tokenizer, fields: Fields) -> Example:
    if row.fields.get(fields.completion) is not None:
        prompt = row.text(fields.prompt) if row.fields.get(fields.prompt) is not None else ""
        completion, empty = row.text(fields.completion), fields.completion
    elif fields.text in row.fields:
        prompt, completion, empty = "", row.text(fields.text), fields.text
    else:
        raise ValueError(f"{row.where} has neither {fields.completion!r} nor {fields.text!r}")
    if not completion:
        raise ValueError(f"{row.where}: {empty!r} is empty")
    before = tokenizer.encode(prompt)
    ids = before + tokenizer.encode(completion, add_special_tokens=False) + [tokenizer.eos_token_id]
    # With no prompt all is learned but the BOS, which is no label anyway.
    return Example(np.array(ids, np.int32), len(before) if prompt else 0, row.where)


def _fitting(example: Example, longest: int, too_long: str, fields: Fields) -> Iterator[Example]:
    over = example.length - longest
    if over <= 0:
        yield example
    elif too_long == "cut":
        # The prompt's beginning goes first, but for the BOS; then the completion's end.
        gone = min(over, max(0, example.first - 1))
        ids = np.concatenate([example.ids[:1], example.ids[1 + gone :]])[: longest + 1]
        yield Example(ids, example.first - gone, example.where)
    elif too_long == "split" and not example.first:
        for start in range(0, example.length, longest):
            yield Example(example.ids[start : start + longest + 1], 0, example.where)
    elif too_long != "drop":
        hint = "which 'split' does not part; " if too_long == "split" else ""
        raise ValueError(
            f"{example.where} has {example.length + 1} tokens, {hint}the limit is {longest + 1}: give --too-long cut "
            "or drop, or a larger --max-length if the model has the positions"
        )


def packed_rows(
    examples: Sequence[Example], length: int, pad_id: int, learn_prompt: bool = False
) -> list[dict[str, np.ndarray]]:
    """Examples side by side in rows of ``length``, few as they can be made.

    ``segment_ids`` are 1, 2, … for the examples of a row, which do not see each other, and 0 for padding.
    """
    rows = []
    for indices in pack([example.length for example in examples], length):
        row = {
            "input_ids": np.full(length, pad_id, np.int32),
            "labels": np.full(length, IGNORE_INDEX, np.int32),
            "segment_ids": np.zeros(length, np.int32),
        }
        start = 0
        for segment, i in enumerate(indices, 1):
            place = slice(start, start := start + examples[i].length)
            for name, values in examples[i].arrays(learn_prompt).items():
                row[name][place] = values
            row["segment_ids"][place] = segment
        rows.append(row)
    return rows


def collate(rows: Sequence[dict[str, np.ndarray]], pad_id: int, longest: int) -> dict[str, np.ndarray]:
    """A batch ``[B, T]`` of rows: packed ones, or an example each.

    Padding follows the text, which a causal model does not look ahead to: no mask is needed.
    """
    if "segment_ids" in rows[0]:
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    fills = {"input_ids": pad_id, "labels": IGNORE_INDEX}
    return {name: padded([row[name] for row in rows], fill, longest) for name, fill in fills.items()}

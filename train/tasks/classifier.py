"""A classifier over the rows of tables: their examples, its logits, its scores, and what it says of each row."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optjax import Params, Tokenizer, sequence_classification
from optjax.heads import label_losses

from .inference import over_examples
from .labels import REGRESSION, SINGLE, Labels
from .metrics import per_label, predictions, probabilities, scores
from .table import Row
from .texts import collate, encode_texts
from .watch import Watch, nobody

Example = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classifier:
    """How rows become batches, and logits labels.

    Attributes:
      columns: one or two, of text.
      longest: tokens of a row; ``too_long`` as of `encode_texts`.
      pad_id: to fill batches with.
      batch_size: of evaluation and prediction.
    """

    labels: Labels
    tokenizer: Tokenizer
    columns: Sequence[str]
    longest: int
    too_long: str
    pad_id: int
    batch_size: int

    @property
    def collate(self):
        return partial(collate, pad_id=self.pad_id, longest=self.longest)

    def read(self, rows: Sequence[Row], labelled: bool = True) -> tuple[list[Row], list[Example]]:
        """Rows and their examples, without those that are dropped for their length.

        Raises:
          ValueError: a row without text or label, or too long; none is left.
        """
        ids = encode_texts(rows, self.columns, self.tokenizer, self.longest, self.too_long)
        kept = [i for i, each in enumerate(ids) if each is not None]
        if not kept:
            raise ValueError(f"none of {len(rows)} rows fits into {self.longest} tokens")
        found = self.labels.encode(rows) if labelled else None
        examples = [{"input_ids": ids[i]} | ({} if found is None else {"labels": found[i]}) for i in kept]
        return [rows[i] for i in kept], examples

    def logits(self, params: Params, examples: Sequence[Example], watch: Watch = nobody) -> np.ndarray:
        """``[N, num_labels]`` in float32."""
        ids = [{"input_ids": example["input_ids"]} for example in examples]
        found = over_examples(_logits, params, ids, self.collate, self.batch_size, watch)
        return np.stack([logits for (logits,) in found])

    def scores(self, logits: np.ndarray, examples: Sequence[Example]) -> dict[str, float]:
        """The loss and the figures of `metrics.scores`."""
        kind, labels = self.labels.problem_type, np.stack([example["labels"] for example in examples])
        loss = float(jnp.mean(label_losses(jnp.asarray(logits), jnp.asarray(labels), kind)))
        return {"loss": loss} | scores(kind, predictions(kind, logits), labels)

    def per_label(self, logits: np.ndarray, examples: Sequence[Example]) -> list[dict[str, Any]]:
        """Precision, recall, F1 and support of each label."""
        kind, labels = self.labels.problem_type, np.stack([example["labels"] for example in examples])
        return per_label(kind, predictions(kind, logits), labels, self.labels.names)

    def records(self, rows: Sequence[Row], logits: np.ndarray) -> list[dict[str, Any]]:
        """What the rows hold, and what is said of them: ``prediction``, and ``probability`` of each label."""
        kind, names = self.labels.problem_type, self.labels.names
        made = []
        for row, said, shares in zip(rows, predictions(kind, logits), probabilities(kind, logits), strict=True):
            each = {name: float(share) for name, share in zip(names, shares, strict=True)}
            if kind == REGRESSION:
                found: dict[str, Any] = {"prediction": float(said) if len(names) == 1 else each}
            else:
                label = names[said] if kind == SINGLE else [n for n, yes in zip(names, said, strict=True) if yes]
                found = {"prediction": label, "probability": each}
            made.append(dict(row.fields) | found)
        return made


def _logits(params: Params, batch: dict[str, jax.Array]) -> tuple[jax.Array]:
    out = sequence_classification(params, batch["input_ids"], attention_mask=batch["attention_mask"])
    return (out.logits,)

"""Adapters merged into a checkpoint that is read tensor by tensor, and never whole in memory."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax
import numpy as np

from optjax.checkpoints.match import Match
from optjax.checkpoints.open import Opened, open_checkpoint
from optjax.checkpoints.tensors import Index, TensorRef, block
from optjax.config import OPTConfig
from optjax.declaration import declare
from optjax.lora.apply import check_fit
from optjax.lora.layout import unstack_adapters
from optjax.lora.parts import LOW_RANK, Adapters, module_path, walk
from optjax.params import abstract_params


@dataclass(frozen=True)
class Merged(TensorRef):
    """``W + scale · B A`` of a matrix in a file, in its dtype; the sum is made in float32."""

    ref: TensorRef
    lora_A: np.ndarray
    lora_B: np.ndarray
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.ref.shape

    @property
    def dtype(self) -> np.dtype:  # type: ignore[override]
        return self.ref.dtype

    def read(self, index: Index = ()) -> np.ndarray:
        rows, columns = (slice(*bounds) for bounds in block(index, self.shape))
        delta = np.float32(self.scale) * (self.lora_B[rows] @ self.lora_A[:, columns])
        return (self.ref.read(index).astype(np.float32) + delta).astype(self.dtype)


@dataclass(frozen=True)
class Own(TensorRef):
    """A weight that the adapters hold whole."""

    array: np.ndarray
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.array.shape

    def read(self, index: Index = ()) -> np.ndarray:
        return np.ascontiguousarray(self.array[index]).astype(self.dtype)


def open_merged(path, head: str | None, config: OPTConfig | str | None, adapters: Adapters) -> Opened:
    """`open_checkpoint`, its tensors with the adapters in them. A head that they hold need not be in the checkpoint.

    Raises:
      ValueError, FileNotFoundError: as `open_checkpoint`; a quantized checkpoint; adapters of another model.
    """
    own_head = adapters.weights.get("score") or adapters.weights.get("qa_outputs")
    if head is None and own_head is not None:
        head = adapters.head
    opened = open_checkpoint(path, head, config, create_head=own_head is not None)
    if opened.quantization is not None:
        raise ValueError(f"{path} is quantized to {opened.quantization.kind}: merge into the original, then quantize")
    if "score" in adapters.weights:
        labels = adapters["score"]["weight"].shape[0]
        if labels != opened.config.num_labels:
            if not opened.plan.created:
                raise ValueError(f"the adapter's head has {labels} labels, and the model's {opened.config.num_labels}")
            opened.config = opened.config.replace(num_labels=labels)
    adapters = unstack_adapters(adapters)
    check_fit(abstract_params(opened.config, head=opened.head), adapters)
    return dataclasses.replace(opened, plan=_merged(opened, adapters))


def _merged(opened: Opened, adapters: Adapters) -> Match:
    weights = {weight.path: weight for weight in declare(opened.config, opened.head)}
    tensors = dict(opened.plan.tensors)
    for path, layer, own in walk(jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), adapters)):
        for name in own.keys() - set(LOW_RANK):
            tensors[".".join((*path, name)), layer] = Own(own[name], opened.dtype)
        if "lora_A" in own:
            key = ".".join((*path, "weight")), layer
            scale = adapters.config.scaling(module_path(weights[key[0]], layer, adapters.head))
            tensors[key] = Merged(tensors[key], own["lora_A"], own["lora_B"], scale)
    missing = [weight.path for weight in opened.plan.created if (weight.path, None) not in tensors]
    if missing:
        raise ValueError(f"neither the checkpoint nor the adapter holds {', '.join(missing)}")
    return Match(tensors, opened.plan.scales)

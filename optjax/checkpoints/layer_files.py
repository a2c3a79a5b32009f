"""Layers that stay in a checkpoint's files: each is read when its turn comes, while the one before it computes.

A compiled program calls back for each layer, which has then been read already, or nearly so: threads read the next one
as soon as one is fetched. After the last layer that is the first, of the next token. So the process holds three layers
at most: one that is being read, one that is handed over, one that is computed with.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from optjax.checkpoints.match import Match
from optjax.checkpoints.place import as_dtype
from optjax.checkpoints.quantized import stored
from optjax.checkpoints.tensors import TensorRef
from optjax.config import OPTConfig
from optjax.declaration import Weight, declare
from optjax.params import Params
from optjax.quantization.quantize import Quantization

# Of one layer, read at once: a disk answers several questions sooner than one after another.
THREADS = 4


class LayerFiles:
    """What ``params.offload`` is where layers are read from files.

    Each is a value of its own: a program that was compiled with one reads that one's files.

    Attributes:
      quantization: as the files have it.
      on_layer: called with the number of each layer that a program fetches; None, or whoever shows progress.
    """

    memory = "disk"

    def __init__(self, tree: Any, layers: Sequence[Sequence[TensorRef]], quantization: Quantization | None):
        """Of the tensors of each layer, and how they make its matrices: ``tree``, whose leaves are abstract arrays."""
        self._shapes, self._structure = jax.tree.flatten(tree)
        self._layers = layers
        self._pool: ThreadPoolExecutor | None = None
        self._coming: dict[int, list[Future[np.ndarray]]] = {}
        self._lock = threading.Lock()
        self.quantization = quantization
        self.on_layer: Callable[[int], None] | None = None

    def bring(self, params: Params, i: int, after: jax.Array, coming: Any) -> tuple[Any, Any]:
        """See `optjax.offloading.Offload`."""
        arrays = jax.pure_callback(lambda i, after: self.read(int(i)), self._shapes, np.int32(i), after)
        matrices = jax.tree.unflatten(self._structure, arrays)
        return _join(params.layer(i), matrices), None

    def read(self, i: int) -> list[np.ndarray]:
        """The tensors of layer ``i``; the next one is read meanwhile, and nothing else is kept."""
        if self.on_layer is not None:
            self.on_layer(i)
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(THREADS, "optjax-layers")
            wanted = (i, (i + 1) % len(self._layers))
            for other in [other for other in self._coming if other not in wanted]:
                for future in self._coming.pop(other):
                    future.cancel()
            for each in wanted:
                if each not in self._coming:
                    tensors = zip(self._layers[each], self._shapes, strict=True)
                    self._coming[each] = [self._pool.submit(_read, ref, like.dtype) for ref, like in tensors]
            mine = self._coming.pop(i)
        return [future.result() for future in mine]


def layer_files(config: OPTConfig, plan: Match, quantization: Quantization | None, dtype: Any) -> LayerFiles:
    """The matrices of a checkpoint's layers, where they are; ``dtype`` is what quantized ones stand for."""
    tree: dict[str, Any] = {}
    layers: list[list[TensorRef]] = [[] for _ in range(config.num_hidden_layers)]
    for weight in filter(stays_in_files, declare(config, None)):
        made = None if quantization is None else stored(quantization, weight)
        _, *steps, last = weight.keys()
        node = tree
        for step in steps:
            node = node.setdefault(str(step), {})
        # What is cast is cast where it is used.
        like = jax.ShapeDtypeStruct(weight.shape, plan.dtype_of_layers(weight))
        node[str(last)] = like if made is None else made.astype(dtype)
    paths = [".".join(str(entry.key) for entry in path) for path, _ in _by_matrix(tree)]
    for i, refs in enumerate(layers):
        for path in paths:
            key = f"layers.{path}", i
            refs += [plan.tensors[key]] + ([plan.scales[key]] if key in plan.scales else [])
    return LayerFiles(tree, layers, quantization)


def abstract_layer_files(params: Params) -> Params:
    """Abstract params, of no quantization, as if their layers lay in files: for ahead-of-time compilation alone."""
    tree = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype) if w.ndim > 1 else None, params["layers"][0])
    layers = [jax.tree.map(lambda w: w if w.ndim < 2 else None, layer) for layer in params["layers"]]
    return dataclasses.replace(params, weights=params.weights | {"layers": layers}, offload=LayerFiles(tree, (), None))


def stays_in_files(weight: Weight) -> bool:
    """Whether it is read when its turn comes: the matrices of the layers are."""
    return weight.per_layer and len(weight.shape) > 1


def _by_matrix(tree: Any) -> list[tuple[Any, Any]]:
    """Paths and matrices, in the order in which jax flattens them."""
    from optjax.quantization.weight import QuantizedWeight

    return jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: isinstance(x, QuantizedWeight))[0]


def _read(ref: TensorRef, dtype: np.dtype) -> np.ndarray:
    return as_dtype(ref.read(), dtype)


def _join(vectors: dict[str, Any], matrices: dict[str, Any]) -> dict[str, Any]:
    """Two nested dicts as one."""
    both = dict(vectors)
    for name, value in matrices.items():
        if value is not None:
            both[name] = _join(vectors[name], value) if isinstance(value, dict) and name in vectors else value
    return both

"""A program to be compiled ahead of time: a jitted function, its abstract arguments and what they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import jax
import numpy as np

from optjax.offloading import is_on_host


@dataclass(frozen=True)
class Program:
    """One compiled step of a job.

    Attributes:
      name: ``"train step"``, ``"prefill"``, ``"decode step"``.
      function: made by `jax.jit`.
      arguments: its arguments, arrays as `jax.ShapeDtypeStruct` with shardings.
      groups: pytrees among the arguments, by what they are: weights, optimizer state, cache.
      compiler_options: that it is compiled with, where it is run.
      inside: pytrees that stand in memory during the step and are no arguments: gradients.
    """

    name: str
    function: Any
    arguments: tuple[Any, ...]
    groups: dict[str, Any]
    inside: dict[str, Any] = field(default_factory=dict)
    compiler_options: dict[str, Any] = field(default_factory=dict)


# A job is the module and the function that makes its programs from (config, placement, **options). By name: sharding
# imports nothing of train.
JOBS = {
    "train": "optjax.train.ahead:train_programs",
    "generate": "optjax.sharding.plan.generation:generation_programs",
}


def find_job(job: str) -> Callable[..., list[Program]]:
    """The function behind one of `JOBS`, or behind another ``module:function``.

    Raises:
      ValueError: there is no such job.
    """
    module, colon, function = JOBS.get(job, job).partition(":")
    if not colon:
        raise ValueError(f"no job {job!r}; there are: {', '.join(JOBS)}")
    return getattr(import_module(module), function)


def bytes_per_device(tree: Any) -> int:
    """Of a pytree of abstract arrays, as their shardings lay them out; what lies in the host's memory is not there."""

    def one(leaf: Any) -> int:
        shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding is not None else leaf.shape
        return int(np.prod(shape, dtype=np.int64)) * leaf.dtype.itemsize

    return sum(one(leaf) for leaf in jax.tree.leaves(tree) if not is_on_host(leaf.sharding))

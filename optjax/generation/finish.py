"""When a hypothesis is complete, which complete ones are kept, and when a prompt's search is over.

Two rules, as transformers has two: that of its beam search and beam sampling (4.57), and that of group beam search (its
BeamSearchScorer), which differ where hypotheses end in the last step, or where the best candidate has just ended.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from optjax.generation.paths import NOTHING, Paths, best, join, pick
from optjax.generation.search import Beams


@partial(jax.tree_util.register_dataclass, data_fields=["paths", "filled", "open"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Finished:
    """The n best complete hypotheses of each prompt so far.

    Attributes:
      paths: ``[B, n]``, from the best down.
      filled: ``[B, n]`` bool, the places that hold one.
      open: ``[B, 1]`` bool, prompts whose search goes on.
    """

    paths: Paths
    filled: jax.Array
    open: jax.Array

    def add(self, paths: Paths, allowed: jax.Array, penalty: jax.Array) -> Finished:
        """With those of ``paths`` ``[B, m]`` that are ``allowed`` ``[B, m]``, their score divided by ``penalty``."""
        score = jnp.where(allowed, paths.score / penalty, NOTHING)
        paths = join(self.paths, dataclasses.replace(paths, score=score))
        order = best(self.filled.shape[1], paths.score)
        paths, filled = pick((paths, jnp.concatenate([self.filled, allowed], axis=1)), order)
        return Finished(paths, filled, self.open)


def finish_beams(
    beams: Beams,
    finished: Finished,
    made: Paths,
    ends: jax.Array,
    running: Paths,
    length: jax.Array,
    longest: jax.Array,
) -> Finished:
    """After a step of beam search or beam sampling.

    Args:
      made: ``[B, C]``, the candidates of this step, in the order in which they were chosen.
      ends: ``[B, C]`` bool, those whose last token ends a sequence.
      running: ``[B, n]``, those that go on, from the best down.
      length, longest: int32 scalars, tokens generated, and the most there may be.
    """
    places = finished.filled.shape[1]
    # The candidates after the first n are there only so that n go on.
    complete = (ends | (length == longest)) & (jnp.arange(ends.shape[1]) < places)
    finished = finished.add(made, complete & finished.open, _penalty(beams, length))
    worst = jnp.where(finished.filled, finished.paths.score.min(1, keepdims=True), NOTHING)
    over = (_attainable(beams, running.score[:, :1], length, longest) <= worst).all(1, keepdims=True)
    if beams.early_stopping is True:
        over |= finished.filled.all(1, keepdims=True)
    # By stop strings all candidates may end, and none goes on.
    over |= ends.all(1, keepdims=True)
    return dataclasses.replace(finished, open=finished.open & ~over)


def finish_group(
    beams: Beams, finished: Finished, made: Paths, ends: jax.Array, length: jax.Array, longest: jax.Array
) -> Finished:
    """After a step of one group of group beam search; the arguments are those of `finish_beams`."""
    complete = ends & (jnp.arange(ends.shape[1]) < finished.filled.shape[1])
    finished = finished.add(made, complete & finished.open, _penalty(beams, length))
    over = finished.filled.all(1, keepdims=True)
    if beams.early_stopping is not True:
        attainable = _attainable(beams, made.score.max(1, keepdims=True), length, longest)
        over &= attainable <= finished.paths.score.min(1, keepdims=True)
    return dataclasses.replace(finished, open=finished.open & ~over)


def finish_open(beams: Beams, finished: Finished, running: Paths, length: jax.Array) -> Finished:
    """After the last step of group beam search: where a group is still open its running beams are hypotheses too."""
    return finished.add(running, jnp.broadcast_to(finished.open, running.score.shape), _penalty(beams, length))


def _penalty(beams: Beams, length: jax.Array) -> jax.Array:
    return length.astype(jnp.float32) ** beams.length_penalty


def _attainable(beams: Beams, score: jax.Array, length: jax.Array, longest: jax.Array) -> jax.Array:
    """The best that a path of this score is taken to come to: as if it ended now, or, by ``"never"``, as it might."""
    if beams.early_stopping == "never":
        length = jnp.where(beams.length_penalty > 0, longest, length)
    return score / _penalty(beams, length)

"""Where weights and activations lie: a mesh and its rules, which ride along with the params as static data."""

from __future__ import annotations

import dataclasses
import math
from functools import cached_property, partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from optjax.declaration import Axis
from optjax.sharding.mesh import format_mesh

from .lookup import lookup, lookup_coded, lookup_gathered

Axes = tuple[Axis, ...]


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh and rules. Made by `make_placement`, which checks them.

    Attributes:
      mesh: of devices; its axes are Auto: the compiler partitions.
      rules: for each logical axis the mesh axes that split it, where the mesh has more than one device on them.
    """

    mesh: Mesh
    rules: tuple[tuple[str, tuple[str, ...]], ...]

    @property
    def platform(self) -> str:
        """``"cpu"``, ``"gpu"`` or ``"tpu"``: what the devices are, also where they are only described."""
        platform = self.mesh.devices.flat[0].platform
        return "gpu" if platform in ("cuda", "rocm") else platform

    @cached_property
    def _by_name(self) -> dict[str | None, tuple[str, ...]]:
        sizes = self.mesh.shape
        split = {axis: tuple(name for name in names if sizes.get(name, 1) > 1) for axis, names in self.rules}
        return {None: (), **split}

    @property
    def token_axes(self) -> frozenset[str]:
        """The mesh axes that split the tokens, whose devices all need a weight."""
        return frozenset({*self.mesh_axes("batch"), *self.mesh_axes("length")})

    def mesh_axes(self, axis: Axis) -> tuple[str, ...]:
        """The mesh axes that split a logical axis, or several of one dimension: those of the first outermost."""
        if isinstance(axis, tuple):
            return tuple(name for each in axis for name in self._by_name[each])
        return self._by_name[axis]

    def shards(self, axis: Axis) -> int:
        """The number of parts that a dimension with this logical axis is split into."""
        return math.prod(self.mesh.shape[name] for name in self.mesh_axes(axis))

    def sharding(self, axes: Axes) -> NamedSharding:
        """The sharding of a weight whose dimensions have these logical axes."""
        return self._named(self.mesh_axes(axis) for axis in self._as_gathered_best(axes))

    def fitting(self, shape: tuple[int, ...], axes: Axes) -> NamedSharding:
        """The sharding of an activation; a dimension is split only as far as it divides (one row, one token)."""
        return self._named(self.dividing(size, axis) for size, axis in zip(shape, axes, strict=True))

    def parts(self, size: int, axis: str) -> int:
        """The number of parts that `fitting` splits a dimension of an activation into."""
        return math.prod(self.mesh.shape[name] for name in self.dividing(size, axis))

    def in_parts(self, x: jax.Array) -> jax.Array:
        """Tokens ``[B, T, …]`` as ``[P, B/P, Q, T/Q, …]``, by the parts that rows and their lengths are split into.

        What is summed over the tokens of each part first is summed where it is.
        """
        b, t, *rest = x.shape
        p, q = self.parts(b, "batch"), self.parts(t, "length")
        return x.reshape(p, b // p, q, t // q, *rest)

    def constrain(self, x: jax.Array, axes: Axes) -> jax.Array:
        """An activation, told where to lie; see `fitting`."""
        return jax.lax.with_sharding_constraint(x, self.fitting(x.shape, axes))

    def constrain_both(self, x: jax.Array, axes: Axes, back: Axes) -> jax.Array:
        """`constrain`, and where its cotangent is to lie: left to itself, jax has that lie as x does."""
        return _constrain_both(x, self.fitting(x.shape, axes), self.fitting(x.shape, back))

    def on_each(self, function: Any, arrays: list[jax.Array], axes: list[Axes], out_axes: Axes) -> jax.Array:
        """``function(*arrays)`` on each device, of its own parts of them; the result has the first one's shape.

        For what the compiler does not partition: kernels.
        """
        if self.mesh.size == 1:
            return function(*arrays)
        specs = tuple(self.fitting(x.shape, own).spec for x, own in zip(arrays, axes, strict=False))
        out = self.fitting(arrays[0].shape, out_axes).spec
        return jax.shard_map(function, mesh=self.mesh, in_specs=specs, out_specs=out, check_vma=False)(*arrays)

    def gather(self, weight: jax.Array, axes: Axes) -> jax.Array:
        """A weight as it is used: whole along the mesh axes that split the tokens, whose devices all need it.

        Its cotangent goes straight back to the weight's own sharding, as a reduce-scatter.
        """
        stored, gathered = self.sharding(axes), self.gathered(axes)
        if stored == gathered:
            return weight
        if not jnp.issubdtype(weight.dtype, jnp.floating):
            return jax.lax.with_sharding_constraint(weight, gathered)  # codes of a quantized weight have no cotangent
        return _gather(weight, stored, gathered)

    def sharing(self) -> int:
        """The number of devices that share each weight between them and have tokens of their own."""
        return math.prod(self.mesh.shape[name] for name in self._sharing)

    @cached_property
    def _sharing(self) -> tuple[str, ...]:
        return tuple(name for name in self.mesh_axes("model") if name in self.token_axes)

    def tokens_of_sharing(self, shape: tuple[int, ...]) -> int:
        """The tokens, of ``[B]`` or ``[B, T]``, of devices that share their weights."""
        split = [self.dividing(size, axis) for size, axis in zip(shape, ("batch", "length"), strict=False)]
        apart = [self.mesh.shape[name] for names in split for name in names if name not in self._sharing]
        return math.prod(shape) // math.prod(apart)

    def numbers_of_a_token(self, width: int) -> float:
        """That are sent and got for each token where it travels to the matrices of a layer of that width."""
        return width * (12 / self.shards("heads") + 4 / self.sharing())

    def tokens_travel(self, shape: tuple[int, ...], width: int) -> bool:
        """Whether it is tokens ``[B, T]`` that should travel, not the matrices of a layer of that width, D.

        Of n devices that share the matrices of a part of the heads, 1/t, each would gather 12 D²/t numbers, or else
        send and get 12 D/t + 4 D/n for each token (where `fsdp` splits columns, as on TPU; elsewhere about as many).
        What is gathered is also written to memory and read again, and the TPU compiler copies what it is gathered
        from; that tips the scales by half.
        """
        gathered = 12 * width**2 / self.shards("heads")
        travelling = self.tokens_of_sharing(shape) * self.numbers_of_a_token(width)
        return self.sharing() > 1 and travelling <= 1.5 * gathered

    def tokens_travel_to_head(self, shape: tuple[int, ...], vocab_size: int, width: int) -> bool:
        """The same of the head alone, ``[V, E]``: its outputs are many, in float32, and summed over the devices."""
        vocab = vocab_size / self.shards("vocab")
        travelling = self.tokens_of_sharing(shape) * (width + 4 * vocab)
        return self.sharing() > 1 and travelling <= 1.5 * vocab * width

    def stays(self, matrix_axes: Axes) -> bool:
        """Whether a matrix with these axes would be gathered, and can be used where it is."""
        return self.sharding(matrix_axes) != self.gathered(matrix_axes)

    # A mesh axis that splits tokens and is to split columns, or the other way round, takes an exchange of its own: two
    # that change places at once are more than the partitioner knows how to do.

    def to_matrix(self, x: jax.Array, axes: Axes) -> jax.Array:
        """Tokens ``[B, in]`` or ``[B, T, in]`` as the devices that share a matrix ``[out, in]`` multiply them.

        What splits the matrix does not split the tokens any longer; of each a device has the columns of its own part.
        """
        _, columns = self._split(axes)
        exchanged = [name for name in columns if name in self.token_axes]
        for n in range(len(exchanged) + 1):
            x = self._lay(x, exchanged[:n], columns, exchanged[n:])
        return self._lay(x, {name for names in self._split(axes) for name in names}, columns)

    def from_matrix(self, y: jax.Array, axes: Axes) -> jax.Array:
        """The product ``[B, out]`` or ``[B, T, out]`` as it comes out of the parts of a matrix."""
        columns, _ = self._split(axes)
        exchanged = [name for name in columns if name in self.token_axes]
        y = self._lay(y, {name for names in self._split(axes) for name in names}, columns)
        for n in range(len(exchanged) - 1, 0, -1):
            y = self._lay(y, exchanged[:n], columns, exchanged[n:])
        # The last exchange is left to what is asked for next, but where rows do not divide, and it is a gather.
        if self.parts(y.shape[0], "batch") < self.shards("batch"):
            y = self._lay(y, (), columns, exchanged)
        return y

    def _split(self, axes: Axes) -> list[tuple[str, ...]]:
        """The mesh axes that split each dimension of a weight."""
        return [self.mesh_axes(axis) for axis in self._as_gathered_best(axes)]

    def _lay(self, x: jax.Array, whole: Any, columns: Any, without: Any = ()) -> jax.Array:
        """Tokens that some mesh axes do not split; and their ``columns``, which are split as said, without some."""
        sizes = zip(x.shape[:-1], ("batch", "length"), strict=False)
        split = [tuple(name for name in self.dividing(size, axis) if name not in whole) for size, axis in sizes]
        last = tuple(name for name in columns if name not in without)
        return jax.lax.with_sharding_constraint(x, self._named([*split, last]))

    def gather_as_fits(self, matrix: jax.Array, axes: Axes) -> jax.Array:
        """`gather` of a matrix that is split as `fitting` has it: one of an adapter."""
        stored = self.fitting(matrix.shape, axes)
        split = [self.dividing(size, axis) for size, axis in zip(matrix.shape, axes, strict=True)]
        gathered = self._named(tuple(name for name in names if name not in self.token_axes) for names in split)
        return matrix if stored == gathered else _gather(matrix, stored, gathered)

    def total(self, sums: jax.Array, axes: Axes) -> jax.Array:
        """A weight's cotangent, in its sharding, from the sums ``[P, Q, …]`` over each of the parts of `in_parts`."""
        parts = self.fitting(sums.shape[:2], ("batch", "length")).spec
        sums = jax.lax.with_sharding_constraint(sums, self._named([*parts, *self.gathered(axes).spec]))
        return jax.lax.with_sharding_constraint(sums.sum((0, 1)), self.sharding(axes))

    def take(self, table: jax.Array, axes: Axes, index: jax.Array, dtype: Any, stay: bool = False) -> jax.Array:
        """Rows of a table in ``dtype``, ``[B, T, …]``, by an index ``[B, T]``; see `lookup`.

        ``stay`` says that no weight of the layers is gathered.
        """
        # Where the TPU compiler exchanges rows, it starts the gathers of a layer's weights too late to overlap.
        rows = lookup_gathered if self.platform == "tpu" and not stay else lookup
        return rows(table, index, jnp.dtype(dtype), self, axes)

    def take_coded(self, table: Any, axes: Axes, index: jax.Array, dtype: Any) -> jax.Array:
        """The same of a quantized table that is not gathered."""
        return lookup_coded(table, index, jnp.dtype(dtype), self, axes)

    def gathered(self, axes: Axes) -> NamedSharding:
        """The sharding of a weight as it is used: whole along the mesh axes that split the tokens."""
        axes = self._as_gathered_best(axes)
        return self._named(tuple(name for name in self.mesh_axes(axis) if name not in self.token_axes) for axis in axes)

    def _as_gathered_best(self, axes: Axes) -> Axes:
        """On TPU, what splits rows a second time splits the columns instead: its compiler gathers columns as they
        lie. XLA's GPU compiler keeps a transposed copy of all layers for that."""
        found = list(axes)
        for i, (axis, following) in enumerate(pairwise(axes)):
            if self.platform == "tpu" and isinstance(axis, tuple) and following is None:
                found[i : i + 2] = axis
        return tuple(found)

    def dividing(self, size: int, axis: Axis) -> tuple[str, ...]:
        """The mesh axes that split a dimension of an activation, as far as it divides."""
        names = self.mesh_axes(axis)
        while size % math.prod(self.mesh.shape[name] for name in names):
            names = names[:-1]
        return names

    def _named(self, entries: Any) -> NamedSharding:
        spec = [names[0] if isinstance(names, tuple) and len(names) == 1 else names or None for names in entries]
        return NamedSharding(self.mesh, PartitionSpec(*spec))

    def __repr__(self) -> str:
        rules = ", ".join(f"{axis}: {'·'.join(names)}" for axis, names in self._by_name.items() if names)
        return f"Placement({format_mesh(self.mesh)}; {rules})"


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _constrain_both(x: jax.Array, there: NamedSharding, back: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, there)


_constrain_both.defvjp(
    lambda x, there, back: (_constrain_both(x, there, back), None),
    lambda there, back, _, cotangent: (jax.lax.with_sharding_constraint(cotangent, back),),
)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(weight: jax.Array, stored: NamedSharding, gathered: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(weight, gathered)


def _gather_forward(weight, stored, gathered):
    return _gather(weight, stored, gathered), None


def _gather_backward(stored, gathered, _, cotangent):
    return (jax.lax.with_sharding_constraint(cotangent, stored),)


_gather.defvjp(_gather_forward, _gather_backward)

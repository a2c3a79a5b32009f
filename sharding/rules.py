"""Rules: which logical axis of weights and activations is split over which axes of the mesh. They are data.

A rule set is a dict that has an entry for every logical axis, so that nothing is replicated by being forgotten; a set
of one's own is best begun from one of `RULES`: ``RULES["fsdp+tensor"] | {"vocab": None}``.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from jax.sharding import Mesh

from optjax.sharding.mesh import AXES

Rules = Mapping[str, str | tuple[str, ...] | None]

LOGICAL_AXES = {
    "vocab": "V, the vocabulary: of the word embedding, an untied head and the logits",
    "embed": "E, the width of the word embedding",
    "model": "D, the hidden size, of weights; of q, k, v and fc1 it splits each part of heads and mlp once more; "
    "of activations it is never split",
    "projection": "D, in project_in and project_out",
    "heads": "H·K or H: attention's heads, of weights, activations and the KV cache",
    "mlp": "F, the width of the feed-forward layer",
    "position": "rows of the position table",
    "labels": "labels of a classifier",
    "batch": "B, rows of the batch",
    "length": "T, tokens of a row, inside attention and feed-forward",
    "residual_length": "T of the residual stream, between them",
    "cache_length": "S, columns of the KV cache",
}

_REPLICATED: dict[str, str | tuple[str, ...] | None] = dict.fromkeys(LOGICAL_AXES)
_FULLY_SHARDED = {"model": ("fsdp", "sequence"), "embed": ("fsdp", "sequence")}
_TENSOR = {"heads": "tensor", "mlp": "tensor", "vocab": "tensor"}
_ROWS = {"batch": ("data", "fsdp"), "length": "sequence", "residual_length": "sequence"}

RULES: dict[str, Rules] = {
    # Every device has all weights.
    "data": _REPLICATED | {"batch": ("data", "fsdp", "sequence", "tensor")},
    # Every device keeps a part of each weight, and gathers it where it is used (Rajbhandari et al. 2020, ZeRO stage 3);
    # or, to generate from few tokens, multiplies those of all with its part.
    "fsdp": _REPLICATED | _ROWS | _FULLY_SHARDED,
    # Every device computes a part of each layer (Shoeybi et al. 2019, Megatron-LM).
    "tensor": _REPLICATED | _ROWS | _TENSOR,
    "fsdp+tensor": _REPLICATED | _ROWS | _FULLY_SHARDED | _TENSOR,
    # And between those parts every device keeps its share of the tokens (Korthikanti et al. 2022, section 4.2).
    "fsdp+tensor+sequence": _REPLICATED
    | _ROWS
    | _FULLY_SHARDED
    | _TENSOR
    | {"residual_length": ("sequence", "tensor")},
}
DEFAULT_RULES = "fsdp+tensor+sequence"

# The dimensions of activations that stand together: no mesh axis may split two of them.
_TOGETHER = (
    ("batch", "length", "heads"),
    ("batch", "length", "mlp"),
    ("batch", "length", "vocab"),
    ("batch", "residual_length"),
    ("batch", "heads", "cache_length"),
)


def as_rules(rules: str | Rules | None, mesh: Mesh) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """A rule set, checked and in one form: a tuple of mesh axes for every logical axis.

    Axes of `optjax.sharding.AXES` that the mesh lacks count as size 1.

    Raises:
      ValueError: no such set; logical axes unknown or left out; mesh axes unknown, used twice in one array, or of more
        than one device and used by no rule.
    """
    if rules is None:
        rules = DEFAULT_RULES
    if isinstance(rules, str):
        if rules not in RULES:
            raise ValueError(f"no rule set {rules!r}; there are: {', '.join(RULES)}; or give a dict of your own")
        rules = RULES[rules]
    if not isinstance(rules, Mapping):
        raise ValueError(f"rules are a name or a dict, not {type(rules).__name__}")
    for name in rules:
        if name not in LOGICAL_AXES:
            near = difflib.get_close_matches(str(name), LOGICAL_AXES, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(LOGICAL_AXES)}"
            raise ValueError(f"no logical axis is named {name!r}; {hint}")
    missing = [name for name in LOGICAL_AXES if name not in rules]
    if missing:
        raise ValueError(
            f"the rules say nothing of {', '.join(missing)}; give each a mesh axis or None, or begin from a set: "
            f"optjax.sharding.RULES['fsdp+tensor'] | {{…}}"
        )
    known = {**dict.fromkeys(AXES, 1), **mesh.shape}
    made = {}
    for name in LOGICAL_AXES:
        value = rules[name]
        axes = () if value is None else (value,) if isinstance(value, str) else value
        if not isinstance(axes, tuple | list) or not all(isinstance(axis, str) for axis in axes):
            raise ValueError(f"the rule for {name!r} should be a mesh axis, a tuple of them or None, not {value!r}")
        axes = tuple(axes)
        for axis in axes:
            if axis not in known:
                raise ValueError(f"the rule for {name!r} names mesh axis {axis!r}; the mesh has: {', '.join(known)}")
        made[name] = axes
        if len(set(axes)) < len(axes):
            raise ValueError(f"the rule for {name!r} names a mesh axis twice: {axes}")
    split = {name: [axis for axis in axes if known[axis] > 1] for name, axes in made.items()}
    for names in _TOGETHER:
        used = [axis for name in names for axis in split[name]]
        for axis in used:
            if used.count(axis) > 1:
                both = " and ".join(repr(name) for name in names if axis in split[name])
                raise ValueError(f"mesh axis {axis!r} splits {both}, which are dimensions of the same activations")
    idle = [axis for axis, size in mesh.shape.items() if size > 1 and not any(axis in axes for axes in split.values())]
    if idle:
        raise ValueError(
            f"no rule uses mesh axis {idle[0]!r}: its {mesh.shape[idle[0]]} groups of devices would all do the same "
            "work; give it to 'batch', or choose another mesh"
        )
    return tuple(made.items())

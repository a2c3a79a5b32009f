"""What is asked of a plan, complete and checked: a size, a slice, a job, a mesh, rules and the job's options."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from optjax.attention_blocks import block_of_queries
from optjax.config import OPTConfig
from optjax.kernels.choice import rounded_cache, settle
from optjax.presets import BATCH_TOKENS, PRESETS
from optjax.sharding.choose import choose_mesh
from optjax.sharding.fitting import MeshShape, misfit, that_work
from optjax.sharding.mesh import format_mesh, parse_mesh
from optjax.sharding.placement import Placement
from optjax.sharding.rules import DEFAULT_RULES, Rules, as_rules

from . import analytic
from .analytic import Work
from .hardware import Topology, parse_topology

JOBS = ("train", "generate")
# Of the memory, what micro-batches may fill by estimate, which is off by up to a tenth.
MARGIN = 0.8
HARDLY_LONGER = 1.02
# By the hidden size, as a config has no name.
_PAPER_TOKENS = {PRESETS[size]["hidden_size"]: tokens for size, tokens in BATCH_TOKENS.items()}


@dataclass(frozen=True)
class Request:
    """One combination to plan. Made by `make_request`, which fills in what is left open and checks the whole.

    Attributes:
      size: its name, ``opt-175b``; of a config the one it is given, such as its file's, or ``custom``.
      mesh: the size of every axis.
      rules: a name of `optjax.sharding.RULES`, or a dict.
      options: of the job: what its programs are made with, in plain types.
    """

    size: str
    config: OPTConfig
    topology: Topology
    job: str
    mesh: dict[str, int]
    rules: str | Rules
    options: dict[str, Any]

    @property
    def splits(self) -> Placement:
        """The placement, over a mesh that has a shape and no devices."""
        mesh: Any = MeshShape(self.mesh)
        return Placement(mesh, as_rules(self.rules, mesh))

    @property
    def flash(self) -> bool:
        """Whether kernels attend, in a train step or as prompts are read.

        Raises:
          ValueError: that is asked for and cannot be had.
        """
        o, dtype, on = self.options, self.options["dtype"], self.topology.chip.platform
        if self.job == "generate":
            shape, rounds = (o["batch"], o["prompt"]), rounded_cache(o["cache_dtype"])
            return settle("auto", self.config, self.splits, dtype, shape, not_for_many=rounds, on=on) == "flash"
        how = "eager" if o["query_block"] is not None else o["attn_implementation"]
        return settle(how, self.config, self.splits, dtype, (o["batch"], o["length"]), on=on) == "flash"

    @property
    def own_keys(self) -> bool:
        """Whether tokens look at each other's keys as they are, not at what a cache of another dtype holds of them."""
        return self.job == "train" or self.options["cache_dtype"] in (None, self.options["dtype"])

    @property
    def keys(self) -> int:
        """The keys that the queries of a row have before them."""
        o = self.options
        all_columns = not self.own_keys and self.splits.shards("cache_length") > 1
        return o["length"] if self.job == "train" else o["cache_length"] if all_columns else o["prompt"]

    @property
    def block(self) -> int | None:
        """The queries that are attended at a time where no kernel does it; None for all of a row."""
        o = self.options
        if self.job == "train":
            return analytic.query_block(o["length"], o["query_block"])
        return block_of_queries(self.splits, o["batch"], o["prompt"], self.keys, self.config.num_attention_heads)

    def works(self) -> dict[str, Work]:
        """What each program of the job has to do."""
        o, splits = self.options, self.splits
        width = analytic.WIDTHS[o["dtype"]]
        if self.job == "generate":
            of_cache = analytic.cache_width(self.config, o["cache_dtype"] or o["dtype"])
            shape = {"batch": o["batch"], "cache_length": o["cache_length"], "width": width, "cache_width": of_cache}
            length, block, keys = o["prompt"], self.block, float(self.keys)
            if self.flash:
                keys = analytic.keys_of_a_query(length, 1)
            elif self.own_keys and block is not None and length % block == 0 and splits.shards("length") == 1:
                keys = analytic.keys_of_a_query(length, block)
            works = {
                "prefill": analytic.prefill(self.config, splits, length=length, keys=keys, flash=self.flash, **shape),
                "decode step": analytic.decoding(self.config, splits, **shape),
            }
            if o["offload"] is None:
                return works
            how = {"width": width, "from_disk": o["offload"] == "disk"}
            return {name: analytic.offloaded(work, self.config, splits, **how) for name, work in works.items()}
        step = analytic.Training(
            batch=o["batch"],
            length=o["length"],
            micro_batches=o["micro_batches"],
            remat=o["remat"],
            block=self.block,
            flash=self.flash,
            moment=analytic.WIDTHS[o["moments_dtype"]],
            compute=width,
            moments_on_device=o["moments_memory"] == "device",
        )
        return {"train step": analytic.training(self.config, splits, step)}

    def command(self) -> str:
        """The command that plans just this."""
        words = ["optjax", "plan", self.size, "--topology", self.topology.name, "--job", self.job]
        words += ["--mesh", format_mesh(self.mesh) if self.topology.devices > 1 else "data=1"]
        if isinstance(self.rules, str) and self.rules != DEFAULT_RULES:
            words += ["--rules", self.rules]
        defaults = _defaults(self.config, self.job)
        for name, value in self.options.items():
            if name in ("batch", "micro_batches") or value != defaults[name]:
                value = f"{value / 1e9:g}" if name == "disk_bandwidth" else value
                words += [f"--{name.replace('_', '-')}", str(value)]
        return shlex.join(words)


def make_request(
    size: str | OPTConfig,
    topology: str | Topology,
    job: str = "train",
    *,
    mesh: str | Mapping[str, int] | None = "auto",
    rules: str | Rules | None = None,
    name: str | None = None,
    **options: Any,
) -> Request:
    """See `optjax.sharding.plan.plan`, whose arguments these are.

    Args:
      name: what to call a size that is a config.

    Raises:
      ValueError: something is unknown, or does not fit together.
    """
    config = size if isinstance(size, OPTConfig) else OPTConfig.preset(size)
    name = size.lower().removeprefix("facebook/") if isinstance(size, str) else name or "custom"
    topology = topology if isinstance(topology, Topology) else parse_topology(topology)
    if job not in JOBS:
        raise ValueError(f"no job {job!r}; there are: {', '.join(JOBS)}")
    if mesh is None or mesh == "auto":
        chip = topology.chip
        fast = chip.devices_per_host if not chip.dimensions else topology.devices // topology.slices
        sizes = choose_mesh(config, topology.devices, job, memory=chip.capacity, fast=fast, rules=rules)
    else:
        sizes = parse_mesh(mesh, topology.devices)
    request = Request(name, config, topology, job, sizes, DEFAULT_RULES if rules is None else rules, {})
    wrong = misfit(request.splits, config, "causal_lm")
    if wrong:
        raise ValueError(f"{wrong}; {that_work(request.splits, config, 'causal_lm')}")
    chosen = _checked(config, job, options)
    request.options.update(chosen)
    _ = request.flash  # whose error says why it cannot be had
    if chosen.get("micro_batches") == "auto":
        request.options["micro_batches"] = _micro_batches(request)
    if chosen.get("offload") == "disk" and topology.devices > 1:
        raise ValueError(f"offload='disk' is for one device, and {topology.name} has {topology.devices}; use 'host'")
    if job == "train":
        _check_batch(request.splits, request.options)
    return request


def _defaults(config: OPTConfig, job: str) -> dict[str, Any]:
    positions = config.max_position_embeddings
    if job == "generate":
        lengths = {"prompt": min(512, positions), "cache_length": min(2048, positions)}
        dtypes = {"dtype": "bfloat16", "cache_dtype": None}
        return {"batch": 1, **lengths, **dtypes, "offload": None, "disk_bandwidth": None}
    length = min(2048, positions)
    return {
        "batch": max(1, _PAPER_TOKENS.get(config.hidden_size, 2**21) // length),
        "length": length,
        "micro_batches": "auto",
        "remat": "full",
        "dtype": "bfloat16",
        "moments_dtype": "float32",
        "moments_memory": "device",
        "query_block": None,
        "attn_implementation": "eager",
        "loss_chunks": None,
        "dropout": 0.0,
    }


_CHOICES = {
    "dtype": ("bfloat16", "float32", "float16"),
    "cache_dtype": ("bfloat16", "float32", "float16", "int8"),
    "moments_dtype": ("float32", "bfloat16"),
    "moments_memory": ("device", "host"),
    "attn_implementation": ("eager", "flash", "auto"),
    "offload": (None, "host", "disk"),
}


def _checked(config: OPTConfig, job: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """A job's options, with those left out (or None) filled in."""
    chosen = _defaults(config, job)
    for name, value in options.items():
        if name not in chosen:
            raise ValueError(f"to {job} there is no option {name!r}; there are: {', '.join(chosen)}")
        if value is not None:
            chosen[name] = value
    for name, value in chosen.items():
        allowed = tuple(analytic.REMAT) if name == "remat" else _CHOICES.get(name)
        if allowed is not None:
            if value not in allowed and (name, value) != ("cache_dtype", None):
                raise ValueError(f"{name} should be one of {', '.join(map(str, allowed))}, not {value!r}")
        elif name == "disk_bandwidth":
            if value is not None and (not isinstance(value, int | float) or not value > 0):
                raise ValueError(f"disk_bandwidth should be bytes/s above 0, not {value!r}")
        elif name == "dropout":
            if not isinstance(value, int | float) or not 0 <= value < 1:
                raise ValueError(f"dropout should be at least 0 and less than 1, not {value!r}")
        elif value is not None and value != "auto" and (not isinstance(value, int) or value < (name != "query_block")):
            raise ValueError(f"{name} should be a positive integer, not {value!r}")
    positions = config.max_position_embeddings
    for name in {"length", "cache_length"} & chosen.keys():
        if chosen[name] > positions:
            raise ValueError(f"{name} {chosen[name]} is more than the model's {positions} positions")
    if job == "generate" and chosen["prompt"] > chosen["cache_length"]:
        raise ValueError(f"a prompt of {chosen['prompt']} tokens does not go into a cache of {chosen['cache_length']}")
    if job == "generate" and (chosen["offload"] == "disk") != (chosen["disk_bandwidth"] is not None):
        raise ValueError("offload='disk' and disk_bandwidth, in bytes/s, go together: a disk's speed is not known here")
    return chosen


def _micro_batches(request: Request) -> int:
    """As many micro-batches as take hardly longer than fewer ones that fit, by estimate: each part gathers the weights
    anew, and a smaller part takes less memory. At most so many that a device has one row."""
    from .estimate import estimate, memory

    most = max(1, request.options["batch"] // request.splits.shards("batch"))
    tried = [
        replace(request, options={**request.options, "micro_batches": n}) for n in range(1, most + 1) if most % n == 0
    ]
    fitting = [each for each in tried if memory(each) <= MARGIN * request.topology.chip.capacity] or tried[-1:]
    times = [estimate(each).floor for each in fitting]
    return max(
        each.options["micro_batches"]
        for each, time in zip(fitting, times, strict=True)
        if time <= HARDLY_LONGER * min(times)
    )


def _check_batch(splits: Placement, options: Mapping[str, Any]) -> None:
    batch, parts = options["batch"], options["micro_batches"]
    groups = splits.shards("batch")
    if batch % (parts * groups):
        raise ValueError(
            f"a batch of {batch} rows does not divide into {parts} micro-batches over {groups} groups of devices; "
            f"it should be a multiple of {parts * groups}"
        )
    for axis in ("length", "residual_length"):
        if options["length"] % splits.shards(axis):
            raise ValueError(
                f"rows of {options['length']} tokens do not divide over {splits.shards(axis)} devices, as the rule for "
                f"{axis!r} asks; choose another length, mesh or rules"
            )

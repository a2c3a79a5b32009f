"""``optjax plan``: what a size needs on a slice, said by the compiler of that slice, before the slice is rented."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optjax.cli import terminal
from optjax.cli.arguments import count
from optjax.cli.terminal import UsageError

if TYPE_CHECKING:
    from optjax.sharding.plan.request import Request
    from optjax.sharding.plan.search import Found

SUMMARY = "what a size needs on a TPU slice or GPUs, before they are rented"
OPERANDS = "SIZE --topology SLICE"
TEXT = """\
Compiles the real train step, or prefill and decode step, for a slice that need
not be there, and prints what a device holds against its memory, what is sent
between devices, and the least time of a step. Nothing runs on the slice.

The compilers: pip install 'optjax[plan-tpu]' or 'optjax[plan-gpu]'.
"""
EXAMPLES = """\
examples:
  optjax plan opt-1.3b --topology v5e:4x4
  optjax plan opt-175b --topology v5p:4x4x8 --job train --mesh fsdp=32,tensor=4 --batch 1024
  optjax plan opt-175b --topology h100:8 --job generate --batch 16
  optjax plan opt-30b --topology v5e:1x1 --job generate --offload host --batch 4
  optjax plan opt-30b --topology v6e:8x8 --search --plot plan.png
  optjax plan opt-66b --topology 2xv5e:16x16 --json | jq .fits
  optjax plan --settings runs/first --topology v5p:4x4x4

slices: v4:2x2x1 v5e:4x4 v5p:4x4x8 v6e:8x8 tpu7x:2x2x1 …; h100:8 h100:64 a100:8;
several of them: 2xv5e:16x16. A wrong shape gets the list of those that exist.

Exit status: 0 where it fits, 3 where it does not.
"""
DOES_NOT_FIT = 3
_LISTED = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    text = "opt-125m … opt-175b, galactica-125m … galactica-120b, or a config.json"
    add("size", metavar="SIZE", nargs="?", help=text)
    text = "of a training run, or its folder: its size, batch, mesh and levers, where no flag says otherwise"
    add("--settings", type=Path, metavar="FILE", help=text)
    add("--topology", required=True, metavar="SLICE", help="v5p:4x4x8, v5e:16x16, h100:8, 2xv5e:16x16 for two slices")
    add("--job", choices=("train", "generate"), default="train", help="(default: train)")
    add("--mesh", metavar="SPEC", help="fsdp=32,tensor=4; one size may be -1 (default: auto)")
    add("--rules", metavar="NAME", help="data, fsdp, tensor, fsdp+tensor, fsdp+tensor+sequence (default: the last)")
    text = "rows over all devices (default: to train as in the paper, to generate 1)"
    add("--batch", type=count, metavar="N", help=text)
    text = "computed with (default: bfloat16; the weights that are trained stay float32)"
    add("--dtype", choices=("bfloat16", "float32", "float16"), help=text)

    train = parser.add_argument_group("to train").add_argument
    train("--length", type=count, metavar="N", help="tokens of a row (default: 2048)")
    text = "parts that a batch is taken in (default: as many as cost no time)"
    train("--micro-batches", type=count, metavar="N", help=text)
    text = (
        "what the forward pass keeps: all, what products give, each layer's input, that in host memory (default: full)"
    )
    train("--remat", choices=("none", "dots", "full", "offload"), help=text)
    train("--moments-dtype", choices=("float32", "bfloat16"), help="of Adam's moments (default: float32)")
    train("--moments-memory", choices=("device", "host"), help="where they are (default: device)")
    train(
        "--query-block", type=int, metavar="N", help="queries that attention takes at a time, 0 for all (default: 512)"
    )
    text = "kernels of TPU and GPU for attention (flash), or none (default: eager)"
    train("--attn-implementation", choices=("eager", "flash", "auto"), help=text)
    train("--loss-chunks", type=count, metavar="N", help="parts that the logits are made in (default: of 128 MiB)")
    train("--dropout", type=float, metavar="P", help="(default: 0)")

    generate = parser.add_argument_group("to generate").add_argument
    generate("--prompt", type=count, metavar="N", help="tokens read at once (default: 512)")
    generate("--cache-length", type=count, metavar="N", help="columns of the cache (default: 2048)")
    text = "of the cache (default: that of --dtype)"
    generate("--cache-dtype", choices=("bfloat16", "float32", "float16", "int8"), help=text)
    text = "layers come from the host's memory or from disk for every token: for models larger than the device's memory"
    generate("--offload", choices=("host", "disk"), help=text)
    generate("--disk-bandwidth", type=float, metavar="GB/S", help="of that disk, as it reads large files")

    text = "try meshes, rules, remat policies and micro-batches, and rank what fits; options that are given stay"
    add("--search", action="store_true", help=text)
    add("--limit", type=count, default=8, metavar="N", help="with --search, compile so many at most (default: 8)")
    add("--json", action="store_true", help="all of it as JSON: bytes and seconds; with --search a list")
    add("--plot", type=Path, metavar="FILE", help="draw memory and time: .png, .pdf, .svg (with --search, of the best)")
    add("--save-hlo", metavar="FOLDER", help="write the compiled programs' texts")


_OPTIONS = ("batch", "dtype", "length", "micro_batches", "remat", "moments_dtype", "moments_memory", "query_block")
_OPTIONS += ("attn_implementation", "loss_chunks", "dropout", "prompt", "cache_length", "cache_dtype", "offload")
_OPTIONS += ("disk_bandwidth",)


# Settings of a run (optjax.train.settings) that have another name here.
_OF_A_RUN = {"batch_size": "batch", "config": "size", "preset": "size"}


def run(arguments: argparse.Namespace) -> int:
    if arguments.settings is not None:
        _fill_in(arguments)
    if arguments.size is None:
        raise UsageError("which size? opt-125m … opt-175b, a config.json, or --settings of a run")
    options = {name: value for name in _OPTIONS if (value := getattr(arguments, name)) is not None}
    if "disk_bandwidth" in options:
        options["disk_bandwidth"] *= 1e9
    size = _size(arguments.size)
    if arguments.plot is not None:
        _check_plot(arguments.plot)
    if arguments.save_hlo is not None:
        if arguments.search:
            raise UsageError("--save-hlo is for one plan; name its mesh, without --search")
        Path(arguments.save_hlo).mkdir(parents=True, exist_ok=True)
    asked = {"mesh": arguments.mesh or "auto", "rules": arguments.rules, "name": arguments.size, **options}
    if arguments.search:
        return _search(arguments, size, asked)

    from optjax.sharding.plan.planning import run as run_request
    from optjax.sharding.plan.request import make_request

    request = make_request(size, arguments.topology, arguments.job, **asked)
    terminal.status(f"compiling for {request.topology.name} …")
    try:
        plan = run_request(request, arguments.save_hlo)
    finally:
        terminal.status("")
    if arguments.json:
        print(plan.to_json(), end="")
    else:
        from optjax.sharding.plan.table import render

        render(plan, _console())
    if arguments.plot is not None:
        plan.plot(arguments.plot)
    return 0 if plan.fits else DOES_NOT_FIT


def _search(arguments: argparse.Namespace, size: Any, asked: dict[str, Any]) -> int:
    from optjax.sharding.plan.search import search

    with _Progress() as progress:
        found = search(
            size, arguments.topology, arguments.job, limit=arguments.limit, on_progress=progress.update, **asked
        )
    if arguments.json:
        print(json.dumps([plan.to_dict() for plan in (*found.ranked, *found.refused)], indent=2))
    else:
        _print_found(found)
    if arguments.plot is not None and found.ranked:
        found.ranked[0].plot(arguments.plot)
    return 0 if found.ranked else DOES_NOT_FIT


def _fill_in(arguments: argparse.Namespace) -> None:
    """What a run's settings say and no flag does."""
    from optjax.settings_file import read_settings

    if arguments.job != "train":
        raise UsageError("--settings are those of a training run; leave out --job generate")
    for name, value in read_settings(arguments.settings).items():
        name = _OF_A_RUN.get(name, name)
        if name in ("size", "mesh", "rules", *_OPTIONS) and getattr(arguments, name) is None:
            setattr(arguments, name, value)


def _size(text: str) -> Any:
    """A published size's name, or the config of a file or folder."""
    from optjax.config import OPTConfig
    from optjax.presets import PRESETS

    if text.lower().removeprefix("facebook/") in PRESETS:
        return text
    if Path(text).expanduser().exists():
        return OPTConfig.from_json(Path(text).expanduser())
    return OPTConfig.preset(text)  # whose error lists the sizes


def _check_plot(path: Path) -> None:
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise ImportError("--plot needs matplotlib: pip install 'optjax[plot]'")
    if path.suffix.lower() not in (".png", ".pdf", ".svg", ".jpg", ".webp"):
        raise UsageError(f"{path}: a plot is a .png, .pdf or .svg file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no folder {path.parent} to write {path.name} to")


def _console() -> Any:
    from rich.console import Console

    # A pipe has no width: nothing is wrapped or cut there.
    return Console(highlight=False, width=None if sys.stdout.isatty() else 1000)


def _print_found(found: Found) -> None:
    from rich import box
    from rich.table import Table

    from optjax.sharding.mesh import format_mesh
    from optjax.sharding.plan import units

    console = _console()
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    titles = ("", "mesh", "rules", "remat", "parts", "peak", "floor", "bound by", "MFU ≤", "tokens/s ≤")
    for i, title in enumerate(titles):
        table.add_column(title, justify="left" if i in (1, 2, 3, 7) else "right")
    for i, plan in enumerate((*found.ranked, *found.refused)[:_LISTED]):
        request, rates = plan.request, plan.main.roofline
        levers = [str(request.options.get(name, "–")) for name in ("remat", "micro_batches")]
        rules = request.rules if isinstance(request.rules, str) else "one's own"
        start = [str(i + 1) if plan.fits else "✗", format_mesh(request.mesh), rules, *levers, units.size(plan.peak)]
        times = ["", "", "", ""]
        if plan.fits:
            times = [units.seconds(rates.floor), rates.bound, f"{rates.mfu:.1%}", units.rate(rates.tokens_per_second)]
        table.add_row(*start, *times, style="" if plan.fits else "dim")
    console.print(table)
    left = found.possible - found.hopeless - found.tried
    counts = f"{found.tried} compiled, {found.hopeless} cannot fit by their analytic minimum, {left} not tried"
    console.print(f"\n{counts} (--limit)", style="dim")
    if found.ranked:
        console.print(f"the first again: {found.ranked[0].request.command()}")


class _Progress:
    """A bar on standard error, on a terminal only."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
        self._task = self._bar.add_task("estimating", total=None)

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, done: int, total: int, request: Request | None) -> None:
        text = ""
        if request is not None:
            from optjax.sharding.mesh import format_mesh

            text = f"{format_mesh(request.mesh)} {request.rules if isinstance(request.rules, str) else ''}"
        self._bar.update(self._task, completed=done, total=total, description=text)

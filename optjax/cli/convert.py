"""``optjax convert``: a checkpoint of any format, written as Hugging Face lays it out."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from optjax.cli import terminal
from optjax.cli.arguments import DTYPES, add_adapter, add_quantize, add_revision, count, quantization
from optjax.cli.calibration import LENGTH, WINDOWS
from optjax.cli.terminal import UsageError

if TYPE_CHECKING:
    import numpy as np

    from optjax.checkpoints.open import Opened
    from optjax.config import OPTConfig
    from optjax.params import Params

SUMMARY = "write a checkpoint of any format in the Hugging Face layout"
OPERANDS = "SOURCE DEST"
TEXT = """\
Reads a checkpoint of any format that optjax knows and writes it as Hugging Face
lays it out, with its tokenizer; transformers loads the result (unless quantized,
which optjax loads: its codes, and a quantization_config in config.json).

Read: safetensors and .bin, Flax .msgpack, TF .h5 (one file or many), metaseq .pt
(consolidated, model-parallel parts, FSDP shards), Alpa's folder of arrays.
Tensors pass through memory one at a time: a checkpoint may be larger than it.
With --calibration the result stays on the device until it is written.
"""
EXAMPLES = """\
examples:
  optjax convert facebook/opt-125m opt-125m
  optjax convert metaseq/reshard.pt opt-350m --tokenizer facebook/opt-350m
  optjax convert opt-13b opt-13b-bf16 --dtype bfloat16 --max-shard-size 2GB
  optjax convert opt-125m opt-125m-flax --format flax
  optjax convert opt-30b opt-30b-int8 --quantize int8
  optjax convert opt-30b opt-30b-int4 --quantize int4 --calibration some_books.txt
  optjax convert opt-1.3b opt-1.3b-chat --adapter ./my-lora

DEST appears when all of it is written; a failure leaves nothing behind.
"""
HEADS = ("causal_lm", "sequence_classification", "question_answering", "base")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", metavar="SOURCE", help="a folder, a file, a hub id such as facebook/opt-125m, or opt-mini")
    add("dest", metavar="DEST", type=Path, help="the folder to write; new or empty")
    add("--format", choices=("safetensors", "flax"), default="safetensors", help="to write (default: safetensors)")
    add("--dtype", choices=DTYPES, help="cast the weights (default: as they are)")
    add_quantize(add)
    text = (
        "text files of the kind that the model will read: --quantize then goes by what they bring (GPTQ), which in 4 "
        "bits halves the error; it takes longer, and memory for the result, a layer, and the windows' hidden states"
    )
    add("--calibration", nargs="+", type=Path, metavar="FILE", help=text)
    text = f"windows of up to {LENGTH} tokens that are taken evenly from the texts (default: {WINDOWS})"
    add("--calibration-windows", type=count, metavar="N", help=text)
    add_adapter(add, "a LoRA adapter to merge into the weights: a folder of PEFT's, or a hub id")
    add("--head", choices=HEADS, help="the head to keep, base for none (default: the checkpoint's)")
    add("--max-shard-size", default="5GB", metavar="SIZE", help="of one file, such as 500MB (default: 5GB)")
    text = "a published size's name or a config.json, where the checkpoint has none or a wrong one"
    add("--config", metavar="NAME", help=text)
    add("--tokenizer", metavar="SOURCE", help="where the tokenizer is, if not with the checkpoint")
    add_revision(add)
    text = "write into a DEST that is not empty: its model and its tokenizer are replaced, other files stay"
    add("--force", action="store_true", help=text)
    add("-q", "--quiet", action="store_true", help="nothing on standard error but errors")


def run(arguments: argparse.Namespace) -> int:
    dest: Path = arguments.dest.expanduser()
    if dest.exists() and not dest.is_dir():
        raise UsageError(f"{dest} is a file; a checkpoint is written to a folder")
    wanted = quantization(arguments)
    if arguments.calibration is None and arguments.calibration_windows is not None:
        raise UsageError("--calibration-windows is for --calibration")
    if arguments.calibration is not None and wanted is None:
        raise UsageError("--calibration is for --quantize int4, nf4 or int8")
    if arguments.format != "safetensors" and wanted is not None:
        raise UsageError(f"--format {arguments.format} cannot hold quantized weights; leave --format or --quantize out")
    replaces = dest.exists() and any(dest.iterdir())
    if replaces and not arguments.force:
        raise UsageError(f"{dest} is not empty; name another folder, or replace what is in it with --force")

    from optjax.checkpoints.hub import resolve_source
    from optjax.checkpoints.lazy import lazy_params
    from optjax.checkpoints.save import parse_size, read_before, save_over
    from optjax.progress import progress_bar

    parse_size(arguments.max_shard_size)
    path = resolve_source(arguments.source, revision=arguments.revision)
    opened = _open(path, arguments)
    if arguments.format != "safetensors" and opened.quantization is not None:
        raise UsageError(
            f"{arguments.source} is quantized to {opened.quantization.kind}, which --format {arguments.format} cannot "
            "hold; leave --format out, or convert the model that it was made from"
        )
    if replaces and dest.samefile(opened.found.folder) and (others := read_before(dest, arguments.format)):
        raise UsageError(f"{dest} is the source, and would lose {others[0].name} for the result; name another folder")
    files = _tokenizer_files(path, arguments, replaces)
    ids = None if arguments.calibration is None else _calibration(opened, files, arguments)
    write_tokenizer = _tokenizer_writer(files)
    show = sys.stderr.isatty() and not arguments.quiet
    with progress_bar(opened.nbytes, f"converting {Path(arguments.source).name}", show and ids is None) as advance:
        params = lazy_params(opened, arguments.dtype, advance, wanted)
        _check_space(params, dest)
        if ids is not None and wanted is not None:
            from optjax.quantization.calibrate import gptq

            params = gptq(lazy_params(opened, arguments.dtype, advance), ids, wanted, progress=show)
        options = {"format": arguments.format, "max_shard_size": arguments.max_shard_size}
        if replaces:
            save_over(params, dest, **options)
            write_tokenizer(dest)
        else:
            with _new_folder(dest) as staging:
                save_over(params, staging, **options)
                write_tokenizer(staging)
    if not arguments.quiet:
        made = wanted or opened.quantization
        _summarize(opened, files, dest, None if made is None else made.kind)
    return 0


def _open(path: Path, arguments: argparse.Namespace) -> Opened:
    """The checkpoint; errors in the words of the command line, not of `load_params`."""
    from optjax.checkpoints.errors import CheckpointError
    from optjax.checkpoints.open import open_checkpoint

    try:
        if arguments.adapter is not None:
            from optjax.lora.files import load_adapters
            from optjax.lora.in_files import open_merged

            return open_merged(path, arguments.head, _config(arguments.config), load_adapters(arguments.adapter))
        return open_checkpoint(path, arguments.head, _config(arguments.config))
    except (CheckpointError, FileNotFoundError) as error:
        text = str(error).replace("pass key=jax.random.key(0) to create one", "choose another --head")
        text = text.replace("pass config=, an OPTConfig or the name of a preset such as", "pass --config, such as")
        raise type(error)(text) from error


def _calibration(opened: Opened, tokenizer: list[Path], arguments: argparse.Namespace) -> np.ndarray:
    """The ids ``[N, T]`` that quantization goes by."""
    from optjax.cli.calibration import read_texts, windows
    from optjax.tokenizer import Tokenizer

    texts = read_texts(arguments.calibration)
    wanted = arguments.calibration_windows or WINDOWS
    return windows(Tokenizer.load(tokenizer[0].parent), texts, opened.config.max_position_embeddings, wanted)


def _config(name: str | None) -> OPTConfig | str | None:
    if name is None or not Path(name).expanduser().exists():
        return name
    from optjax.config import OPTConfig

    return OPTConfig.from_json(Path(name).expanduser())


def _tokenizer_files(path: Path, arguments: argparse.Namespace, replaces: bool) -> list[Path]:
    """The files of the tokenizer; none where there is no tokenizer and none is asked for."""
    from optjax import tokenizer_files as names

    if arguments.tokenizer is not None:
        folder = names.locate(arguments.tokenizer, None, None)
    else:
        folder = path if path.is_dir() else path.parent
    files = {name: folder / name for name in names.FILES if (folder / name).is_file()}
    if names.FULL in files or (names.VOCAB in files and names.MERGES in files):
        return list(files.values())
    if arguments.tokenizer is not None:
        raise FileNotFoundError(
            f"no tokenizer in {folder}: looked for {names.FULL}, or {names.VOCAB} and {names.MERGES}"
        )
    if arguments.calibration is not None:
        raise UsageError("--calibration takes a tokenizer, and none is with the checkpoint; name one with --tokenizer")
    if not arguments.quiet:
        kept = "what there is in DEST stays" if replaces else "the result has none"
        terminal.note(f"there is no tokenizer with the checkpoint: {kept}; --tokenizer names one")
    return []


@contextmanager
def _new_folder(dest: Path) -> Iterator[Path]:
    """A folder beside ``dest`` that takes its name at the end, or goes away if anything fails."""
    dest.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{dest.name}-", dir=dest.parent))
    try:
        yield staging
        umask = os.umask(0)
        os.umask(umask)
        staging.chmod(0o777 & ~umask)  # mkdtemp's folders are for one user only
        if dest.exists():
            dest.rmdir()
        staging.rename(dest)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _check_space(params: Params, dest: Path) -> None:
    """OSError where the disk has too little room, rather than when it is full."""
    import math

    import jax

    from optjax.cli.units import size

    there = next(folder for folder in (dest, *dest.absolute().parents) if folder.exists())
    needed = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    free = shutil.disk_usage(there).free
    if needed > free:
        raise OSError(f"the result takes {size(needed)}, and where {dest} would be there are {size(free)} left")


def _tokenizer_writer(files: list[Path]) -> Callable[[Path], None]:
    """What writes the tokenizer of these files into a folder; damaged ones are seen before anything is written."""
    from optjax import tokenizer_files as names

    if not files or {file.name for file in files} & {names.FULL, names.SETTINGS}:
        return partial(_copy, files)
    # Of vocab.json and merges.txt alone transformers would make GPT-2's tokenizer, which puts no BOS before a text.
    from optjax.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(files[0].parent)

    def write(folder: Path) -> None:
        with tempfile.TemporaryDirectory() as whole:
            tokenizer.save(whole)
            _copy(sorted(Path(whole).iterdir()), folder)

    return write


def _copy(files: list[Path], folder: Path) -> None:
    """The files of a tokenizer, in place of all of an earlier one; where there are none, that stays."""
    from optjax.tokenizer_files import remove_others

    for file in files:
        target = folder / file.name
        if not target.exists() or not target.samefile(file):
            shutil.copyfile(file, folder / f".{file.name}.new")
            os.replace(folder / f".{file.name}.new", target)
    if files:
        remove_others(folder, {file.name for file in files})


def _summarize(opened: Opened, tokenizer: list[Path], dest: Path, quantized: str | None) -> None:
    from optjax.cli.units import count, size
    from optjax.declaration import count_params

    files = [path for path in dest.iterdir() if path.is_file()]
    total = size(sum(path.stat().st_size for path in files))
    parameters = count(count_params(opened.config, opened.head))
    extra = ", with the tokenizer" if tokenizer else ""
    kind = f" in {quantized}" if quantized else ""
    source = opened.found.format
    terminal.note(f"{dest}: {parameters} parameters{kind} from {source}, {len(files)} files of {total}{extra}")

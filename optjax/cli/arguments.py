"""How the commands read their arguments. What they are stands with each command."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, NoReturn

from optjax.cli.terminal import UsageError

if TYPE_CHECKING:
    from optjax.quantization.quantize import Quantization

COMMANDS = ("generate", "score", "convert", "info", "plan")
DTYPES = ("float32", "bfloat16", "float16")
QUANTIZATIONS = ("int8", "int4", "nf4")
MODEL = "opt-mini"

_TEXT = """\
OPT, Meta's open language models, in JAX. Without any download:

  optjax generate "The old house stood at the end of the road, and"
"""
_EXAMPLES = """\
examples:
  optjax generate --model facebook/opt-125m "Hello, my name is"
  optjax score "The king sat upon his" " throne" " horse"
  optjax convert facebook/opt-1.3b opt-1.3b-bf16 --dtype bfloat16
  optjax info opt-1.3b opt-175b
  optjax plan opt-175b --topology v5p:4x4x8

Each command has its own help: optjax generate --help
"""


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The arguments of one command; ``run`` among them is the function that carries it out.

    Raises:
      SystemExit: after ``--help`` or ``--version``, or (status 2) where the arguments make no sense.
    """
    parser = _parser()
    if not words:
        parser.print_help(sys.stderr)
        raise SystemExit(2)
    return parser.parse_args(_with_dashes(words))


def add_model(group: Any) -> None:
    """The options of commands that run a model; `optjax.cli.models.load` reads them."""
    add = group.add_argument
    text = f"a folder, a file, or a hub id such as facebook/opt-125m (default: {MODEL}, which ships with optjax)"
    add("-m", "--model", default=MODEL, metavar="SOURCE", help=text)
    add("--tokenizer", metavar="SOURCE", help="where the tokenizer is, if not with the model")
    add_revision(add)
    text = "of weights and computation (default: bfloat16; float32 on a CPU, float16 on a GPU older than Ampere)"
    add("--dtype", choices=DTYPES, help=text)
    add_quantize(add)
    add_adapter(add, "a LoRA adapter to use with the model, which may be quantized: a folder of PEFT's, or a hub id")
    text = "spread the model over devices: tensor=4, or fsdp=2,tensor=4; -1 stands for all that are left (one device)"
    add("--mesh", metavar="AXES", help=text)
    text = (
        "a model larger than the device's memory: its layers lie in the host's memory, or stay in the files, and come "
        "one after another for every token; --batch-size 32 takes hardly longer than 1"
    )
    add("--offload", choices=("host", "disk"), help=text)
    text = "do not keep compiled programs in the user's cache folder; later runs start slower"
    add("--no-compile-cache", dest="compile_cache", action="store_false", help=text)


def add_attention(add: Any, what: str, default: str | None = "auto") -> None:
    text = f"how {what} are read: kernels of TPU and GPU (flash) or none; auto: flash where it can be had"
    add("--attn-implementation", choices=("auto", "eager", "flash"), default=default, help=f"{text} (default: auto)")


def add_revision(add: Any) -> None:
    add("--revision", metavar="NAME", help="branch, tag or commit, where SOURCE is a hub id")


def add_adapter(add: Any, text: str) -> None:
    add("--adapter", metavar="SOURCE", help=text)


def add_quantize(add: Any) -> None:
    text = "keep the matrices in 8 bits, or in 4 in groups (see --group-size); halves or quarters bfloat16's memory"
    add("--quantize", choices=QUANTIZATIONS, help=text)
    add("--group-size", type=count, metavar="N", help="weights that share a scale, for int4 and nf4 (default: 64)")


def quantization(arguments: argparse.Namespace) -> Quantization | None:
    """What --quantize and --group-size ask for.

    Raises:
      UsageError: they do not go together, or make no sense.
    """
    kind, size = arguments.quantize, arguments.group_size
    if size is not None and kind in (None, "int8"):
        raise UsageError("--group-size is for --quantize int4 and nf4")
    if kind is None:
        return None
    from optjax.quantization.quantize import Quantization

    try:
        return Quantization(kind) if size is None else Quantization(kind, size)
    except ValueError as error:
        raise UsageError(f"--group-size: {error}") from None


def check_offload(arguments: argparse.Namespace) -> None:
    """Sees that --offload goes with the rest.

    Raises:
      UsageError: it does not.
    """
    if arguments.offload == "disk":
        if arguments.adapter is not None:
            raise UsageError("--offload disk does not go with --adapter: merge it first (optjax convert --adapter)")
        if arguments.mesh is not None:
            raise UsageError("--offload disk does not go with --mesh: it reads for one device")
        if arguments.quantize is not None:
            raise UsageError(
                "--offload disk does not go with --quantize: it takes the files as they are: convert them first"
            )


def count(text: str) -> int:
    """An argument that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"should be a whole number of at least 1, not {text!r}")
    return int(text)


def seed(text: str) -> int:
    """An argument that seeds a random generator."""
    if not text.isdecimal() or int(text) >= 1 << 32:
        raise argparse.ArgumentTypeError(f"should be a whole number from 0 to 4294967295, not {text!r}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="optjax", description=_TEXT, epilog=_EXAMPLES)
    parser.add_argument("--version", action=_Version, nargs=0, help="print the versions of optjax, jax and Python")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    for name in COMMANDS:
        # These modules are light: what they need to run they import when they run.
        module = import_module(f"optjax.cli.{name}")
        command = commands.add_parser(
            name,
            help=module.SUMMARY,
            usage=f"optjax {name} [options] {module.OPERANDS}",
            description=module.TEXT,
            epilog=module.EXAMPLES,
        )
        module.add_arguments(command)
        command.add_argument("--debug", action="store_true", help="errors with their traceback (or set OPTJAX_DEBUG=1)")
        command.set_defaults(run=module.run)
    return parser


def _with_dashes(words: Sequence[str]) -> list[str]:
    """Options may be written as in Python: ``--max_new_tokens`` is ``--max-new-tokens``."""
    out = []
    for i, word in enumerate(words):
        if word == "--":
            return out + list(words[i:])
        name, equals, value = word.partition("=")
        out.append(name.replace("_", "-") + equals + value if name.startswith("--") and " " not in name else word)
    return out


class _Parser(argparse.ArgumentParser):
    """An error is one line that says where to look."""

    def __init__(self, **options: Any):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"optjax: error: {message}{self._nearest(message)} (see: {self.prog} --help)\n")

    def _nearest(self, message: str) -> str:
        """What the person may have meant."""
        _, found, unknown = message.partition("unrecognized arguments: ")
        known = [name for action in self._actions for name in action.option_strings]
        near = difflib.get_close_matches(unknown.split("=")[0].split(" ")[0], known, n=1) if found else []
        return f"; did you mean {near[0]}?" if near else ""

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[override]
        """As argparse has it, but what a command does not know is the command's error, not the program's."""
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return known, unknown


class _Version(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        import platform
        from importlib.metadata import version

        from optjax import __version__

        print(f"optjax {__version__} (jax {version('jax')}, Python {platform.python_version()})")
        parser.exit()

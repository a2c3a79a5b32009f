"""``optjax generate``: continues prompts."""

from __future__ import annotations

import argparse
import re
from typing import Any

from optjax.cli.arguments import DTYPES, add_quantize, add_revision, count, quantization, seed
from optjax.cli.terminal import UsageError

SUMMARY = "continue a prompt"
OPERANDS = "[PROMPT]"
TEXT = """\
Continues a prompt and prints the text as it comes.

Tokens are drawn at random, with a new seed each time, which is shown on standard
error: the same seed gives the same text. --greedy takes the most probable token
instead; small models then soon repeat themselves.
"""
EXAMPLES = """\
examples:
  optjax generate                                      a sample prompt and opt-mini
  optjax generate "Once upon a time" --seed 7 -n 300
  optjax generate --model facebook/opt-350m --greedy "The capital of France is"
  optjax generate --model ./my-checkpoint --num-return-sequences 3 "Dear Sir,"
  optjax generate --num-beams 4 --no-repeat-ngram-size 3 "The old house"
  optjax generate --penalty-alpha 0.6 --top-k 4 "The old house"
  optjax generate --model facebook/opt-30b --mesh tensor=8 "The sea"
  optjax generate --stop "\\n\\n" "Question: why is the sea salt?\\nAnswer:"
  optjax generate --model facebook/opt-6.7b --quantize int8 "The sea"
  echo "It was a dark night" | optjax generate
  optjax generate --file prompts.txt --jsonl > answers.jsonl

A prompt starts with the model's BOS token, which the tokenizer adds. With several
texts each is printed after a line "==> 1 of 3 <==" once all of its batch are done.
"""
MODEL = "opt-mini"
TOKENS = 200
# Sharper than the model's own distribution, which rambles; transformers' default for top_k.
SAMPLING: dict[str, float | int] = {"temperature": 0.8, "top_k": 50, "top_p": 0.95}
_ONLY_SAMPLING = (*SAMPLING, "min_p", "typical_p", "seed")
_SEARCHING = ("num_beams", "length_penalty", "early_stopping", "num_beam_groups", "diversity_penalty", "penalty_alpha")
# Of contrastive search, as its authors have it.
CANDIDATES = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    text = "the text to continue, in quotes; by default standard input, if piped"
    add("prompt", nargs="*", metavar="PROMPT", help=text)
    add("-f", "--file", metavar="FILE", help="a file of prompts, one a line; - for standard input")
    _add_model(parser.add_argument_group("model"))
    _add_length(parser.add_argument_group("length"))
    _add_choosing(parser.add_argument_group("choosing tokens", "Names and meanings are those of transformers."))
    _add_searching(parser.add_argument_group("searching", "Looks further than the next token, and draws nothing."))
    _add_output(parser.add_argument_group("output"))


def _add_model(group: Any) -> None:
    add = group.add_argument
    text = f"a folder, a file, or a hub id such as facebook/opt-125m (default: {MODEL}, which ships with optjax)"
    add("-m", "--model", default=MODEL, metavar="SOURCE", help=text)
    add("--tokenizer", metavar="SOURCE", help="where the tokenizer is, if not with the model")
    add_revision(add)
    text = "of weights and computation (default: float32 on CPU, bfloat16 on GPU and TPU)"
    add("--dtype", choices=DTYPES, help=text)
    add_quantize(add)
    text = "spread the model over devices: tensor=4, or fsdp=2,tensor=4; -1 stands for all that are left (one device)"
    add("--mesh", metavar="AXES", help=text)


def _add_length(group: Any) -> None:
    add = group.add_argument
    text = f"most tokens to add (default: {TOKENS}, or what the model has room for)"
    add("-n", "--max-new-tokens", type=count, metavar="N", help=text)
    add("--min-new-tokens", type=int, default=0, metavar="N", help="no end before this many")
    text = r"end a text before TEXT; may be given several times (\n, \t and \\ stand for what they do in C)"
    add("--stop", action="append", type=_unescaped, metavar="TEXT", help=text)
    add = group.add_mutually_exclusive_group().add_argument
    text = "a text ends where the model ends it (the default)"
    add("--stop-at-eos", dest="stop_at_eos", action="store_true", default=True, help=text)
    add("--ignore-eos", dest="stop_at_eos", action="store_false", help="go on to --max-new-tokens")


def _add_choosing(group: Any) -> None:
    add = group.add_mutually_exclusive_group().add_argument
    add("--do-sample", action="store_true", default=None, help="draw tokens at random (the default)")
    add("--greedy", dest="do_sample", action="store_false", help="always the most probable token")
    add = group.add_argument
    add("--seed", type=seed, metavar="N", help="of the random draws (default: a new one each time)")
    text = f"below 1 bolder choices, above 1 more varied ones (default: {SAMPLING['temperature']})"
    add("--temperature", type=float, metavar="X", help=text)
    text = f"among the K most probable; 0 for all (default: {SAMPLING['top_k']})"
    add("--top-k", type=int, metavar="K", help=text)
    text = f"among the most probable with mass P; 1 for all (default: {SAMPLING['top_p']})"
    add("--top-p", type=float, metavar="P", help=text)
    add("--min-p", type=float, metavar="P", help="leave out what is less probable than P times the most probable")
    add("--typical-p", type=float, metavar="P", help="among the locally typical with mass P")
    add("--repetition-penalty", type=float, metavar="X", help="above 1: less of what was said already")
    add("--no-repeat-ngram-size", type=int, metavar="N", help="no N tokens in a row come twice")
    add("--num-return-sequences", type=count, default=1, metavar="N", help="texts for each prompt")


def _add_searching(group: Any) -> None:
    add = group.add_argument
    add("--num-beams", type=count, metavar="N", help="beam search; with --do-sample the beams are drawn")
    add(
        "--length-penalty",
        type=float,
        metavar="X",
        help="above 0 favours longer texts (default: 1)",
    )
    text = "end with N ended beams, or when none can get better by a rule of thumb (false) or at all (never)"
    add("--early-stopping", choices=("true", "false", "never"), metavar="WHEN", help=text + " (default: false)")
    add("--num-beam-groups", type=count, metavar="N", help="groups of beams, which --diversity-penalty keeps apart")
    add("--diversity-penalty", type=float, metavar="X", help="on a token that another group has just taken")
    text = f"contrastive search: how much a token like those before it loses, among --top-k (there {CANDIDATES})"
    add("--penalty-alpha", type=float, metavar="X", help=text)


def _add_output(group: Any) -> None:
    add = group.add_argument
    add("--no-echo", dest="echo", action="store_false", help="print only what is new, without the prompt")
    add(
        "--jsonl",
        action="store_true",
        help="a JSON object a line: prompt, text, tokens, finish_reason (eos, stop or length)",
    )
    add("--batch-size", type=count, default=8, metavar="N", help="prompts of a file computed at once (default: 8)")
    told = group.add_mutually_exclusive_group()
    told.add_argument("--stats", action="store_true", help="speed on standard error also where that is no terminal")
    told.add_argument("-q", "--quiet", action="store_true", help="nothing on standard error but errors")
    text = "do not keep compiled programs in the user's cache folder; later runs start slower"
    add("--no-compile-cache", dest="compile_cache", action="store_false", help=text)


def run(arguments: argparse.Namespace) -> int:
    from optjax.cli.prompts import read_prompts

    options = _options(arguments)
    quantization(arguments)
    prompts = read_prompts(arguments.prompt, arguments.file, quiet=arguments.quiet)

    # From here on it takes jax.
    from optjax.cli.continuation import Continuation

    Continuation(arguments, options).write(prompts)
    return 0


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What is told to `optjax.generate`, as far as it needs no model.

    Raises:
      UsageError: options that do not go together.
    """
    given = vars(arguments)
    searching = {name: given[name] for name in _SEARCHING if given[name] is not None}
    sampling = not searching if arguments.do_sample is None else arguments.do_sample
    options: dict[str, Any] = {"do_sample": sampling} | searching
    if "early_stopping" in options:
        options["early_stopping"] = {"true": True, "false": False}.get(options["early_stopping"], "never")
    if sampling:
        options |= {name: SAMPLING[name] if given[name] is None else given[name] for name in SAMPLING}
        options |= {name: given[name] for name in ("min_p", "typical_p") if given[name] is not None}
    else:
        contrastive = "penalty_alpha" in searching
        idle = [name for name in _ONLY_SAMPLING if given[name] is not None and not (contrastive and name == "top_k")]
        idle = [f"--{name.replace('_', '-')}" for name in idle]
        how = f"--{next(iter(searching)).replace('_', '-')}" if searching else "--greedy"
        if idle:
            raise UsageError(f"{how} takes no notice of {', '.join(idle)}; leave one or the other out")
        if arguments.num_return_sequences > 1 and "num_beams" not in searching:
            raise UsageError(f"{how} has one answer: --num-return-sequences needs sampling or beams")
        if contrastive:
            options["top_k"] = CANDIDATES if arguments.top_k is None else arguments.top_k
    others = ("repetition_penalty", "no_repeat_ngram_size", "num_return_sequences", "min_new_tokens")
    options |= {name: given[name] for name in others if given[name] is not None}
    if not arguments.stop_at_eos:
        options["eos_token_id"] = []
    if arguments.stop:
        options["stop_strings"] = arguments.stop
    return options


def _unescaped(text: str) -> str:
    r"""A stop string as it is typed: a shell makes no line breaks of ``\n``."""
    if not text:
        raise argparse.ArgumentTypeError("should hold one character at least")
    known = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}
    return re.sub(r"\\([ntr\\])", lambda match: known[match[1]], text)


def describe_sampling(options: dict[str, Any], seed: int) -> str:
    """The options that made a text, in words: what it takes to make it again."""
    searching = [f"{name} {options[name]}" for name in (*_SEARCHING, "top_k") if name in options]
    if not options["do_sample"]:
        return ", ".join(searching) or "greedy"
    names = [name for name in (*SAMPLING, "min_p", "typical_p") if name in options]
    beams = [each for each in searching if not each.startswith("top_k")]
    return ", ".join([f"seed {seed}", *beams, *(f"{name} {options[name]:g}" for name in names)])

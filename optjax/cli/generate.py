"""``optjax generate``: continues prompts."""

from __future__ import annotations

import argparse
import re
from typing import Any

from optjax.cli.arguments import add_attention, add_model, check_offload, count, quantization, seed
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
  optjax generate --model facebook/opt-6.7b --assistant-model facebook/opt-125m "The sea"
  optjax generate --prompt-lookup-num-tokens 8 --file chapters.txt
  optjax generate --guidance-scale 1.5 --negative-prompt "It was a merry day" "It was"
  optjax generate --model facebook/opt-30b --mesh tensor=8 "The sea"
  optjax generate --stop "\\n\\n" $'Question: why is the sea salt?\\nAnswer:'
  optjax generate --model facebook/opt-6.7b --quantize int8 "The sea"
  optjax generate --model ./opt-66b --offload disk -n 20 "The sea"
  optjax generate --model facebook/opt-6.7b --quantize nf4 --adapter ./my-lora "The sea"
  echo "It was a dark night" | optjax generate
  optjax generate --file prompts.txt --jsonl > answers.jsonl

A prompt starts with the model's BOS token, which the tokenizer adds. With several
texts each is printed after a line "==> 1 of 3 <==" once all of its batch are done.
"""
TOKENS = 200
# Sharper than the model's own distribution, which rambles; transformers' default for top_k.
SAMPLING: dict[str, float | int] = {"temperature": 0.8, "top_k": 50, "top_p": 0.95}
_MORE_SAMPLING = ("min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
_ONLY_SAMPLING = (*SAMPLING, *_MORE_SAMPLING, "seed")
_SEARCHING = ("num_beams", "length_penalty", "early_stopping", "num_beam_groups", "diversity_penalty", "penalty_alpha")
_GUESSING = ("num_assistant_tokens", "prompt_lookup_num_tokens", "max_matching_ngram_size")
_OTHERS = (
    "repetition_penalty",
    "no_repeat_ngram_size",
    "encoder_repetition_penalty",
    "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty",
    "min_new_tokens",
    "num_return_sequences",
    "guidance_scale",
    "cache_dtype",
    "prefill_chunk_size",
    "attn_implementation",
    *_GUESSING,
)
# Of contrastive search, as its authors have it.
CANDIDATES = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    text = "the text to continue, in quotes; by default standard input, if piped"
    add("prompt", nargs="*", metavar="PROMPT", help=text)
    add("-f", "--file", metavar="FILE", help="a file of prompts, one a line; - for standard input")
    add_model(parser.add_argument_group("model"))
    _add_length(parser.add_argument_group("length"))
    _add_choosing(parser.add_argument_group("choosing tokens", "Names and meanings are those of transformers."))
    _add_searching(parser.add_argument_group("searching", "Looks further than the next token, and draws nothing."))
    text = "What is guessed is checked in one pass of the model: the same texts, in fewer passes."
    _add_guessing(parser.add_argument_group("guessing ahead", text))
    _add_guidance(parser.add_argument_group("guidance", "Away from what would follow another text."))
    _add_memory(parser.add_argument_group("memory"))
    _add_output(parser.add_argument_group("output"))


def _add_length(group: Any) -> None:
    add = group.add_argument
    text = f"most tokens to add (default: {TOKENS}, or what the model has room for)"
    add("-n", "--max-new-tokens", type=count, metavar="N", help=text)
    add("--min-new-tokens", type=int, default=0, metavar="N", help="no end before this many")
    text = "after START tokens the end becomes more probable, the faster the more FACTOR is above 1"
    add("--exponential-decay-length-penalty", type=float, nargs=2, metavar=("START", "FACTOR"), help=text)
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
    add("--epsilon-cutoff", type=float, metavar="P", help="leave out what is less probable than P, such as 0.0005")
    text = "the same, but leave out less where many tokens are about as probable (eta sampling)"
    add("--eta-cutoff", type=float, metavar="P", help=text)
    add("--repetition-penalty", type=float, metavar="X", help="above 1: less of what was said already")
    add("--no-repeat-ngram-size", type=int, metavar="N", help="no N tokens in a row come twice")
    add("--encoder-repetition-penalty", type=float, metavar="X", help="above 1: more of what the prompt says")
    add("--encoder-no-repeat-ngram-size", type=int, metavar="N", help="no N tokens in a row of the prompt come again")
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


def _add_guessing(group: Any) -> None:
    add = group.add_argument
    text = "a smaller model with the same tokenizer guesses (speculative decoding): a folder, a file, or a hub id"
    add("--assistant-model", metavar="SOURCE", help=text)
    add("--num-assistant-tokens", type=count, metavar="N", help="tokens that it guesses at a time (default: 5)")
    text = "guess N tokens by what followed the last words before, for texts that repeat parts of their prompts"
    add("--prompt-lookup-num-tokens", type=count, metavar="N", help=text)
    text = "how many tokens back these words go at most (default: 2)"
    add("--max-matching-ngram-size", type=count, metavar="N", help=text)


def _add_guidance(group: Any) -> None:
    add = group.add_argument
    text = "how far away: 1 is not at all, 1.5 a usual value; takes twice the work"
    add("--guidance-scale", type=float, metavar="X", help=text)
    text = "the other text (default: the prompt's last token alone, so that the prompt is kept to more closely)"
    add("--negative-prompt", metavar="TEXT", help=text)


def _add_memory(group: Any) -> None:
    add = group.add_argument
    text = "of keys and values: int8 takes half of bfloat16's memory (default: that of the weights; float32 on a CPU)"
    add("--cache-dtype", choices=("float32", "bfloat16", "float16", "int8"), help=text)
    text = "read prompts N tokens at a time: less memory for long ones (default: at once)"
    add("--prefill-chunk-size", type=count, metavar="N", help=text)
    add_attention(add, "prompts", default=None)


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
    told.add_argument(
        "--stats",
        action="store_true",
        help="speed and kind of attention on standard error also where that is no terminal",
    )
    told.add_argument("-q", "--quiet", action="store_true", help="nothing on standard error but errors")


def run(arguments: argparse.Namespace) -> int:
    from optjax.cli.prompts import read_prompts

    options = _options(arguments)
    quantization(arguments)
    check_offload(arguments)
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
        options |= {name: given[name] for name in _MORE_SAMPLING if given[name] is not None}
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
    options |= {name: given[name] for name in _OTHERS if given[name] is not None}
    if arguments.exponential_decay_length_penalty is not None:
        start, factor = arguments.exponential_decay_length_penalty
        if not start.is_integer():  # as infinity is not
            raise UsageError(f"--exponential-decay-length-penalty begins after a whole number of tokens, not {start:g}")
        options["exponential_decay_length_penalty"] = int(start), factor
    _check_pairs(arguments)
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


def _check_pairs(arguments: argparse.Namespace) -> None:
    """Options that are of no use without another one.

    Raises:
      UsageError: such a one stands alone.
    """
    given = vars(arguments)
    for name, needed in (
        ("num_assistant_tokens", "assistant_model"),
        ("max_matching_ngram_size", "prompt_lookup_num_tokens"),
        ("negative_prompt", "guidance_scale"),
    ):
        if given[name] is not None and given[needed] is None:
            name, needed = (f"--{each.replace('_', '-')}" for each in (name, needed))
            raise UsageError(f"{name} is of no use without {needed}; give both or neither")


def describe_choosing(arguments: argparse.Namespace, options: dict[str, Any], seed: int) -> str:
    """The options that made a text, in words: what it takes to make it again."""
    searching = [f"{name} {options[name]}" for name in (*_SEARCHING, "top_k") if name in options]
    if options["do_sample"]:
        names = [name for name in (*SAMPLING, *_MORE_SAMPLING) if name in options]
        beams = [each for each in searching if not each.startswith("top_k")]
        words = [f"seed {seed}", *beams, *(f"{name} {options[name]:g}" for name in names)]
    else:
        words = searching or ["greedy"]
    if arguments.assistant_model is not None:
        words.append(f"assistant_model {arguments.assistant_model}")
    words += [f"{name} {options[name]:g}" for name in ("guidance_scale", *_GUESSING) if name in options]
    return ", ".join(words)

"""``optjax score``: how probable texts are."""

from __future__ import annotations

import argparse

from optjax.cli.arguments import add_attention, add_model, check_offload, count, quantization
from optjax.cli.terminal import UsageError

SUMMARY = "how probable texts are, token by token"
OPERANDS = "[TEXT [CONTINUATION …]]"
TEXT = """\
Prints how probable a model finds each token of a text after those before it, and
what it would rather have read there. With continuations, how probable each of
them is after the text. With --perplexity, one figure for a text of any length.
"""
EXAMPLES = """\
examples:
  optjax score "He put his hand in his pocket"
  optjax score --top-n 3 "He put his hand in his pocket"
  optjax score "The king sat upon his" " throne" " horse" " house"
  optjax score --file reviews.txt " good" " bad" --jsonl > scores.jsonl
  optjax score --file questions.jsonl --jsonl > scores.jsonl
  optjax score --perplexity --file novel.txt
  optjax score --perplexity --stride 256 --model facebook/opt-125m --file novel.txt

A line of a .jsonl file is {"text": …}, {"prompt": …, "continuation": …} or {"prompt":
…, "continuations": […]}. Give continuations with the space that begins a word; one at
the end of the text is read as theirs. Logarithms are natural.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    text = "a text to score, in quotes; by default standard input, if piped"
    add("texts", nargs="*", metavar="TEXT", help=text)
    text = "a file of texts, one a line, which all words then continue; or .jsonl; - for standard input"
    add("-f", "--file", metavar="FILE", help=text)
    group = parser.add_argument_group("model")
    add_model(group)
    add_attention(group.add_argument, "texts")
    _add_perplexity(parser.add_argument_group("perplexity"))
    _add_output(parser.add_argument_group("output"))


def _add_perplexity(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    text = "take the text, or the file, as a whole, and read it in windows: perplexity and bits per byte"
    add("--perplexity", action="store_true", help=text)
    text = "tokens of a window (default: what the model has room for)"
    add("--max-length", type=count, metavar="N", help=text)
    text = (
        "tokens that a window moves on (default: all but one): each token is predicted from at least "
        "--max-length less these before it; smaller is more exact, and slower"
    )
    add("--stride", type=count, metavar="N", help=text)


def _add_output(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--top-n", type=count, metavar="N", help="also the N most probable tokens in each one's place")
    text = (
        "a JSON object a line: prompt, text, logprob, perplexity, is_greedy, ids, tokens, token_logprobs, "
        "top_logprobs; one object with --perplexity"
    )
    add("--jsonl", action="store_true", help=text)
    add("--batch-size", type=count, default=8, metavar="N", help="texts computed at once (default: 8)")
    add("-q", "--quiet", action="store_true", help="nothing on standard error but errors")


def run(arguments: argparse.Namespace) -> int:
    quantization(arguments)
    check_offload(arguments)
    if not arguments.perplexity:
        idle = [f"--{name.replace('_', '-')}" for name in ("max_length", "stride") if vars(arguments)[name] is not None]
        if idle:
            raise UsageError(f"{' and '.join(idle)} is about the windows of --perplexity; give it as well")
        from optjax.cli.score_input import read_items

        items = read_items(arguments.texts, arguments.file, quiet=arguments.quiet)

        # From here on it takes jax.
        from optjax.cli.scoring import write_scores

        write_scores(arguments, items)
        return 0
    if arguments.top_n is not None:
        raise UsageError("--perplexity gives one figure, and no alternatives: leave --top-n out")
    from optjax.cli.score_input import read_document

    document = read_document(arguments.texts, arguments.file, quiet=arguments.quiet)

    from optjax.cli.perplexity import write_perplexity

    write_perplexity(arguments, document)
    return 0

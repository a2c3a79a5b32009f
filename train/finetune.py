"""Fine-tunes a language model on prompts and their completions, or on texts.

  python -m optjax.train.finetune --model facebook/opt-125m --data pairs.jsonl --run runs/first

A row has a `prompt` and a `completion`, or a `text`. It is read as </s>, the prompt, the completion, </s>; the prompt
is not learned. What stands between the two (a blank, a line) is to be part of one of them. Examples share rows of
--max-length tokens without seeing each other (--no-packing: a row each). A tenth of the data is held out; the model
whose loss there is least ends in runs/first/model, which transformers loads as OPTForCausalLM, with its figures
(metrics.json) and some of what it writes (predictions.jsonl).

LoRA, on top of a model whose weights are kept in 4 bits:

  python -m optjax.train.finetune --model facebook/opt-1.3b --data pairs.jsonl --run runs/second --lora-r 16 \\
    --quantize nf4 --dtype bfloat16

leaves the adapters in runs/second/adapter too, as PEFT reads them. The same command goes on where a run was stopped. A
finished model completes other prompts:

  python -m optjax.train.finetune --model runs/first/model --predict prompts.jsonl --predictions said.jsonl
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from optjax import OPTConfig, Params, Tokenizer

from .flags import step_options
from .tasks import flags
from .tasks.causal import TOO_LONG, Example, Fields, collate, encode_examples, packed_rows
from .tasks.language import beginnings, evaluate, write
from .tasks.lengths import max_length
from .tasks.source import load_config, load_tokenizer, load_weights, pad_id
from .tasks.split import hold_out
from .tasks.table import Row, read_rows, write_rows
from .tasks.training import Task, figures, first_process, say, script, train, write_json
from .tasks.watch import Watch, bar, nobody

HEAD = "causal_lm"
SAMPLES, PREDICTIONS = 3, 32


def _parser() -> argparse.ArgumentParser:
    parser = flags.make_parser("finetune", __doc__)
    group = flags.add_model(parser, ".jsonl, .json, or .csv and .tsv with a header")
    add = group.add_argument
    for name in ("prompt", "completion", "text"):
        add(f"--{name}-field", default=name, metavar="NAME", help=f"({name})")
    add("--learn-prompt", action=argparse.BooleanOptionalAction, default=False, help="learn the prompts too")
    text = "examples share rows of --max-length tokens, or have a row each (packing)"
    add("--packing", action=argparse.BooleanOptionalAction, default=True, help=text)
    text = "of a longer example: an error; without the beginning of its prompt, then its end (cut); several of a text"
    flags.add_lengths(group, TOO_LONG, f"{text} (split); left out (drop)")
    flags.add_prediction(parser, "prompts to complete; where they have completions too, those are scored")
    group = parser.add_argument_group("texts that it writes: samples on the way, and for --predict")
    group.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="(64)")
    group.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0: the likeliest tokens (0)")
    group.add_argument("--top-p", type=float, default=1.0, metavar="X", help="with a temperature (1)")
    flags.add_training(parser)
    flags.add_log(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    def body(args: argparse.Namespace) -> None:
        config = load_config(args)
        tokenizer = load_tokenizer(args, config)
        reader = _Reader(args, config, tokenizer)
        params = _train(args, config, reader) if args.data else load_weights(args, config, HEAD, args.quantize)
        if params is not None and args.predict:
            _predict(args, params, reader)

    return script(_parser(), argv, body)


@dataclasses.dataclass(frozen=True)
class _Reader:
    """How rows become examples, and these batches."""

    args: argparse.Namespace
    config: OPTConfig
    tokenizer: Tokenizer

    @property
    def longest(self) -> int:
        return max_length(self.config, self.args.max_length)

    @property
    def fields(self) -> Fields:
        return Fields(self.args.prompt_field, self.args.completion_field, self.args.text_field)

    @property
    def collate(self):
        fill = pad_id(self.config, self.tokenizer)
        return partial(collate, pad_id=fill, longest=self.longest)

    @property
    def evaluation_batch(self) -> int:
        return self.args.eval_batch_size or self.args.batch_size

    def examples(self, rows: Sequence[Row]) -> list[Example]:
        return encode_examples(rows, self.tokenizer, self.fields, self.longest, self.args.too_long)

    def arrays(self, examples: Sequence[Example]) -> list[dict[str, np.ndarray]]:
        learns = self.args.learn_prompt
        if self.args.packing:
            return packed_rows(examples, self.longest, pad_id(self.config, self.tokenizer), learns)
        return [example.arrays(learns) for example in examples]

    def figures(self, params: Params, arrays: Sequence[dict[str, Any]]) -> dict[str, float]:
        options = dataclasses.replace(step_options(self.args), micro_batches=1)
        return evaluate(params, arrays, self.collate, self.evaluation_batch, options)

    def write(self, params: Params, prompts: Sequence[np.ndarray], batch_size: int, watch: Watch = nobody) -> list[str]:
        return write(
            params,
            self.tokenizer,
            prompts,
            batch_size=min(batch_size, len(prompts)),
            max_new_tokens=self.args.max_new_tokens,
            temperature=self.args.temperature,
            top_p=self.args.top_p,
            seed=self.args.seed,
            watch=watch,
        )


def _train(args: argparse.Namespace, config: OPTConfig, reader: _Reader) -> Params | None:
    """The best model; None where ``--stop-at`` comes before its end."""
    rows = read_rows(args.data)
    if args.validation is None:
        rows, held = hold_out(rows, args.validation_fraction, args.seed)
    else:
        held = read_rows(args.validation)
    examples, kept = reader.examples(rows), reader.examples(held) if held else []
    arrays, validation = reader.arrays(examples), reader.arrays(kept) if held else []
    room = reader.longest - args.max_new_tokens
    shown = [ids for ids in beginnings(kept) if len(ids) <= room][:PREDICTIONS]

    def sample(params: Params) -> list[str]:
        few = shown[:SAMPLES]
        written = reader.write(params, few, SAMPLES)
        return [reader.tokenizer.decode(ids) + text for ids, text in zip(few, written, strict=True)]

    task = Task(
        name="finetune",
        config=config,
        tokenizer=reader.tokenizer,
        head=HEAD,
        examples=arrays,
        collate=reader.collate,
        longest=reader.longest,
        evaluate=(lambda params: reader.figures(params, validation)) if held else None,
        better=("loss", "min"),
        sample=sample if shown else None,
        about={"packing": args.packing, "learn_prompt": args.learn_prompt, "max_length": reader.longest},
    )
    side = f"in {len(arrays)} rows of {reader.longest} tokens" if args.packing else "in a row each"
    say(args, f"{len(examples)} examples to train on, {side}; {len(kept)} held out")
    params = train(args, task)
    if params is None or not held:
        return params
    found = reader.figures(params, validation)
    say(args, f"on the examples held out: {figures(found)}")
    write_json(args.run / "metrics.json", found)
    if shown:
        pairs = zip(shown, reader.write(params, shown, reader.evaluation_batch), strict=True)
        records = [{"prompt": reader.tokenizer.decode(ids), "prediction": text} for ids, text in pairs]
        if first_process():
            write_rows(args.run / "predictions.jsonl", records)
    return params


def _predict(args: argparse.Namespace, params: Params, reader: _Reader) -> None:
    path = flags.predictions_path(args)
    rows = read_rows(args.predict, [args.prompt_field])
    prompts = [np.array(reader.tokenizer.encode(row.text(args.prompt_field)), np.int32) for row in rows]
    with bar("writing", len(prompts), args.quiet) as watch:
        written = reader.write(params, prompts, reader.evaluation_batch, watch)
    records = [dict(row.fields) | {"prediction": text} for row, text in zip(rows, written, strict=True)]
    if first_process():
        write_rows(path, records)
    said = ""
    if all(row.fields.get(args.completion_field) for row in rows):
        said = f"; {figures(reader.figures(params, reader.arrays(reader.examples(rows))))}"
    say(args, f"wrote {path}, {len(rows)} rows{said}")


if __name__ == "__main__":
    sys.exit(main())

"""Trains opt-mini's tokenizer: byte-level BPE in OPT's conventions, on the training split alone.

  python -m optjax.train.opt_mini.tokenizer --documents build/opt-mini/train.jsonl --out build/opt-mini/tokenizer

OPT's conventions: ids <s> 0, <pad> 1, </s> 2, <unk> 3; bos, eos and unk are all </s>; one </s> before a text, none
after it. Written are tokenizer.json, and vocab.json with merges.txt for those who read the older pair.
"""

import argparse
import json
from pathlib import Path

from .corpus import read_documents

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]


def train_tokenizer(texts: list[str], vocab_size: int):
    """A `tokenizers.Tokenizer` of exactly `vocab_size` entries.

    Raises:
      ValueError: if the texts are too few to find that many merges.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),  # every byte, so that nothing is unknown
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"these texts give {tokenizer.get_vocab_size()} entries, not {vocab_size}; ask for fewer")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", pair="</s> $A $B", special_tokens=[("</s>", SPECIAL.index("</s>"))]
    )
    return tokenizer


def save_tokenizer(tokenizer, folder: Path, max_length: int) -> None:
    """Writes the five files transformers and optjax read."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))  # vocab.json, merges.txt
    names = {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "</s>"}
    settings = {
        "tokenizer_class": "GPT2Tokenizer",
        "add_bos_token": True,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "model_max_length": max_length,
        **names,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(names, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m optjax.train.opt_mini.tokenizer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--documents", type=Path, required=True, help="train.jsonl of the corpus program")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument(
        "--vocab-size", type=int, default=8192, help="entries, the four special ones included (%(default)s)"
    )
    parser.add_argument(
        "--max-length", type=int, default=512, help="longest text of the model, in tokens (%(default)s)"
    )
    args = parser.parse_args()
    if not args.documents.is_file():
        parser.error(f"{args.documents} is not there; make it with python -m optjax.train.opt_mini.corpus")
    texts = read_documents(args.documents)
    tokenizer = train_tokenizer(texts, args.vocab_size)
    save_tokenizer(tokenizer, args.out, args.max_length)
    sample = texts[:: max(1, len(texts) // 200)]
    count = sum(len(encoding.ids) for encoding in tokenizer.encode_batch(sample))
    ratio = sum(len(text.encode()) for text in sample) / count
    print(f"{args.out}: {tokenizer.get_vocab_size()} entries, {ratio:.2f} bytes per token")


if __name__ == "__main__":
    main()

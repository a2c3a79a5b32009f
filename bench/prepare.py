"""Writes one random OPT model in every format that the compared programs read. Run as a process of its own.

`python -m bench.prepare SIZE FOLDER FORMAT...` writes FOLDER/hf always, and FOLDER/flax, FOLDER/ctranslate2 and
FOLDER/assistant (a small model of the same vocabulary) where they are named. All hold the same weights, so that the
programs can be held to the same answers.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from bench.arguments import Parser

SIZES = {
    "tiny": dict(
        hidden_size=64, word_embed_proj_dim=32, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=512
    ),
    "125m": dict(hidden_size=768, ffn_dim=3072, num_hidden_layers=12, num_attention_heads=12),
    "350m": dict(
        hidden_size=1024,
        word_embed_proj_dim=512,
        ffn_dim=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        do_layer_norm_before=False,
    ),
    "1.3b": dict(hidden_size=2048, ffn_dim=8192, num_hidden_layers=24, num_attention_heads=32),
    "2.7b": dict(hidden_size=2560, ffn_dim=10240, num_hidden_layers=32, num_attention_heads=32),
}
ASSISTANT = dict(hidden_size=64, ffn_dim=256, num_hidden_layers=2, num_attention_heads=4)
FORMATS = ("flax", "ctranslate2", "assistant")


def main() -> None:
    parser = Parser("prepare", __doc__)
    parser.add_argument("size", choices=list(SIZES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("formats", nargs="*", metavar="FORMAT")
    parser.add_argument("--dtype", default="float32", help="of the weights in FOLDER/hf")
    parser.add_argument("--repeats", action="store_true", help="a model that says one token over and over")
    args = parser.parse_args()
    if unknown := set(args.formats) - set(FORMATS):
        parser.error(f"formats are {', '.join(FORMATS)}, not {', '.join(unknown)}")
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"

    write_all(args.folder, SIZES[args.size], args.formats, args.dtype, args.repeats)
    if "ctranslate2" in args.formats:
        from ctranslate2.converters import TransformersConverter  # pyright: ignore[reportMissingImports]

        write_tokenizer(args.folder / "hf", SIZES[args.size].get("vocab_size", 50272))
        TransformersConverter(str(args.folder / "hf")).convert(str(args.folder / "ctranslate2"))
    if "assistant" in args.formats:
        vocab = {"vocab_size": SIZES[args.size].get("vocab_size", 50272)}
        write(args.folder / "assistant", ASSISTANT | vocab, args.dtype, args.repeats)


def write_all(
    folder: str | Path, size: dict[str, Any], formats: list[str], dtype: str = "float32", repeats: bool = False
) -> None:
    """FOLDER/hf, and FOLDER/flax if it is named."""
    write(Path(folder, "hf"), size, dtype, repeats)
    if "flax" in formats:
        from transformers import FlaxOPTForCausalLM

        flax: Any = FlaxOPTForCausalLM.from_pretrained(str(Path(folder, "hf")), from_pt=True)
        flax.save_pretrained(Path(folder, "flax"))


def write(folder: Path, size: dict[str, Any], dtype: str, repeats: bool) -> None:
    import torch
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    # Nothing ends a text early: there is no end-of-sequence token.
    config = OPTConfig(**{"word_embed_proj_dim": size["hidden_size"], **size, "eos_token_id": None})  # pyright: ignore
    model = OPTForCausalLM(config).eval()
    with torch.no_grad():
        if repeats:
            _repeat(model.model.decoder)
        else:
            # Positions far apart from each other: untrained, the model might else repeat one token for ever.
            model.model.decoder.embed_positions.weight.normal_(0, 0.2)
    model.to(getattr(torch, dtype)).save_pretrained(folder)


def _repeat(decoder: Any) -> None:
    """What stands for a token passes through the layers nearly as it is, and the tied head finds the same token."""
    decoder.embed_positions.weight.zero_()
    for layer in decoder.layers:
        for linear in (layer.self_attn.out_proj, layer.fc2):
            linear.weight.mul_(0.01)
    if decoder.project_in is not None:
        decoder.project_out.weight.copy_(decoder.project_in.weight.T)


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """CTranslate2 speaks of tokens, not of ids: token i is called "i"."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({str(i): i for i in range(vocab_size)}, unk_token="3"))
    names = dict(bos_token="2", eos_token="2", unk_token="3", pad_token="1")
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)


if __name__ == "__main__":
    main()

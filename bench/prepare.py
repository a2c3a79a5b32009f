"""Writes one random OPT model in every format that the compared programs read. Run as a process of its own.

`python -m bench.prepare SIZE FOLDER FORMAT...` writes FOLDER/hf always, and FOLDER/flax and FOLDER/ctranslate2 where
they are named. All hold the same weights, so that the programs can be held to the same answers.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

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
}


def main() -> None:
    size, folder, *formats = sys.argv[1:]
    root = Path(folder)
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"

    import torch
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    # Nothing ends a text early: there is no end-of-sequence token.
    config = OPTConfig(**{"word_embed_proj_dim": SIZES[size]["hidden_size"], **SIZES[size], "eos_token_id": None})  # pyright: ignore
    model = OPTForCausalLM(config).eval()
    with torch.no_grad():
        # Positions far apart from each other: untrained, the model would else repeat one token for ever.
        model.model.decoder.embed_positions.weight.normal_(0, 0.2)
    model.save_pretrained(root / "hf")
    if "flax" in formats:
        from transformers import FlaxOPTForCausalLM

        flax: Any = FlaxOPTForCausalLM.from_pretrained(str(root / "hf"), from_pt=True)
        flax.save_pretrained(root / "flax")
    if "ctranslate2" in formats:
        from ctranslate2.converters import TransformersConverter  # pyright: ignore[reportMissingImports]

        write_tokenizer(root / "hf", config.vocab_size)
        TransformersConverter(str(root / "hf")).convert(str(root / "ctranslate2"))


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """CTranslate2 speaks of tokens, not of ids: token i is called "i"."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({str(i): i for i in range(vocab_size)}, unk_token="3"))
    names = dict(bos_token="2", eos_token="2", unk_token="3", pad_token="1")
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)


if __name__ == "__main__":
    main()

"""Writes search_*.npz: what transformers answers by its search strategies.

Group beam search and contrastive search have left the package; 4.49 has them still. Beam search is that of 4.57, whose
rules are others. So twice, in environments that need nothing of ours:

    pip install "transformers==4.49.0" torch    # and again with 4.57.6
    python tests/golden/make_search.py

The model and the calls are made of seeds, in tests/search_cases.py; the files hold the answers alone.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import transformers

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import search_cases  # noqa: E402


def main() -> None:
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    has_all = hasattr(transformers.GenerationMixin, "_group_beam_search")
    model, twin = make_model(), make_model(noise=2e-6)
    for strategy in ("group", "contrastive") if has_all else ("beam",):
        answers = [search_cases.sure_rows(model, twin, call) for call in search_cases.calls(strategy)]
        tokens, scores, sure = (np.concatenate(each) for each in zip(*answers, strict=True))
        path = HERE / f"search_{strategy}.npz"
        np.savez_compressed(path, tokens=tokens.astype(np.uint8), scores=scores.astype(np.float32), sure=sure)
        print(f"{path.name}: {path.stat().st_size} bytes, {len(tokens)} rows, {sure.mean():.1%} sure")


def make_model(noise: float = 0.0):
    config = transformers.OPTConfig(**search_cases.FIELDS, attn_implementation="eager")
    model = transformers.OPTForCausalLM(config).eval()
    model.get_input_embeddings().padding_idx = None
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.from_numpy(search_cases.weight(name, tuple(weight.shape), noise)))
    model.generation_config = transformers.GenerationConfig(pad_token_id=search_cases.PAD)
    return model


if __name__ == "__main__":
    main()

"""Makes the TensorFlow checkpoints in this folder and records what their weights are.

Run once, in an environment of its own:

    python -m pip install "tensorflow-cpu==2.19.*" "tf-keras==2.19.*" "transformers==4.57.*" h5py
    python tests/checkpoint_golden/make_tf_h5.py

The folders hold tf_model.h5 and config.json as TFOPT's save_pretrained writes them. weights.npz holds each variable by
the name TFOPT gives it, prefixed with the folder's name.
"""

import os
import shutil
from pathlib import Path

os.environ["TF_USE_LEGACY_KERAS"] = "1"

import numpy as np
import tensorflow as tf
from transformers import OPTConfig, TFOPTForCausalLM

HERE = Path(__file__).parent
SIZES = dict(vocab_size=19, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, ffn_dim=12)
SIZES |= dict(max_position_embeddings=7)
POST_NORM = dict(do_layer_norm_before=False, word_embed_proj_dim=6)

CHECKPOINTS = {"one_file": ({}, "5GB"), "sharded_post_norm": (POST_NORM, "1KB")}


def main() -> None:
    rng = np.random.default_rng(0)
    recorded = {}
    for name, (changes, shard) in CHECKPOINTS.items():
        model = TFOPTForCausalLM(OPTConfig(**SIZES, **changes))
        model(tf.constant([[2, 3, 4]]))
        for variable in model.weights:
            variable.assign(rng.standard_normal(variable.shape).astype(np.float32))
        shutil.rmtree(HERE / name, ignore_errors=True)
        model.save_pretrained(HERE / name, max_shard_size=shard)
        (HERE / name / "generation_config.json").unlink(missing_ok=True)
        recorded |= {f"{name}:{variable.name}": variable.numpy() for variable in model.weights}
    np.savez_compressed(HERE / "weights.npz", **recorded)


if __name__ == "__main__":
    main()

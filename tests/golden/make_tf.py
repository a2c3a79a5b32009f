"""Writes tf_*.npz: what transformers' TFOPT answers, which honours head_mask where the torch model ignores it.

Needs TensorFlow, which the tests do not:

    pip install tensorflow-cpu==2.19.1 tf-keras==2.19.0 "transformers>=4.57,<5"
    python tests/golden/make_tf.py

Each file holds a small model's config, its weights by Hugging Face's names, one call and its answers.
"""

import json
from pathlib import Path

import numpy as np
import tensorflow as tf
from transformers import OPTConfig, TFOPTForCausalLM

SIZES = dict(
    vocab_size=31, hidden_size=12, num_hidden_layers=2, num_attention_heads=3, ffn_dim=20, max_position_embeddings=16
)
CONFIGS = {
    "pre_norm": SIZES | dict(activation_function="gelu"),
    "post_norm": SIZES | dict(do_layer_norm_before=False, word_embed_proj_dim=8),
}


def main() -> None:
    for seed, (name, fields) in enumerate(CONFIGS.items()):
        rng = np.random.default_rng(seed)
        model = TFOPTForCausalLM(OPTConfig(**fields))
        model.build_in_name_scope()
        state = {}
        for weight in model.weights:
            path = weight.name.removesuffix(":0").split("/")
            path = path[path.index("decoder") :]
            value = rng.standard_normal(weight.shape).astype(np.float32)
            if path[-1] in ("gamma", "beta", "bias"):
                value = 0.3 * value + (path[-1] == "gamma")
            elif path[-1] == "kernel":
                value /= weight.shape[0] ** 0.5
            weight.assign(value)
            leaf = "bias" if path[-1] in ("beta", "bias") else "weight"
            state[".".join(["model", *path[:-1], leaf])] = value.T if path[-1] == "kernel" else value

        ids = rng.integers(3, fields["vocab_size"], size=(3, 7))
        mask = np.ones_like(ids)
        mask[0, :3] = 0
        mask[1, 5:] = 0
        head_mask = np.array([[1.0, 0.0, 0.5], [0.0, 1.0, 1.0]], np.float32)
        answers = {}
        for which, heads in [("", None), ("_head_mask", tf.constant(head_mask))]:
            out = model(
                tf.constant(ids),
                attention_mask=tf.constant(mask),
                head_mask=heads,
                output_attentions=True,
                output_hidden_states=True,
            )
            answers["logits" + which] = out.logits.numpy()
            answers["attentions" + which] = np.stack(out.attentions)
            answers["last_hidden_state" + which] = out.hidden_states[-1].numpy()
        path = Path(__file__).parent / f"tf_{name}.npz"
        np.savez_compressed(
            path,
            config=json.dumps(fields),
            ids=ids,
            mask=mask,
            head_mask=head_mask,
            **answers,
            **{f"weights/{key}": value for key, value in state.items()},
        )
        print(path.name, path.stat().st_size, "bytes,", len(state), "weights")


if __name__ == "__main__":
    main()

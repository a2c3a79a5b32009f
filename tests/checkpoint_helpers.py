"""Tiny checkpoints made by torch and transformers, and comparisons bit for bit."""

from __future__ import annotations

import contextlib
import json
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from hf_models import torch_model

from optjax import OPTConfig, Params
from optjax.params import build_params

PRE_NORM = OPTConfig(
    vocab_size=61,
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    ffn_dim=40,
    max_position_embeddings=14,
)
# 350m's peculiarities: norms after the residual, no last norm, embeddings narrower than the model.
POST_NORM = PRE_NORM.replace(do_layer_norm_before=False, word_embed_proj_dim=12)
CONFIGS = {"pre_norm": PRE_NORM, "post_norm": POST_NORM}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}


def make_state(
    config: OPTConfig, head: str | None = "causal_lm", seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """Random weights under transformers' names without any prefix: ``layers.0.fc1.weight``, ``score.weight``."""
    model = torch_model(config, head, seed)
    state = {name.split("decoder.")[-1]: w.detach().to(dtype) for name, w in model.named_parameters()}
    if not config.layer_norm_elementwise_affine:
        state = {name: w for name, w in state.items() if "norm" not in name}
    return state


def make_params(
    config: OPTConfig, head: str | None = "causal_lm", dtype: str = "float32", seed: int = 0, stacked: bool = False
) -> Params:
    """Params with the weights of `make_state`; nothing is compiled."""
    state = {name: w.numpy().astype(jnp.dtype(dtype)) for name, w in make_state(config, head, seed).items()}

    def leaf(weight: Any, layer: int | None) -> jax.Array:
        if weight.per_layer and stacked:
            paths = [weight.path.replace("layers.", f"layers.{i}.", 1) for i in range(config.num_hidden_layers)]
            return jnp.asarray(np.stack([state[path] for path in paths]))
        return jnp.asarray(
            state[weight.path if layer is None else weight.path.replace("layers.", f"layers.{layer}.", 1)]
        )

    return build_params(config, head, leaf, stacked=stacked)


def write_config(config: OPTConfig, folder: Path, head: str | None = "causal_lm", **more: Any) -> Path:
    names = {
        "causal_lm": "OPTForCausalLM",
        None: "OPTModel",
        "sequence_classification": "OPTForSequenceClassification",
        "question_answering": "OPTForQuestionAnswering",
    }
    folder.mkdir(parents=True, exist_ok=True)
    fields = config.to_dict() | {"architectures": [names[head]]} | more
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def prefixed(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The names of a file: the decoder's weights get the prefix, the heads none."""
    outside = ("lm_head.", "score.", "qa_outputs.")
    return {(name if name.startswith(outside) else prefix + name): tensor for name, tensor in state.items()}


def flat(params: Params) -> dict[str, np.ndarray]:
    """Every leaf under its dotted path, stacked layers taken apart."""
    out: dict[str, np.ndarray] = {}

    def walk(node: Any, path: str) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                walk(value, f"{path}.{key}" if path else key)
        elif isinstance(node, list):
            for i, value in enumerate(node):
                walk(value, f"{path}.{i}")
        else:
            out[path] = np.asarray(node)

    walk({k: v for k, v in params.weights.items() if k != "layers"}, "")
    for i in range(params.config.num_hidden_layers):
        walk(params.layer(i), f"layers.{i}")
    return out


def bits(array: Any) -> np.ndarray:
    """The bits of an array, torch's or ours, as unsigned numbers."""
    if isinstance(array, torch.Tensor):
        array = array.detach().contiguous()
        array = array.view(torch.int16).numpy() if array.dtype == torch.bfloat16 else array.numpy()
    array = np.ascontiguousarray(array)
    return array.view(f"u{array.dtype.itemsize}")


def assert_same(params: Params, state: dict[str, Any]) -> None:
    """The params hold exactly the tensors of ``state``: same names, shapes, dtypes and bits."""
    ours = flat(params)
    assert sorted(ours) == sorted(state)
    for name, tensor in state.items():
        assert str(ours[name].dtype) == str(tensor.dtype).removeprefix("torch."), name
        assert ours[name].shape == tuple(tensor.shape), name
        np.testing.assert_array_equal(bits(ours[name]), bits(tensor), err_msg=name)


def assert_equal_params(a: Params, b: Params) -> None:
    """Two params are the same, layout included."""
    assert (a.config, a.head) == (b.config, b.head)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert_same(a, flat(b))


@contextlib.contextmanager
def no_hang_and_no_flood(seconds: int = 60, kilobytes: int = 500_000) -> Iterator[None]:
    """Fails where reading broken files takes a minute of the processor, or half a gigabyte."""

    def too_long(*_: Any) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGPROF, too_long)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < kilobytes


def load_with_transformers(folder: Path, head: str | None = "causal_lm") -> Any:
    """transformers' torch model of a folder, in the folder's dtype; fails where any weight is missing or left over."""
    classes = {
        None: transformers.OPTModel,
        "causal_lm": transformers.OPTForCausalLM,
        "sequence_classification": transformers.OPTForSequenceClassification,
        "question_answering": transformers.OPTForQuestionAnswering,
    }
    model, report = classes[head].from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert {name: found for name, found in report.items() if found} == {}
    return model

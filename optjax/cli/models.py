"""The model that a command runs, loaded as its arguments say."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import jax

import optjax
from optjax.cli.arguments import MODEL, quantization
from optjax.cli.compilation_cache import keep_compiled_programs
from optjax.placed import AMPERE, compute_capability


@dataclass(frozen=True)
class Model:
    """A model and its tokenizer; ``assistant`` is a smaller one that guesses for it, if asked for."""

    params: optjax.Params
    tokenizer: optjax.Tokenizer
    title: str
    assistant: optjax.Params | None = None


def load(arguments: argparse.Namespace) -> Model:
    """What `add_model` asks for, with the language model's head; and ``--assistant-model``, where a command has it.

    Raises:
      ValueError, FileNotFoundError: as `optjax.load_params`, `optjax.Tokenizer.load` and `make_mesh`.
    """
    if arguments.compile_cache:
        keep_compiled_programs()
    dtype = arguments.dtype or default_dtype()
    # The tokenizer first: it is soon there, and where it is not, nobody waits for the weights.
    tokenizer = optjax.Tokenizer.load(arguments.tokenizer or arguments.model, revision=arguments.revision)
    mesh = None
    if arguments.mesh is not None:
        from optjax.sharding import make_mesh

        mesh = make_mesh(arguments.mesh)
    progress = False if arguments.quiet else None
    params = optjax.load_params(
        arguments.model,
        dtype,
        "causal_lm",
        mesh,
        revision=arguments.revision,
        progress=progress,
        quantization=quantization(arguments),
        offload=arguments.offload,
    )
    if arguments.adapter is not None:
        params = optjax.with_adapters(params, optjax.load_adapters(arguments.adapter))
    source = getattr(arguments, "assistant_model", None)
    assistant = None
    if source is not None:
        assistant = optjax.load_params(source, dtype, "causal_lm", mesh, progress=progress)
    return Model(params, tokenizer, _title(arguments, params, dtype), assistant)


def default_dtype() -> str:
    """What the devices here compute fast in."""
    if jax.default_backend() == "cpu":
        return "float32"
    # On an older GPU XLA would write a float32 copy of every bfloat16 weight at each step.
    return "float16" if (compute_capability(None) or AMPERE) < AMPERE else "bfloat16"


def _title(arguments: argparse.Namespace, params: optjax.Params, dtype: str) -> str:
    size = f"{optjax.count_params(params.config) / 1e6:,.1f}M parameters, {dtype} on {jax.default_backend()}"
    if params.quantization is not None:
        size = size.replace(f", {dtype}", f", {params.quantization.kind} for {dtype}")
    if arguments.adapter is not None:
        size += f", adapter {arguments.adapter}"
    if arguments.mesh is not None:
        size += f", {arguments.mesh}"
    if arguments.offload is not None:
        size += ", layers from the host's memory" if arguments.offload == "host" else ", layers from disk"
    other = "; it ships with optjax, --model takes others" if arguments.model == MODEL else ""
    return f"{arguments.model}: {size}{other}"

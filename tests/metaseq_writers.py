"""Writes checkpoints as metaseq and fairscale do, in torch, after their documented layout."""

from __future__ import annotations

import argparse
import collections
import math
from pathlib import Path
from typing import Any

import torch

from optjax import OPTConfig

State = dict[str, torch.Tensor]


def to_metaseq(state: State, fused: bool) -> State:
    """metaseq's names; with ``fused``, one qkv_proj whose rows are those of k, then v, then q."""
    out: State = {}
    renames = {"final_layer_norm.": "layer_norm.", "project_in.": "project_in_dim.", "project_out.": "project_out_dim."}
    for name, tensor in state.items():
        if name == "lm_head.weight":
            out["decoder.output_projection.weight"] = tensor
            continue
        for old, new in renames.items():
            name = new + name.removeprefix(old) if name.startswith(old) else name
        out[f"decoder.{name}"] = tensor
    if fused:
        for name in [n for n in out if ".k_proj." in n]:
            parts = [out.pop(name.replace(".k_proj.", f".{letter}_proj.")) for letter in "kvq"]
            out[name.replace(".k_proj.", ".qkv_proj.")] = torch.cat(parts)
    out["decoder.version"] = torch.tensor([3.0])
    return out


def split_parts(model: State, count: int) -> list[State]:
    """Megatron's model-parallel parts."""
    parts: list[State] = [{} for _ in range(count)]
    for name, tensor in model.items():
        if "qkv_proj" in name:
            # Each part has its own slice of k, of v and of q.
            thirds = [third.chunk(count) for third in tensor.chunk(3)]
            pieces = [torch.cat([third[i] for third in thirds]) for i in range(count)]
        elif any(key in name for key in ("k_proj", "v_proj", "q_proj", "fc1", "embed_tokens", "output_projection")):
            pieces = list(tensor.chunk(count))
        elif name.endswith(("fc2.weight", "out_proj.weight")):
            pieces = list(tensor.chunk(count, dim=1))
        else:
            pieces = [tensor] * count
        assert len(pieces) == count
        for part, piece in zip(parts, pieces, strict=True):
            part[name] = piece.clone()
    return parts


def shard(model: State, count: int) -> tuple[list[State], list[dict[str, Any]]]:
    """fairscale's flat parameters, one of the root and one of every layer, in shards; and each shard's metadata."""
    groups: dict[str, list[str]] = collections.defaultdict(list)
    for name in model:
        if name != "decoder.version":
            layer = name.split(".")[2] if name.startswith("decoder.layers.") else None
            groups["" if layer is None else f"decoder.layers.{layer}"].append(name)
    shards: list[State] = [{"decoder.version": model["decoder.version"]} for _ in range(count)]
    metadata: list[dict[str, Any]] = [
        {"param_metadata": [], "buffer_names": ["decoder.version"], "world_size": count} for _ in range(count)
    ]
    for path, names in groups.items():
        prefix = f"{path}." if path else ""
        flat = torch.cat([model[name].reshape(-1) for name in names])
        size = math.ceil(flat.numel() / count)
        for i in range(count):
            piece = flat[i * size : (i + 1) * size]
            padding = size - piece.numel()
            shards[i][f"{prefix}flat_param_0"] = torch.nn.functional.pad(piece, [0, padding]).clone()
            layout = {
                "names": [name.removeprefix(prefix) for name in names],
                "shapes": [model[name].shape for name in names],
                "numels": [model[name].numel() for name in names],
                "padding": padding,
            }
            entry = {"fsdp_path": path, "params": {"flat_param_0": layout}, "no_broadcast_optim_state": False}
            metadata[i]["param_metadata"].append(entry | {"shared_param_info": []})
    return shards, metadata


def arguments(config: OPTConfig, style: str) -> dict[str, Any]:
    """What stands beside the weights: the model's arguments under ``cfg`` or ``args``, and bookkeeping."""
    model = dict(
        arch="transformer_lm_megatron",
        activation_fn=config.activation_function,
        dropout=config.dropout,
        attention_dropout=config.attention_dropout,
        decoder_layers=config.num_hidden_layers,
        decoder_embed_dim=config.hidden_size,
        decoder_ffn_embed_dim=config.ffn_dim,
        decoder_attention_heads=config.num_attention_heads,
        decoder_normalize_before=config.do_layer_norm_before,
        share_decoder_input_output_embed=config.tie_word_embeddings,
        max_target_positions=config.max_position_embeddings,
    )
    more = {
        "extra_state": {
            "metrics": collections.OrderedDict(a=[1, 2.5]),
            "path": Path("/x"),
            "train_iterator": {"epoch": 1},
        },
        "optimizer_history": [{"criterion_name": "CrossEntropyCriterion", "num_updates": 9}],
        "last_optimizer_state": {"state": {0: {"exp_avg": torch.ones(5), "step": 9}}},
        "task_state": {},
    }
    match style:
        case "cfg_dict":
            return more | {"cfg": {"_name": None, "model": model, "task": {"tokens_per_sample": 2048}}}
        case "cfg_namespace":
            return more | {"cfg": {"_name": None, "model": argparse.Namespace(**model)}}
        case "args":
            return more | {"cfg": None, "args": argparse.Namespace(**model)}
    return more


def write_metaseq(
    state: State,
    config: OPTConfig,
    folder: Path,
    *,
    parts: int = 1,
    shards: int = 1,
    fused: bool = True,
    style: str = "cfg_namespace",
) -> list[Path]:
    """A whole checkpoint; the files, in the order they were written."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for p, part in enumerate(split_parts(to_metaseq(state, fused), parts)):
        models, metadata = shard(part, shards) if shards > 1 else ([part], [{}])
        for s, model in enumerate(models):
            name = "reshard" + (f"-model_part-{p}" if parts > 1 else "") + (f"-shard{s}" if shards > 1 else "")
            content = {"model": collections.OrderedDict(model), **arguments(config, style)}
            if shards > 1:
                content["shard_metadata"] = metadata[s]
            paths.append(folder / f"{name}.pt")
            torch.save(content, paths[-1])
    return paths

"""metaseq's files: whole, in model-parallel parts, in FSDP shards, and both."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from checkpoint_helpers import CONFIGS, DTYPES, POST_NORM, PRE_NORM, assert_same, flat, make_state, write_config
from metaseq_writers import shard, split_parts, to_metaseq, write_metaseq

from optjax import OPTConfig, load_params
from optjax.checkpoints import CheckpointError

BIG = PRE_NORM.replace(vocab_size=64)  # metaseq pads the vocabulary, so that it divides.


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("shards", [1, 2, 3, 7])
@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_bit_for_bit(tmp_path, parts, shards, fused, dtype):
    state = make_state(BIG, dtype=DTYPES[dtype])
    paths = write_metaseq(state, BIG, tmp_path, parts=parts, shards=shards, fused=fused)
    assert len(paths) == parts * shards
    params = load_params(tmp_path)
    assert (params.head, params.config) == ("causal_lm", BIG)
    assert_same(params, state)
    assert_same(load_params(paths[-1]), state)


def test_more_shards_than_a_flat_parameter_needs(tmp_path):
    """Files are ordered by number, not by name, and a shard may be nothing but padding."""
    state = make_state(BIG)
    write_metaseq(state, BIG, tmp_path, parts=2, shards=37)
    assert_same(load_params(tmp_path), state)


@pytest.mark.parametrize("style", ["cfg_dict", "cfg_namespace", "args"])
@pytest.mark.parametrize(
    "config",
    [
        *CONFIGS.values(),
        PRE_NORM.replace(activation_function="gelu", dropout=0.25, attention_dropout=0.5),
        PRE_NORM.replace(tie_word_embeddings=False),
        PRE_NORM.replace(enable_bias=False),
        PRE_NORM.replace(layer_norm_elementwise_affine=False),
        PRE_NORM.replace(_remove_final_layer_norm=True),
    ],
    ids=["pre_norm", "post_norm", "gelu", "untied", "no_bias", "no_affine", "no_final_norm"],
)
def test_the_config_comes_from_the_arguments(tmp_path, style, config):
    state = make_state(config)
    write_metaseq(state, config, tmp_path, style=style, shards=2)
    params = load_params(tmp_path)
    assert params.config == config
    assert_same(params, state)


def test_a_config_json_comes_first(tmp_path):
    state = make_state(POST_NORM)
    write_metaseq(state, POST_NORM.replace(num_attention_heads=2), tmp_path)
    write_config(POST_NORM.replace(dropout=0.5), tmp_path)
    assert load_params(tmp_path).config == POST_NORM.replace(dropout=0.5)


def test_without_arguments(tmp_path):
    """Heads cannot be read off the shapes, unless the shapes are those of a published size."""
    state = make_state(PRE_NORM)
    write_metaseq(state, PRE_NORM, tmp_path, style="none")
    with pytest.raises(CheckpointError, match="number of attention heads of a model of 3 layers and width 24"):
        load_params(tmp_path)
    assert_same(load_params(tmp_path, config=PRE_NORM), state)

    config = OPTConfig.preset("opt-125m", vocab_size=8, max_position_embeddings=4, ffn_dim=8)
    state = {name: torch.zeros(w.shape, dtype=torch.float16) for name, w in meta_state(config).items()}
    write_metaseq(state, config, tmp_path / "125m", style="none")
    params = load_params(tmp_path / "125m")
    assert params.config == config and params.config.num_attention_heads == 12


def meta_state(config: OPTConfig) -> dict[str, torch.Tensor]:
    """Shapes only."""
    import transformers

    with torch.device("meta"):
        model = transformers.OPTModel(transformers.OPTConfig(**config.to_dict()))
    return {name.removeprefix("decoder."): w for name, w in model.named_parameters()}


def test_the_flat_size_of_the_published_files():
    """1.3B in two model-parallel parts has flat layers of 25,185,280 elements."""
    part = split_parts(to_metaseq(meta_state(OPTConfig.preset("opt-1.3b")), fused=True), 2)[0]
    layer = [w.numel() for name, w in part.items() if name.startswith("decoder.layers.7.")]
    assert sum(layer) == 25_185_280


def test_a_plain_state_dict_and_huggingface_names(tmp_path):
    state = make_state(POST_NORM)
    torch.save(to_metaseq(state, fused=False), tmp_path / "a.pt")
    assert_same(load_params(tmp_path / "a.pt", config=POST_NORM), state)
    torch.save({"model": {f"model.decoder.{n}": w for n, w in state.items()}}, tmp_path / "b.pt")
    assert_same(load_params(tmp_path / "b.pt", config=POST_NORM), state)


def test_several_checkpoints_in_a_folder(tmp_path):
    states = [make_state(BIG, seed=i) for i in (0, 1)]
    write_metaseq(states[0], BIG, tmp_path, parts=2)
    write_metaseq(states[1], BIG, tmp_path, parts=1)
    with pytest.raises(CheckpointError, match="name one of them: reshard-model_part-0.pt, reshard.pt"):
        load_params(tmp_path)
    assert_same(load_params(tmp_path / "reshard-model_part-1.pt"), states[0])
    assert_same(load_params(tmp_path / "reshard.pt"), states[1])


def test_missing_parts_and_shards_are_named(tmp_path):
    paths = write_metaseq(make_state(BIG), BIG, tmp_path, parts=4, shards=3)
    paths[5].unlink()
    for path in paths[6:9]:
        path.unlink()
    with pytest.raises(CheckpointError) as error:
        load_params(tmp_path)
    assert "2 missing:\n  model part 2 of 4\n  shard 2 of 3 of model part 1" in str(error.value)
    write_metaseq(make_state(BIG), BIG, tmp_path, parts=4, shards=3)[-1].unlink()
    with pytest.raises(CheckpointError, match="shard 2 of 3 of model part 3"):
        load_params(tmp_path)
    for path in tmp_path.glob("*-shard2.pt"):
        path.unlink()
    with pytest.raises(CheckpointError, match="a shard is missing"):
        load_params(tmp_path)


@pytest.mark.parametrize("what", ["padding", "numels", "names", "no metadata", "part shape", "odd qkv"])
def test_parts_that_do_not_belong_together(tmp_path, what):
    state = make_state(BIG)
    paths = write_metaseq(state, BIG, tmp_path, parts=2, shards=2 if what not in ("part shape", "odd qkv") else 1)
    for path in paths[1:2] if what != "no metadata" else paths:
        content = torch.load(path, weights_only=False)
        if what == "no metadata":
            del content["shard_metadata"]
        elif what == "part shape":
            content["model"]["decoder.layers.0.fc1.weight"] = torch.zeros(20, 23)
        elif what == "odd qkv":
            content["model"]["decoder.layers.0.self_attn.qkv_proj.bias"] = torch.zeros(35)
        else:
            layout = content["shard_metadata"]["param_metadata"][1]["params"]["flat_param_0"]
            layout["padding"] += 5 if what == "padding" else 0
        torch.save(content, path)
    if what in ("numels", "names"):
        content = torch.load(paths[0], weights_only=False)
        content["shard_metadata"]["param_metadata"][1]["params"]["flat_param_0"][what].pop()
        torch.save(content, paths[0])
    with pytest.raises(CheckpointError):
        load_params(tmp_path)


def test_blocks_across_parts_and_shards(tmp_path):
    """What sharded loading asks for: any block of a tensor that lies in many files."""
    from optjax.checkpoints.contents import open_contents
    from optjax.checkpoints.detect import find_checkpoint

    state = make_state(BIG)
    write_metaseq(state, BIG, tmp_path, parts=4, shards=3)
    tensors = open_contents(find_checkpoint(tmp_path)).tensors
    rng = np.random.default_rng(0)
    for name in flat(load_params(tmp_path)):
        array = state[name].numpy()
        for _ in range(5):
            cuts = [sorted(rng.integers(0, n + 1, size=2)) for n in array.shape]
            index = tuple(slice(int(a), int(b)) for a, b in cuts)
            np.testing.assert_array_equal(tensors[name].read(index), array[index])


def test_shards_of_one_part_add_up():
    """The writer itself: what fairscale's shards hold without padding is the model."""
    model = to_metaseq(make_state(BIG), fused=True)
    shards, metadata = shard(model, 5)
    layouts = [m["param_metadata"][0]["params"]["flat_param_0"] for m in metadata]
    whole = torch.cat(
        [s["flat_param_0"][: len(s["flat_param_0"]) - m["padding"]] for s, m in zip(shards, layouts, strict=True)]
    )
    assert whole.numel() == sum(layouts[0]["numels"])
    assert torch.equal(whole[: layouts[0]["numels"][0]], model["decoder.embed_tokens.weight"].reshape(-1))

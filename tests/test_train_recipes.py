"""The paper's settings, and a mesh and micro-batches for the devices at hand."""

import types

import jax
import pytest

from optjax import OPTConfig
from optjax.sharding import make_mesh
from optjax.sharding.plan import parse_topology
from optjax.sharding.plan.here import chip_here, topology_here
from optjax.train.fit import fit
from optjax.train.options import StepOptions
from optjax.train.recipes import RECIPES, recipe_for

# Zhang et al. 2022, table 1: the learning rate, and the batch in tokens, as printed.
PAPER = {
    "opt-125m": ("6.0e-4", "0.5M"),
    "opt-350m": ("3.0e-4", "0.5M"),
    "opt-1.3b": ("2.0e-4", "1M"),
    "opt-2.7b": ("1.6e-4", "1M"),
    "opt-6.7b": ("1.2e-4", "2M"),
    "opt-13b": ("1.0e-4", "4M"),
    "opt-30b": ("1.0e-4", "4M"),
    "opt-66b": ("0.8e-4", "2M"),
    "opt-175b": ("1.2e-4", "2M"),
}


def test_recipes_are_the_papers():
    assert RECIPES.keys() == PAPER.keys()
    for size, (lr, batch) in PAPER.items():
        recipe = recipe_for(f"facebook/{size}")
        tokens = recipe["batch_size"] * recipe["length"]
        assert recipe["lr"] == pytest.approx(float(lr))
        assert tokens / 2**20 == float(batch.removesuffix("M"))
        config = OPTConfig.preset(recipe["config"])
        assert recipe["length"] == config.max_position_embeddings and recipe["dropout"] == config.dropout
    assert RECIPES["opt-175b"]["warmup_tokens"] / (1024 * 2048) == 2000  # steps
    with pytest.raises(ValueError, match="no recipe for 'opt-9b'; there are: opt-125m"):
        recipe_for("opt-9b")


def devices(kind: str, shape: tuple[int, ...], slices: int = 1, cores: int = 1) -> list:
    """As jax describes them."""
    import itertools

    return [
        types.SimpleNamespace(device_kind=kind, coords=place, slice_index=s, process_index=0, core_on_chip=c)
        for s in range(slices)
        for place in itertools.product(*map(range, shape))
        for c in range(cores)
    ]


@pytest.mark.parametrize(
    ("found", "name"),
    [
        (devices("TPU v5 lite", (4, 4, 1)), "v5e:4x4"),
        (devices("TPU v5", (2, 4, 4), slices=2), "2xv5p:2x4x4"),
        (devices("TPU7x", (2, 2, 1), cores=2), "tpu7x:2x2x1"),
        (devices("NVIDIA H100 80GB HBM3", (8,)), "h100:8"),
    ],
)
def test_devices_are_known_by_their_kind(found, name):
    assert topology_here(found) == parse_topology(name)


def test_a_cpu_is_no_chip_but_a_topology():
    assert chip_here() is None
    here = topology_here()
    assert here.devices == len(jax.devices()) and here.chip.capacity > 1e8


def test_what_is_left_open_is_chosen():
    config, options = OPTConfig.preset("opt-1.3b"), StepOptions(dtype="bfloat16", remat="full")
    batch = {"batch_size": 512, "length": 2048}
    on_slice = fit(config, options, devices=devices("TPU v5", (2, 2, 1)), **batch)
    assert on_slice.mesh == "fsdp=4" and 512 % on_slice.micro_batches == 0 and on_slice.micro_batches > 1
    assert on_slice.needed < on_slice.capacity
    one = fit(config, options, devices=devices("TPU v5 lite", (1, 1, 1)), **batch)
    assert one.mesh is None and one.needed > one.capacity  # 1.3B with its optimizer's state is 21 GB
    given = fit(config, options, devices=devices("TPU v5", (2, 2, 1)), mesh="fsdp=2,tensor=2", micro_batches=8, **batch)
    assert given.mesh == "fsdp=2,tensor=2" and given.micro_batches == 8
    with pytest.raises(ValueError, match="multiple of 16"):
        fit(config, options, devices=devices("TPU v5", (2, 2, 1)), micro_batches=4, batch_size=8, length=2048)
    here = fit(OPTConfig(num_hidden_layers=2), options, batch_size=16, length=128)
    assert make_mesh(here.mesh).size == len(jax.devices())

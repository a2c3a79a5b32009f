"""The order of devices in a mesh, on TPU slices that are not there."""

from __future__ import annotations

import pytest
from tpu_compiler import ask

pytestmark = pytest.mark.tpu_compiler

PROGRAM = """
import json
from jax.experimental import topologies
from optjax.sharding import make_mesh

def devices(name, **options):
    return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices

found = {}
two = devices("v5e:4x4", num_slices=2)
for spec in ("data=2,fsdp=4,tensor=4", "fsdp=8,tensor=4", "tensor=32"):
    try:
        mesh = make_mesh(spec, two)
        found[spec] = [[d.slice_index for d in row] for row in mesh.devices.reshape(-1, mesh.shape["tensor"])]
    except ValueError as error:
        found[spec] = str(error)
mesh = make_mesh("fsdp=16,tensor=4", devices("v5p:4x4x4"))
found["coords"] = [[d.coords for d in row] for row in mesh.devices.reshape(16, 4)]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found() -> dict:
    return ask("-c", PROGRAM)


@pytest.mark.parametrize("spec", ["data=2,fsdp=4,tensor=4", "fsdp=8,tensor=4"])
def test_slices_are_split_by_the_outer_axes(found, spec):
    rows = found[spec]
    assert all(len(set(row)) == 1 for row in rows)
    assert [row[0] for row in rows] == [0] * 4 + [1] * 4


def test_no_tensor_axis_between_slices(found):
    assert "would run its sequence or tensor axis between 2 slices" in found["tensor=32"]


def test_the_tensor_axis_is_a_ring(found):
    """Four neighbours along one dimension of the torus, which has wrap-around links at that length."""
    for row in found["coords"]:
        differs = [len(set(column)) for column in zip(*row, strict=True)]
        assert sorted(differs) == [1, 1, 4]
    assert len({tuple(coords) for row in found["coords"] for coords in row}) == 64

"""Topologies as people write them, and how fast what is between the devices is."""

from __future__ import annotations

import pytest

from optjax.sharding.plan import interconnect
from optjax.sharding.plan.hardware import CHIPS, parse_topology, shapes
from optjax.sharding.plan.interconnect import Position, links, seconds


@pytest.mark.parametrize(
    ("text", "devices", "hosts"),
    [
        ("v5p:4x4x8", 128, 32),
        ("V5E:16x16", 256, 64),
        ("v5e:1x1", 1, 1),
        ("tpu7x:2x2x1", 8, 1),
        ("tpu7x:4x4x4", 128, 16),
        ("v4:2x2x2", 8, 2),
        ("h100:1", 1, 1),
        ("h100:8", 8, 1),
        ("h100:64", 64, 8),
        ("2xv5e:16x16", 512, 128),
        ("2*v5e:16x16", 512, 128),
    ],
)
def test_topologies(text: str, devices: int, hosts: int):
    topology = parse_topology(text)
    assert (topology.devices, topology.hosts) == (devices, hosts)
    assert parse_topology(topology.name) == topology


def test_dimensions_come_in_any_order():
    assert parse_topology("v5p:4x4x2") == parse_topology("v5p:2x4x4")
    assert parse_topology("v5p:1x2x2").name == "v5p:2x2x1"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("v5e:2x2x2", ["does not exist", "2x4", "16x16"]),
        ("v5p:3x4x4", ["does not exist", "2x4x4", "4x4x8", "multiples of 4", "6144"]),
        ("v5p:16x20x28", ["does not exist"]),  # a whole pod: no job is as large
        ("v6e", ["does not exist", "8x16"]),
        ("v5p:0x4x4", ["does not exist"]),
        ("h100:12", ["h100:8", "h100:16"]),
        ("h100:0", ["h100:8"]),
        ("h100:4x2", ["h100:8"]),
        ("h100", ["h100:8"]),
        ("2xh100:8", ["h100:16"]),
        ("0xv5e:2x2", ["no slices"]),
        ("tpu9:2x2", ["no chip named 'tpu9'", "v5p", "h100"]),
        ("v5p 4x4x4", ["v5p:4x4x8"]),
        ("", ["v5p:4x4x8"]),
    ],
)
def test_what_is_not_for_rent_is_refused(text: str, words: list[str]):
    with pytest.raises(ValueError) as error:
        parse_topology(text)
    for word in words:
        assert word in str(error.value)


def test_the_shapes_that_google_lists_exist():
    """Those of the pages of v5p and TPU7x; slices beyond a cube of 64 chips are whole cubes."""
    for name in ("4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16", "16x16x24", "4x4x12"):
        assert tuple(map(int, name.split("x"))) in shapes(CHIPS["v5p"])
    for chip in CHIPS.values():
        if chip.platform == "tpu":
            each = shapes(chip)
            assert len(set(each)) == len(each)
            assert max(map(_volume, each)) <= chip.largest


def _volume(shape: tuple[int, ...]) -> int:
    volume = 1
    for side in shape:
        volume *= side
    return volume


def test_rings_close_where_the_slice_is_whole():
    assert parse_topology("v5e:16x16").wraps == (True, True)
    assert parse_topology("v5e:8x16").wraps == (False, True)
    assert parse_topology("v5p:4x4x4").wraps == (True, True, True)
    assert parse_topology("v5p:2x4x4").wraps == (False, False, False)


def chips(*sides: range, island: int = 0) -> list[Position]:
    places: list[tuple[int, ...]] = [()]
    for side in sides:
        places = [(*place, i) for place in places for i in side]
    return [Position(island, (*place, 0)) for place in places]


def test_a_ring_uses_its_links_both_ways():
    """Gathering 1600 MB over 16 chips in a ring of 50 GB/s: 15/16 of it comes in, half from either side."""
    ring = links(parse_topology("v5e:16x16"), chips(range(16), range(1)))
    assert seconds("all-gather", 1.6e9, ring) == pytest.approx(1.5e9 / 100e9)
    assert seconds("all-reduce", 1.6e9, ring) == pytest.approx(2 * 1.5e9 / 100e9)
    line = links(parse_topology("v5e:8x16"), chips(range(8), range(1)))
    assert seconds("reduce-scatter", 1.6e9, line) == pytest.approx(1.4e9 / 50e9)
    plane = links(parse_topology("v5e:16x16"), chips(range(16), range(16)))
    assert plane.local == 4 * 50e9


def test_a_part_of_a_ring_is_a_line():
    assert links(parse_topology("v5e:16x16"), chips(range(4), range(1))).local == 50e9


def test_slices_are_joined_by_the_slower_network():
    both = [*chips(range(16), range(1)), *chips(range(16), range(1), island=1)]
    group = links(parse_topology("2xv5e:16x16"), both)
    assert (group.size, group.islands) == (32, 2)
    # Half of the result comes from the other slice, over the network of 16 chips.
    assert seconds("all-gather", 1.6e9, group) == pytest.approx(0.8e9 / (16 * 3.125e9))
    apart = links(parse_topology("2xv5e:16x16"), [Position(0, (0, 0, 0)), Position(1, (0, 0, 0))])
    assert seconds("all-reduce", 1e9, apart) == pytest.approx(2 * 0.5e9 / 3.125e9)


def test_gpus_of_a_host_reach_each_other_directly():
    class Device:
        def __init__(self, id: int):
            self.id = id

    topology = parse_topology("h100:16")
    places = interconnect.positions(topology, [Device(i) for i in range(16)])
    inside = links(topology, places[:8])
    assert (inside.islands, inside.local) == (1, 450e9)
    everywhere = links(topology, places)
    assert (everywhere.islands, everywhere.network) == (2, 8 * 50e9)
    assert seconds("all-gather", 1.6e9, everywhere) == pytest.approx(max(1.5e9 / 450e9, 0.8e9 / 400e9))


def test_the_cores_of_a_chip_share_its_links():
    topology = parse_topology("tpu7x:4x4x4")
    row = [Position(0, (x, 0, 0, core)) for x in range(4) for core in range(2)]
    assert links(topology, row).local == 2 * 100e9 / 2
    assert links(topology, row[:2]).local > 100e9


@pytest.mark.parametrize("kind", ["all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"])
def test_one_device_has_nothing_to_send(kind: str):
    assert seconds(kind, 1e9, links(parse_topology("v5e:2x2"), chips(range(1), range(1)))) == 0

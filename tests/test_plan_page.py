"""The page of plans: which rows there are, and that a run that was stopped goes on."""

from __future__ import annotations

import json
import re
import shlex

import pytest

from optjax.cli.arguments import parse
from optjax.sharding.plan import analytic
from optjax.sharding.plan import page as page_module
from optjax.sharding.plan import working_set as working_set_module
from optjax.sharding.plan.compiling import Compiled
from optjax.sharding.plan.excess import FAR, above, over, table
from optjax.sharding.plan.page import ALSO, JOBS, RENTED, SIZES, Page, from_words, ladder, make, smallest
from optjax.sharding.plan.planning import assemble
from optjax.sharding.plan.request import Request
from optjax.sharding.plan.working_set import working_set
from optjax.train.options import LOGITS_BYTES, QUERY_BLOCK


@pytest.fixture
def compiled(monkeypatch) -> list[str]:
    """The commands that were compiled, by a stand-in: what a device holds is a fifth more than the least."""
    commands: list[str] = []

    def run(request: Request):
        commands.append(request.command())
        made = []
        for name, work in request.works().items():
            peak = int(1.2 * work.least_memory)
            refused = "refused" if peak > request.topology.chip.capacity else None
            made.append(Compiled(name, {}, {}, 0, peak, refused, (), 1.0))
        return assemble(request, made)

    monkeypatch.setattr(page_module, "run", run)
    return commands


def test_a_row_is_compiled_once(compiled, tmp_path):
    request = from_words("opt-13b --topology h100:8 --job generate --batch 16")
    for _ in range(2):
        row = Page(tmp_path / "rows.json").row(request)
        assert row is not None and row.fits and row.command == request.command()
    assert compiled == [request.command()]
    assert Page(tmp_path / "none.json", lambda command: False).row(request) is None


def test_the_smallest_slice_is_found(compiled, tmp_path):
    """13B takes 12.0 GiB of each of 16 v5e at least; a fifth more is 14.4 of 15.75. 30B would fit 32, less a fifth."""
    rows = list(smallest(Page(tmp_path / "rows.json"), "opt-13b", "v5e", "train", {}))
    assert rows[-1].fits and rows[-1].made["topology"] == "v5e:4x4"
    assert [row.fits for row in rows[:-1]] == [False] * (len(rows) - 1)
    larger = list(smallest(Page(tmp_path / "rows.json"), "opt-30b", "v5e", "train", {}))
    assert larger[-1].fits and larger[-1].made["topology"] == "v5e:8x8"
    assert {row.made["topology"] for row in larger[:-1]} == {"v5e:4x8"}


def test_slices_of_a_ladder_grow():
    for chip in RENTED:
        sizes = [page_module.parse_topology(name).devices for name in ladder(chip)]
        assert all(after >= 2 * before for before, after in zip(sizes, sizes[1:], strict=False))


@pytest.mark.parametrize("words", ALSO.splitlines())
def test_what_is_asked_besides_makes_sense(words: str):
    request = from_words(words)
    assert request.size in SIZES and request.job in JOBS
    assert parse(shlex.split(request.command())[1:]).command == "plan"


def test_the_page_has_every_row_with_its_command(compiled, tmp_path, monkeypatch):
    monkeypatch.setattr(page_module, "SIZES", ["opt-125m", "opt-1.3b"])
    page = Page(tmp_path / "PLANS.json", lambda command: "opt-1.3b" in command)
    make(page, tmp_path / "PLANS.md")
    text = (tmp_path / "PLANS.md").read_text()
    commands = re.findall(r"`(optjax plan [^`]*)`", text)
    assert sorted(commands) == sorted(json.loads((tmp_path / "PLANS.json").read_text())) == sorted(set(compiled))
    assert {"v5e", "v6e", "v5p", "tpu7x", "h100"} <= {re.findall(r"--topology (\w+)", c)[0] for c in commands}
    lines = [line for line in text.splitlines() if line.startswith("| opt-1.3b |")]
    assert len(lines) == 2 + 2 * len(commands)  # two tables of the smallest slices, and all are a fifth above the least
    # Again, of what is there already.
    before = list(compiled)
    make(Page(tmp_path / "PLANS.json", lambda command: False), tmp_path / "PLANS.md")
    assert compiled == before and (tmp_path / "PLANS.md").read_text() == text


def test_the_working_set_by_hand():
    """A row a device; fsdp's parts of a layer are gathered, tensor's are not."""
    found = working_set(from_words("opt-13b --topology v5e:4x4 --mesh fsdp=8,tensor=2 --batch 8 --micro-batches 1"))
    d, f, v, t = 5120, 20480, 50272, 2048
    layer = 4 * d * d + 2 * d * f + (3 * d + f)  # what tensor=2 splits; norms and the other biases are whole
    whole = 6 * d
    assert found == {
        "two layers' weights": 2 * 2 * (layer // 2 + whole),
        "a layer's gradient": 4 * (layer // 2 + whole),
        "the table and its gradient": 6 * v * d // 2,
        "a layer's values": 2 * (2 * t // 2 * d + t * (2 * d + 6 * d // 2 + 3 * f // 2)),
        "scores of a block of queries": 10 * 20 * 512 * t,
        "logits at once": 2 * (128 << 20),
    }
    assert (analytic.QUERY_BLOCK, working_set_module.LOGITS_BYTES) == (QUERY_BLOCK, LOGITS_BYTES)
    flash = from_words("opt-13b --topology v5e:4x4 --mesh fsdp=8,tensor=2 --batch 8 --attn-implementation flash")
    assert "scores of a block of queries" not in working_set(flash)
    read = working_set(from_words("opt-125m --topology v5e:1x1 --job generate --batch 8"))
    assert "scores of a block of queries" not in read and read["logits at once"] == 8 * 8 * v
    short = from_words("opt-125m --topology v5e:1x1 --job generate --batch 8 --prompt 128")  # too few for a kernel
    assert working_set(short)["scores of a block of queries"] == 10 * 8 * 12 * 128 * 128
    # To generate, weights are gathered for a long prompt of many rows, not for a short one.
    many, few = (
        working_set(from_words(f"opt-13b --topology v5e:4x4 --job generate --mesh fsdp=8,tensor=2 --batch 32 {prompt}"))
        for prompt in ("--prompt 512", "--prompt 64")
    )
    assert "two layers' weights" not in few and many["two layers' weights"] == found["two layers' weights"]
    assert "two layers' weights" not in read


def test_what_stands_above_the_least_is_the_working_set(repository):
    """Of all train steps that were compiled for the page and need far more than the least."""
    page = Page(repository / "sharding" / "PLANS.json")
    for command, made in page.rows.items():
        if made["job"] == "train" and over(made) > FAR:
            in_use = sum(working_set(page_module.Row(command, made).request()).values())
            assert 0 < above(made) <= in_use, command


def test_what_the_working_set_does_not_explain_is_marked(repository):
    rows = Page(repository / "sharding" / "PLANS.json").rows.values()
    made = max(rows, key=above)
    for in_use, marked in ((above(made), False), (above(made) - 1, True)):
        assert ("GiB * |" in table([(made, {"all": in_use})])[-1]) == marked

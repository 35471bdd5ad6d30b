"""Tables on screens of any width."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from sft_job.plan.prices import prices, smallest_change
from sft_job.plan.setup import Ranks
from sft_job.plan.show import show_plan
from tests.unit.plan.cases import case


@pytest.mark.parametrize("width", [80, 100, 130, 200])
def test_every_figure_is_legible(width: int) -> None:
    one, screen = (
        case(lengths=(131_072,) * 4, ranks=Ranks(4), card="a100", **{"model.recompute": "none"}),
        io.StringIO(),
    )
    found, changes = one.estimate(), prices(one)
    show_plan(one, found, changes, smallest_change(one), 4096, [], Console(file=screen, width=width, highlight=False))
    lines = screen.getvalue().splitlines()
    sizes = {**found.memory.parts, "all tensors": found.memory.peak}
    for name, size in sizes.items():
        assert any(name in line and f"{size / 2**30:.2f}" in line for line in lines), name
    for name, size in found.memory.host.items():
        assert any(name in line and f"{size / 2**30:.1f}" in line for line in lines), name
    for price in changes:
        last = price.words().split()[0].rpartition(".")[2]
        row = next(line for line in lines if line.split(" ")[0].endswith(last))
        assert f" {price.found.memory.peak / 2**30:.1f} " in row
        assert row.rstrip().endswith(("fits", "tight", "fit", "too large"))
    assert all(len(line.rstrip()) <= width for line in lines)
    assert not any("\u2026" in line for line in lines)

"""Figures in the documents are the plan's."""

from __future__ import annotations

from pathlib import Path

import pytest

from sft_job.plan.setup import GIB, Ranks
from tests.unit.plan.cases import case

ROOT = Path(__file__).parents[3]
COLUMNS = ((131_072, 1), (131_072, 2), (524_288, 1), (524_288, 2), (1_048_576, 2))


def _row(begins: str) -> list[float]:
    lines = (ROOT / "docs" / "long-documents.md").read_text(encoding="utf-8").splitlines()
    (line,) = (line for line in lines if line.startswith(f"| **{begins}**"))
    return [float(cell.strip(" *")) for cell in line.split("|")[2:-1]]


@pytest.mark.parametrize("recompute", ["full", "offload"])
def test_peaks_of_long_documents(recompute: str) -> None:
    found: list[float] = []
    for tokens, gpus in COLUMNS:
        changes = {"ulysses_sequence_parallel_size": gpus, "model.recompute": recompute}
        planned = case(lengths=(tokens,), ranks=Ranks(gpus), **changes).estimate(timed=False)
        found.append(float(round(planned.memory.peak / GIB)))
    assert _row(f"peak, `{recompute}`") == found

"""Cards by their names."""

from __future__ import annotations

import pytest

from sft_job.errors import Problem
from sft_job.plan.cards import CARDS, find_card


@pytest.mark.parametrize(("said", "name"), [
    ("h200", "h200"), ("H100", "h100"), ("NVIDIA H200", "h200"), ("NVIDIA H100 80GB HBM3", "h100"),
    ("H100 NVL", "h100-nvl"),
    ("NVIDIA A100-SXM4-80GB", "a100"), ("NVIDIA A100-SXM4-40GB", "a100-40gb"), ("A100-40GB", "a100-40gb"),
    ("NVIDIA A800-SXM4-80GB", "a800"), ("NVIDIA L40S", "l40s"), ("NVIDIA GeForce RTX 4090", "rtx4090"),
    ("NVIDIA H20", "h20"), ("b200", "b200"),
])  # fmt: skip
def test_names(said: str, name: str) -> None:
    card = find_card(said)
    assert not isinstance(card, Problem)
    assert card.name == name


def test_a_wrong_name_gets_a_suggestion() -> None:
    problem = find_card("h20o")
    assert isinstance(problem, Problem)
    assert problem.code == 2
    assert "did you mean h20" in problem.fix
    assert all(name in problem.fix for name in CARDS)
    assert "did you mean" not in find_card("abacus").fix


def test_only_what_was_run_counts_as_measured() -> None:
    assert [card.name for card in CARDS.values() if card.measured] == ["h200"]

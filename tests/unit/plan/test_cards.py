"""Cards by their names."""

from __future__ import annotations

import pytest

from sft_job.errors import Problem
from sft_job.plan.cards import CARDS, card_like, find_card


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


@pytest.mark.parametrize(("said", "name", "least", "most"), [
    ("NVIDIA A100-PCIE-40GB", "a100-40gb", 36, 39.5), ("NVIDIA A800 40GB Active", "a800", 36, 39.5),
    ("NVIDIA H200 NVL", "h200", 130, 140), ("NVIDIA H20-3e", "h20", 90, 94),
    ("NVIDIA GH200 144G HBM3e", "gh200", 130, 140),
    ("NVIDIA GH200 480GB", "gh200", 90, 94), ("NVIDIA Z1 Future", "h100", 70, 79),
])  # fmt: skip
def test_whatever_is_here_is_planned_for(said: str, name: str, least: float, most: float) -> None:
    card = card_like(said)
    assert card.name == name
    assert least <= card.memory <= most


def test_a_card_on_pcie_is_slower() -> None:
    for said, like in (("NVIDIA H100 PCIe", "h100"), ("NVIDIA A100 80GB PCIe", "a100")):
        card = find_card(said)
        assert not isinstance(card, Problem)
        assert card.memory == CARDS[like].memory
        assert card.bf16 < CARDS[like].bf16
        assert card.link < CARDS[like].link

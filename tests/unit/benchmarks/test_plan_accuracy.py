"""The planning half of the benchmark, and its comparison with what runs leave."""

from __future__ import annotations

import json

import pytest

from benchmarks.plan import data_steps
from benchmarks.plan_accuracy import CONFIGS, chosen_levels, compared, main, planned, table
from sft_job.fitting import plan_text
from sft_job.model.recompute import Recompute
from sft_job.plan.cards import CARDS
from sft_job.plan.setup import GIB

CARD = CARDS["h200"]


def test_twelve_configurations() -> None:
    assert len({config.name for config in CONFIGS}) == 12
    assert [config.side.ranks for config in CONFIGS] == [1] * 6 + [2] * 6
    assert {config.side.tokens.length for config in CONFIGS} == {4096, 32768, 131072}
    assert sum("model.lora_rank" in config.side.settings for config in CONFIGS) == 6
    for config in CONFIGS:
        assert data_steps([config.row], config.steps, config.warmup) <= config.steps + config.warmup + 1


def test_one_call_has_time_for_those_on_one_card() -> None:
    """Rehearsals, warm-up and measured steps by the plan, and half a minute to build and compile each."""
    total = 0.0
    for config in CONFIGS[:6]:
        plan = planned(config, CARD)
        rehearsals = 4 if plan.setup.recompute == "auto" else 1
        total += 30 + (rehearsals + config.steps + config.warmup) * plan.step.seconds
    assert total < 530


def test_planning_alone(tmp_path, capsys) -> None:
    assert main(["--dry", "--out", str(tmp_path), "--card", "h200"]) == 0
    record = json.loads((tmp_path / "plan_accuracy.json").read_text())
    assert len(record["lines"]) == 12
    assert all(line["state"] == "not run" and line["planned_seconds"] > 0 for line in record["lines"])
    said = capsys.readouterr().out
    assert (tmp_path / "plan_accuracy.md").read_text() == said
    assert "| full_128k_1 |" in said
    assert "0 measured" in said
    with pytest.raises(SystemExit, match="no such configuration: full_9k"):
        main(["--dry", "--configs", "full_9k", "--out", str(tmp_path)])


def run_of(config, gib: float, seconds: float, state: str = "done", said: str = "") -> dict:
    figures = {"memory": {"allocated_gib_after_warmup": gib}, "step_seconds": {"median": seconds}}
    return {"state": state, "figures": figures if state == "done" else {}, "said": [said], "shape": "qwen2.5-7b"}


def test_planned_beside_measured() -> None:
    config = CONFIGS[0]
    plan = planned(config, CARD)
    peak, seconds = plan.memory.peak / GIB, plan.step.seconds
    line = compared(config, plan, run_of(config, 1.05 * peak, 0.5 * seconds))
    assert line["memory_off"] == pytest.approx(-1 / 21)
    assert line["time_off"] == pytest.approx(1.0)
    assert not line["said_to_fit_and_did_not"]
    record = {"machine": {"gpu": "1 x X", "commit": "abc"}, "started": "now", "card": "h200", "shape": "s"}
    text = table({**record, "lines": [line]})
    assert "| -4.8% |" in text
    assert "beyond them: full_4k_1;" in text


def test_the_mistake_that_must_not_happen() -> None:
    config = CONFIGS[0]
    plan = planned(config, CARD)
    assert plan.verdict == "fits"
    assert compared(config, plan, run_of(config, 0, 0, "out of memory"))["said_to_fit_and_did_not"]


def test_memory_is_compared_at_what_the_run_recomputed() -> None:
    """It may have chosen another plan than was foreseen."""
    said = "recomputation of 28 blocks: 20 nothing, 8 all but attention; peak 127.6 of 138.5 GiB"
    levels = chosen_levels(["attention: flash4", said])
    assert levels == ["attention"] * 8 + ["none"] * 20
    assert chosen_levels(["recomputation of 2 blocks: 1 all but attention, 1 all; peak 1"]) == ["full", "attention"]
    assert chosen_levels(["nothing of it"]) is None
    config = CONFIGS[2]
    plan = planned(config, CARD)
    line = compared(config, plan, run_of(config, 100.0, 1.0, said="recomputation of 28 blocks: 28 all; peak 1"))
    assert line["levels"] == {"full": 28}
    assert line["planned_gib"] < plan.memory.peak / GIB


@pytest.mark.parametrize("level", list(Recompute))
def test_every_level_is_read_from_the_runs_own_line(level: Recompute) -> None:
    for plan in ((level,) * 28, (level, *(Recompute.FULL,) * 27), (level, *(Recompute.NONE,) * 27)):
        found = chosen_levels([f"x {plan_text(plan, 2**30, 2**31)}"])
        assert found is not None
        assert sorted(found) == sorted(str(each) for each in plan)

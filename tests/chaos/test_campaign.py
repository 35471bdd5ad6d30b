"""The harness itself: its plans, what its oracle sees, and one run that is killed three times."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from pathlib import Path

import pytest

from tests.chaos.campaign import Campaign
from tests.chaos.faults import FULL, Bench
from tests.chaos.inputs import SEED_YAML, run_overrides
from tests.chaos.mutations import check_texts
from tests.chaos.oracle import Evidence, differences, gather, reference_faults
from tests.chaos.plan import SAVE_FREQ, SHAPES, TOTAL_STEPS, Phase, Target, make_plan
from tests.chaos.world import Start, run_start

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kills", [1, 5, 12, 24, 60, 200, 500])
def test_a_plan_has_each_kill_once_and_gets_further_between_them(kills: int) -> None:
    plan = make_plan(kills, 1)
    numbers = [strike.number for each in plan for strike in each.strikes]
    assert numbers == list(range(1, kills + 1))
    for each in plan:
        assert each.strikes
        windows = [(strike.step - 1) // SAVE_FREQ for strike in each.strikes if strike.step]
        assert windows == sorted(windows)
        assert max(Counter(windows).values(), default=0) <= 2
        # Whatever a kill waits for, the next one still finds a step to hit.
        assert all(strike.step <= TOTAL_STEPS - 5 for strike in each.strikes[:-1])


@pytest.mark.parametrize(("kills", "seed"), [(24, 1), (25, 3), (200, 1), (200, 2)])
def test_24_kills_meet_every_configuration(kills: int, seed: int) -> None:
    assert {each.shape for each in make_plan(kills, seed)} == set(SHAPES)


def test_200_kills_meet_every_phase_signal_and_target() -> None:
    strikes = [strike for each in make_plan(200, 1) for strike in each.strikes]
    assert {strike.phase for strike in strikes} == set(Phase)
    assert {strike.target for strike in strikes} == set(Target)
    assert {strike.signal.name for strike in strikes} == {
        "SIGKILL",
        "SIGTERM",
        "SIGUSR2",
        "SIGSTOP",
        "SIGSEGV",
        "SIGINT",
    }
    assert sum(strike.step == 0 for strike in strikes) > 10, "few kills hit a start that recovers"
    assert sum(each.cli for each in make_plan(200, 1)) == 8


def test_a_plan_is_a_function_of_its_seed() -> None:
    assert make_plan(60, 4) == make_plan(60, 4)
    assert make_plan(60, 4) != make_plan(60, 5)


@pytest.fixture(scope="module")
def straight(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Evidence:
    folder = tmp_path_factory.mktemp("straight")
    overrides = run_overrides(bench.inputs, FULL, 2)
    start = Start(SEED_YAML, overrides, {"CHECKPOINT_DIR": str(folder)}, folder / "control", 0, 2)
    ended = bench.server.call(run_start, start, timeout=120.0)
    assert ended.code == 0, ended.output
    return bench.server.call(gather, folder / "sft", folder / "control")


def test_an_uninterrupted_run_is_right_by_itself(straight: Evidence) -> None:
    """Each row once an epoch, another order in each, and no two ranks or steps with the same random numbers."""
    assert reference_faults(straight) == []
    assert len(straight.ledger) == 2 * TOTAL_STEPS


def test_the_oracle_sees_each_difference(straight: Evidence) -> None:
    assert differences(straight, copy.deepcopy(straight), exact=True) == []
    other = copy.deepcopy(straight)
    name = next(iter(other.tensors))
    other.tensors[name] = "0"
    assert "tensors" in differences(straight, other, exact=True)[0]
    for what in ("rows", "lr", "tokens", "seed", "rng"):
        other = copy.deepcopy(straight)
        other.ledger[7][what] = None
        assert what in differences(straight, other, exact=True)[0]
    other = copy.deepcopy(straight)
    other.metrics[5, "train/loss"] *= 1 + 1e-7
    assert "train/loss of step 5" in differences(straight, other, exact=True)[0]
    assert differences(straight, other, exact=False) == []
    folders = [*straight.folders, ".saving_global_step_4"]
    other = dataclasses.replace(straight, folders=folders, latest="global_step_8")
    assert len(differences(straight, other, exact=True)) == 2
    other = dataclasses.replace(straight, ledger=straight.ledger[:-2])
    assert "never made" in differences(straight, other, exact=True)[0]


def test_a_run_that_is_killed_three_times_ends_equal(bench: Bench, tmp_path: Path) -> None:
    told: list[str] = []
    plan = [each for each in make_plan(12, 1) if len(each.strikes) == 3][:1]
    (verdict,) = Campaign(bench.server, tmp_path, told.append).run(plan, 1)
    assert verdict.faults == []
    assert len(verdict.places) == 3


def test_every_mutation_has_its_place_in_the_code() -> None:
    assert check_texts() == []

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from benchmarks.ours_side import job_settings
from benchmarks.plan import LEARNING_RATE, RunSpec, runs_of
from benchmarks.report import figures, gate, markdown, spread, verdict, waste
from benchmarks.rows import Row, rows_named
from benchmarks.stamps import StepClock, host_seconds
from benchmarks.tokens import Tokens
from benchmarks.trl_side import sft_arguments


def rank(seconds: list[float], **more: Any) -> dict[str, Any]:
    return {
        "step_seconds": seconds,
        "ceiling_before": {"tflops": 700.0},
        "ceiling_after": {"tflops": 650.0, "warm": {"tflops": 600.0}},
        **more,
    }


def run_of(ranks: list[dict[str, Any]], warmup: int = 1, world: int = 1, **more: Any) -> dict[str, Any]:
    return {"ranks": ranks, "warmup": warmup, "side": {"ranks": world, "settings": {}}, **more}


def test_rates_are_per_gpu_after_the_warmup_by_the_slowest_rank() -> None:
    ranks = [
        rank([9.0, 1.0, 2.0], tokens=[100, 100, 100], flops=[1e15, 4e15, 4e15], memory={"allocated_gib": 3.0}),
        rank([9.0, 2.0, 1.0], tokens=[100, 100, 100], memory={"allocated_gib": 5.0}),
    ]
    found = figures(run_of(ranks, world=2))
    assert found["steps"] == 2
    assert found["step_seconds"]["median"] == 2.0
    assert found["tokens_per_second_per_gpu"]["median"] == 25.0
    assert found["model_tflops_per_gpu"]["median"] == 1000.0
    assert found["first_step_seconds"] == 9.0
    assert found["memory"] == {"allocated_gib": 5.0}
    assert found["ceilings_tflops"] == [700.0, 650.0, 700.0, 650.0]
    assert found["warm_ceilings_tflops"] == [600.0] * 2, "only where it was measured"


def test_a_run_that_was_cut_off_counts_with_what_it_left() -> None:
    found = figures(run_of([], step_seconds=[3.0, 1.0, 1.0], tokens=[8, 8, 8, 8], flops=[1e12] * 4, losses=[5.0]))
    assert found["tokens_per_second_per_gpu"]["median"] == 8.0
    assert found["losses"] == [5.0]


def test_a_run_that_left_nothing_has_no_figures() -> None:
    found = figures(run_of([]))
    assert "step_seconds" not in found
    assert found["first_step_seconds"] is None


def test_spread() -> None:
    assert spread([float(value) for value in range(11)]) == {"median": 5.0, "p10": 1.0, "p90": 9.0}
    assert spread([2.0]) == {"median": 2.0, "p10": 2.0, "p90": 2.0}


def test_waste_counts_padding_and_the_busiest_rank() -> None:
    assert waste([[60, 50], [50, 60]], [100, 100], 1) == pytest.approx({"padding": 0.1, "token_imbalance": 1 / 11})
    # Two ranks of a Ulysses group share their packs.
    assert waste([[100], [100]], [100], 2) == pytest.approx({"padding": 0.0, "token_imbalance": 0.0})


FALLING = [10.0 - 0.1 * step for step in range(20)]


def by(relative: float, *steps: int) -> list[float]:
    """The falling losses, some of them off."""
    return [value * (1 + relative if step in steps else 1) for step, value in enumerate(FALLING)]


@pytest.mark.parametrize(
    ("losses", "passed"),
    [
        (FALLING, True),
        (by(0.0009, 0, 4), True),
        (by(0.002, 0), False),
        (by(0.004, *range(5, 20)), True),
        (by(0.006, 19), False),
        (by(0.006, 19)[:19], True),
        ([FALLING[0]] * 20, False),
    ],
)
def test_losses_must_be_the_references(losses: list[float], passed: bool) -> None:
    assert gate(losses, FALLING, (1e-3, 5e-3))["passed"] is passed


def test_a_reference_that_stands_still_proves_nothing() -> None:
    """The losses that a 7B had at a rate of 1e-5: its first one, at every step, would have passed for all of them."""
    still = [12.652, 12.642, 12.6445, 12.643, 12.6613, 12.6573, 12.6525, 12.6355, 12.656, 12.636, 12.629, 12.6405]
    for losses in (still, [still[0]] * 12):
        found = gate(losses, still, (1e-3, 5e-3))
        assert found["passed"] is None
        assert found["why"] == "the reference's losses stand still"
    assert gate([1.1 * each for each in still], still, (1e-3, 5e-3))["passed"] is False, "what differs is still wrong"
    assert gate(still, still, (0.02, 0.05), must_move=False)["passed"] is True


def test_both_sides_train_at_the_same_rate(tmp_path) -> None:
    told = {"settings": {}, "token_file": "t/rows.parquet", "model": "m", "out": str(tmp_path), "on_gpu": False}
    spec = RunSpec(tokens=Tokens(2, 8), steps=2, warmup=1, ranks=1, **told)
    assert job_settings(spec)["optim"]["lr"] == sft_arguments(spec)["learning_rate"] == LEARNING_RATE


def test_no_losses_are_no_pass() -> None:
    assert gate([], [10.0], (1e-3, 5e-3))["passed"] is None


def done(row: Row, rates: dict[str, float]) -> list[dict[str, Any]]:
    """A sitting's runs with given rates by part and side."""
    runs: list[dict[str, Any]] = []
    for run in runs_of([row], 4, 1, partners=True, reference=True):
        seconds = 1000.0 / rates.get(f"{run.part} {run.side.name}", rates.get(run.part, 1.0))
        left = rank(
            [seconds] * 5,
            tokens=[1000] * 5,
            flops=[seconds * 1e14] * 5,
            losses=[9.0, 8.0, 7.0, 6.0, 5.0],
            grad_norms=[1.0] * 5,
        )
        record = {**asdict(run), "side": asdict(run.side), "shape": row.shape, "state": "done", "ranks": [left]}
        runs.append({**record, "figures": figures(record)})
    return runs


def test_the_fastest_partner_counts_and_a_to_a_is_shown() -> None:
    row = rows_named(["qwen7b_full_2x8192"])[0]
    fast = row.partners[1].name
    runs = done(row, {"A": 150.0, "A'": 130.0, "B": 50.0, f"B {fast}": 100.0})
    found = verdict(row, runs, 200.0, 160.0)
    assert found["partner"] == fast
    assert found["ratio_tokens"] == pytest.approx(1.4)
    assert found["a_to_a"] == pytest.approx(20 / 140)
    assert found["of_ceiling"] == pytest.approx(0.5)
    assert found["of_warm_ceiling"] == pytest.approx(0.625)
    assert found["gate"]["passed"]
    assert found["losses_to_partner"]["passed"]


def test_runs_of_another_row_do_not_count() -> None:
    row, other = rows_named(["qwen7b_full_2x8192", "qwen7b_lora_2x8192"])
    found = verdict(other, done(row, {}), None)
    assert found["ours_tokens_per_second_per_gpu"] == []
    assert "partner" not in found


def test_partners_of_another_model_do_not_count() -> None:
    row = rows_named(["qwen7b_full_2x8192"])[0]
    runs = done(row, {})
    for run in runs:
        run["shape"] = "tiny" if run["part"] in ("B", "R") else run["shape"]
    found = verdict(row, runs, None)
    assert "partner" not in found
    assert "gate" not in found


def test_the_table_has_a_line_for_every_run_also_for_those_that_failed() -> None:
    row = rows_named(["qwen7b_full_2x8192"])[0]
    runs = done(row, {})
    runs[1] = {**runs[1], "state": "out of memory", "figures": figures(run_of([]))}
    machine = {"gpu": None, "versions": {}, "commit": "abc"}
    record = {"machine": machine, "started": "now", "runs": runs, "verdicts": [verdict(row, runs, 800.0)]}
    lines = markdown(record).splitlines()
    assert sum(line.startswith(f"| {row.name}") for line in lines) == len(runs) + 1
    assert len({line.count(" | ") for line in lines if line.startswith("| qwen")}) == 2
    assert any("out of memory" in line for line in lines)


def test_the_clock_leaves_its_times_at_once_and_a_torn_line_counts_for_nothing(tmp_path) -> None:
    import torch

    path = tmp_path / "steps.jsonl"
    clock = StepClock(torch.device("cpu"), path, warmup=1)
    assert clock.began == float("inf")
    for _ in range(3):
        clock.mark()
    assert clock.steps == 2
    assert host_seconds(path) == clock.seconds()
    path.write_text(path.read_text() + '{"step": 3, "host_sec')
    assert host_seconds(path) == clock.seconds()
    assert host_seconds(tmp_path / "none") == []

from __future__ import annotations

import pytest

from sft_job.metrics.meters import StepMeter, validation_record

# DESIGN section 4, to the letter.
FIELDS = [
    "step",
    "epoch",
    "train/loss",
    "train/lr",
    "train/grad_norm",
    "train/tokens",
    "train/supervised_tokens",
    "perf/tokens_per_second_per_gpu",
    "perf/model_tflops_per_gpu",
    "perf/mfu",
    "perf/step_seconds",
    "perf/data_wait_seconds",
    "data/padding_fraction",
    "data/cost_imbalance",
    "memory/peak_gib",
]


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def one_step(meter: StepMeter, clock: Clock, seconds: float, wait: float, tokens: int, flops: float = 0.0) -> None:
    meter.begin_step()
    with meter.waiting_for_data():
        clock.now += wait
    clock.now += seconds - wait
    meter.end_step(tokens=tokens, supervised_tokens=tokens // 2, flops=flops, padding=0.25, imbalance=0.5)


def record(meter: StepMeter, step: int = 1, peak_bytes: int | None = None):
    return meter.record(step=step, epoch=0.5, loss=1.5, lr=1e-3, grad_norm=0.7, peak_bytes=peak_bytes)


def test_one_step() -> None:
    clock = Clock()
    meter = StepMeter(world_size=4, peak_flops=100e12, clock=clock)
    one_step(meter, clock, seconds=2.0, wait=0.5, tokens=1000, flops=400e12)
    line = record(meter, step=7, peak_bytes=3 * 2**30)
    assert list(line) == FIELDS
    assert line == {
        "step": 7,
        "epoch": 0.5,
        "train/loss": 1.5,
        "train/lr": 1e-3,
        "train/grad_norm": 0.7,
        "train/tokens": 1000,
        "train/supervised_tokens": 500,
        "perf/tokens_per_second_per_gpu": 125.0,
        "perf/model_tflops_per_gpu": 50.0,
        "perf/mfu": 0.5,
        "perf/step_seconds": 2.0,
        "perf/data_wait_seconds": 0.5,
        "data/padding_fraction": 0.25,
        "data/cost_imbalance": 0.5,
        "memory/peak_gib": 3.0,
    }


def test_rates_are_means_over_the_interval_and_tokens_add_up() -> None:
    clock = Clock()
    meter = StepMeter(world_size=1, peak_flops=None, tokens=10_000, supervised_tokens=7_000, clock=clock)
    one_step(meter, clock, seconds=1.0, wait=0.0, tokens=100)
    one_step(meter, clock, seconds=3.0, wait=1.0, tokens=300)
    first = record(meter)
    assert first["perf/step_seconds"] == 2.0
    assert first["perf/data_wait_seconds"] == 0.5
    assert first["perf/tokens_per_second_per_gpu"] == 100.0
    assert (first["train/tokens"], first["train/supervised_tokens"]) == (10_400, 7_200)
    one_step(meter, clock, seconds=0.5, wait=0.0, tokens=100)
    second = record(meter)
    assert second["perf/step_seconds"] == 0.5
    assert second["perf/tokens_per_second_per_gpu"] == 200.0
    assert second["train/tokens"] == 10_500


def test_time_between_steps_does_not_count() -> None:
    clock = Clock()
    meter = StepMeter(world_size=1, peak_flops=None, clock=clock)
    one_step(meter, clock, seconds=1.0, wait=0.0, tokens=100)
    clock.now += 60  # validation, a checkpoint
    one_step(meter, clock, seconds=1.0, wait=0.0, tokens=100)
    assert record(meter)["perf/tokens_per_second_per_gpu"] == 100.0


def test_step_that_was_not_ended_is_forgotten() -> None:
    clock = Clock()
    meter = StepMeter(world_size=1, peak_flops=None, clock=clock)
    meter.begin_step()
    with meter.waiting_for_data():
        clock.now += 9
    one_step(meter, clock, seconds=1.0, wait=0.25, tokens=100)
    line = record(meter)
    assert (line["perf/step_seconds"], line["perf/data_wait_seconds"]) == (1.0, 0.25)


def test_unknown_peak_and_memory_are_null() -> None:
    clock = Clock()
    meter = StepMeter(world_size=1, peak_flops=None, clock=clock)
    one_step(meter, clock, seconds=1.0, wait=0.0, tokens=1, flops=1e12)
    line = record(meter)
    assert line["perf/mfu"] is None
    assert line["memory/peak_gib"] is None
    assert line["perf/model_tflops_per_gpu"] == 1.0


def test_misuse() -> None:
    meter = StepMeter(world_size=1, peak_flops=None)
    with pytest.raises(RuntimeError, match="begin_step"):
        meter.end_step(tokens=1, supervised_tokens=1, flops=0.0)
    with pytest.raises(RuntimeError, match="without a step"):
        record(meter)
    with pytest.raises(ValueError, match="world_size = 0"):
        StepMeter(world_size=0, peak_flops=None)


def test_validation_record() -> None:
    assert validation_record(5, 0.25) == {"step": 5, "val/loss": 0.25}
    assert validation_record(5, 0.25, {"math": 0.5}) == {"step": 5, "val/loss": 0.25, "val/math/loss": 0.5}

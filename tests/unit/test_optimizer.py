from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_job.config.schema import OptimConfig
from sft_job.optimizer import learning_rate, warmup_steps


def rates(total: int, **settings) -> list[float]:
    config = OptimConfig(lr=1.0, **settings)
    return [learning_rate(config, step, total) for step in range(total)]


def test_warm_up_rises_evenly_and_reaches_the_peak_once() -> None:
    curve = rates(20, warmup_steps=4, lr_scheduler="constant")
    assert curve[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert set(curve[4:]) == {1.0}


def test_cosine_falls_to_its_end_one_step_after_the_last() -> None:
    config = OptimConfig(lr=1.0, warmup_steps=0)
    curve = rates(8, warmup_steps=0)
    assert curve[0] == 1.0
    assert curve[4] == pytest.approx(0.5)
    assert learning_rate(config, 8, 8) == pytest.approx(0.0)
    assert rates(8, warmup_steps=0, min_lr_ratio=0.1)[-1] > 0.1
    assert learning_rate(OptimConfig(lr=1.0, warmup_steps=0, min_lr_ratio=0.1), 8, 8) == pytest.approx(0.1)


def test_wsd_is_stable_then_falls_over_the_last_tenth() -> None:
    curve = rates(110, warmup_steps=10, lr_scheduler="wsd")
    assert set(curve[10:101]) == {1.0}
    assert curve[101] < 1.0
    assert curve[-1] < 0.05


def test_steps_win_over_the_ratio() -> None:
    assert warmup_steps(OptimConfig(warmup_steps_ratio=0.1), 50) == 5
    assert warmup_steps(OptimConfig(warmup_steps_ratio=0.1, warmup_steps=7), 50) == 7


@given(
    st.integers(1, 300),
    st.floats(0, 1),
    st.sampled_from(["cosine", "wsd", "constant"]),
    st.floats(0, 1),
)
def test_every_rate_is_positive_and_falls_only_after_it_rose(total, ratio, kind, least) -> None:
    curve = rates(total, warmup_steps_ratio=ratio, lr_scheduler=kind, min_lr_ratio=least)
    assert all(0 < rate <= 1 for rate in curve)
    top = curve.index(max(curve))
    assert curve[: top + 1] == sorted(curve[: top + 1])
    assert curve[top:] == sorted(curve[top:], reverse=True)

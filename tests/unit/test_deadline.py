from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sft_job.deadline import Deadline


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_learned_from_the_longest_of_the_recent() -> None:
    clock = Clock()
    deadline = Deadline(clock.now + 100, clock, first_save=10)
    assert deadline.needed == 10 + 5
    for seconds in (1.0, 9.0, 2.0):
        deadline.step_took(seconds)
    assert deadline.needed == 1.5 * 9 + 10 + 5
    deadline.save_took(2.0)
    assert deadline.needed == 1.5 * (9 + 4) + 5
    for _ in range(50):
        deadline.step_took(1.0)
    assert deadline.needed == 1.5 * (1 + 4) + 5


def test_once_reached_it_stays_so() -> None:
    """Ranks must not begin a stop and then go on because a slow save left the window."""
    clock = Clock()
    deadline = Deadline(clock.now + 20, clock, first_save=15)
    assert deadline.reached
    deadline.save_took(0.1)
    assert deadline.needed < 20
    assert deadline.reached


durations = st.floats(0.01, 60)


@given(st.lists(st.tuples(durations, durations, st.booleans()), min_size=1, max_size=60), st.floats(0, 5000))
def test_the_last_save_is_in_time(steps: list[tuple[float, float, bool]], length: float) -> None:
    """A loop as the trainer's: after the first save, as long as nothing takes longer than half as much again."""
    clock = Clock()
    end = clock.now + length
    deadline = Deadline(end, clock)
    step, save = steps[0][0], steps[0][1]
    deadline.step_took(step)
    deadline.save_took(save)
    if deadline.reached:
        return
    for factor_step, factor_save, saves in steps:
        clock.now += step * (1 + factor_step / 120)
        deadline.step_took(step)
        if deadline.reached:
            break
        if saves:
            clock.now += save * (1 + factor_save / 120)
    else:
        return
    clock.now += save * 1.5
    assert clock.now <= end

from __future__ import annotations

from sft_job.pulse import SAVING, TRAINING, Beat, Pulse, pulse_file, read_beat
from sft_job.watchdog import Action, Seen, Watchdog


def at(count: int, phase: str = TRAINING, moved: int = 0) -> Seen:
    return Seen(Beat(count, 1, phase), moved)


def actions(watchdog: Watchdog, ranks: dict[int, Seen], seconds: range) -> list[Action]:
    return [watchdog.look(second, ranks) for second in seconds]


def test_stacks_once_then_the_kill() -> None:
    watchdog = Watchdog(100, now=0)
    watchdog.look(0, {0: at(1), 1: at(1)})
    found = actions(watchdog, {0: at(1), 1: at(1)}, range(1, 106))
    assert [second for second, action in enumerate(found, 1) if action is Action.ASK_FOR_STACKS] == [80]
    assert [second for second, action in enumerate(found, 1) if action is Action.KILL] == [105]
    assert watchdog.still_for(105) == 105


def test_any_rank_that_moves_starts_it_anew() -> None:
    watchdog = Watchdog(10, now=0)
    for second in range(0, 200, 8):
        assert watchdog.look(second, {0: at(1), 1: at(second)}) is Action.NOTHING


def test_a_rank_that_ends_is_no_sign_of_life() -> None:
    watchdog = Watchdog(10, now=0)
    watchdog.look(0, {0: at(5), 1: at(5)})
    watchdog.look(9, {1: at(5)})
    assert watchdog.look(15, {1: at(5)}) is Action.KILL


def test_bytes_count_outside_training_only() -> None:
    """In training a logger's thread writes too, and would hide that the ranks are stuck."""
    busy = Watchdog(10, now=0, allowance=20)
    stuck = Watchdog(10, now=0, allowance=20)
    for second in range(0, 300, 25):
        assert busy.look(second, {0: at(1, SAVING, moved=second), 1: at(1, SAVING)}) is not Action.KILL
    stuck.look(0, {0: at(1)})
    assert stuck.look(15, {0: at(1, moved=99)}) is Action.KILL


def test_one_slow_rank_gives_all_of_them_time() -> None:
    watchdog = Watchdog(10, now=0, allowance=20)
    watchdog.look(0, {0: at(1, SAVING), 1: at(1)})
    assert watchdog.look(34, {0: at(1, SAVING), 1: at(1)}) is not Action.KILL
    assert watchdog.look(35, {0: at(1, SAVING), 1: at(1)}) is Action.KILL


def test_a_pulse_is_read_back(tmp_path) -> None:
    path = pulse_file(tmp_path, 3)
    assert read_beat(path) == Beat()
    pulse = Pulse(path)
    pulse.enter(TRAINING)
    pulse.beat(step=123456789012)
    with pulse.phase(SAVING):
        assert read_beat(path) == Beat(3, 123456789012, SAVING)
    assert read_beat(path) == Beat(4, 123456789012, TRAINING)
    pulse.beat()
    assert path.stat().st_size == 64
    path.write_bytes(b"\0" * 64)
    assert read_beat(path) == Beat()
    Pulse().enter(TRAINING)  # without a supervisor nobody looks

"""What is killed when: a pure function of the number of kills and a seed."""

from __future__ import annotations

import itertools
import random
import signal
from dataclasses import dataclass
from enum import Enum

TOTAL_STEPS = 15
"""Three epochs of five steps."""
SAVE_FREQ = 2
CLI_EVERY = 25
"""Every so many kills one goes through the real command in processes of its own."""
_FEWEST_A_TRAJECTORY = 3
_MOST_A_TRAJECTORY = 6
# All but the last kill of a run come by this step: one that waits for its phase still leaves the next one steps to hit.
_LAST_STEP = 10


class Phase(Enum):
    """Where in a run the signal comes."""

    LOAD = "load"
    FETCH = "fetch"
    FORWARD = "forward"
    BACKWARD = "backward"
    OPTIMIZER = "optimizer"
    SAVE_SHARD = "save-shard"
    FSYNC = "fsync"
    RENAME = "rename"
    LATEST = "latest"
    PRUNE = "prune"
    EXPORT = "export"
    VALIDATE = "validate"
    EXIT = "exit"


class Target(Enum):
    """Whom the signal is sent to."""

    RANK = "rank"
    RANKS = "all ranks"
    SUPERVISOR = "supervisor"
    NODE = "supervisor and ranks"


# STOP is followed by KILL: a process that froze and was then taken away.
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGUSR2, signal.SIGSTOP, signal.SIGSEGV, signal.SIGINT)
GRACEFUL = frozenset({signal.SIGTERM, signal.SIGUSR2, signal.SIGINT})
# Where a checkpoint is being written: these come after the optimizer step whose checkpoint is due.
_IN_A_SAVE = (Phase.SAVE_SHARD, Phase.FSYNC, Phase.RENAME, Phase.LATEST, Phase.PRUNE)
_IN_A_STEP = (Phase.FETCH, Phase.FORWARD, Phase.BACKWARD, Phase.OPTIMIZER)


@dataclass(frozen=True)
class Strike:
    """One kill.

    Attributes:
        number: from 1, over the whole plan.
        step: it comes at the first chance at or after this optimizer step (from 1); 0 = while the run starts.
        phase: where.
        nth: chances of this phase that pass before it.
        rank: whose progress decides, and who is hit if ``target`` is a rank; modulo the world size.
        signal: what is sent.
        target: to whom.
    """

    number: int
    step: int
    phase: Phase
    nth: int
    rank: int
    signal: signal.Signals
    target: Target


@dataclass(frozen=True)
class Shape:
    """How a run trains.

    Attributes:
        lora: adapters instead of all weights.
        ulysses: ranks that share a sequence (on one rank: 1).
        accumulation: micro-batches of a step on two ranks.
        worlds: ranks before and after the middle of the kills.
    """

    lora: bool
    ulysses: int
    accumulation: int
    worlds: tuple[int, int]

    @property
    def exact(self) -> bool:
        """Equal bits are promised; otherwise the same rows, and losses within rounding."""
        return self.worlds == (2, 2)

    def __str__(self) -> str:
        world = "2 ranks" if self.exact else f"{self.worlds[0]}->{self.worlds[1]} ranks"
        return f"{'lora' if self.lora else 'full'}, ulysses {self.ulysses}, accumulation {self.accumulation}, {world}"


SHAPES = tuple(
    Shape(lora, ulysses, accumulation, worlds)
    for worlds, lora, ulysses, accumulation in itertools.product(
        ((2, 2), (2, 1), (1, 2)), (False, True), (1, 2), (1, 3)
    )
)


@dataclass(frozen=True)
class Trajectory:
    """One run with its kills.

    Attributes:
        number: from 1.
        shape: how it trains.
        strikes: one a start, in order; after them the run is left to end.
        cli: through the real command.
    """

    number: int
    shape: Shape
    strikes: tuple[Strike, ...]
    cli: bool = False

    def world(self, start: int) -> int:
        """Ranks of a start (from 0)."""
        return self.shape.worlds[2 * start >= len(self.strikes) + 1]


def make_plan(kills: int, seed: int) -> list[Trajectory]:
    """Spread ``kills`` over trajectories; 24 or more meet every shape.

    The kills of a trajectory are in the order of their steps.
    """
    draw = random.Random(seed)
    by_cli = kills // CLI_EVERY
    direct = kills - by_cli
    fewest = min(len(SHAPES), direct) if direct >= len(SHAPES) else -(-direct // _FEWEST_A_TRAJECTORY)
    count = max(fewest, -(-direct // _MOST_A_TRAJECTORY))
    # Of few trajectories each kind of world has its share.
    shapes = list(SHAPES)
    if count < len(SHAPES):
        draw.shuffle(shapes)
        shapes.sort(key=lambda shape: not shape.exact)
        half = -(-count * 2 // 3)
        shapes = [*shapes[: min(half, 8)], *shapes[8:]]
    numbers = itertools.count(1)
    plan: list[Trajectory] = []
    for index in range(count):
        share = direct // count + (index < direct % count)
        shape = shapes[index % len(shapes)]
        plan.append(Trajectory(len(plan) + 1, shape, _strikes(share, shape, draw, numbers)))
    for index in range(by_cli):
        shape = SHAPES[index % 8]  # equal bits: the world stays
        plan.append(Trajectory(len(plan) + 1, shape, _strikes(1, shape, draw, numbers), cli=True))
    return plan


def _strikes(count: int, shape: Shape, draw: random.Random, numbers: itertools.count[int]) -> tuple[Strike, ...]:
    """Kills in the order of their steps; about a third of them hit a start that recovers from another."""
    windows = _LAST_STEP // SAVE_FREQ
    strikes: list[Strike] = []
    # The window between two checkpoints that a kill falls into, at most two in each.
    places = sorted(draw.sample(sorted([*range(windows), *range(windows)]), count))
    for at, window in enumerate(places):
        first = window * SAVE_FREQ + 1
        recovering = at > 0 and places[at - 1] == window
        step = 0 if recovering and draw.random() < 0.7 else draw.randrange(first, first + SAVE_FREQ)
        last = at == count - 1 and draw.random() < 0.5
        strikes.append(_strike(next(numbers), step, first + SAVE_FREQ - 1, last, draw))
    return tuple(strikes)


def _strike(number: int, step: int, save_step: int, last: bool, draw: random.Random) -> Strike:
    if last:
        phase = draw.choice([Phase.EXPORT, Phase.EXIT, Phase.VALIDATE, Phase.LATEST])
        step = save_step = TOTAL_STEPS
    elif step == 0:
        phase = draw.choice([Phase.LOAD, Phase.LOAD, Phase.FETCH, Phase.FORWARD])
    else:
        # Two checkpoints are kept: nothing is removed before the third.
        saving = [phase for phase in _IN_A_SAVE if phase is not Phase.PRUNE or save_step > 2 * SAVE_FREQ]
        phase = draw.choice([*_IN_A_STEP, *saving, Phase.VALIDATE])
    if phase in _IN_A_SAVE:
        step = save_step
    nth = {Phase.SAVE_SHARD: 6, Phase.FSYNC: 8, Phase.RENAME: 4, Phase.PRUNE: 5, Phase.EXPORT: 10, Phase.LOAD: 3}
    number_of_ranks = 1 if phase in (Phase.RENAME, Phase.LATEST, Phase.PRUNE, Phase.EXPORT) else 2
    rank = draw.randrange(number_of_ranks)
    if rank:
        nth[Phase.FSYNC] = 1  # the other ranks write one file of a save
    sent = draw.choices(SIGNALS, weights=(8, 3, 2, 2, 2, 2))[0]
    return Strike(number, step, phase, draw.randrange(nth.get(phase, 1)), rank, sent, _target(sent, draw))


def _target(sent: signal.Signals, draw: random.Random) -> Target:
    if sent == signal.SIGSTOP:
        return Target.RANK
    if sent == signal.SIGSEGV:
        return draw.choice([Target.RANK, Target.RANKS])
    if sent in GRACEFUL:  # a scheduler may signal every process of a job
        return draw.choice([Target.RANK, Target.SUPERVISOR, Target.NODE])
    return draw.choices([Target.RANK, Target.RANKS, Target.SUPERVISOR, Target.NODE], weights=(5, 2, 2, 2))[0]

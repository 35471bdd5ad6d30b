"""A plan carried out: every trajectory with its kills, each compared with the run that nobody touched."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path

from tests.chaos import cli_run
from tests.chaos.inputs import SEED_YAML, make_inputs, run_overrides
from tests.chaos.oracle import Evidence, differences, gather, reference_faults
from tests.chaos.plan import TOTAL_STEPS, Shape, Strike, Trajectory
from tests.chaos.server import HangError, Server
from tests.chaos.world import End, Start, expected, run_start, strikes_done

_ENDINGS = 3
"""Starts that an undisturbed run may take to its end after the last strike (a stop may have come in its last step)."""


@dataclass(frozen=True)
class Verdict:
    """What came of one trajectory.

    Attributes:
        places: kill number -> where it really came.
        faults: what is wrong; empty = equal to the uninterrupted run.
        starts: how often it was started.
    """

    trajectory: Trajectory
    places: dict[int, str]
    faults: list[str]
    starts: int
    seconds: float
    folder: Path
    codes: list[int] = field(default_factory=list)


class Campaign:
    """Carries out trajectories, some at a time.

    Args:
        server: forks the processes.
        folder: for everything that is written; each trajectory's part is removed where it went well.
        tell: takes a line about each trajectory that ended.
    """

    def __init__(self, server: Server, folder: Path, tell: Callable[[str], None]) -> None:
        self._server = server
        self._folder = folder
        self._tell = tell
        self._references: dict[Shape, Evidence] = {}
        self._locks: dict[Shape, threading.Lock] = {}
        self._lock = threading.Lock()
        server.call(make_inputs, folder / "inputs")

    def run(self, plan: list[Trajectory], jobs: int) -> list[Verdict]:
        """All of them; in order of their numbers."""
        verdicts: list[Verdict] = []
        with ThreadPoolExecutor(jobs) as pool:
            for future in as_completed([pool.submit(self._trajectory, each) for each in plan]):
                verdict = future.result()
                verdicts.append(verdict)
                state = "equal" if not verdict.faults else "DIFFERS"
                kills = ", ".join(f"{n} {place}" for n, place in verdict.places.items())
                self._tell(f"{verdict.seconds:5.1f} s  {state}  {verdict.trajectory.shape}: {kills}")
                if not verdict.faults:
                    shutil.rmtree(verdict.folder, ignore_errors=True)
        return sorted(verdicts, key=lambda verdict: verdict.trajectory.number)

    def reference(self, shape: Shape) -> Evidence:
        """The uninterrupted run of this shape on two ranks."""
        # Where the world changes, what is compared has no dropout; otherwise the world does not matter here.
        key = replace(shape, worlds=(2, 2) if shape.exact else (2, 1))
        with self._lock:
            lock = self._locks.setdefault(key, threading.Lock())
        with lock:
            if key not in self._references:
                folder = self._folder / f"reference_{len(self._references)}_{threading.get_ident()}"
                end = self._start(folder, key, 0, 2, None)
                if end.code != 0:
                    raise AssertionError(f"the uninterrupted run ended with {end.code}:\n{end.output}")
                found = self._gather(folder)
                if faults := reference_faults(found):
                    raise AssertionError("the uninterrupted run is wrong itself: " + "; ".join(faults))
                self._references[key] = found
                shutil.rmtree(folder)
        return self._references[key]

    def _start(self, folder: Path, shape: Shape, number: int, world: int, strike: Strike | None) -> End:
        overrides = run_overrides(self._folder / "inputs", shape, world)
        environ = {"CHECKPOINT_DIR": str(folder), "SFT_JOB_ID": folder.name}
        start = Start(SEED_YAML, overrides, environ, folder / "control", number, world, strike)
        return self._server.call(run_start, start, timeout=start.hang_seconds + 30)

    def _gather(self, folder: Path) -> Evidence:
        return self._server.call(gather, folder / "sft", folder / "control")

    def _trajectory(self, trajectory: Trajectory) -> Verdict:
        began = time.monotonic()
        folder = self._folder / f"trajectory_{trajectory.number}"
        codes: list[int] = []
        try:
            reference = self.reference(trajectory.shape)
            if trajectory.cli:
                faults = self._cli(trajectory, folder, codes)
            else:
                faults = self._starts(trajectory, folder, codes)
            if not faults:
                found = self._gather(folder)
                faults = differences(reference, found, exact=trajectory.shape.exact, ledger=not trajectory.cli)
        except (HangError, AssertionError, OSError) as error:
            faults = [f"{type(error).__name__}: {error}"]
        places = strikes_done(folder / "control")
        if not faults and len(places) < len(trajectory.strikes):
            faults = [f"only {len(places)} of {len(trajectory.strikes)} kills found a chance"]
        seconds = time.monotonic() - began
        return Verdict(trajectory, places, faults, len(codes), seconds, folder, codes)

    def _starts(self, trajectory: Trajectory, folder: Path, codes: list[int]) -> list[str]:
        """Start it again and again, first with a strike each, then undisturbed to its end."""
        faults: list[str] = []
        pending = list(trajectory.strikes)
        for number in range(len(trajectory.strikes) + _ENDINGS):
            strike = pending.pop(0) if pending else None
            end = self._start(folder, trajectory.shape, number, trajectory.world(number), strike)
            codes.append(end.code)
            if end.hung:
                return [f"start {number} hung after kill {strike.number if strike else '-'}:\n{end.output[-2000:]}"]
            place = strikes_done(folder / "control").get(strike.number) if strike else None
            if strike is not None and place is not None:
                if not expected(strike, place)(end.code):
                    faults.append(
                        f"start {number}: exit code {end.code} after {_kill_text(strike)}\n{end.output[-2000:]}"
                    )
            elif strike is not None:
                # Nothing was left to train: the run was at its end before this kill's turn.
                faults.append(f"start {number}: kill {strike.number} found no chance, exit code {end.code}")
            elif end.code == 0:
                return faults
            elif end.code != 143:
                faults.append(f"start {number}: exit code {end.code} without a kill\n{end.output[-2000:]}")
        return [*faults, f"not at its end after {len(codes)} starts"]

    def _cli(self, trajectory: Trajectory, folder: Path, codes: list[int]) -> list[str]:
        overrides = run_overrides(self._folder / "inputs", trajectory.shape, 2)
        (strike,) = trajectory.strikes
        return cli_run.killed_and_resumed(folder, SEED_YAML, overrides, strike, codes)


def _kill_text(strike: Strike) -> str:
    who = f"rank {strike.rank}" if strike.target.value == "rank" else strike.target.value
    when = f"step {strike.step}" if strike.step else "its start"
    return f"kill {strike.number} ({strike.signal.name} to {who}, {strike.phase.value} at {when})"


def kill_text(strike: Strike) -> str:
    """One kill in words."""
    return _kill_text(strike)


__all__ = ["TOTAL_STEPS", "Campaign", "Verdict", "kill_text"]

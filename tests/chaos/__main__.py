"""``make chaos KILLS=n SEED=s``: kill runs at chosen instants and compare each with the run that nobody touched.

The exit code is 0 where every one of them is equal.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.chaos.campaign import Campaign, Verdict, kill_text
from tests.chaos.plan import Strike, Trajectory, make_plan
from tests.chaos.server import Server
from tests.chaos.shim import compiler


def main() -> int:
    """Carry out a plan and show what came of it."""
    parser = argparse.ArgumentParser(prog="make chaos", description=__doc__)
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, help="only the run that this kill belongs to, with all of its kills")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--show", action="store_true", help="only show the plan")
    given = parser.parse_args()
    console = Console(soft_wrap=True, highlight=False)
    if compiler() is None:
        console.print("no C compiler (gcc, cc, clang): the shim that watches the file calls cannot be built")
        return 2
    plan = make_plan(given.kills, given.seed)
    if given.only is not None:
        plan = [each for each in plan if any(strike.number == given.only for strike in each.strikes)]
    if given.show:
        _show(plan, console)
        return 0
    console.print(f"{sum(len(each.strikes) for each in plan)} kills in {len(plan)} runs, seed {given.seed}")
    folder = Path(tempfile.mkdtemp(prefix="sft_chaos_"))
    began = time.monotonic()
    with Server() as server:
        verdicts = Campaign(server, folder, console.print).run(plan, given.jobs)
    seconds = time.monotonic() - began
    _table(verdicts, console)
    failed = [verdict for verdict in verdicts if verdict.faults]
    for verdict in failed:
        _tell_failure(verdict, given.kills, given.seed, console)
    kills = sum(len(verdict.places) for verdict in verdicts)
    equal = sum(len(verdict.places) for verdict in verdicts if not verdict.faults)
    starts = sum(verdict.starts for verdict in verdicts)
    shapes = len({verdict.trajectory.shape for verdict in verdicts})
    console.print(
        f"kills {kills} in {len(verdicts)} runs of {shapes} configurations ({starts} starts): "
        f"resumed equal {equal} of {kills}, {seconds:.0f} s"
    )
    if not failed:
        shutil.rmtree(folder)
    return 1 if failed else 0


def _show(plan: Iterable[Trajectory], console: Console) -> None:
    for each in plan:
        console.print(f"run {each.number}{' (command)' if each.cli else ''}: {each.shape}")
        for strike in each.strikes:
            console.print(f"    {kill_text(strike)}, after {strike.nth} chances")


def _tell_failure(verdict: Verdict, kills: int, seed: int, console: Console) -> None:
    number = verdict.trajectory.strikes[0].number
    console.print(f"\nrun {verdict.trajectory.number} ({verdict.trajectory.shape}), exit codes {verdict.codes}:")
    for strike in verdict.trajectory.strikes:
        console.print(f"  {kill_text(strike)}: {verdict.places.get(strike.number, 'not reached')}", markup=False)
    for fault in verdict.faults[:12]:
        console.print(f"  - {fault}", markup=False)
    console.print(f"  its files: {verdict.folder}")
    console.print(f"  again: make chaos KILLS={kills} SEED={seed} ONLY={number}")


def _table(verdicts: Iterable[Verdict], console: Console) -> None:
    """Kills by phase and signal."""
    counts: Counter[tuple[str, str]] = Counter()
    for verdict in verdicts:
        for strike in verdict.trajectory.strikes:
            if strike.number in verdict.places:
                counts[_phase(strike, verdict), strike.signal.name.removeprefix("SIG")] += 1
    phases = sorted(
        {phase for phase, _ in counts}, key=lambda phase: -sum(n for (p, _), n in counts.items() if p == phase)
    )
    signals = ("KILL", "TERM", "USR2", "STOP", "SEGV", "INT")
    table = Table("phase", *signals, "all", title="kills by phase and signal (STOP is followed by KILL)")
    for phase in phases:
        row = [counts[phase, name] for name in signals]
        table.add_row(phase, *(str(number or "") for number in row), str(sum(row)))
    columns = [sum(counts[phase, name] for phase in phases) for name in signals]
    table.add_row("all", *map(str, columns), str(sum(columns)))
    console.print(table)


def _phase(strike: Strike, verdict: Verdict) -> str:
    """Where the kill came: the planned phase, unless it found no chance there."""
    place = verdict.places[strike.number]
    names = {"forward", "exit"}
    return place if place in names else strike.phase.value


if __name__ == "__main__":
    sys.exit(main())

"""``sft-job preflight``: on each node of an allocation, with the environment of ``train``: is it fit to train on?

The process that the user started is torch-free; the ranks (``preflight.rank``) meet and judge, this one shows.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sft_job.config.load import run_folder
from sft_job.config.resolve import Resolution
from sft_job.config.topology import Topology
from sft_job.contract import Env, ExitCode, RunFolder
from sft_job.errors import JobError, Problem, ProblemsError, problems_text, raise_problems
from sft_job.opening import examined
from sft_job.oversight import Listener
from sft_job.preflight.facts import FACTS_FILE, RESULT_FILE, NodeFacts, all_facts, to_wire
from sft_job.preflight.findings import Check
from sft_job.preflight.shared import own_token
from sft_job.preflight.space import space_needed
from sft_job.processes import adopt_orphans, reap
from sft_job.pulse import pulse_file, read_beat
from sft_job.ranks import RankEnd, RankGroup, verdict
from sft_job.streams import say

LIMIT_SECONDS = 60.0
_TOGETHER_SECONDS = 25.0
"""Of the limit, kept for what the nodes do together once all are there."""
_LATE_SECONDS = 3.0
_STYLES = {"ok": "green", "note": "yellow", "FAIL": "bold red"}
# Nobody wraps lines in a pipe.
_PIPE_WIDTH = 160


def preflight_job(config_arg: str | None, overrides: Sequence[str], environ: Mapping[str, str], limit: float) -> int:
    """Look at this node and, with the others, at all of them; the first node shows a table.

    Args:
        config_arg: config file, None = by the environment.
        overrides: ``key=value``.
        environ: environment variables, those of ``train``.
        limit: seconds after which there is an answer, whoever is missing.

    Returns:
        0 where the allocation is fit, the same code on every node; 2, 65, 66, 73 by what is wrong; 137 where a node did
        not come or cannot be reached; 143 where it was stopped.
    """
    listener = Listener().install()
    adopt_orphans()
    began = time.monotonic()
    resolution = examined(config_arg, overrides, environ)
    # What is wrong with data or model on this node alone is told by the first node, with all the rest.
    local = [problem for problem in resolution.problems if problem.code in (ExitCode.DATA, ExitCode.MODEL)]
    try:
        raise_problems([problem for problem in resolution.problems if problem not in local])
        with tempfile.TemporaryDirectory(prefix="sft_job_") as reports:
            with own_token(run_folder(resolution.loaded.config).root) as token:
                facts = all_facts(resolution.loaded.config, resolution.topology, token, environ, local)
                end = _run_ranks(resolution, facts, Path(reports), environ, listener, began, began + limit)
            return _tell(resolution, end, Path(reports))
    except JobError as error:
        say(f"{error}\n")
        return error.code


def _run_ranks(
    resolution: Resolution,
    facts: NodeFacts,
    reports: Path,
    environ: Mapping[str, str],
    listener: Listener,
    began: float,
    deadline: float,
) -> RankEnd:
    """The ranks' end; their time is up a little after the deadline."""
    config, topology = resolution.loaded.config, resolution.topology
    space = space_needed(config, resolution.model) if resolution.model else None
    left = deadline - time.monotonic()
    meet_until = deadline - min(_TOGETHER_SECONDS, left / 2)
    given = {
        "facts": to_wire(facts),
        "space": asdict(space) if space else None,
        "began": began,
        "meet_until": meet_until,
    }
    (reports / FACTS_FILE).write_text(json.dumps(given), encoding="utf-8")
    logs = RunFolder(reports)
    logs.logs.mkdir()
    command = [sys.executable, "-m", "sft_job.preflight.rank"]
    ranks = RankGroup(command, topology, logs, reports, {**environ, Env.DEADLINE: repr(deadline)})
    while not ranks.step():
        reap(ranks.pids)
        if listener.stopped():
            ranks.kill()
            raise JobError(ExitCode.STOPPED, "stopped before there was a verdict")
        if time.monotonic() > deadline + _LATE_SECONDS:
            phases = {read_beat(pulse_file(reports, rank)).phase.replace("-", " ") for rank in _own_ranks(topology)}
            ranks.kill()
            return RankEnd(0, ExitCode.LOST, f"no answer in time; its ranks were {' and '.join(sorted(phases))}", {})
    return verdict(ranks.ends())


def _own_ranks(topology: Topology) -> range:
    first = topology.node_rank * topology.nproc_per_node
    return range(first, first + topology.nproc_per_node)


def _tell(resolution: Resolution, end: RankEnd, reports: Path) -> int:
    """Show what was found; the exit code."""
    topology = resolution.topology
    try:
        result: dict[str, Any] = json.loads((reports / RESULT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise _no_verdict(topology, end) from None
    checks = [Check.from_wire(fields) for fields in result["checks"]]
    code = ExitCode(result["code"])
    problems = [problem for check in checks for problem in check.problems]
    if topology.node_rank == 0:
        console = Console(highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH)
        console.print(f"preflight of {topology.nnodes} node(s) x {topology.nproc_per_node} ranks")
        console.print(checks_table(checks))
    if problems:
        say(f"{problems_text(problems)}\nnot fit to train on: exit code {int(code)} ({code.reason})\n")
    else:
        Console(highlight=False).print(f"node {topology.node_rank}: fit to train on")
    return code


def checks_table(checks: Sequence[Check]) -> Table:
    """A line for each check; its notes below it, and problems in a word: they are told in full after the table."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in checks:
        verdict_text = Text(check.verdict, _STYLES.get(check.verdict, "dim"))
        heads = [problem.subject for problem in check.problems]
        text = "\n".join([*([check.text] if check.text else []), *check.notes, *heads])
        table.add_row(check.name, verdict_text, Text(text if check.tried else "not tried"))
    return table


def _no_verdict(topology: Topology, end: RankEnd) -> JobError:
    """This node heard nothing of the first one, or its own ranks died."""
    if end.code not in (ExitCode.LOST, ExitCode.BUG):
        return JobError(end.code, end.message)
    where = f"{topology.master_addr}:{topology.master_port}"
    lines = "".join(f"\n      {line}" for line in end.last_lines)
    if topology.node_rank > 0:
        rule = f"no verdict came from node 0 at {where}: {end.message}"
        fix = f"is node 0 there? can this node resolve and reach {where}? see the log of node 0"
    elif end.code == ExitCode.BUG:
        return JobError(end.code, f"a bug in sft_job, in a rank of the preflight:{lines}")
    else:
        rule = f"the ranks of this node ended without a verdict: {end.message}{lines}"
        fix = "see what they said; it is the same that a run would meet"
    return ProblemsError([Problem(ExitCode.LOST, f"node {topology.node_rank}", rule, fix)])

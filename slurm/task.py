"""What submitit runs on each node, outside of any container: starts the job there, and queues it again.

The job is a child process. Here is only waiting, so that a signal is answered within a moment whatever the job does.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sft_job.contract import DEFAULT_CONFIG_NAME, STOP_SIGNALS, Env, ExitCode
from sft_job.jobfile.validate import OURS
from sft_job.processes import kill_tree
from sft_job.streams import say
from slurm.aftermath import Aftermath
from slurm.allocation import Allocation, read_allocation
from slurm.containers import Setting, job_command, job_environ, removal_command
from slurm.controller import job_state
from slurm.ends import Ends, Peers
from slurm.listener import Listener
from slurm.plan import NO_PREFLIGHT, ONLY_PREFLIGHT, Plan
from slurm.requeue import code_of, joint_code
from slurm.settings import KILL_SECONDS, LEAVE_SECONDS

_POLL_SECONDS = 0.2
_GATHER_SECONDS = 20.0
"""How long the end of this node waits for those of the others."""
_ANSWER_SECONDS = 5.0
"""Kept before the time limit, to queue again."""
_DIE_SECONDS = 2.0
"""How long a killed child is waited for: one that waits for a dead file server cannot die."""
_REMOVE_SECONDS = 60
_EARLY_SECONDS = 75.0
"""Slurm's warning comes so long before we ask at the most: up to a minute, and some seconds."""


def run_node(values: Mapping[str, Any]) -> None:
    """Run the job on this node; ends the process with the job's exit code unless it is done.

    Args:
        values: of the ``Plan``.
    """
    node = Node(Plan.of(values), read_allocation(os.environ), os.environ)
    code = node.run()
    # What Slurm still sends to end this start must not change its code.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    if code != ExitCode.DONE:
        # No error that submitit would keep: the code is what Slurm shows, and what was wrong stands in the log.
        sys.exit(code)


class Node:
    """The job on one node, from its start to what becomes of it.

    Args:
        plan: what is to happen.
        allocation: where this node stands.
        environ: environment of this process.
        clock: Unix time.
    """

    def __init__(
        self,
        plan: Plan,
        allocation: Allocation,
        environ: Mapping[str, str],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._plan = plan
        self._here = allocation
        self._clock = clock
        self._listener = Listener()
        folder = Path(plan.folder)
        self._ends = Ends(folder, allocation.job_id, allocation.start)
        self._after = Aftermath(plan, allocation.job_id, allocation.start, self._tell)
        variables = job_variables(plan, allocation, environ)
        host = allocation.hosts[allocation.node]
        self._setting = Setting(
            plan, variables, allocation.job_id, allocation.node, host, f"{os.getuid()}:{os.getgid()}"
        )

    def run(self) -> int:
        """Run what the plan says; the exit code of this node's task."""
        self._listener.install()
        first = self._here.node == 0
        self._remove_leftovers()
        own = self._run_verbs()
        self._ends.put(self._here.node, own)
        ends = self._gather()
        code = joint_code(ends)
        if not first:
            return code
        missing = len(ends) < self._here.nodes
        verdict = self._after.judge(code, self._listener.asked, over=self._is_late(), missing=missing)
        self._after.act(verdict)
        self._ends.settle(verdict.code)
        return verdict.code

    def _run_verbs(self) -> int:
        arguments = [self._plan.config, *self._plan.overrides]
        code = int(ExitCode.DONE)
        if self._plan.preflight != NO_PREFLIGHT:
            code = self._run_child(job_command(self._setting, "preflight", *arguments))
        if code != ExitCode.DONE or self._plan.preflight == ONLY_PREFLIGHT:
            return code
        if self._listener.asked.any:
            return int(ExitCode.STOPPED)
        # A container runtime may listen to nothing, and would pass nothing on.
        return self._run_child(job_command(self._setting, "train", *arguments), listens=self._plan.container == "none")

    def _run_child(self, command: Sequence[str], *, listens: bool = False) -> int:
        """Run a command to its end; its exit code by the contract.

        Args:
            command: what to run.
            listens: it unblocks signals once it listens to them, so that one that comes early waits there.
        """
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS) if listens else ()
        try:
            child = subprocess.Popen(command, env=job_environ(self._setting), stdin=subprocess.DEVNULL)
        except OSError as error:
            say(f"slurm: {command[0]} cannot be started on {self._setting.host}: {error.strerror or error}\n")
            return int(ExitCode.CONFIG)
        finally:
            if listens:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._listener.passes_to(child)
        peers = Peers(self._ends, self._here.node)
        killed_at: float | None = None
        while child.poll() is None and (killed_at is None or time.monotonic() < killed_at + _DIE_SECONDS):
            time.sleep(_POLL_SECONDS)
            self._look_at_the_clock()
            number = peers.wish(time.monotonic(), self._plan.grace_seconds)
            if number is not None:
                self._tell(f"another node ended with {peers.code}: this one's job is sent {number.name}")
            elif killed_at is None and self._is_late():
                self._tell("the time limit is here and the job has not left: it is killed")
                number = signal.SIGKILL
            if number == signal.SIGKILL:
                killed_at = time.monotonic()
                self._kill(child)
            elif number is not None:
                with contextlib.suppress(ProcessLookupError):
                    child.send_signal(number)
        self._listener.passes_to(None)
        if child.returncode is None:
            return int(ExitCode.LOST)
        return code_of(child.returncode, self._listener.asked)

    def _kill(self, child: subprocess.Popen[bytes]) -> None:
        """Kill what was started: the ranks have sessions of their own, and a container is nobody's child."""
        kill_tree(child.pid)
        command = removal_command(self._setting)
        if command is not None:  # not waited for: what is left of the time is for the requeue
            with contextlib.suppress(OSError):
                subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)

    def _is_late(self) -> bool:
        """Whether the job must be gone by now, so that it can be queued again before Slurm ends it."""
        end = self._here.end_time
        return end is not None and self._clock() >= end - KILL_SECONDS

    def _look_at_the_clock(self) -> None:
        """Ask the job to save when its time is nearly over, or when Slurm warns of something else.

        Node 0 alone does: its ranks tell the others'. Slurm's warning of the time limit is early, and comes at the
        start of a job whose whole time is short; the clock is exact. A preflight alone has nothing to save, and a time
        that the job's grace may fill.
        """
        if self._here.node != 0 or self._plan.preflight == ONLY_PREFLIGHT:
            return
        end, grace = self._here.end_time, self._plan.grace_seconds + LEAVE_SECONDS
        if end is not None and self._clock() >= end - grace and not self._listener.asked.any:
            self._tell("the time limit is near: the job saves and leaves")
            self._listener.ask_to_save(limit=True)
        if self._listener.take_warning():
            state = job_state(self._here.job_id)
            preempted = state is not None and state.preempted
            near = end is None or self._clock() >= end - grace - _EARLY_SECONDS
            # Of a time limit that is known the clock takes care; a controller that does not answer may mean either.
            if preempted or not near or end is None or state is None:
                self._tell("Slurm warns: the job saves and leaves")
                self._listener.ask_to_save(limit=near and not preempted)

    def _gather(self) -> dict[int, int]:
        """The ends of all nodes, or of those that are known after a while."""
        began, end = self._clock(), self._here.end_time
        deadline = began + _GATHER_SECONDS
        if end is not None and began < end:
            deadline = min(deadline, end - _ANSWER_SECONDS)
        while len(ends := self._ends.all()) < self._here.nodes and self._clock() < deadline:
            time.sleep(_POLL_SECONDS)
        return ends

    def _remove_leftovers(self) -> None:
        """A container of an earlier start that Slurm's kill did not reach."""
        command = removal_command(self._setting)
        if command is not None:
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                subprocess.run(command, capture_output=True, timeout=_REMOVE_SECONDS, check=False)

    def _tell(self, text: str) -> None:
        say(f"slurm: start {self._here.start} of job {self._here.job_id}, node {self._here.node}: {text}\n")


def job_variables(plan: Plan, here: Allocation, environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of the job on this node: Slurm's and the submitter's, what the job file says, and the contract's.

    What others may have left of the contract's variables (a torchrun, a shell that trains) is taken out.
    """
    config = Path(plan.config)
    # An srun that starts a container keeps its own way to fail.
    variables = {name: value for name, value in environ.items() if name not in {*OURS, "SLURM_EXIT_ERROR"}}
    if plan.interface:
        variables["NCCL_SOCKET_IFNAME"] = plan.interface
        if not plan.interface.startswith("^"):  # gloo takes names only
            variables["GLOO_SOCKET_IFNAME"] = plan.interface.lstrip("=")
    variables |= plan.environment
    variables |= {
        Env.CONFIG_PATH: str(config.parent),
        Env.CONFIG_NAME: config.name or DEFAULT_CONFIG_NAME,
        Env.CHECKPOINT_DIR: plan.checkpoint_dir,
        Env.NPROC_PER_NODE: str(plan.ranks_per_node),
        Env.NNODES: str(here.nodes),
        Env.NODE_RANK: str(here.node),
        Env.JOB_ID: here.job_id,
    }
    if plan.gpus_per_node:
        variables[Env.GPUS_PER_NODE] = str(plan.gpus_per_node)
    if here.nodes > 1:
        variables[Env.MASTER_ADDR] = here.hosts[0]
        variables[Env.MASTER_PORT] = str(plan.master_port or here.port)
    if here.end_time is not None:
        variables[Env.END_TIME] = repr(here.end_time - KILL_SECONDS)
    return variables

"""One start of a run: the real supervisor and the real ranks, forked instead of started, one of them struck."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.chaos.plan import GRACEFUL, Phase, Strike, Target
from tests.chaos.shim import Act, Op, Shim

JOURNAL = "strikes"
"""In the control folder: a line for each strike that was done: kill number, planned phase, place, process."""
SEEN = "seen"
"""In the control folder: how many calls the shim of an armed rank 0 saw."""
_SUBREAPER = 36
_FROZEN_SECONDS = 0.3
_PATIENCE = 3
"""Steps that a strike waits for its phase."""


@dataclass(frozen=True)
class Arm:
    """What the shim does in rank 0 from an optimizer step on, under ``root``; at its exit the rank notes the count.

    Attributes:
        step: 0 = from the rank's start.
        act: ``Act.STRIKE`` = SIGKILL at the call after ``skip`` others; see ``Shim.arm``.
    """

    step: int
    ops: Op
    root: Path
    part: str
    act: Act
    skip: int = 0
    value: int = 0


@dataclass(frozen=True)
class Start:
    """What to start.

    Attributes:
        overrides: ``key=value`` after the config file.
        environ: on top of the server's environment.
        control: folder for logs, pid files, the journal and the ledger; one for a whole trajectory.
        number: of this start, from 0.
        world: ranks.
        strike: None = let it run.
        hang_seconds: longest time that it may take.
        arm: of rank 0, where there is no strike.
    """

    config: Path
    overrides: tuple[str, ...]
    environ: Mapping[str, str]
    control: Path
    number: int
    world: int
    strike: Strike | None = None
    hang_seconds: float = 90.0
    arm: Arm | None = None


@dataclass(frozen=True)
class End:
    """How a start ended: the supervisor's exit code (negative: the signal that killed it), and what was left."""

    code: int
    seconds: float
    hung: bool
    orphans: int
    output: str = field(repr=False, default="")


def run_start(start: Start) -> End:
    """Start, wait for the supervisor and every process it leaves, and clean up after a hang."""
    ctypes.CDLL(None).prctl(_SUBREAPER, 1)
    start.control.mkdir(parents=True, exist_ok=True)
    for old in start.control.glob("*.pid"):
        old.unlink()
    log = start.control / f"start_{start.number}.log"
    began = time.monotonic()
    supervisor = _fork(lambda: _supervise(start, log))
    (start.control / "supervisor.pid").write_text(str(supervisor))
    code, hung, orphans = _wait(supervisor, start, began + start.hang_seconds)
    return End(code, time.monotonic() - began, hung, orphans, log.read_text(errors="replace"))


def _wait(supervisor: int, start: Start, deadline: float) -> tuple[int, bool, int]:
    """Wait until no process is left; a frozen one is killed after a moment."""
    code: int | None = None
    orphans = 0
    frozen_since: float | None = None
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return code if code is not None else 1, False, orphans
        if pid == supervisor:
            code = os.waitstatus_to_exitcode(status)
        elif pid:
            orphans += 1
        else:
            if time.monotonic() > deadline:
                _kill_all()
                return code if code is not None else 1, True, orphans
            if frozen_since is None and start.strike is not None and start.strike.signal == signal.SIGSTOP:
                frozen_since = time.monotonic() if _struck(start) else None
            elif frozen_since is not None and time.monotonic() > frozen_since + _FROZEN_SECONDS:
                _end_frozen(start)
                frozen_since = float("inf")
            time.sleep(0.01)


def _struck(start: Start) -> bool:
    return start.strike is not None and start.strike.number in strikes_done(start.control)


def strikes_done(control: Path) -> dict[int, str]:
    """Kill number -> the place where it came, of the strikes that were done."""
    try:
        lines = [line.split() for line in (control / JOURNAL).read_text().splitlines()]
    except FileNotFoundError:
        return {}
    return {int(number): place for number, _, place, _ in lines}


def _end_frozen(start: Start) -> None:
    assert start.strike is not None
    path = start.control / f"rank_{start.strike.rank % start.world}.pid"
    with contextlib.suppress(OSError, ValueError):
        os.kill(int(path.read_text()), signal.SIGKILL)


def _kill_all() -> None:
    """End every descendant: they are this process's children, or theirs."""
    while True:
        found = [
            int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit() and _parent(path) == os.getpid()
        ]
        if not found:
            return
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


def _parent(process: Path) -> int:
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return -1


def _fork(action: Callable[[], int]) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        code = action()
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _supervise(start: Start, log: Path) -> int:
    from rich.console import Console

    from sft_job.supervisor import Supervisor

    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.closerange(3, 256)
    os.environ.update(start.environ)
    os.environ["NPROC_PER_NODE"] = str(start.world)

    class Forked(_ForkedProcess):
        chaos = start

    # In this process only, which ends with the run: the same interpreter again would be seconds of imports.
    subprocess.Popen = Forked  # type: ignore[misc]
    return int(Supervisor(Console(), os.environ).train(str(start.config), list(start.overrides)))


class _ForkedProcess(subprocess.Popen):  # type: ignore[type-arg]
    """``subprocess.Popen`` that forks where the command is a module of this job; the rest of it is the real one."""

    chaos: Start

    def _execute_child(self, args: Any, *rest: Any) -> None:  # type: ignore[override]
        (_, _, _, pass_fds, cwd, env, _, _, _, *pipes) = rest
        p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, _, _, _, _, _, new_session, _ = pipes
        module = args[args.index("-m") + 1] if isinstance(args, list) and "-m" in args else ""
        if module not in ("sft_job.train", "sft_job.prepare"):
            super()._execute_child(args, *rest)
            return
        arguments = args[args.index("-m") + 2 :]

        def child() -> int:
            for source, target in ((p2cread, 0), (c2pwrite, 1), (errwrite, 2)):
                if source != -1:
                    os.dup2(source, target, inheritable=True)
            kept = sorted(pass_fds)
            for low, high in zip([2, *kept], [*kept, 256], strict=True):
                os.closerange(low + 1, high)
            if new_session:
                os.setsid()
            if cwd is not None:
                os.chdir(cwd)
            if env is not None:
                os.environ.clear()
                os.environ.update(env)
            return _run_module(module, arguments, self.chaos)

        self.pid = _fork(child)
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)  # type: ignore[attr-defined]


def _run_module(module: str, arguments: list[str], start: Start) -> int:
    import torch

    torch.set_num_threads(1)
    if module == "sft_job.prepare":
        from sft_job.prepare import main as prepare

        return int(prepare(arguments))
    from sft_job.train import main as train

    rank = int(os.environ["RANK"])
    (start.control / f"rank_{rank}.pid").write_text(str(os.getpid()))
    watch = Watch(rank, start)
    watch.install()
    code = int(train(arguments))
    watch.at_exit()
    return code


class Watch:
    """Follows one rank through its run by torch's global hooks, writes the ledger, and strikes when it is time."""

    def __init__(self, rank: int, start: Start) -> None:
        self._rank = rank
        self._start = start
        strike = start.strike
        self._strike = strike if strike is not None and strike.rank % start.world == rank else None
        self._shim = Shim()
        self._rows: dict[int, list[int]] = {}
        self._step: int | None = None  # steps done; None before the first batch was asked for
        self._tokens = hashlib.sha256()
        self._left = self._strike.nth if self._strike else 0

    def install(self) -> None:
        """Set the hooks."""
        from torch.nn.modules import module
        from torch.optim import optimizer

        module.register_module_forward_pre_hook(self._forward)
        module.register_module_forward_hook(self._after_forward)
        optimizer.register_optimizer_step_pre_hook(self._before_step)
        optimizer.register_optimizer_step_post_hook(self._stepped)
        self._watch_rows()
        if self._strike is not None:
            strike = self._strike
            files = {
                Target.RANK: [],
                Target.RANKS: [f"rank_{rank}" for rank in range(self._start.world)],
                Target.SUPERVISOR: ["supervisor"],
                Target.NODE: ["supervisor", *(f"rank_{rank}" for rank in range(self._start.world))],
            }[strike.target]
            paths = [self._start.control / f"{name}.pid" for name in files]
            text = f"{strike.number} {strike.phase.value}"
            self._shim.prepare(self._start.control / JOURNAL, text, strike.signal, paths)
            if strike.phase is Phase.LOAD:
                sys.addaudithook(self._opened)
        elif self._start.arm is not None and self._rank == 0 and self._start.arm.step == 0:
            self._arm(self._start.arm)

    def _arm(self, arm: Arm) -> None:
        self._shim.prepare(self._start.control / JOURNAL, "0 armed", signal.SIGKILL)
        self._shim.arm(arm.ops, arm.root, arm.part, arm.act, skip=arm.skip, value=arm.value)

    def at_exit(self) -> None:
        """A strike that found no chance comes now, so that every planned kill is one."""
        if self._strike is not None:
            self._shim.disarm()
            self._shim.strike(Phase.EXIT.value)
        elif self._start.arm is not None and self._rank == 0:
            (self._start.control / SEEN).write_text(str(self._shim.seen()))

    def _watch_rows(self) -> None:
        from sft_job.data.order import RowOrder

        rows = RowOrder.rows

        def watched(order: RowOrder, step: int) -> Any:
            found = rows(order, step)
            self._rows[step] = [int(row) for row in found]
            if self._step is None:
                self._step = step
            if step + 1 >= self._at:
                self._meet(Phase.FETCH)
            return found

        RowOrder.rows = watched  # type: ignore[method-assign]

    @property
    def _at(self) -> int:
        return self._strike.step if self._strike is not None else sys.maxsize

    def _meet(self, phase: Phase) -> None:
        """A chance to strike: the phase is the planned one and the step has come."""
        strike = self._strike
        if strike is None or strike.phase is not phase:
            return
        if phase is not Phase.FETCH and (self._step or 0) + 1 < strike.step:
            return
        if self._left > 0:
            self._left -= 1
            return
        self._shim.strike(phase.value)

    def _opened(self, event: str, arguments: tuple[Any, ...]) -> None:
        if (
            event == "open"
            and str(arguments[0]).endswith((".distcp", ".metadata"))
            and "/checkpoints/" in str(arguments[0])
        ):
            self._meet(Phase.LOAD)

    def _forward(self, module: Any, arguments: tuple[Any, ...]) -> None:
        from sft_job.model.causal_lm import CausalLMLoss

        if not isinstance(module, CausalLMLoss):
            return
        if not module.training:
            # After the step that is validated.
            if self._step is not None and self._step >= self._at:
                self._meet(Phase.VALIDATE)
            return
        if self._strike is not None and self._strike.phase is Phase.LOAD and self._strike.step == 0:
            self._shim.strike(Phase.FORWARD.value)  # there was nothing to load
        if self._strike is not None and (self._step or 0) >= self._strike.step + _PATIENCE:
            self._shim.strike(Phase.FORWARD.value)  # its phase has not come: kills that follow need steps to train
        batch = arguments[0]
        if self._step is not None:  # what comes before the first batch is the rehearsal
            for tensor in (batch.input_ids, batch.position_ids, batch.targets):
                self._tokens.update(tensor.numpy().tobytes())
        self._meet(Phase.FORWARD)

    def _after_forward(self, module: Any, arguments: Any, output: Any) -> None:
        from sft_job.model.causal_lm import CausalLMLoss

        if isinstance(module, CausalLMLoss) and output.requires_grad:
            output.register_hook(lambda gradient: self._meet(Phase.BACKWARD))

    def _before_step(self, *_: Any) -> None:
        if self._step is not None:
            self._meet(Phase.OPTIMIZER)

    def _stepped(self, optimizer: Any, *_: Any) -> None:
        """After an optimizer step: note what was trained on, and watch the files from the planned step on."""
        import torch

        if self._step is None:
            return  # torch makes an empty step when it loads an optimizer's state
        record = {
            "start": self._start.number,
            "rank": self._rank,
            "world": self._start.world,
            "step": self._step + 1,
            "rows": self._rows.pop(self._step),
            "lr": optimizer.param_groups[0]["lr"],
            "tokens": self._tokens.hexdigest(),
            "seed": torch.initial_seed(),
            "rng": hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest(),
        }
        self._tokens = hashlib.sha256()
        line = json.dumps(record) + "\n"
        ledger = os.open(self._start.control / "ledger.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(ledger, line.encode())
        os.close(ledger)
        self._step += 1
        arm = self._start.arm
        if self._step >= self._at:
            self._watch_files()
        elif arm is not None and self._rank == 0 and self._step == arm.step:
            self._arm(arm)

    def _watch_files(self) -> None:
        assert self._strike is not None
        places: dict[Phase, tuple[Op, str]] = {
            Phase.SAVE_SHARD: (Op.WRITE, ".distcp"),
            Phase.FSYNC: (Op.FSYNC, "/checkpoints"),
            Phase.RENAME: (Op.RENAME, "/checkpoints/"),
            Phase.LATEST: (Op.RENAME, "/latest"),
            Phase.PRUNE: (Op.RENAME | Op.UNLINK, "/.pruned"),
            Phase.EXPORT: (Op.WRITE, "/adapter/" if "model.lora_rank=4" in self._start.overrides else "/huggingface/"),
        }
        if self._strike.phase in places and not self._shim.struck:
            ops, part = places[self._strike.phase]
            self._shim.arm(ops, self._start.control.parent, part, Act.STRIKE, skip=self._strike.nth)


def expected(strike: Strike, place: str) -> Callable[[int], bool]:
    """Which exit codes are right after a strike; ``place`` is where it came."""
    killed = strike.target in (Target.SUPERVISOR, Target.NODE) and strike.signal not in GRACEFUL
    late = place == Phase.EXIT.value

    def right(code: int) -> bool:
        if killed:
            return code == -strike.signal
        if strike.signal in GRACEFUL:
            return code in (143, 0)
        return code == 137 or (late and code == 0)

    return right

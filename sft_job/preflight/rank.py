"""Entry of one rank of a preflight: leave word, meet the others, send through the network, hear the verdict.

Rank 0 judges, and keeps the store until the others have heard. The supervising process gives facts and the time limit.
"""

from __future__ import annotations

import json
import os
import signal
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sft_job.contract import STACK_SIGNAL, STOP_SIGNALS, Env, ExitCode
from sft_job.errors import JobError, worst_code
from sft_job.preflight.board import Board, open_board
from sft_job.preflight.facts import FACTS_FILE, RESULT_FILE, NodeFacts, from_wire, to_wire
from sft_job.preflight.findings import Network, Speed
from sft_job.preflight.judge import check_presence, judge
from sft_job.preflight.network import measure
from sft_job.preflight.shared import Token, unseen
from sft_job.preflight.space import Space
from sft_job.pulse import Pulse, pulse_file
from sft_job.runtime import die_with_parent
from sft_job.streams import say, settle_streams

_LAST_SECONDS = 3.0
"""Kept at the end for the verdict to reach everybody."""


@dataclass
class _Rank:
    """One rank.

    Attributes:
        deadline: when all must be over, by this host's monotonic clock.
        meet_until: how long others are waited for.
        began: when the supervising process did.
    """

    rank: int
    world: int
    per_node: int
    reports: Path
    pulse: Pulse
    deadline: float
    meet_until: float
    began: float

    @property
    def node(self) -> int:
        return self.rank // self.per_node

    @property
    def speaks(self) -> bool:
        """This rank speaks for its node."""
        return self.rank % self.per_node == 0

    @property
    def place(self) -> str:
        """What names this rank also where nodes disagree on how many ranks each has."""
        return f"{self.node}.{self.rank % self.per_node}"

    def run(self, facts: NodeFacts, needed: Space | None) -> ExitCode:
        """Everything; the verdict's exit code."""
        self.pulse.enter("starting-the-gpu")
        gpu_fault = _gpu_fault(self.rank % self.per_node, facts)
        self.pulse.enter("meeting")
        board = open_board(os.environ, self.world, self.meet_until)
        if not board.first(f"taken/{self.place}"):
            board.put(f"double/{self.node}", facts.host)
            raise JobError(
                ExitCode.CONFIG,
                f"node {self.node} is there already: another node has the same number\n    fix: give every node a "
                f"{Env.NODE_RANK} of its own, from 0 to {Env.NNODES} - 1",
            )
        if self.speaks:
            self._speak(board, facts)
        board.put(f"here/{self.place}", gpu_fault)
        if self.rank == 0:
            board.put("roll", self._call_the_roll(board))
        roll = board.get("roll", self.deadline - _LAST_SECONDS)
        if roll["complete"]:
            self._together(board, Path(facts.folder), able=not roll["gpu_faults"])
        if self.rank == 0:
            board.put("verdict", self._judge(board, roll, needed))
        self.pulse.enter("waiting-for-the-verdict")
        verdict = board.get("verdict", self.deadline)
        if self.speaks:
            _write(self.reports / RESULT_FILE, verdict)
        board.put(f"bye/{self.rank}", "")
        if self.rank == 0:
            present = [f"bye/{rank}" for rank in range(self.world) if rank not in _ranks(roll["missing"])]
            board.wait_for(present, self.deadline)
        return ExitCode(verdict["code"])

    def _speak(self, board: Board, facts: NodeFacts) -> None:
        versions = dict(facts.versions)
        if torch.version.cuda:
            versions["cuda"] = torch.version.cuda
        fault = _cuda_fault() if facts.devices and not torch.cuda.is_available() else ""
        board.put(f"token/{self.node}", asdict(facts.token))
        board.put(f"facts/{self.node}", to_wire(replace(facts, versions=versions, cuda_fault=fault)))

    def _call_the_roll(self, board: Board) -> dict[str, Any]:
        """Who is missing when the time is up, by node, and whose GPU fails."""
        keys = {f"here/{rank // self.per_node}.{rank % self.per_node}": rank for rank in range(self.world)}
        left = {keys[key] for key in board.wait_for(list(keys), self.meet_until)}
        missing: dict[int, list[int]] = {}
        for rank in sorted(left):
            missing.setdefault(rank // self.per_node, []).append(rank)
        said = {rank: board.get(key, self.deadline) for key, rank in keys.items() if rank not in left}
        faults = {rank: fault for rank, fault in said.items() if fault}
        nodes = range(self.world // self.per_node)
        told = [board.get(f"facts/{node}", self.deadline) for node in nodes if board.has(f"facts/{node}")]
        even = all((each["ranks"], each["nodes"]) == (self.per_node, len(nodes)) for each in told)
        waited = time.monotonic() - self.began
        return {"missing": missing, "gpu_faults": faults, "waited": waited, "complete": even and not missing}

    def _together(self, board: Board, folder: Path, *, able: bool) -> None:
        """What needs all nodes: reading each other's tokens, and the network where every GPU works."""
        until = self.deadline - 2 * _LAST_SECONDS
        if self.speaks:
            self.pulse.enter("reading-the-run-folder")
            nodes = range(self.world // self.per_node)
            tokens = {node: Token(**board.get(f"token/{node}", until)) for node in nodes}
            board.put(f"unseen/{self.node}", unseen(folder, tokens, min(10.0, max(0.0, until - time.monotonic()) / 2)))
        if able and self.world > 1:
            self.pulse.enter("in-the-network-test")
            found = measure(board.store, self.rank, self.world, self.per_node, max(1.0, (until - time.monotonic()) / 2))
            board.put(f"network/{self.rank}", asdict(found))

    def _judge(self, board: Board, roll: Mapping[str, Any], needed: Space | None) -> dict[str, Any]:
        """Rank 0: all checks, by what everybody said."""
        missing = {int(node): ranks for node, ranks in roll["missing"].items()}
        faults = {int(rank): fault for rank, fault in roll["gpu_faults"].items()}
        until = self.deadline - _LAST_SECONDS
        expected = self.world // self.per_node
        board.wait_for([f"unseen/{node}" for node in range(expected)] if roll["complete"] else [], until)
        nodes = [from_wire(board.get(f"facts/{node}", until)) for node in range(expected) if board.has(f"facts/{node}")]
        not_seen = {
            node: {int(other): why for other, why in board.get(f"unseen/{node}", until).items()}
            for node in range(expected)
            if board.has(f"unseen/{node}")
        }
        silent = {node.node for node in nodes} - not_seen.keys() if roll["complete"] else set[int]()
        not_seen |= {node: {node: "could not be read in time"} for node in silent}
        network = self._network(board, until) if roll["complete"] and not faults else None
        doubles = {node: board.get(f"double/{node}", until) for node in range(expected) if board.has(f"double/{node}")}
        presence = check_presence(nodes, expected, missing, doubles, roll["waited"])
        checks = [presence, *judge(nodes, faults, not_seen, network, needed, all_read=roll["complete"])]
        problems = [problem for check in checks for problem in check.problems]
        code = worst_code(problems) if problems else ExitCode.DONE
        return {"code": int(code), "checks": [check.to_wire() for check in checks]}

    def _network(self, board: Board, until: float) -> Network:
        if self.world == 1:
            return Network(clocks={0: time.time()})
        keys = {rank: f"network/{rank}" for rank in range(self.world)}
        silent = set(board.wait_for(list(keys.values()), until))
        faults = {rank: "gave no answer in the network test" for rank, key in keys.items() if key in silent}
        mine: Mapping[str, Any] = {}
        for rank, key in keys.items():
            if key not in silent:
                found = board.get(key, until)
                faults |= {int(faulty): text for faulty, text in found["faults"].items()}
                mine = found if rank == 0 else mine
        speeds = tuple(Speed(**each) for each in mine.get("speeds", ()))
        clocks = {int(node): at for node, at in mine.get("clocks", {}).items()}
        return Network(speeds, clocks, faults, mine.get("uncertain", 0.0))


def _ranks(missing: Mapping[str, list[int]]) -> set[int]:
    return {rank for ranks in missing.values() for rank in ranks}


def _gpu_fault(local: int, facts: NodeFacts) -> str:
    """Let this rank's GPU multiply something; why it cannot."""
    if not facts.devices or not torch.cuda.is_available():
        return ""
    try:
        ones = torch.ones(256, 256, device=torch.device("cuda", local))
        wrong = int((ones @ ones != 256.0).sum().item())
    except Exception as error:  # whatever CUDA raises is what people must see
        return str(error).partition("\n")[0]
    return f"{wrong} of 65,536 sums are wrong" if wrong else ""


def _cuda_fault() -> str:
    try:
        torch.cuda.init()
    except Exception as error:  # an AssertionError where torch was built without CUDA
        return str(error).partition("\n")[0]
    return "torch finds none"


def _write(path: Path, value: Any) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(json.dumps(value), encoding="utf-8")
    temporary.replace(path)


def main() -> int:
    """Take part as one rank; the verdict's exit code, 137 where none was heard."""
    die_with_parent()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (*STOP_SIGNALS, STACK_SIGNAL))
    reports, number = Path(os.environ[Env.REPORT_DIR]), int(os.environ["RANK"])
    given = json.loads((reports / FACTS_FILE).read_text(encoding="utf-8"))
    rank = _Rank(
        rank=number,
        world=int(os.environ["WORLD_SIZE"]),
        per_node=int(os.environ["LOCAL_WORLD_SIZE"]),
        reports=reports,
        pulse=Pulse(pulse_file(reports, number)),
        deadline=float(os.environ[Env.DEADLINE]),
        meet_until=float(given["meet_until"]),
        began=float(given["began"]),
    )
    message = ""
    try:
        code = rank.run(from_wire(given["facts"]), Space(**given["space"]) if given["space"] else None)
    except JobError as error:
        code, message = error.code, str(error)
    except (dist.DistError, OSError) as error:  # the store or its host is gone
        code, message = ExitCode.LOST, str(error).partition("\n")[0] or type(error).__name__
    except Exception:  # no report: the supervising process shows the last lines of the log
        say(traceback.format_exc())
        return ExitCode.BUG
    _write(reports / f"rank_{number}.json", {"rank": number, "code": int(code), "message": message})
    return code


if __name__ == "__main__":
    exit_code = main()
    settle_streams()
    # A rank whose peers are gone may hang in the teardown of its process group.
    os._exit(exit_code)

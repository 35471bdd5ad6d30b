"""The short preflight at the start of a run on several nodes: what costs nothing beside the weights that load next."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from rich.console import Console

from sft_job.config.load import run_folder
from sft_job.config.schema import JobConfig
from sft_job.config.topology import Topology
from sft_job.errors import raise_problems
from sft_job.preflight.facts import common_facts, from_wire, gpu_facts, to_wire
from sft_job.preflight.findings import Check, Network
from sft_job.preflight.judge import fewer_gpus, judge_start
from sft_job.preflight.shared import Token, own_token, unseen
from sft_job.runtime import Runtime


def compare_nodes(config: JobConfig, runtime: Runtime, environ: Mapping[str, str]) -> None:
    """Count the GPUs and compare the nodes of a run before it loads weights (a collective call).

    Nothing is done where ``trainer.preflight`` is off.

    Rank 0 shows what is allowed but perhaps not meant.

    Args:
        config: the run's settings.
        runtime: this rank.
        environ: environment variables of the rank.

    Raises:
        ProblemsError: on all ranks alike: nodes show fewer GPUs than were asked for (137; 2 where none shows any),
            software or settings differ (2), data (65) or model (66) differ or cannot be read, the run folder is not
            shared or cannot be written (73).
    """
    per_node = int(environ.get("LOCAL_WORLD_SIZE", runtime.world))
    nodes = runtime.world // per_node
    if not config.trainer.preflight:
        return
    topology = Topology(per_node, nodes, runtime.rank // per_node, environ.get("MASTER_ADDR", ""), None)
    if nodes < 2:  # there is nothing to compare but what was asked for
        raise_problems(fewer_gpus([gpu_facts(topology, environ)]))
        return
    checks = _checks(config, runtime, topology, environ)
    if runtime.is_first:
        console = Console(highlight=False)
        for check in checks:
            for note in check.notes:
                console.print(f"warning: {note}", markup=False, soft_wrap=True)
    raise_problems([problem for check in checks for problem in check.problems])


def _checks(config: JobConfig, runtime: Runtime, topology: Topology, environ: Mapping[str, str]) -> list[Check]:
    """The same checks on every rank; each node's first rank looks for it."""
    per_node = topology.nproc_per_node
    looks = runtime.rank % per_node == 0
    folder = run_folder(config).root
    with own_token(folder) if looks else contextlib.nullcontext(Token("")) as token:
        mine = None
        if looks:
            mine = to_wire(replace(common_facts(config, topology, environ), token=token, folder=str(folder)))
        told = _gathered(mine, runtime.world)
        clock = time.time()  # all ranks leave the exchange at about the same moment
        nodes = [from_wire(each) for each in told[::per_node]]
        seen = unseen(folder, {node.node: node.token for node in nodes}) if looks else {}
        answers = _gathered((seen, clock), runtime.world)[::per_node]
    return judge_start(
        nodes,
        {node.node: answer[0] for node, answer in zip(nodes, answers, strict=True)},
        Network(clocks={node.node: answer[1] for node, answer in zip(nodes, answers, strict=True)}),
    )


def _gathered(value: Any, world: int) -> list[Any]:
    found: list[Any] = [None] * world
    dist.all_gather_object(found, value)
    return found

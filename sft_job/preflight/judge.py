"""What the nodes' facts mean: pure functions from facts to checks, each with its problems and notes. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sft_job.checkpoint.state import is_safe
from sft_job.contract import ExitCode
from sft_job.errors import Problem
from sft_job.preflight.facts import NodeFacts
from sft_job.preflight.findings import Check, Network
from sft_job.preflight.gpus import Gpu
from sft_job.preflight.space import Space, gib

SKEW_SECONDS = 2.0
"""Clocks that differ by more are noted: nothing here relies on them, but logs and file times are read by people."""
_SHM_BYTES = 2**30
_MEMORY_PER_RANK = 4 * 2**30
_USED_BYTES = 2**30
_LISTED = 4
_SHOWN = ("sft_job", "torch", "cuda", "transformers", "python")
_NODES_NAMED = 8
Nodes = Sequence[NodeFacts]


def judge(
    nodes: Nodes,
    gpu_faults: Mapping[int, str],
    unseen: Mapping[int, Mapping[int, str]],
    network: Network | None,
    needed: Space | None,
    *,
    all_read: bool,
) -> list[Check]:
    """All checks of the nodes that came, in the order in which they are shown.

    Args:
        nodes: their facts, by number.
        gpu_faults: rank -> why its GPU does not compute.
        unseen: node -> nodes whose token it did not read, and why.
        network: what the ranks measured; None where they could not begin.
        needed: bytes that the run needs.
        all_read: each node has tried to read what the others wrote.
    """
    others = [code for code in ExitCode if code not in (ExitCode.DATA, ExitCode.MODEL)]
    settings = check_settings(nodes)
    own = check_own(nodes, others, "settings", "")
    return [
        check_gpus(nodes, gpu_faults),
        check_software(nodes),
        replace(settings, problems=(*own.problems, *settings.problems)),
        check_network(network, sum(node.ranks for node in nodes)),
        check_folder(nodes, unseen, all_read=all_read),
        check_space(nodes, needed),
        *check_inputs(nodes),
        check_clocks(nodes, network),
        check_memory(nodes),
    ]


def judge_start(nodes: Nodes, unseen: Mapping[int, Mapping[int, str]], network: Network) -> list[Check]:
    """The short form, at the start of a run, where the ranks have already met."""
    return [
        Check("gpus", problems=fewer_gpus(nodes)),
        check_software(nodes),
        check_settings(nodes),
        check_folder(nodes, unseen),
        *check_inputs(nodes),
        check_clocks(nodes, network),
    ]


def check_presence(
    nodes: Nodes,
    expected: int,
    missing: Mapping[int, Sequence[int]],
    doubles: Mapping[int, str],
    waited: float,
) -> Check:
    """Whether all nodes came, each with a number of its own and as many ranks as the others.

    Args:
        nodes: those that came.
        expected: how many there should be.
        missing: node -> its ranks that did not come.
        doubles: number that two nodes have -> host of the second.
        waited: seconds.
    """
    here = ", ".join(node.name for node in nodes[:_NODES_NAMED])
    more = f" and {len(nodes) - _NODES_NAMED} more" if len(nodes) > _NODES_NAMED else ""
    problems = [
        Problem(
            ExitCode.CONFIG,
            f"node {node}",
            f"two nodes have this number; the second is {host}",
            "give every node a NODE_RANK of its own, from 0 to NNODES - 1",
        )
        for node, host in doubles.items()
    ]
    for node in nodes[1:]:
        if (node.ranks, node.nodes) != (nodes[0].ranks, nodes[0].nodes):
            rule = f"was told of {node.nodes} nodes with {node.ranks} ranks each, {nodes[0].name} of {nodes[0].nodes}"
            fix = "the same NNODES and NPROC_PER_NODE on every node"
            problems.append(Problem(ExitCode.CONFIG, node.name, f"{rule} with {nodes[0].ranks}", fix))
    for node, ranks in missing.items() if not problems else ():
        known = next((each for each in nodes if each.node == node), None)
        who = f"rank{'s' if len(ranks) > 1 else ''} {_span(ranks)}"
        subject = f"{who} of {known.name}" if known else f"node {node} ({who})"
        rule = f"did not come within {waited:.0f} s; here: {here or 'nobody'}"
        fix = "see its own log; it must reach MASTER_ADDR:MASTER_PORT of node 0, with NNODES and NODE_RANK of its own"
        problems.append(Problem(ExitCode.LOST, subject, rule, fix))
    ranks = sum(node.ranks for node in nodes)
    return Check("nodes", f"{len(nodes)} of {expected}: {here}{more}; {ranks} ranks", problems=tuple(problems))


def check_own(nodes: Nodes, codes: Sequence[ExitCode], name: str, text: str) -> Check:
    """What nodes found wrong by themselves, of these kinds; one that several have is said once."""
    found: dict[Problem, list[NodeFacts]] = {}
    for node in nodes:
        for problem in node.problems:
            if problem.code in codes:
                found.setdefault(problem, []).append(node)
    problems = [
        problem if len(on) == len(nodes) else replace(problem, subject=f"{_names(on)}: {problem.subject}")
        for problem, on in found.items()
    ]
    return Check(name, text, problems=tuple(problems))


def check_software(nodes: Nodes) -> Check:
    """The same versions everywhere."""
    first = nodes[0].versions
    shown = [
        f"{name} {first[name]}" for name in ("sft_job", "torch", "cuda", "transformers", "python") if name in first
    ]
    fix = "run the same image, or the same environment, on every node"
    problems = _differences(nodes, lambda node: node.versions, ExitCode.CONFIG, "software", fix)
    return Check("software", ", ".join(shown), problems=problems)


def check_settings(nodes: Nodes) -> Check:
    """The same settings everywhere; those that may change between two starts may differ, too."""
    fix = "start every node with the same config and the same overrides"
    firm = _differences(
        nodes, lambda node: {k: v for k, v in node.settings.items() if not is_safe(k)}, ExitCode.CONFIG, "", fix
    )
    loose = _differences(
        nodes, lambda node: {k: v for k, v in node.settings.items() if is_safe(k)}, ExitCode.CONFIG, "", fix
    )
    notes = tuple(f"{problem.subject}: {problem.rule}" for problem in loose)
    return Check("settings", f"{len(nodes[0].settings)} settings equal" if not firm else "", notes, firm)


def check_inputs(nodes: Nodes) -> list[Check]:
    """Data and model readable, and the same everywhere."""
    checks: list[Check] = []
    marks: dict[str, tuple[ExitCode, Callable[[NodeFacts], Mapping[str, Any]]]] = {
        "data": (ExitCode.DATA, lambda node: node.data),
        "model": (ExitCode.MODEL, lambda node: node.model),
    }
    for name, (code, of) in marks.items():
        own = check_own(nodes, [code], name, f"{len(of(nodes[0]))} files, equal by size, beginning and end")
        fix = f"every node must see the same {name} files: one shared file system, or equal copies"
        # A file that a node could not read is told of already.
        able = [node for node in nodes if not any(problem.code == code for problem in node.problems)]
        differ = _differences(able, of, code, "", fix) if able else ()
        checks.append(replace(own, problems=(*own.problems, *differ)))
    return checks


def check_folder(nodes: Nodes, unseen: Mapping[int, Mapping[int, str]], *, all_read: bool = True) -> Check:
    """The run folder can be written by each node and is one folder.

    Args:
        nodes: the nodes.
        unseen: node -> nodes whose token it did not read, and why.
        all_read: each node has tried to read what the others wrote.
    """
    names = {node.node: node.name for node in nodes}
    problems = [
        Problem(
            ExitCode.CANNOT_CREATE,
            f"{node.name}: {node.folder}",
            f"cannot be written: {node.token.fault}",
            "another CHECKPOINT_DIR, or its owner and rights",
        )
        for node in nodes
        if node.token.fault
    ]
    pairs = [
        f"{node.name} does not see what {names.get(other, f'node {other}')} wrote (it {why})"
        for node in nodes
        for other, why in sorted(unseen.get(node.node, {}).items())
    ]
    if pairs:
        more = f", and {len(pairs) - _LISTED} more such pairs" if len(pairs) > _LISTED else ""
        rule = f"is not one folder for all nodes: {'; '.join(pairs[:_LISTED])}{more}"
        fix = "mount the same file system at CHECKPOINT_DIR on every node"
        problems.append(Problem(ExitCode.CANNOT_CREATE, "the run folder", rule, fix))
    text = f"{nodes[0].folder}: written" + (", read by all nodes" if len(nodes) > 1 and all_read else "")
    text = nodes[0].folder if problems else text
    return Check("run folder", text, problems=tuple(problems))


def check_space(nodes: Nodes, needed: Space | None) -> Check:
    """Room for checkpoints, export and token cache, by the node that sees least."""
    known = [node for node in nodes if node.free is not None]
    if needed is None or not known:
        return Check("space", tried=False)
    least = min(known, key=lambda node: node.free or 0)
    free = least.free or 0
    text = f"{gib(free)} free, needed about {needed.text()}"
    if needed.total <= free:
        return Check("space", text)
    rule = f"has {gib(free)} free, the run needs about {needed.text()}"
    problem = Problem(ExitCode.CANNOT_CREATE, least.folder, rule, "free space, or another CHECKPOINT_DIR")
    return Check("space", text, problems=(problem,))


def fewer_gpus(nodes: Nodes) -> tuple[Problem, ...]:
    """Nodes that show fewer GPUs than the launcher asked for: ranks would run on the CPU, or not at all.

    Where no node shows one the image or the driver is at fault, or the request: the same the next time (2). Else GPUs
    are lost (137).
    """
    if nodes and all(node.devices_asked and not node.devices for node in nodes):
        fix = "has the container the devices (nvidia-container-toolkit, --nv), and the job the GPUs?"
        rule = f"shows no GPU; {nodes[0].devices_asked} were asked for (CUDA_VISIBLE_DEVICES counts, too)"
        return (Problem(ExitCode.CONFIG, _names(nodes), rule, fix),)
    return tuple(
        Problem(
            ExitCode.LOST,
            node.name,
            f"shows {node.devices or 'no'} GPU{'' if node.devices == 1 else 's'}; {node.devices_asked} were asked for",
            "take this node out: its GPUs are lost (nvidia-smi, dmesg); or CUDA_VISIBLE_DEVICES hides some",
        )
        for node in nodes
        if node.devices < node.devices_asked
    )


def check_gpus(nodes: Nodes, faults: Mapping[int, str]) -> Check:
    """GPUs and driver as torch needs them, each of them computes, and they are the same everywhere."""
    fix = "take its node out of the allocation, or ask its administrator: nvidia-smi -q, dmesg"
    problems = [
        Problem(ExitCode.LOST, f"rank {rank}", f"its GPU fails: {fault}", fix) for rank, fault in faults.items()
    ]
    fewer = fewer_gpus(nodes)
    problems += fewer
    notes: list[str] = []
    kinds = {node.node: (node.devices, *sorted({gpu.name for gpu in node.gpus})) for node in nodes}
    counts = {node.devices for node in nodes}
    for node in nodes:
        if node.cuda_fault:
            rule, fix = f"torch cannot use its GPUs: {node.cuda_fault}", "a driver as new as torch's CUDA, or its image"
            problems.append(Problem(ExitCode.CONFIG, node.name, rule, fix))
        if 0 in counts and len(counts) > 1 and not node.devices and not fewer:
            rule = f"shows no GPU; others show {max(counts)}"
            problems.append(Problem(ExitCode.LOST, node.name, rule, "take this node out: its GPUs are lost"))
        for gpu in node.gpus:
            notes += [f"{node.name} GPU {gpu.index}: {text}" for text in _gpu_notes(gpu)]
    if len(set(kinds.values())) > 1 and not problems:
        notes.insert(0, f"not the same on all nodes: {'; '.join(f'{n.name}: {_gpus_text(n)}' for n in nodes)}")
    drivers = {gpu.driver for node in nodes for gpu in node.gpus}
    if len(drivers) > 1:
        notes.append(f"several drivers: {', '.join(sorted(drivers))}")
    alike = len(nodes) > 1 and nodes[0].devices and not notes and not problems
    text = f"{_gpus_text(nodes[0])}{' on each node' if alike else ''}"
    return Check("gpus", text, tuple(notes), tuple(problems))


def _gpus_text(node: NodeFacts) -> str:
    if not node.devices:
        return "none: ranks run on the CPU"
    if not node.gpus:
        return f"{node.devices}, of which nvidia-smi tells nothing"
    gpu = node.gpus[0]
    return f"{node.devices} x {gpu.name}, {gib(gpu.memory)}, driver {gpu.driver}"


def _gpu_notes(gpu: Gpu) -> list[str]:
    notes: list[str] = []
    if gpu.ecc_errors:
        notes.append(f"{gpu.ecc_errors} uncorrected memory errors")
    if gpu.slowed:
        notes.append(gpu.slowed)
    if gpu.used > _USED_BYTES:
        notes.append(f"{gib(gpu.used)} in use by another process")
    return notes


def check_memory(nodes: Nodes) -> Check:
    """Host memory and /dev/shm: nothing that fails, but what kills runs later."""
    notes = [
        f"{node.name}: /dev/shm has {gib(node.shm)}; ranks with GPUs exchange through it, give it 1 GiB or more"
        for node in nodes
        if node.devices and node.ranks > 1 and 0 < node.shm < _SHM_BYTES
    ]
    notes += [
        f"{node.name}: {gib(node.memory_free)} of host memory free for {node.ranks} ranks"
        for node in nodes
        if node.devices and 0 < node.memory_free < _MEMORY_PER_RANK * node.ranks
    ]
    least, shm = min(node.memory_free for node in nodes), min(node.shm_free for node in nodes)
    each = " at least on each node" if len(nodes) > 1 else ""
    return Check("memory", f"{gib(least)} free, /dev/shm {gib(shm)} free{each}", tuple(notes))


def check_network(network: Network | None, world: int) -> Check:
    """Whether the ranks reach each other."""
    if network is None:
        return Check("network", tried=False)
    if world == 1:
        return Check("network", "one rank")
    fix = (
        "ports between the nodes must be open; name the interface in NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME where "
        "nodes have several"
    )
    by_text: dict[str, list[int]] = {}
    for rank, fault in sorted(network.faults.items()):
        by_text.setdefault(fault, []).append(rank)
    problems = tuple(
        Problem(ExitCode.LOST, f"rank{'s' if len(ranks) > 1 else ''} {_span(ranks)}", fault, fix)
        for fault, ranks in by_text.items()
    )
    return Check("network", ", ".join(speed.text() for speed in network.speeds), problems=problems)


def check_clocks(nodes: Nodes, network: Network | None) -> Check:
    """How far the nodes' clocks are from node 0's."""
    if network is None or len(network.clocks) < len(nodes):
        return Check("clocks", tried=False)
    first = network.clocks[nodes[0].node]
    skews = {node.node: network.clocks[node.node] - first for node in nodes[1:]}
    notes = [
        f"{node.name} is {abs(skew):,.0f} s {'ahead of' if skew > 0 else 'behind'} {nodes[0].name}"
        for node in nodes[1:]
        if abs(skew := skews[node.node]) > SKEW_SECONDS + network.uncertain
    ]
    most = max((abs(skew) for skew in skews.values()), default=0.0)
    text = f"at most {most:,.2f} s apart" if skews else "one node"
    return Check("clocks", text, tuple(notes))


def _differences(
    nodes: Nodes, of: Callable[[NodeFacts], Mapping[str, Any]], code: ExitCode, kind: str, fix: str
) -> tuple[Problem, ...]:
    """Names whose values are not those of the first node: the first few by name, and how many more."""
    first = of(nodes[0])
    problems: list[Problem] = []
    left = 0
    for name in sorted({name for node in nodes for name in of(node)}):
        odd = [node for node in nodes[1:] if of(node).get(name) != first.get(name)]
        if not odd:
            continue
        if len(problems) == _LISTED:
            left += 1
            continue
        there = _value(of(odd[0]), name)
        rule = f"{_value(first, name)} on {nodes[0].name}, {there} on {_names(odd)}"
        problems.append(Problem(code, f"{kind} {name}".strip(), f"differs between the nodes: {rule}", fix))
    if left:
        problems.append(Problem(code, f"{kind or 'and'} {left} more".strip(), "differ between the nodes", fix))
    return tuple(problems)


def _value(values: Mapping[str, Any], name: str) -> str:
    return str(values[name]) if name in values else "nothing"


def _names(nodes: Nodes) -> str:
    return _several([node.name for node in nodes])


def _several(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NODES_NAMED} more" if len(names) > _NODES_NAMED else ""
    return f"{', '.join(names[:_NODES_NAMED])}{more}"


def _span(ranks: Sequence[int]) -> str:
    """0-3 of consecutive ranks, else a list."""
    if len(ranks) > 2 and ranks[-1] - ranks[0] == len(ranks) - 1:
        return f"{ranks[0]}-{ranks[-1]}"
    return ", ".join(map(str, ranks))

"""What one node knows of itself, in a form that travels to the others as JSON. Torch-free."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import shutil
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from sft_job import __version__
from sft_job.checkpoint.state import flat_config
from sft_job.config.load import run_folder
from sft_job.config.schema import JobConfig
from sft_job.config.topology import Topology, asked_gpus, count_gpus
from sft_job.contract import ExitCode
from sft_job.errors import Problem
from sft_job.preflight.gpus import Gpu, read_gpus
from sft_job.preflight.inputs import data_marks, model_marks
from sft_job.preflight.shared import Token
from sft_job.preflight.space import free_space
from sft_job.version import commit

_PACKAGES = ("torch", "transformers", "tokenizers", "peft", "accelerate", "safetensors", "pyarrow", "numpy")
_OPTIONAL = (
    "flash-attn",
    "flash-attn-3",
    "flash-attn-4",
    "liger-kernel",
    "triton",
    "nvidia-nccl-cu12",
    "nvidia-nccl-cu13",
)
_SHM = Path("/dev/shm")
FACTS_FILE = "facts.json"
"""In the report folder, for the ranks: facts of this node, space that the run needs, how long to wait for others."""
RESULT_FILE = "result.json"
"""In the report folder, from the ranks: exit code and all checks, the same on every node."""


@dataclass(frozen=True)
class NodeFacts:
    """One node.

    Attributes:
        node: its number.
        host: its name.
        ranks: how many it runs.
        nodes: how many nodes there are, as it was told.
        versions: of the software that must be the same everywhere; name -> version.
        settings: of the run: full path -> value.
        data: marks of the data files.
        model: marks of the model's files.
        token: what it wrote into the run folder.
        folder: the run folder, as this node names it.
        free: bytes free there; None where that is not known.
        devices: GPUs that its ranks may use.
        devices_asked: GPUs that the launcher asked for; 0 = none, or it does not say.
        gpus: the same as the driver tells of them; none where nvidia-smi does not answer.
        cuda_fault: why torch cannot use them; '' where it can, or where there are none.
        memory: bytes of host memory.
        memory_free: of them, available.
        shm: bytes of /dev/shm.
        shm_free: of them, free.
        problems: what is wrong on this node alone.
    """

    node: int
    host: str
    ranks: int
    nodes: int = 1
    versions: Mapping[str, str] = field(default_factory=dict[str, str])
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    data: Mapping[str, str] = field(default_factory=dict[str, str])
    model: Mapping[str, str] = field(default_factory=dict[str, str])
    token: Token = field(default_factory=lambda: Token(""))
    folder: str = ""
    free: int | None = None
    devices: int = 0
    devices_asked: int = 0
    gpus: tuple[Gpu, ...] = ()
    cuda_fault: str = ""
    memory: int = 0
    memory_free: int = 0
    shm: int = 0
    shm_free: int = 0
    problems: tuple[Problem, ...] = ()

    @property
    def name(self) -> str:
        """As messages call it."""
        return f"node {self.node} ({self.host})"


def to_wire(facts: NodeFacts) -> dict[str, Any]:
    """The facts in values that JSON keeps; of problems what is shown of them."""
    return asdict(replace(facts, problems=())) | {"problems": [problem_to_wire(each) for each in facts.problems]}


def from_wire(fields: Mapping[str, Any]) -> NodeFacts:
    """The facts that another node sent; another version of sft_job may have more fields, or fewer."""
    names = {each.name for each in dataclasses.fields(NodeFacts)}
    known = {name: value for name, value in fields.items() if name in names}
    known["token"] = Token(**known["token"])
    known["gpus"] = tuple(Gpu(**each) for each in known["gpus"])
    known["problems"] = tuple(map(problem_from_wire, known["problems"]))
    return NodeFacts(**known)


def problem_to_wire(problem: Problem) -> dict[str, Any]:
    """A problem whose first line holds origin and value as text: its value may be anything."""
    head = replace(problem, rule="", fix="").text().partition("\n")[0]
    return {"code": int(problem.code), "subject": head, "rule": problem.rule, "fix": problem.fix}


def problem_from_wire(fields: Mapping[str, Any]) -> Problem:
    """The problem that ``problem_to_wire`` wrote."""
    return Problem(ExitCode(fields["code"]), str(fields["subject"]), str(fields["rule"]), str(fields["fix"]))


def gpu_facts(topology: Topology, environ: Mapping[str, str]) -> NodeFacts:
    """Where this node stands, and its GPUs: those that are there, and those that were asked for."""
    return NodeFacts(
        node=topology.node_rank,
        host=socket.gethostname(),
        ranks=topology.nproc_per_node,
        nodes=topology.nnodes,
        devices=count_gpus(environ),
        devices_asked=asked_gpus(environ),
    )


def common_facts(config: JobConfig, topology: Topology, environ: Mapping[str, str]) -> NodeFacts:
    """What must agree between nodes (software, settings, data, model) or be there at all (GPUs).

    Costs a few reads for each file.
    """
    data, data_problems = data_marks(config)
    model, model_problems = model_marks(config)
    return replace(
        gpu_facts(topology, environ),
        versions=versions(environ),
        settings=flat_config(config),
        data=data,
        model=model,
        problems=(*data_problems, *model_problems),
    )


def all_facts(
    config: JobConfig, topology: Topology, token: Token, environ: Mapping[str, str], known: Sequence[Problem] = ()
) -> NodeFacts:
    """Everything that is known without torch.

    Args:
        config: the run's settings.
        topology: where this node stands.
        token: what this node wrote into the run folder.
        environ: environment variables.
        known: problems that were found before.
    """
    common = common_facts(config, topology, environ)
    memory = _memory()
    shm = _disk(_SHM)
    folder = run_folder(config).root
    try:
        free = free_space(folder)[1]
    except OSError:
        free = None
    seen = {problem.rule for problem in known}
    return replace(
        common,
        folder=str(folder),
        token=token,
        free=free,
        gpus=_visible(read_gpus(), environ),
        memory=memory.get("MemTotal", 0),
        memory_free=memory.get("MemAvailable", 0),
        shm=shm[0],
        shm_free=shm[1],
        problems=(*known, *(problem for problem in common.problems if problem.rule not in seen)),
    )


def versions(environ: Mapping[str, str]) -> dict[str, str]:
    """Of this job, Python and the packages that have a part in the result; what is not installed is left out."""
    found = {"python": platform.python_version(), "sft_job": __version__}
    if known := commit(environ):
        found["commit"] = known
    for name in (*_PACKAGES, *_OPTIONAL):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _visible(gpus: tuple[Gpu, ...], environ: Mapping[str, str]) -> tuple[Gpu, ...]:
    """Without those that CUDA_VISIBLE_DEVICES hides by number; others' names are all left in."""
    listed = environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return gpus
    numbers = [part.strip() for part in listed.split(",")]
    if not all(number.isdecimal() for number in numbers):
        return gpus if count_gpus(environ) else ()
    return tuple(gpu for gpu in gpus if str(gpu.index) in numbers)


def _memory(path: Path = Path("/proc/meminfo")) -> dict[str, int]:
    """The kernel's counts in bytes; a container's own limit may be lower."""
    try:
        lines = path.read_text(encoding="ascii").splitlines()
        return {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
    except (OSError, ValueError, IndexError):
        return {}


def _disk(path: Path) -> tuple[int, int]:
    try:
        usage = shutil.disk_usage(path)
    except OSError:
        return 0, 0
    return usage.total, usage.free

"""The run's own config where a job is submitted: looked at, and kept as it is now. Torch-free."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from sft_job.config.resolve import resolve
from sft_job.contract import ExitCode
from sft_job.errors import Problem

_COMMAND_LINE = "command line"
# What they name need not be on the machine from which the job is submitted.
_ON_THE_NODES = (
    "model.lora_adapter_path",
    "model.external_lib",
    "trainer.default_hdfs_dir",
    "trainer.resume_path",
)


def look_at_run(
    config: Path, overrides: Sequence[str], environ: Mapping[str, str], gpu_count: int, origin: str
) -> tuple[list[Problem], list[Problem]]:
    """What is wrong with the settings of the run.

    Args:
        config: its YAML.
        overrides: ``key=value`` on top of it.
        environ: as the job will see it; ``${oc.env:NAME}`` is looked up in the environment of this process.
        gpu_count: GPUs of a node.
        origin: where the overrides were written.

    Returns:
        Problems that every machine has, and those that may be this one's alone: folders, modules and variables that
        exist on the nodes.
    """
    found = [
        dataclasses.replace(each, origin=origin or "overrides") if each.origin == _COMMAND_LINE else each
        for each in resolve(str(config), overrides, environ, gpu_count).problems
    ]
    here = [each for each in found if _may_hold_there(each)]
    return [each for each in found if each not in here], here


def _may_hold_there(problem: Problem) -> bool:
    unset_variable = problem.rule.startswith("cannot be resolved: Environment variable")
    return unset_variable or problem.subject in _ON_THE_NODES or problem.code != ExitCode.CONFIG


@dataclasses.dataclass(frozen=True)
class Copy:
    """A config as it was when the job was submitted: what is edited later does not change a job that waits.

    Attributes:
        path: where the copy is to be; the same content has the same place.
        content: of the config.
    """

    path: Path
    content: bytes

    def write(self) -> None:
        """Write it, for the owner alone.

        Raises:
            OSError: it cannot be written.
        """
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        whole = self.path.with_name(f"{self.path.name}.{os.getpid()}.tmp")
        with os.fdopen(os.open(whole, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as stream:
            stream.write(self.content)
        whole.replace(self.path)


def copy_for(config: Path, folder: Path) -> Copy:
    """The copy of a config below a folder, not yet written; it keeps the file's name, which messages show.

    Raises:
        OSError: the config cannot be read.
    """
    content = config.read_bytes()
    return Copy(folder / "configs" / hashlib.sha256(content).hexdigest()[:12] / config.name, content)

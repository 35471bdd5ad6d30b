"""The run's own config where a job is submitted: looked at, and kept as it is now. Torch-free."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sft_job.config.load import Loaded
from sft_job.config.references import is_module_name
from sft_job.config.resolve import resolve
from sft_job.contract import ExitCode
from sft_job.errors import JobError, Problem
from sft_job.jobfile.load import LoadedJob
from sft_job.jobfile.mounts import Mount, check_path
from sft_job.jobfile.seen import MODULE, Sight, paths_of, unseen, unseen_module
from sft_job.jobfile.validate import secret_problems

_COMMAND_LINE = "command line"
# What they name need not be on the machine from which the job is submitted.
_ON_THE_NODES = (
    "model.lora_adapter_path",
    "trainer.default_hdfs_dir",
    "trainer.resume_path",
)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a job will run, as far as that is known where it is submitted.

    Attributes:
        launcher: name of its block in the job file.
        teller: who can tell what this machine cannot: nodes, container, pods.
        config: absolute path of the run's YAML.
        overrides: of the run.
        variables: of the job; ``${oc.env:NAME}`` is looked up in the environment of this process.
        gpu_count: GPUs of a node.
        mounted: what a container sees under its own path: setting -> path; empty without a container.
        sight: all that a container sees; None without one.
        secrets_here: secrets come from the environment of the process that submits.
    """

    launcher: str
    teller: str
    config: Path
    overrides: Sequence[str]
    variables: Mapping[str, str]
    gpu_count: int
    mounted: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])
    sight: Sight | None = None
    secrets_here: bool = True


def look_from_here(loaded: LoadedJob[Any], place: Place, environ: Mapping[str, str]) -> tuple[list[Problem], list[str]]:
    """What is wrong with a job here and now and with its run's settings; and, as lines, what only others can tell.

    Args:
        loaded: the job file.
        place: where it will run.
        environ: of the process that submits.
    """
    job = loaded.job
    problems = [*secret_problems(job, "", environ), *secret_problems(loaded.block, place.launcher, environ)]
    if not place.config.is_file():
        rule, fix = "there is no such file", "correct the path; a relative one begins at the folder in which you submit"
        problems.append(Problem(ExitCode.CONFIG, "config", rule, fix, job.config))
    for subject, path in place.mounted.items():
        # The container sees these under their own names, which mounts must be able to say.
        try:
            check_path(path)
        except ValueError as error:
            fix = "another path; a relative one begins at the folder in which you submit"
            problems.append(Problem(ExitCode.CONFIG, subject, f"is mounted into the container: {error}", fix, path))
    for at, name in enumerate(job.secrets):
        if place.secrets_here and not environ.get(name):
            rule, fix = "this variable is not set here", f"export {name}=..., or take it out of the list"
            problems.append(Problem(ExitCode.CONFIG, f"secrets[{at}]", rule, fix, name))
    problems = [dataclasses.replace(problem, origin=loaded.origin(problem.subject)) for problem in problems]
    if not place.config.is_file():
        return problems, []
    found, unproven = _look_at_run(place, loaded.origin("overrides") or "overrides")
    notes = [f"only the {place.teller} can tell: {each.line()}" for each in unproven]
    return [*problems, *found], notes


def _look_at_run(place: Place, overrides: str) -> tuple[list[Problem], list[Problem]]:
    """What is wrong with the run's settings on every machine, and what may be wrong on this one alone.

    Args:
        place: where the job will run.
        overrides: where its overrides were written.
    """
    resolution = resolve(str(place.config), place.overrides, place.variables, place.gpu_count)
    found = [each for each in resolution.problems if not _may_hold_there(each)]
    here = [each for each in resolution.problems if _may_hold_there(each)]
    refused, unproven = _look_for_files(place, resolution.loaded) if resolution.loaded.readable else ([], [])
    said = {each.subject for each in (*refused, *unproven)}
    if place.sight is not None:  # what this machine's Python finds says nothing of the container's
        here = [each for each in here if each.subject != MODULE or _is_unset(each)]
    here = [*(each for each in here if each.subject not in said), *unproven]

    def placed(problem: Problem) -> Problem:
        return dataclasses.replace(problem, origin=overrides) if problem.origin == _COMMAND_LINE else problem

    return [placed(each) for each in (*found, *refused)], [placed(each) for each in here]


def _look_for_files(place: Place, run: Loaded) -> tuple[list[Problem], list[Problem]]:
    refused, unproven = unseen(paths_of(run.config), place.sight, run.origin)
    if place.sight is not None:
        module = unseen_module(run.config, place.sight, place.variables.get("PYTHONPATH", ""), run.origin)
        unproven += [] if module is None else [module]
    return refused, unproven


def _may_hold_there(problem: Problem) -> bool:
    """Whether another machine may see it otherwise: folders, modules and variables that exist there."""
    module = problem.subject == MODULE and is_module_name(str(problem.value))
    return module or _is_unset(problem) or problem.subject in _ON_THE_NODES or problem.code != ExitCode.CONFIG


def _is_unset(problem: Problem) -> bool:
    return problem.rule.startswith("cannot be resolved: Environment variable")


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
        JobError: the config cannot be read (2).
    """
    try:
        content = config.read_bytes()
    except OSError as error:
        raise JobError(ExitCode.CONFIG, f"{config} cannot be read: {error.strerror or error}") from error
    return Copy(folder / "configs" / hashlib.sha256(content).hexdigest()[:12] / config.name, content)


def with_folder_of(config: Path, checkpoint_dir: str, mounts: Sequence[str]) -> list[str]:
    """The mounts, with the folder of a config of which a container gets a copy.

    What else lies there, such as a chat template, the container sees as if it had the config itself.
    """
    if config.is_relative_to(checkpoint_dir):
        return list(mounts)
    return [str(Mount(str(config.parent), str(config.parent))), *mounts]

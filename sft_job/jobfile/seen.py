"""Which of a run's files, folders and modules its job would not see, as far as that is known where it is submitted."""

from __future__ import annotations

import importlib.machinery
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from sft_job.config.references import names_template_file
from sft_job.config.schema import JobConfig
from sft_job.contract import ExitCode
from sft_job.errors import Problem
from sft_job.jobfile.mounts import Mount, with_home

MODULE = "model.external_lib"
_IMAGE = "/opt/sft-job"
_SCRATCH = ("/tmp", "/dev/shm")
"""Folders that a container can write, and that hold nothing when it starts."""
_GLOB = re.compile(r"[*?\[]")
_WRITTEN = ("data.cache_dir", "trainer.default_local_dir", "trainer.default_hdfs_dir")
# The rules for the run's settings look at these themselves.
_LOOKED_AT = ("model.partial_pretrain", "model.lora_adapter_path", "trainer.resume_path")
_INSTALLED = ("site-packages", "dist-packages")


@dataclass(frozen=True)
class Sight:
    """What a container of the job sees. Its image is not known.

    Attributes:
        mounts: files and folders from outside.
        add: how the job file names one more; ``{}`` stands for the folder, with ``:rw`` behind it to write there.
        sources_here: the mounts' sources are paths of this machine.
        closed: nothing else comes in, the image cannot be written, and the working folder is ``/``; otherwise the
            cluster or the user's own options may bring more.
    """

    mounts: Sequence[Mount]
    add: str = "mounts: [{}]"
    sources_here: bool = True
    closed: bool = True


def paths_of(config: JobConfig) -> dict[str, str]:
    """Setting -> path, of everything in a run's settings that names files; what is no path is left out."""
    data, model, trainer = config.data, config.model, config.trainer
    template = data.chat_template
    found: dict[str, Any] = {
        "model.partial_pretrain": model.partial_pretrain,
        "model.lora_adapter_path": model.lora_adapter_path,
        "data.chat_template": template if template and names_template_file(template) else None,
        "data.cache_dir": data.cache_dir,
        "data.custom_cls.path": data.custom_cls.path,
        "trainer.default_local_dir": trainer.default_local_dir,
        "trainer.default_hdfs_dir": trainer.default_hdfs_dir,
        "trainer.resume_path": trainer.resume_path,
    }
    _add_files(found, "data.train_files", data.train_files)
    _add_files(found, "data.val_files", data.val_files)
    return {name: path for name, path in found.items() if isinstance(path, str) and path and "://" not in path}


def unseen(
    paths: Mapping[str, str], sight: Sight | None, origin: Callable[[str], str] = lambda _: ""
) -> tuple[list[Problem], list[Problem]]:
    """Paths that the job does not see, and those of which this machine cannot say it.

    A path is refused where nothing can be there; one that the image may hold, or that the job's own machine may have,
    is not proved to be wrong.

    Args:
        paths: setting -> path.
        sight: what the container sees; None = no container, the job sees what its machine has.
        origin: where a setting was set.
    """
    refused: list[Problem] = []
    unproven: list[Problem] = []
    for name, path in paths.items():
        fault = _absent(name, with_home(path)) if sight is None else _fault(name, path, sight)
        if fault is not None:
            problem = Problem(ExitCode.CONFIG, name, fault.rule, fault.fix, path, origin(name))
            (refused if fault.certain else unproven).append(problem)
    return refused, unproven


def unseen_module(
    config: JobConfig, sight: Sight, python_path: str, origin: Callable[[str], str] = lambda _: ""
) -> Problem | None:
    """What is not proved of ``model.external_lib``: that the container finds it. Imports nothing.

    Args:
        config: of the run.
        sight: what the container sees.
        python_path: ``PYTHONPATH`` in the container; the image's own one is not known.
        origin: where a setting was set.
    """
    name = config.model.external_lib
    package = (name or "").partition(".")[0]
    if not name or package == "sft_job" or package in sys.stdlib_module_names:
        return None
    folders = [os.path.normpath(each) for each in python_path.split(":") if each.startswith("/")]
    sources = [source for each in folders if (source := _source(each, sight))]
    if _finder(package, sources) is not None:
        return None
    rule = "would have to be installed in the image, or lie in a mounted folder of PYTHONPATH"
    here = _finder(package, [str(Path.cwd()), *sys.path]) or "/its/folder"
    fix = "install it in the image"
    if not any(part in Path(here).parts for part in _INSTALLED):
        fix += f"; or {sight.add.format(here)} and environment: {{PYTHONPATH: {here}}}"
    return Problem(ExitCode.CONFIG, MODULE, rule, fix, name, origin(MODULE))


@dataclass(frozen=True)
class _Fault:
    rule: str
    fix: str
    certain: bool = False


def _fault(name: str, path: str, sight: Sight) -> _Fault | None:
    """What is wrong with a path in a container."""
    writes = name in _WRITTEN
    if not path.startswith("/"):
        where = "it would begin at /" if sight.closed else "it may begin at another folder"
        fix = f"{name}=/absolute/path/to/{Path(path).name}, and {sight.add.format('/absolute/path/to')}"
        rule = f"is no absolute path: in the container {where}"
        return _Fault(rule, f"{fix} unless that folder is seen already", sight.closed)
    path = os.path.normpath(path)
    if _is_seen(path, sight.mounts, writes):
        return _absent(name, _source(path, sight))
    folder = os.path.dirname(path) if Path(path).suffix or _GLOB.search(path) else path  # noqa: PTH120
    folder = _GLOB.split(folder)[0].rstrip("/")
    fix = f"add it: {sight.add.format((folder or path) + (':rw' if writes else ''))}"
    if folder in _SCRATCH:
        fix = f"put it into a folder of its own and add that: {folder} is made with the container"
    if writes:
        return _Fault("is not mounted for the job to write there", fix, sight.closed)
    rule = "is seen by no mount of the container"
    if sight.closed and (_is_below(path, _SCRATCH) or (sight.sources_here and _is_here(path))):
        return _Fault(rule, fix, certain=True)
    more = "" if sight.closed else ", or be mounted by the cluster or by options of yours"
    return _Fault(f"{rule}: it would have to be in the image{more}", fix)


def _absent(name: str, path: str) -> _Fault | None:
    """That a path of this machine, '' where it is not known, has nothing behind it."""
    if not path or name in (*_WRITTEN, *_LOOKED_AT) or _is_here(path):
        return None
    rule, fix = "there is no such file or folder on this machine", "correct the path, unless the job finds it there"
    return _Fault(rule if not _GLOB.search(path) else "there is no such folder on this machine", fix)


def _is_here(path: str) -> bool:
    """Whether this machine has a path, or the folder before its first wildcard; True where it cannot be looked at."""
    try:
        os.lstat(_before_wildcard(path) if _GLOB.search(path) else path)  # a link may lead somewhere in the container
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError):
        return True
    return True


def _source(path: str, sight: Sight) -> str:
    """The path of this machine that the container sees at an absolute path; '' where that is not known."""
    over = _over(path, sight.mounts) if sight.sources_here else []
    if not over:
        return ""
    mount = over[-1]
    return os.path.normpath(f"{mount.source}/{os.path.relpath(path, mount.target)}")


def _finder(package: str, folders: Sequence[str]) -> str | None:
    """The folder in which Python would find a package."""
    found = importlib.machinery.PathFinder.find_spec(package, list(folders))
    if found is None:
        return None
    inside = next(iter(found.submodule_search_locations or ()), found.origin)
    return str(Path(inside).parent) if inside else ""


def _is_seen(path: str, mounts: Sequence[Mount], writes: bool) -> bool:
    whole = _before_wildcard(path)
    if whole != path and any(Path(mount.target).is_relative_to(whole) for mount in mounts):
        return True
    if _is_below(whole, _SCRATCH if writes else (_IMAGE,)):
        return True
    over = _over(whole, mounts)
    return bool(over) and (not writes or over[-1].writable)


def _over(path: str, mounts: Sequence[Mount]) -> list[Mount]:
    """The mounts that hold a path, the one that counts last."""
    over = [mount for mount in mounts if Path(path).is_relative_to(mount.target)]
    return sorted(over, key=lambda mount: len(Path(mount.target).parts))


def _is_below(path: str, folders: Sequence[str]) -> bool:
    return any(Path(path).is_relative_to(folder) for folder in folders)


def _before_wildcard(path: str) -> str:
    """The folder before the first wildcard of an absolute path; the path itself where it has none."""
    pattern = _GLOB.search(path)
    return path[: path.rfind("/", 0, pattern.start()) + 1] or "." if pattern else path


def _add_files(found: dict[str, Any], name: str, value: Any) -> None:
    """A file, a list of them, or named sets of either."""
    if isinstance(value, list | tuple):
        for at, each in enumerate(cast("list[Any]", value)):
            found[f"{name}[{at}]"] = each
    elif isinstance(value, dict):
        for key, entry in cast("dict[str, Any]", value).items():
            files = cast("dict[str, Any]", entry).get("files") if isinstance(entry, dict) else entry
            _add_files(found, f"{name}.{key}", files)
    else:
        found[name] = value

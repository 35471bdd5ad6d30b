"""Which of a run's paths a container cannot see: pure, from its settings and what is mounted."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from sft_job.config.schema import JobConfig
from sft_job.contract import ExitCode
from sft_job.errors import Problem
from sft_job.jobfile.mounts import Mount

_IMAGE = "/opt/sft-job"
_GLOB = re.compile(r"[*?\[]")
_WRITTEN = ("data.cache_dir", "trainer.default_local_dir")


def paths_of(config: JobConfig) -> dict[str, str]:
    """Setting -> path, of everything in a run's settings that names files; what is no path is left out."""
    data, model, trainer = config.data, config.model, config.trainer
    found: dict[str, Any] = {
        "model.partial_pretrain": model.partial_pretrain,
        "model.lora_adapter_path": model.lora_adapter_path,
        "data.cache_dir": data.cache_dir,
        "data.custom_cls.path": data.custom_cls.path,
        "trainer.default_local_dir": trainer.default_local_dir,
        "trainer.resume_path": trainer.resume_path,
    }
    _add_files(found, "data.train_files", data.train_files)
    _add_files(found, "data.val_files", data.val_files)
    return {name: path for name, path in found.items() if isinstance(path, str) and path and "://" not in path}


def unseen(
    paths: Mapping[str, str], mounts: Sequence[Mount], origin: Callable[[str], str] = lambda _: ""
) -> list[Problem]:
    """What is wrong with paths in a container, whose working folder is ``/`` and whose home is ``/tmp``.

    Args:
        paths: setting -> path.
        mounts: what the container sees.
        origin: where a setting was set.
    """
    problems: list[Problem] = []
    for name, path in paths.items():
        writes = name in _WRITTEN
        if not path.startswith("/"):
            rule, fix = (
                "is no absolute path: in the container it would begin at /",
                _absolute(name, path),
            )
        elif not _is_seen(os.path.normpath(path), mounts, writes):
            folder = os.path.dirname(path) if Path(path).suffix or _GLOB.search(path) else path  # noqa: PTH120
            folder = _GLOB.split(folder)[0]
            rule = "is not mounted for the job to write there" if writes else "is seen by no mount of the container"
            fix = f"add it: mounts: [{folder}{':rw' if writes else ''}]"
        else:
            continue
        problems.append(Problem(ExitCode.CONFIG, name, rule, fix, path, origin(name)))
    return problems


def _absolute(name: str, path: str) -> str:
    here = Path.home() / path[2:] if path.startswith("~/") else Path(path)
    return f"{name}=/absolute/path/to/{here.name}, and its folder in mounts unless it lies beside the config"


def _is_seen(path: str, mounts: Sequence[Mount], writes: bool) -> bool:
    pattern = _GLOB.search(path)
    whole = Path(path)
    if pattern:  # the folder before the first wildcard
        whole = Path(path[: path.rindex("/", 0, pattern.start()) + 1])
    if pattern and any(Path(mount.target).is_relative_to(whole) for mount in mounts):
        return True
    if whole.is_relative_to(_IMAGE) or (writes and whole.is_relative_to("/tmp")):
        return True
    over = [mount for mount in mounts if whole.is_relative_to(mount.target)]
    return bool(over) and (not writes or max(over, key=lambda mount: len(Path(mount.target).parts)).writable)


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

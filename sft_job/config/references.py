"""Rules for settings that name something outside the config: adapter, module, remote folder."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from sft_job.config.schema import JobConfig
from sft_job.contract import ExitCode
from sft_job.errors import Problem

_ADAPTER = "model.lora_adapter_path"
_MODULE = "model.external_lib"
_REMOTE = "trainer.default_hdfs_dir"
_ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_WEIGHTS = "adapter_model.safetensors"


def check_references(config: JobConfig, origin: Callable[[str], str]) -> list[Problem]:
    """Look at adapter, module and remote folder that settings name; imports and connects to nothing.

    Returns:
        Problems with exit code 2, or 66 where the adapter's folder cannot be used.
    """
    return [
        *_check_adapter(config, origin),
        *_check_module(config, origin),
        *_check_remote(config, origin),
    ]


def adapter_warnings(config: JobConfig, origin: Callable[[str], str]) -> list[str]:
    """LoRA settings that have no effect beside the others."""
    model = config.model
    if model.lora_adapter_path:
        found = _read_adapter(Path(model.lora_adapter_path))
        if isinstance(found, str):
            return []
        pairs = (("lora_rank", model.lora_rank, found.get("r")), ("lora_alpha", model.lora_alpha, found["lora_alpha"]))
        return [
            f"model.{name} = {said} ({origin(f'model.{name}')}), but the adapter in {_ADAPTER} has {real}: {real} it is"
            for name, said, real in pairs
            if origin(f"model.{name}") and said not in (0, real)
        ]
    if model.lora_rank:
        return []
    defaults = type(model)()
    unused = [
        f"model.{name}"
        for name in ("lora_alpha", "target_modules", "exclude_modules")
        if getattr(model, name) != getattr(defaults, name)
    ]
    return [f"{', '.join(unused)}: not used, because model.lora_rank is 0"] if unused else []


def _check_adapter(config: JobConfig, origin: Callable[[str], str]) -> list[Problem]:
    path = config.model.lora_adapter_path
    if not path:
        return []
    found = _read_adapter(Path(path))
    if not isinstance(found, str):
        return []
    fix = f"name a folder with {_ADAPTER_CONFIG} and {_ADAPTER_WEIGHTS}, such as adapter/ of a checkpoint"
    return [Problem(ExitCode.MODEL, _ADAPTER, found, fix, path, origin(_ADAPTER))]


def _read_adapter(folder: Path) -> dict[str, Any] | str:
    """The adapter's config, or what is wrong with the folder."""
    try:
        if not folder.is_dir():
            return "there is no such folder"
        missing = [name for name in (_ADAPTER_CONFIG, _ADAPTER_WEIGHTS) if not (folder / name).is_file()]
        if missing:
            return f"is no LoRA adapter in PEFT's format: it lacks {' and '.join(missing)}"
        found = json.loads((folder / _ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return f"cannot be read: {error}"
    if not isinstance(found, dict):
        return f"{_ADAPTER_CONFIG} is no JSON object"
    settings = cast("dict[str, Any]", found)
    kind, rank, alpha = settings.get("peft_type"), settings.get("r"), settings.get("lora_alpha")
    if kind != "LORA":
        return f"{_ADAPTER_CONFIG} says peft_type {kind!r}; this job trains LORA"
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        return f"{_ADAPTER_CONFIG} says r = {rank!r}; it must be a whole number from 1"
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or alpha <= 0:
        return f"{_ADAPTER_CONFIG} says lora_alpha = {alpha!r}; it must be a number above 0"
    odd = [name for name in ("use_dora", "modules_to_save", "bias") if settings.get(name) not in (None, False, "none")]
    if odd:
        return f"{_ADAPTER_CONFIG} sets {', '.join(odd)}; this job trains plain LoRA only"
    return settings


def names_template_file(value: str) -> bool:
    """Whether ``data.chat_template`` is a file's name: the text of a Jinja template holds a brace."""
    return "{" not in value


def is_module_name(name: str) -> bool:
    """Whether Python could have a module of this name anywhere."""
    return all(part.isidentifier() for part in name.split("."))


def _check_module(config: JobConfig, origin: Callable[[str], str]) -> list[Problem]:
    name = config.model.external_lib
    if not name:
        return []
    rule, fix = "must be the name of a Python module, such as my_package.models", ""
    if is_module_name(name):
        if _importable(name.partition(".")[0]):
            return []
        rule = "Python finds no such module"
        fix = "install its package beside sft_job, or add its folder to PYTHONPATH"
    return [Problem(ExitCode.CONFIG, _MODULE, rule, fix, name, origin(_MODULE))]


def _importable(package: str) -> bool:
    """Whether a rank, which also looks in the folder it was started in, would find a package."""
    try:
        found = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return False
    here = [str(Path.cwd()), *sys.path]
    return found is not None or importlib.machinery.PathFinder.find_spec(package, here) is not None


def _check_remote(config: JobConfig, origin: Callable[[str], str]) -> list[Problem]:
    given, run = config.trainer.default_hdfs_dir, config.trainer.default_local_dir
    if not given:
        return []
    protocol, colon, rest = given.partition("://")
    where = origin(_REMOTE)
    if colon and not (re.fullmatch(r"[a-z][a-z0-9+.-]*", protocol) and rest.strip("/")):
        rule = "must be a path, or a URL PROTOCOL://PLACE"
        return [
            Problem(ExitCode.CONFIG, _REMOTE, rule, "such as hdfs://host/runs/one or s3://bucket/one", given, where)
        ]
    if (colon and protocol not in ("file", "local")) or not run:
        return []
    try:
        remote, local = Path(rest if colon else given).resolve(), Path(run).resolve()
    except (OSError, ValueError, RuntimeError) as error:
        return [Problem(ExitCode.CONFIG, _REMOTE, f"cannot be looked at: {error}", "", given, where)]
    if remote == local or local in remote.parents:
        rule = f"lies in the run folder {local}, whose checkpoints would be copied into themselves"
        return [Problem(ExitCode.CONFIG, _REMOTE, rule, "name a folder elsewhere", given, where)]
    return []

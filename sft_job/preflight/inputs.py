"""Marks that tell whether nodes see the same data and model files, without reading them whole. Torch-free."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sft_job.config.schema import JobConfig
from sft_job.config.sets import Split, data_sets
from sft_job.contract import ExitCode
from sft_job.data.files import resolve_files
from sft_job.errors import Problem

_THREADS = 16
_END_BYTES = 64 * 1024
_MODEL_KEY = "model.partial_pretrain"


def data_marks(config: JobConfig) -> tuple[dict[str, str], list[Problem]]:
    """``option: place`` of each data file -> its mark, and what cannot be read (65).

    Files are named by their option and number, so that they may lie elsewhere on another node.
    """
    files, problems = data_files(config)
    marks, unread = _marks(files.items(), ExitCode.DATA)
    return marks, problems + unread


def data_files(config: JobConfig) -> tuple[dict[str, Path], list[Problem]]:
    """``option file NUMBER`` -> path, for training and validation files, and what cannot be found (65)."""
    names: dict[str, Path] = {}
    problems: list[Problem] = []
    splits: tuple[Split, Split] = ("train", "val")
    for split in splits:
        for each in data_sets(config.data, split):
            files, not_found = resolve_files(each.entry.files, each.option)
            names |= {f"{each.option} file {number}": path for number, path in enumerate(files)}
            problems += not_found
    return names, problems


def model_marks(config: JobConfig) -> tuple[dict[str, str], list[Problem]]:
    """Name of each file of the model's folder -> its mark, and what cannot be read (66)."""
    if config.model.partial_pretrain is None:
        return {}, []
    folder = Path(config.model.partial_pretrain)
    try:
        files = sorted(path for path in folder.iterdir() if not path.name.startswith(".") and path.is_file())
    except OSError as error:
        rule, fix = f"cannot be read: {error.strerror or error}", "the same folder must be there on every node"
        return {}, [Problem(ExitCode.MODEL, _MODEL_KEY, rule, fix, str(folder))]
    return _marks(((f"{_MODEL_KEY}/{path.name}", path) for path in files), ExitCode.MODEL)


def mark(path: Path) -> str:
    """Size, and SHA-256 of the file's first and last 64 KiB: a parquet's footer, a safetensors' header are in them.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        size = file.seek(0, 2)
        digest = hashlib.sha256()
        for start in (0, max(0, size - _END_BYTES)):
            file.seek(start)
            digest.update(file.read(_END_BYTES))
    return f"{size} bytes, {digest.hexdigest()[:16]}"


def _marks(files: Iterable[tuple[str, Path]], code: ExitCode) -> tuple[dict[str, str], list[Problem]]:
    names = dict(files)

    def attempt(path: Path) -> str | OSError:
        try:
            return mark(path)
        except OSError as error:
            return error

    with ThreadPoolExecutor(_THREADS) as pool:
        found = dict(zip(names, pool.map(attempt, names.values()), strict=True))
    problems = [
        Problem(code, str(names[name]), f"cannot be read: {fault.strerror or fault}", f"named by {name}")
        for name, fault in found.items()
        if isinstance(fault, OSError)
    ]
    return {name: each for name, each in found.items() if isinstance(each, str)}, problems

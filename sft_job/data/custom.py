"""A user's own data set class (``data.custom_cls``): what it must give, and how it is found without running it.

The class is constructed as verl does, ``Class(parquet_files=[...], tokenizer=tokenizer, config=data_section)``, has a
length, and gives for each index a mapping with

- ``input_ids``: the row's token ids;
- ``loss_mask``: for each of them 1 where the token is trained, else 0; or ``labels``: for each of them the id itself
  where the token is trained, else -100. Both are aligned with ``input_ids``: nothing is shifted;
- ``attention_mask``, where there is padding: 0 at padding, which is cut away.

Each is a list, a numpy array or a torch tensor of one dimension. The class is loaded only in processes that tokenise
(each has an instance), and each row is asked for once: what it gives goes through truncation into the token cache.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sft_job.config.schema import DataConfig
from sft_job.config.source import named_bytes
from sft_job.contract import ExitCode
from sft_job.data.columns import plain
from sft_job.errors import Problem, ProblemsError

OPTION = "data.custom_cls"
# They say where files lie and how batches are made: the class sees them, and its rows must not depend on them. The
# files' content and the number of rows are compared by themselves.
_NOT_COMPARED = frozenset(
    {
        "train_files",
        "val_files",
        "train_max_samples",
        "val_max_samples",
        "train_batch_size",
        "micro_batch_size_per_gpu",
        "use_dynamic_bsz",
        "max_token_len_per_gpu",
        "balance_dp_token",
        "max_rejected_fraction",
        "custom_cls",
        "use_shm",
        "cache_dir",
        "num_workers",
    }
)


@dataclass(frozen=True)
class CustomClass:
    """A class and the settings that it is given.

    Attributes:
        path: Python file.
        name: of the class.
        section: the settings below ``data``, as plain values.
    """

    path: Path
    name: str
    section: Mapping[str, Any]

    def fingerprint(self) -> dict[str, Any]:
        """What the rows depend on besides files and tokenizer.

        Raises:
            ProblemsError: exit 2, where the file cannot be read.
        """
        try:
            code = hashlib.sha256(named_bytes(self.path)).hexdigest()
        except OSError as error:
            raise ProblemsError([class_problem("path", f"cannot be read: {error.strerror}", str(self.path))]) from error
        settings = {key: value for key, value in self.section.items() if key not in _NOT_COMPARED}
        return {"code": code, "name": self.name, "settings": json.dumps(settings, sort_keys=True, default=str)}


def custom_class(data: DataConfig) -> CustomClass | None:
    """The class that a config names; None where it names none.

    Raises:
        ProblemsError: exit 2, for all that is wrong with file and name and can be seen without running the file.
    """
    path, name = data.custom_cls.path, data.custom_cls.name
    if not path and not name:
        return None
    if not path or not name:
        missing, given = ("name", "path") if path else ("path", "name")
        raise ProblemsError(
            [class_problem(missing, f"must be set, because {OPTION}.{given} is", getattr(data.custom_cls, missing))]
        )
    file = Path(path).expanduser()
    try:
        names = _names(ast.parse(named_bytes(file), filename=str(file)))
    except OSError as error:
        raise ProblemsError([class_problem("path", f"cannot be read: {error.strerror}", path)]) from error
    except (SyntaxError, ValueError) as error:
        where = f"line {error.lineno}: " if isinstance(error, SyntaxError) else ""
        raise ProblemsError([class_problem("path", f"is not Python: {where}{error}", path)]) from error
    if name not in names and "*" not in names:
        raise ProblemsError([no_such_class(file, name, sorted(names))])
    return CustomClass(file, name, {key: plain(value) for key, value in asdict(data).items()})


def _names(tree: ast.Module) -> set[str]:
    """Whatever the file may give a name to, at any depth: too many rather than too few."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.alias):
            names.add(node.asname or node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def no_such_class(file: Path, name: str, names: Sequence[str]) -> Problem:
    """The file has none of this name, but perhaps one that looks like it."""
    close = difflib.get_close_matches(name, names, n=1)
    return class_problem(
        "name", f"{file} has no class of this name", name, f"did you mean {close[0]}?" if close else ""
    )


def class_problem(key: str, rule: str, value: Any, fix: str = "") -> Problem:
    """What is wrong with the path or the name of the class: exit 2."""
    return Problem(ExitCode.CONFIG, f"{OPTION}.{key}", rule, fix, value)

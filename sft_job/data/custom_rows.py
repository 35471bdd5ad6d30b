"""Rows of a user's own data set class, in the form that the token cache holds. Runs in the tokenising processes.

``custom.py`` says what such a class must give.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
from omegaconf import OmegaConf

from sft_job.data.custom import CustomClass, class_problem, no_such_class
from sft_job.data.render import Rendered
from sft_job.errors import ProblemsError, shorten

IGNORED_LABEL = -100


class MalformedRowError(Exception):
    """A row that cannot be trained on; the text says why."""


class CustomRows:
    """An instance of the class, and its rows in the form that the token cache holds."""

    def __init__(self, custom: CustomClass, files: Sequence[Path], tokenizer: Any, vocabulary: int) -> None:
        """Run the file and construct the class.

        Args:
            custom: the class.
            files: data files.
            tokenizer: the model's.
            vocabulary: ids from 0 to below this exist.

        Raises:
            ProblemsError: exit 2, where the file fails, has no such class, or the class cannot be constructed.
        """
        self._custom = custom
        self._vocabulary = vocabulary
        kind = getattr(_load(custom), custom.name, None)
        if not callable(kind):
            raise ProblemsError([no_such_class(custom.path, custom.name, [])])
        try:
            self._rows: Any = kind(
                parquet_files=[str(file) for file in files],
                tokenizer=tokenizer,
                config=OmegaConf.create(dict(custom.section)),
            )
            self._length = len(self._rows)
        except Exception as error:  # the user's code may fail with anything
            rule = f"cannot be constructed: {_shown(error, custom.path)}\n    in {custom.path}"
            raise ProblemsError([class_problem("name", rule, custom.name)]) from error

    def __len__(self) -> int:
        return self._length

    def row(self, index: int) -> Rendered:
        """One row.

        Raises:
            MalformedRowError: the class fails on it, or gives something else than it must.
        """
        try:
            item = self._rows[index]
        except Exception as error:  # the user's code may fail with anything
            raise MalformedRowError(
                f"{self._custom.name}[{index}] raised {_shown(error, self._custom.path)}"
            ) from error
        try:
            return rendered(item, self._vocabulary)
        except MalformedRowError as error:
            raise MalformedRowError(f"{self._custom.name}[{index}]: {error}") from None


def _shown(error: Exception, path: Path) -> str:
    """The error, and the line of the user's file that it came through last."""
    text = shorten(" ".join(f"{type(error).__name__}: {error}".split()), 300)
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f"{text} (line {lines[-1]})" if lines else text


def _load(custom: CustomClass) -> ModuleType:
    name = f"sft_job_custom_{hashlib.sha256(str(custom.path.absolute()).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, custom.path)
    if spec is None or spec.loader is None:
        raise ProblemsError(
            [class_problem("path", "is not a Python file: its name must end with .py", str(custom.path))]
        )
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's code may fail with anything
        del sys.modules[name]
        rule = f"fails when it is imported: {_shown(error, custom.path)}"
        raise ProblemsError([class_problem("path", rule, str(custom.path))]) from error
    return module


def rendered(item: Any, vocabulary: int) -> Rendered:
    """What a data set class gave, as tokens with trained spans; padding is cut away.

    Args:
        item: a mapping, as ``custom.py`` says.
        vocabulary: ids from 0 to below this exist.

    Raises:
        MalformedRowError: what is wrong with it.
    """
    if not isinstance(item, Mapping):
        raise MalformedRowError(f"is {type(item).__name__}, expected a mapping with input_ids")
    ids = _numbers(item, "input_ids")
    if not len(ids):
        return Rendered([], ())
    if "loss_mask" in item and "labels" in item:
        raise MalformedRowError("has loss_mask and labels, expected one of them")
    if "loss_mask" in item:
        trained = _mask(item, "loss_mask", len(ids))
    elif "labels" in item:
        trained = _labelled(ids, _numbers(item, "labels"))
    else:
        raise MalformedRowError(f"has neither loss_mask nor labels; found {', '.join(map(str, item)) or 'nothing'}")
    if "attention_mask" in item:
        real = _mask(item, "attention_mask", len(ids))
        places = np.flatnonzero(real)
        if len(places) and len(places) != places[-1] - places[0] + 1:
            raise MalformedRowError("attention_mask has gaps, expected padding at the ends only")
        ids, trained = ids[real], trained[real]
    wrong = np.flatnonzero((ids < 0) | (ids >= vocabulary))
    if len(wrong):
        place = int(wrong[0])
        raise MalformedRowError(f"input_ids[{place}] is {ids[place]}, expected 0 to {vocabulary - 1:,}")
    edges = np.flatnonzero(np.diff(np.concatenate([[0], trained.astype(np.int8), [0]])))
    return Rendered(ids.tolist(), tuple((int(start), int(end)) for start, end in edges.reshape(-1, 2)))


def _labelled(ids: npt.NDArray[np.int64], labels: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    if len(labels) != len(ids):
        raise MalformedRowError(f"labels has {len(labels)} entries, input_ids {len(ids)}")
    trained = labels != IGNORED_LABEL
    wrong = np.flatnonzero(trained & (labels != ids))
    if len(wrong):
        place = int(wrong[0])
        raise MalformedRowError(
            f"labels[{place}] is {labels[place]}, input_ids[{place}] {ids[place]}: expected the same id (labels are "
            f"not shifted) or {IGNORED_LABEL}"
        )
    return trained


def _mask(item: Mapping[Any, Any], key: str, length: int) -> npt.NDArray[np.bool_]:
    values = _numbers(item, key)
    if len(values) != length:
        raise MalformedRowError(f"{key} has {len(values)} entries, input_ids {length}")
    wrong = np.flatnonzero((values != 0) & (values != 1))
    if len(wrong):
        raise MalformedRowError(f"{key}[{int(wrong[0])}] is {values[wrong[0]]}, expected 0 or 1")
    return values.astype(np.bool_)


def _numbers(item: Mapping[Any, Any], key: str) -> npt.NDArray[np.int64]:
    """A list, array or tensor of whole numbers, [length] int64."""
    if key not in item:
        raise MalformedRowError(f"has no {key}; found {', '.join(map(str, item)) or 'nothing'}")
    try:
        values = np.asarray(item[key])
    except Exception as error:  # ragged lists, tensors on a device, whatever else
        raise MalformedRowError(f"{key} is no list of numbers: {type(error).__name__}: {error}") from error
    if values.ndim != 1:
        raise MalformedRowError(f"{key} has shape {list(values.shape)}, expected one dimension")
    whole = values.dtype.kind in "biu" or (values.dtype.kind == "f" and bool(np.all(values == np.round(values))))
    if len(values) and not whole:
        raise MalformedRowError(f"{key} holds {values.dtype}, expected whole numbers")
    return values.astype(np.int64)

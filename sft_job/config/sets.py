"""Named data sets: ``data.train_files`` and ``data.val_files`` as a mapping from a name to an entry.

An entry is what the option takes without names (a path, a list, a glob pattern, a folder), or a mapping of the keys
that ``SetEntry`` lists. What an entry leaves out holds as ``data.*`` says it.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, cast

from sft_job.config.fields import nearest, value_at
from sft_job.config.schema import DataConfig, JobConfig
from sft_job.contract import ExitCode
from sft_job.errors import Problem

Split = Literal["train", "val"]
FILES = ("data.train_files", "data.val_files")
"""Options that may hold named sets."""

_NAME = re.compile(r"[A-Za-z0-9_.-]+")
_MULTITURN = ("enable", "messages_key", "tools_key", "enable_thinking_key", "train_on")
_SHARES = ("weight", "repeat")


@dataclass(frozen=True)
class SetEntry:
    """One named data set, as its entry says it; None = as ``data.*`` says it."""

    files: Any = None
    """Parquet: a file, a folder, a glob pattern, or a list of these; must be set."""
    weight: float | None = None
    """Share of an epoch's rows, in proportion to the other sets' weights (training only); 1 where others have one."""
    repeat: float | None = None
    """How often an epoch takes each row (training only); 1 where no set has a weight. 1.5 = each row once, and another
    half of the rows in each epoch once more."""
    prompt_key: Any = None
    """Column of the prompt, or a list of columns."""
    response_key: Any = None
    """Column of the response, or a list of columns."""
    prompt_dict_keys: list[str] | None = None
    """Keys to descend into a prompt column that holds structs; empty = none, whatever ``data.*`` says."""
    response_dict_keys: list[str] | None = None
    """Keys to descend into a response column that holds structs; empty = none, whatever ``data.*`` says."""
    max_samples: int | None = None
    """Use only the first rows of this set's files; -1 = all."""
    enable: bool | None = None
    """Rows are conversations (``multiturn.enable``). Left out, it is on where the entry has another key of multiturn,
    and off where the entry has prompt_key or response_key."""
    messages_key: str | None = None
    """Column of messages."""
    tools_key: str | None = None
    """Column of tools."""
    enable_thinking_key: str | None = None
    """Column that switches thinking row by row."""
    train_on: str | None = None
    """Assistant turns that are trained: all or last."""


_KEYS = tuple(field.name for field in fields(SetEntry) if field.name != "enable")


@dataclass(frozen=True)
class DataSet:
    """One data set of a split.

    Attributes:
        name: its name; an empty text for a split without named sets.
        option: what names it in messages: ``data.train_files``, ``data.train_files.math``.
        entry: its entry.
        data: the settings below ``data`` as they would be if this set were the only one.
    """

    name: str
    option: str
    entry: SetEntry
    data: DataConfig


def data_sets(data: DataConfig, split: Split) -> tuple[DataSet, ...]:
    """The sets of a split whose settings are valid, by name: in which order they are written changes nothing.

    Returns:
        One set without a name where the option holds no mapping; none where there are no validation files.
    """
    option = f"data.{split}_files"
    value = data.train_files if split == "train" else data.val_files
    if value is None and split == "val":
        return ()
    if not isinstance(value, dict):
        return (DataSet("", option, SetEntry(files=value), data),)
    entries = cast("dict[str, Any]", value)
    found: list[DataSet] = []
    for name in sorted(entries):
        flat = _flat(entries[name])
        for key in ("prompt_dict_keys", "response_dict_keys"):
            flat |= {key: flat[key] or []} if key in flat else {}
        entry = SetEntry(**flat)
        found.append(DataSet(name, f"{option}.{name}", entry, _section(data, split, entry)))
    return tuple(found)


def normal_sets(value: Any) -> Any:
    """The value of ``data.train_files`` with every entry in one form, so that two spellings of it are equal."""
    if not isinstance(value, dict):
        return value
    return {name: _flat(entry) for name, entry in cast("dict[str, Any]", value).items()}


def _flat(entry: Any) -> dict[str, Any]:
    """An entry as a mapping without sections."""
    if not isinstance(entry, dict):
        return {"files": entry}
    keys = dict(cast("dict[str, Any]", entry))
    return keys | (keys.pop("multiturn", None) or {})


def _section(data: DataConfig, split: Split, entry: SetEntry) -> DataConfig:
    chat = {key: getattr(entry, key) for key in _MULTITURN if getattr(entry, key) is not None}
    columns = {key: getattr(entry, key) for key in ("prompt_key", "response_key") if getattr(entry, key) is not None}
    enable = bool(chat) if chat or columns else data.multiturn.enable
    changed: dict[str, Any] = {
        **columns,
        f"{split}_files": entry.files,
        "multiturn": replace(data.multiturn, **{"enable": enable, **chat}),
    }
    for key in ("prompt_dict_keys", "response_dict_keys"):
        if getattr(entry, key) is not None:
            changed[key] = getattr(entry, key) or None
    if entry.max_samples is not None:
        changed[f"{split}_max_samples"] = entry.max_samples
    return replace(data, **changed)


def owner_of(path: str) -> str | None:
    """The option with named sets below which a path lies: ``data.train_files.math.weight`` -> ``data.train_files``."""
    return next((option for option in FILES if path.startswith(f"{option}.")), None)


def parents(path: str) -> list[str]:
    """What lies between the option and a part of its named sets: for ``data.train_files.a.weight`` the set ``a``."""
    owner = owner_of(path)
    rest = path.removeprefix(f"{owner}.").split(".") if owner else []
    return [f"{owner}.{'.'.join(rest[:depth])}" for depth in range(1, len(rest))]


def with_part(value: Any, path: str, part: Any) -> dict[str, Any] | None:
    """Named sets with one part replaced or added, as the command line may ask.

    Args:
        value: of ``data.train_files``.
        path: below it: ``math``, ``math.weight``, ``math.multiturn.enable``; names may hold dots.
        part: the new value.

    Returns:
        A new value; None where the old one names no sets.
    """
    if value is not None and not isinstance(value, dict):
        return None
    sets: dict[str, Any] = copy.deepcopy(cast("dict[str, Any]", value or {}))
    known = [name for name in sets if f"{path}.".startswith(f"{name}.")]
    name = max(known, key=len) if known else path.partition(".")[0]
    if path == name:
        return sets | {name: part}
    entry = sets.get(name)
    bare = {} if entry is None else {"files": entry}
    place = sets[name] = cast("dict[str, Any]", entry if isinstance(entry, dict) else bare)
    *sections, key = path.removeprefix(f"{name}.").split(".")
    for section in sections:
        inner = place.get(section)
        place[section] = inner if isinstance(inner, dict) else {}
        place = cast("dict[str, Any]", place[section])
    place[key] = part
    return sets


def shown_parts(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Full path and value of each leaf of named sets; a value that is no mapping is a leaf itself."""
    if not isinstance(value, dict) or not value:
        yield path, value
        return
    for name, part in cast("dict[str, Any]", value).items():
        yield from shown_parts(f"{path}.{name}", part)


@dataclass(frozen=True)
class _Rule:
    text: str
    holds: Callable[[Any], bool]


def _texts(value: Any) -> bool:
    return isinstance(value, list) and value != [] and all(map(_text, cast("list[Any]", value)))


def _text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _above_zero(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0


_ABOVE_ZERO = _Rule("must be a finite number above 0", _above_zero)
_COLUMN = _Rule("must be a column name", _text)
_COLUMNS = _Rule("must be a column name or a list of them", lambda value: _text(value) or _texts(value))
_PATH = _Rule("must be a list of keys, or null", lambda value: value is None or _texts(value))
_RULES: Mapping[str, _Rule] = {
    "files": _Rule("must be a path or a list of them", lambda value: _text(value) or _texts(value)),
    "weight": _ABOVE_ZERO,
    "repeat": _ABOVE_ZERO,
    "prompt_key": _COLUMNS,
    "response_key": _COLUMNS,
    "prompt_dict_keys": _PATH,
    "response_dict_keys": _PATH,
    "max_samples": _Rule(
        "must be a whole number from 1, or -1", lambda value: _whole(value) and (value >= 1 or value == -1)
    ),
    "enable": _Rule("must be true or false", lambda value: isinstance(value, bool)),
    "messages_key": _COLUMN,
    "tools_key": _COLUMN,
    "enable_thinking_key": _COLUMN,
    "train_on": _Rule("must be one of all, last", lambda value: value in ("all", "last")),
}


def check_sets(config: JobConfig, origin: Callable[[str], str]) -> list[Problem]:
    """Everything that is wrong with the mappings of named sets; what the files hold is not looked at.

    Args:
        config: the settings.
        origin: from a full path (``data.train_files.math.weight``) to where it was set.
    """
    problems: list[Problem] = []
    for option in FILES:
        value = value_at(config, option)
        if isinstance(value, dict):
            check = _Check(option, cast("dict[str, Any]", value), origin)
            check.run()
            problems += check.problems
    return problems


class _Check:
    """Looks at one option's sets and collects problems."""

    def __init__(self, option: str, sets: dict[str, Any], origin: Callable[[str], str]) -> None:
        self.option = option
        self.sets = sets
        self.origin = origin
        self.trains = option == FILES[0]
        self.problems: list[Problem] = []

    def run(self) -> None:
        if not self.sets:
            self._problem(self.option, "names no data set", "name one, such as math: /data/math.parquet")
        folded: dict[str, str] = {}
        for name, entry in self.sets.items():
            path = f"{self.option}.{name}"
            other = folded.setdefault(name.casefold(), name)
            if not _NAME.fullmatch(name):
                rule = "the name of a data set is made of the letters A to Z and a to z, digits, _, . and -"
                self._problem(path, rule, "it names metrics such as val/NAME/loss")
            elif other != name:
                rule = f"differs from {self.option}.{other} ({self.origin(f'{self.option}.{other}')}) only by case"
                self._problem(path, rule, "give one of them another name")
            self._entry(name, path, entry)
        if self.trains:
            self._one_kind_of_share()

    def _entry(self, name: str, path: str, entry: Any) -> None:
        if not isinstance(entry, dict):
            rule = _Rule(f"{_RULES['files'].text}, or a mapping with files and more keys", _RULES["files"].holds)
            self._value(path, entry, rule)
            return
        keys = cast("dict[str, Any]", entry)
        section = keys.get("multiturn")
        for key, value in keys.items():
            if key == "multiturn":
                self._section(path, keys, value)
            elif key in _SHARES and not self.trains:
                rule = "is for training sets: a validation takes every row once"
                self._problem(f"{path}.{key}", rule, "leave it out", value)
            elif key in _KEYS:
                self._value(f"{path}.{key}", value, _RULES[key])
            else:
                self._unknown(path, key, [*_KEYS, "multiturn"])
        if "files" not in keys:
            close = nearest(name, [other for other in self.sets if other != name])
            fix = f"did you mean {self.option}.{close}?" if close else "name the set's parquet files"
            self._problem(f"{path}.files", "must be set", fix)
        if set(_SHARES) <= keys.keys():
            rule = f"stands beside weight = {keys['weight']}: a set has one of the two"
            self._problem(f"{path}.repeat", rule, "keep one of them", keys["repeat"])
        chat = {*keys, *(cast("dict[str, Any]", section) if isinstance(section, dict) else {})} & {*_MULTITURN}
        columns = [key for key in ("prompt_key", "response_key") if key in keys]
        if chat and columns and "enable" not in chat:
            rule = f"has {columns[0]} and {min(chat)}: is a row a prompt with its response, or a conversation?"
            self._problem(path, rule, f"set {path}.multiturn.enable, or leave one of them out")

    def _section(self, path: str, keys: dict[str, Any], section: Any) -> None:
        if section is None:
            return
        if not isinstance(section, dict):
            self._problem(f"{path}.multiturn", "must be a mapping", f"its keys are {', '.join(_MULTITURN)}", section)
            return
        for key, value in cast("dict[str, Any]", section).items():
            if key not in _MULTITURN:
                self._unknown(f"{path}.multiturn", key, list(_MULTITURN))
                continue
            self._value(f"{path}.multiturn.{key}", value, _RULES[key])
            if keys.get(key, value) != value:
                rule = f"means the same as {path}.{key} = {keys[key]!r}, which differs"
                self._problem(f"{path}.multiturn.{key}", rule, "keep one of the two", value)

    def _one_kind_of_share(self) -> None:
        entries = {name: cast("dict[str, Any]", each) for name, each in self.sets.items() if isinstance(each, dict)}
        weighted, repeated = (
            [name for name, entry in entries.items() if key in entry and not set(_SHARES) <= entry.keys()]
            for key in _SHARES
        )
        if weighted and repeated:
            rule = f"{', '.join(weighted)} with weight, {', '.join(repeated)} with repeat: all sets have the same kind"
            self._problem(self.option, rule, "give all of them a weight, or all of them a repeat")

    def _value(self, path: str, value: Any, rule: _Rule) -> None:
        if not rule.holds(value):
            self._problem(path, rule.text, "", value)

    def _unknown(self, path: str, key: str, known: list[str]) -> None:
        allowed = [each for each in known if self.trains or each not in _SHARES]
        close = nearest(key, allowed)
        fix = f"did you mean {path}.{close}?" if close else f"a set's keys are {', '.join(allowed)}"
        self._problem(f"{path}.{key}", "unknown key", fix)

    def _problem(self, subject: str, rule: str, fix: str, *value: Any) -> None:
        more = {"value": value[0]} if value else {}
        self.problems.append(Problem(ExitCode.CONFIG, subject, rule, fix, origin=self.origin(subject), **more))

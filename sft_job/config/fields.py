"""The settings of ``schema.py`` as a flat table: full path, type in words, default value."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from sft_job.config.schema import JobConfig


@dataclass(frozen=True)
class Field:
    """One setting.

    Attributes:
        path: full path, such as ``optim.lr``.
        hint: its type annotation in ``schema.py``.
        default: its default value.
    """

    path: str
    hint: Any
    default: Any

    @property
    def kind(self) -> Any:
        """The annotation without Optional: ``int``, ``list``, ``dict``, ``Any``, ..."""
        hint = _without_none(self.hint)
        return typing.get_origin(hint) or hint

    @property
    def item(self) -> Any:
        """Type of a list's items; the annotation itself where this is no list."""
        hint = _without_none(self.hint)
        return typing.get_args(hint)[0] if self.kind is list else hint

    @property
    def expected(self) -> str:
        """What values are allowed, in words."""
        if self.kind is list:
            text = f"a list of {_WORDS_PLURAL.get(self.item, 'values')}"
        else:
            text = _WORDS.get(self.kind, "any value")
        return f"{text} or null" if is_optional(self.hint) else text


_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", dict: "a mapping"}
_WORDS_PLURAL = {int: "whole numbers", float: "numbers", str: "texts"}


def leaf_fields() -> dict[str, Field]:
    """All settings by full path, in the order of ``schema.py``."""
    return fields_of(JobConfig())


def fields_of(settings: Any, section: str = "") -> dict[str, Field]:
    """The same for any tree of dataclasses; ``section`` is where it hangs."""
    return {leaf.path: leaf for leaf in _leaves(settings, section)}


def section_paths(fields: Iterable[str]) -> frozenset[str]:
    """Full paths of the groups of settings (``data``, ``data.multiturn``, ...); the root is the empty path."""
    return frozenset(
        ".".join(parts[:depth]) for parts in (path.split(".") for path in fields) for depth in range(len(parts))
    )


def value_at(config: Any, path: str) -> Any:
    """The value of a setting by full path."""
    for name in path.split("."):
        config = getattr(config, name)
    return config


def join(section: str, name: str) -> str:
    """Full path of a name in a section; the root section is the empty text."""
    return f"{section}.{name}" if section else name


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that looks most like this one, or None where none is close."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)), None)


def suggestion(path: str, fields: Iterable[str]) -> str:
    """A "did you mean" for an unknown key, or an empty text.

    Looks in the key's own section, then for the same name elsewhere, then for a similar full path.
    """
    paths = [*fields]
    known = {*paths, *section_paths(paths)} - {""}
    section, _, name = path.rpartition(".")
    siblings = [each.rpartition(".")[2] for each in known if each.rpartition(".")[0] == section]
    close = nearest(name, siblings)
    if close:
        return f"did you mean {join(section, close)}?"
    elsewhere = sorted(each for each in known if each.rpartition(".")[2] == name)
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere)}?"
    close = nearest(path, known)
    return f"did you mean {close}?" if close else ""


def is_optional(hint: Any) -> bool:
    """Whether null is allowed."""
    return hint is Any or type(None) in typing.get_args(hint)


def _without_none(hint: Any) -> Any:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return next(arg for arg in typing.get_args(hint) if arg is not type(None))
    return hint


def _leaves(config: Any, section: str) -> Iterator[Field]:
    hints = typing.get_type_hints(typing.cast("type[Any]", type(config)))
    for each in dataclasses.fields(config):
        value = getattr(config, each.name)
        path = join(section, each.name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, path)
        else:
            yield Field(path, hints[each.name], value)

"""From YAML nodes to settings: unknown keys, duplicate keys and wrong types, each with its line."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import yaml

from sft_job.config.fields import Field, join, section_paths, suggestion
from sft_job.config.keys import FRAGMENTS
from sft_job.config.sets import FILES, owner_of
from sft_job.config.verl import ALIASES, FOREIGN, Alias, Foreign, foreign
from sft_job.contract import ExitCode
from sft_job.errors import Problem

_TAG = "tag:yaml.org,2002:"
NULL_TAG = _TAG + "null"
_PLAIN_TAGS = frozenset(_TAG + name for name in ("str", "int", "float", "bool", "null", "seq", "map", "merge"))
_KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: "a mapping",
}
_NO_VALUE = object()
_MOST_BITS = 14_000
"""Python shows whole numbers of up to 4,300 digits."""


@dataclass(frozen=True)
class Setting:
    """One value that a layer (file, environment, command line) sets.

    Attributes:
        key: full path of the setting.
        written: the name that was used, which differs from key for other names.
        value: its value; a text with ``${...}`` is not resolved yet.
        origin: where it stands.
        items: where a list's items stand, in their order.
        below: where the parts of named data sets stand, by full path.
        given: the value as it was written, which differs from value where another name has other words for it.
        unset: the other name was given a value that means "not set".
    """

    key: str
    written: str
    value: Any
    origin: str
    items: tuple[str, ...] = ()
    given: Any = None
    unset: bool = False
    below: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True)
class ForeignValue:
    """A key of verl's without a counterpart that a layer sets.

    Attributes:
        key: full path, or an item of a list.
        entry: what is known about it.
        value: its value; unresolved where it is a text with ``${...}``.
        origin: where it stands.
    """

    key: str
    entry: Foreign
    value: Any
    origin: str


class NodeReader:
    """Reads settings from YAML nodes and collects problems.

    Args:
        loader: the loader that composed the nodes.
        fields: all settings.
        where: from a node to the text that says where it stands.
    """

    def __init__(self, loader: Any, fields: Mapping[str, Field], where: Callable[[yaml.Node], str]) -> None:
        self.loader = loader
        self.fields = fields
        self.own_sections = section_paths(fields)
        self.sections = self.own_sections | section_paths([*ALIASES, *FOREIGN])
        self.where = where
        self.settings: list[Setting] = []
        self.foreign: list[ForeignValue] = []
        self.problems: list[Problem] = []

    def problem(self, subject: str, node: yaml.Node, rule: str, fix: str = "", value: Any = _NO_VALUE) -> None:
        """Note a problem at a node."""
        more = {} if value is _NO_VALUE else {"value": value}
        self.problems.append(Problem(ExitCode.CONFIG, subject, rule, fix, origin=self.where(node), **more))

    def read(self, path: str, key_node: yaml.Node, node: yaml.Node) -> None:
        """Read the value of one key, be it a section, a setting or unknown."""
        alias = ALIASES.get(path)
        owner = _dict_owner(path, self.fields)
        entry = foreign(path)
        if path in self.sections:
            self.read_section(path, node)
        elif path in self.fields:
            self._read_field(self.fields[path], path, key_node, node)
        elif alias is not None:
            self._read_field(self.fields[alias.target], path, key_node, node, alias)
        elif owner is not None:
            self._read_free(path, owner, key_node, node)
        elif owner_of(path) is not None:
            self._read_sets(path, path, key_node, node)
        elif entry is not None:
            self._read_foreign(path, entry, key_node, node)
        elif path in FRAGMENTS:
            full = FRAGMENTS[path]
            fix = f"it belongs below {full.rpartition('.')[0]}, as {full}"
            self.problem(path, key_node, "unknown key at the top level", fix)
        else:
            self.problem(path, key_node, "unknown key", self._suggestion(path))

    def read_section(self, path: str, node: yaml.Node) -> None:
        """Read all keys of a section; one without any content sets nothing."""
        if node.tag == NULL_TAG:
            return
        if not isinstance(node, yaml.MappingNode):
            rule = f"must be a mapping of settings; this is {_node_kind(node)}"
            self.problem(path or "the config", node, rule, "write its keys below it, indented")
            return
        for key_node, value_node in self._pairs(path, node):
            name = join(path, key_node.value)
            if "." in key_node.value:
                fix = "write each part on a line of its own, indented below the one before"
                self.problem(name, key_node, "in YAML a key with dots does not reach into sections", fix)
            else:
                self.read(name, key_node, value_node)

    def _pairs(self, path: str, node: yaml.MappingNode) -> list[tuple[yaml.Node, yaml.Node]]:
        """Keys and values of a mapping, merge keys (``<<``) put in; of duplicates the first one."""
        node.value = self._without_bad_keys(path, node)
        try:
            self.loader.flatten_mapping(node)
        except yaml.constructor.ConstructorError as error:
            self.problem(path or "the config", node, str(error.problem))
            return []
        pairs = {key.value: (key, value) for key, value in node.value if isinstance(key, yaml.ScalarNode)}
        return [*pairs.values()]

    def _without_bad_keys(self, path: str, node: yaml.MappingNode) -> list[tuple[yaml.Node, yaml.Node]]:
        first: dict[str, yaml.Node] = {}
        kept: list[tuple[yaml.Node, yaml.Node]] = []
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag not in _PLAIN_TAGS:
                self.problem(path or "the config", key, "its keys must be plain names", "write KEY: VALUE")
            elif key.tag != _TAG + "merge" and key.value in first:
                rule = f"duplicate key; the first one is at {self.where(first[key.value])}"
                self.problem(join(path, key.value), key, rule, "keep one of the two")
            else:
                first.setdefault(key.value, key)
                kept.append((key, value))
        return kept

    def _suggestion(self, path: str) -> str:
        theirs = [*ALIASES, *FOREIGN]
        in_theirs = path.rpartition(".")[0] in self.sections - self.own_sections
        first, second = (theirs, self.fields) if in_theirs else (self.fields, theirs)
        return suggestion(path, first) or suggestion(path, second)

    def _read_foreign(self, path: str, entry: Foreign, key_node: yaml.Node, node: yaml.Node) -> None:
        pairs = [(path, key_node, node)]
        if entry.each and isinstance(node, yaml.SequenceNode):
            pairs = [(f"{path}[{at}]", item, item) for at, item in enumerate(node.value)]
        for name, place, each in pairs:
            value = self._value(name, each)
            if value is not _NO_VALUE:
                self.foreign.append(ForeignValue(name, entry, value, self.where(place)))

    def _read_field(
        self, field: Field, written: str, key_node: yaml.Node, node: yaml.Node, alias: Alias | None = None
    ) -> None:
        if field.path in FILES and isinstance(node, yaml.MappingNode):
            self._read_sets(field.path, written, key_node, node)
            return
        given = self._value(written, node)
        if given is _NO_VALUE:
            return
        if alias is not None and any(given is each or (given == each and given is not False) for each in alias.unset):
            self.settings.append(Setting(field.path, written, None, self.where(key_node), given=given, unset=True))
            return
        value = _own_names(alias.convert(given) if alias else given)
        if field.kind is list and isinstance(node, yaml.SequenceNode):
            odd = [_odd(field.item, item, each) for item, each in zip(node.value, value, strict=True)]
            for index, (item, fault) in enumerate(zip(node.value, odd, strict=True)):
                if fault:
                    self.problem(f"{written}[{index}]", item, *fault, value[index])
            if any(odd):
                return
        elif isinstance(node, yaml.ScalarNode):
            fault = _odd(field.kind, node, value)
            if fault:
                self.problem(written, key_node, *fault, value)
                return
        items = tuple(map(self.where, node.value)) if isinstance(node, yaml.SequenceNode) else ()
        self.settings.append(Setting(field.path, written, value, self.where(key_node), items, given))

    def _read_free(self, path: str, owner: str, key_node: yaml.Node, node: yaml.Node) -> None:
        """A key of a setting that is itself a mapping of free keys, as the command line may name it."""
        if not re.fullmatch(r"[\w-]+(\.[\w-]+)*", path.removeprefix(f"{owner}.")):
            self.problem(path, key_node, f"keys below {owner} are letters, digits, - and _", f"set {owner} as a whole")
            return
        value = self._value(path, node)
        if value is not _NO_VALUE:
            self.settings.append(Setting(path, path, value, self.where(key_node)))

    def _read_sets(self, path: str, written: str, key_node: yaml.Node, node: yaml.Node) -> None:
        """Named data sets, or a part of them as the command line may name it; ``sets.py`` has the rules of entries."""
        below: dict[str, str] = {}
        self._prepare_sets(path, node, below)
        value = self._value(path, node)
        if value is not _NO_VALUE:
            where = self.where(key_node)
            self.settings.append(Setting(path, written, _own_names(value), where, given=value, below=below))

    def _prepare_sets(self, path: str, node: yaml.Node, below: dict[str, str]) -> None:
        """Make keys texts (a set may be called 2024), duplicate ones a problem; note where each part stands."""
        if isinstance(node, yaml.MappingNode):
            node.value = self._pairs(path, node)
            for key, value in node.value:
                key.tag = f"{_TAG}str"
                name = join(path, key.value)
                below[name] = self.where(key)
                self._prepare_sets(name, value, below)
        elif isinstance(node, yaml.SequenceNode):
            below |= {f"{path}[{at}]": self.where(item) for at, item in enumerate(node.value)}
        elif node.tag in _PLAIN_TAGS:
            fault = _odd(bool if path.endswith(".enable") else Any, node, self._value(path, node))
            if fault:
                self.problem(path, node, *fault, node.value)

    def _value(self, path: str, node: yaml.Node) -> Any:
        """The value that OmegaConf's loader makes of a node, or _NO_VALUE and problems."""
        foreign = _foreign_tags(node)
        for each in foreign:
            tag = each.tag.replace(_TAG, "!!")
            fix = "write the value without a tag, or in quotes"
            self.problem(path, each, f"the tag {tag} is not allowed in a config", fix)
        if foreign:
            return _NO_VALUE
        try:
            value = self.loader.construct_object(node, deep=True)
        except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
            said = getattr(error, "problem", None) or error
            self.problem(path, node, f"cannot be read: {said}", "put the value in quotes, or write it plainly")
            return _NO_VALUE
        if _holds_endless_number(value):
            self.problem(path, node, "holds a number of thousands of digits", "write a number that can be used")
            return _NO_VALUE
        return value


def wrong_type(field: Field, value: Any) -> tuple[str, str]:
    """Rule and fix for a value that cannot be converted to the setting's type."""
    if value is None:
        return f"must be {field.expected}; null is not allowed", "leave the key out for its default value"
    rule = f"must be {field.expected}; this is {value_kind(value)}"
    if field.kind is int and isinstance(value, float) and value.is_integer():
        return rule, f"write {int(value)}"
    if field.kind is list and isinstance(value, (str, int, float)):
        return rule, f"write [{value}]"
    return rule, ""


def value_kind(value: Any) -> str:
    """The kind of a value in words."""
    return "null" if value is None else _KINDS.get(cast("type[Any]", type(value)), type(value).__name__)


def _own_names(value: Any) -> Any:
    """The value with references to verl's names (``${model.path}``) turned into references to settings."""
    if isinstance(value, list):
        return [_own_names(each) for each in cast("list[Any]", value)]
    if isinstance(value, dict):
        return {key: _own_names(each) for key, each in cast("dict[Any, Any]", value).items()}
    if not isinstance(value, str):
        return value
    return re.sub(
        r"\$\{([\w.]+)\}", lambda found: f"${{{ALIASES[found[1]].target if found[1] in ALIASES else found[1]}}}", value
    )


def _odd(kind: Any, node: yaml.Node, value: Any) -> tuple[str, str] | None:
    """Rule and fix where YAML 1.1 made of a plain scalar what was hardly meant, else None."""
    plain = isinstance(node, yaml.ScalarNode) and not node.style  # None or an empty text, depending on the parser
    if not plain or isinstance(value, str) or value is None:
        return None
    text = node.value
    if kind is str and str(value) != text:
        return f"must be a text; YAML reads {text} as {_shown(value)}", f'write "{text}" in quotes'
    if kind is Any and isinstance(value, bool) and text.lower() not in ("true", "false"):
        return f"YAML reads {text} as {_shown(value)}", f'write "{text}" in quotes'
    if type(value) in (int, float) and (":" in text or re.fullmatch(r"[-+]?0[0-9_]+", text)):
        base = "base 60" if ":" in text else "octal"
        return f"YAML reads {text} as {_shown(value)} ({base})", "write a plain decimal number, without leading zeros"
    return None


def _dict_owner(path: str, fields: Mapping[str, Field]) -> str | None:
    """The setting with free keys under which a path lies."""
    parts = path.split(".")
    prefixes = (".".join(parts[:depth]) for depth in range(1, len(parts)))
    return next((each for each in prefixes if each in fields and fields[each].kind is dict), None)


def _foreign_tags(node: yaml.Node) -> list[yaml.Node]:
    """Nodes with a tag other than those of plain YAML values."""
    children: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        children = node.value
    elif isinstance(node, yaml.MappingNode):
        children = [each for pair in cast("list[tuple[yaml.Node, yaml.Node]]", node.value) for each in pair]
    found = [] if node.tag in _PLAIN_TAGS else [node]
    return found + [each for child in children for each in _foreign_tags(child)]


def _holds_endless_number(value: Any) -> bool:
    """Base 16 and base 60 write whole numbers that Python makes, but refuses to show."""
    if isinstance(value, dict):
        return any(_holds_endless_number(each) for pair in cast("dict[Any, Any]", value).items() for each in pair)
    if isinstance(value, list):
        return any(map(_holds_endless_number, cast("list[Any]", value)))
    return isinstance(value, int) and value.bit_length() > _MOST_BITS


def _node_kind(node: yaml.Node) -> str:
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    return f"the value {node.value!r}" if isinstance(node, yaml.ScalarNode) else "a mapping"


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)

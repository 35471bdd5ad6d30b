"""Loading ``job.yaml``: defaults < file < command line; everything that is wrong at once, with its line."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import yaml
from omegaconf import OmegaConf

from sft_job.config.fields import Field, fields_of, is_optional, join, leaf_fields, nearest, section_paths
from sft_job.config.settings import NULL_TAG, wrong_type
from sft_job.config.source import UnreadableYamlError, read_text, yaml_nodes
from sft_job.config.verl import ALIASES, FOREIGN
from sft_job.contract import ExitCode
from sft_job.errors import Problem, raise_problems
from sft_job.jobfile.schema import LAUNCHERS, JobFile
from sft_job.jobfile.validate import validate

Block = TypeVar("Block")

_COMMAND_LINE = "command line"
_TAG = "tag:yaml.org,2002:"
_SCALARS = tuple(_TAG + name for name in ("str", "int", "float", "bool", "null", "timestamp", "merge"))
_NOTHING = object()


@dataclass
class LoadedJob(Generic[Block]):
    """A job file as loaded.

    Attributes:
        job: what every launcher reads.
        block: the launcher's own settings.
        origins: full path -> where it was set.
        path: the job file.
    """

    job: JobFile
    block: Block
    origins: dict[str, str]
    path: Path

    def origin(self, key: str) -> str:
        """Where a setting, or a part of it (``mounts[1]``, ``environment.NAME``), was set; '' for a default."""
        while key and key not in self.origins:
            key = key[: max(key.rfind("."), key.rfind("["), 0)]
        return self.origins.get(key, "")


def load_job(
    path: Path,
    overrides: Sequence[str],
    launcher: str,
    block: type[Block],
    check: Callable[[JobFile, Block], Sequence[Problem]],
) -> LoadedJob[Block]:
    """Load a job file and check it.

    Args:
        path: the job file.
        overrides: ``key=value`` from the command line; one of the run's config (``optim.lr``) goes to ``overrides``.
        launcher: name of the launcher's block.
        block: its dataclass.
        check: what the launcher has to say about the settings; asked where every value has the right type.

    Raises:
        ProblemsError: everything that is wrong, at once.
    """
    reader = _Reader({**fields_of(JobFile()), **fields_of(block(), launcher)}, launcher)
    reader.add_file(path)
    for override in overrides:
        reader.add_override(override)
    values, problems = reader.resolved()
    job, own = _built(JobFile(), values, ""), _built(block(), values, launcher)
    loaded = LoadedJob(job, own, reader.origins, path)
    if reader.readable:
        found = list(validate(job))
        if not problems:
            found += check(job, own)
        faulty = {problem.subject for problem in problems}
        problems += [
            dataclasses.replace(problem, origin=problem.origin or loaded.origin(problem.subject))
            for problem in found
            if problem.subject not in faulty
        ]
    raise_problems(problems)
    return loaded


@dataclass
class _Reader:
    """Collects values by full path, and problems."""

    fields: Mapping[str, Field]
    launcher: str
    values: dict[str, Any] = field(default_factory=dict[str, Any])
    origins: dict[str, str] = field(default_factory=dict[str, str])
    problems: list[Problem] = field(default_factory=list[Problem])
    readable: bool = False

    def add_file(self, path: Path) -> None:
        try:
            with yaml_nodes(read_text(path)) as (loader, root):
                if not isinstance(root, yaml.MappingNode):
                    raise UnreadableYamlError("must be a mapping of settings", "write KEY: VALUE, one a line")
                self._section("", loader, root, lambda node: f"{path.name}:{node.start_mark.line + 1}")
                self.readable = True
        except UnreadableYamlError as error:
            origin = "" if error.line is None else f"{path.name}:{error.line}"
            self.problems.append(Problem(ExitCode.CONFIG, str(path), error.rule, error.fix, origin=origin))

    def add_override(self, override: str) -> None:
        key, equals, text = override.partition("=")
        key = key.strip()
        if not equals or not key:
            self._problem("override", "must have the form key=value", "write key=value", override, _COMMAND_LINE)
        elif self._owner(key) is None and key.partition(".")[0] in _run_sections():
            self.values["overrides"] = [*self.values.get("overrides", []), override]
            self.origins["overrides"] = _COMMAND_LINE
        else:
            try:
                with yaml_nodes(text) as (loader, root):
                    node = root if root is not None else yaml.ScalarNode(NULL_TAG, "")
                    self._value(key, loader, node, lambda _: _COMMAND_LINE)
            except UnreadableYamlError as error:
                self._problem(key, f"the value {error.rule}", "put it in quotes", text, _COMMAND_LINE)

    def resolved(self) -> tuple[dict[str, Any], list[Problem]]:
        """All values with their ``${...}`` filled in; keys of the file and ``${oc.env:NAME}`` may stand there."""
        tree = OmegaConf.create({})
        for key, each in {**{path: leaf.default for path, leaf in self.fields.items()}, **self.values}.items():
            OmegaConf.update(tree, key, each, force_add=True)
        values: dict[str, Any] = {}
        for key in self.values:
            try:
                value = OmegaConf.select(tree, key, throw_on_missing=True)
                values[key] = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
            except Exception as error:  # a resolver may raise anything
                rule = f"cannot be resolved: {str(error).splitlines()[0]}"
                fix = "set the variable or key that it names, or write the value; for the shell to fill in: \\${NAME}"
                self._problem(key, rule, fix, self.values[key], self.origins.get(key, ""))
                values[key] = self.fields[key].default
        return values, self.problems

    def _problem(self, subject: str, rule: str, fix: str, value: Any, origin: str) -> None:
        more = {} if value is _NOTHING else {"value": value}
        self.problems.append(Problem(ExitCode.CONFIG, subject, rule, fix, origin=origin, **more))

    def _owner(self, key: str) -> str | None:
        """The setting that a key names, or whose part it names; the section; None where it is unknown."""
        parts = key.split(".")
        for depth in range(len(parts), 0, -1):
            path = ".".join(parts[:depth])
            if path in self.fields and (depth == len(parts) or self.fields[path].kind is dict):
                return path
        return key if key in section_paths(self.fields) else None

    def _section(self, path: str, loader: Any, node: yaml.Node, where: Callable[[yaml.Node], str]) -> None:
        if node.tag == NULL_TAG:
            return
        if not isinstance(node, yaml.MappingNode):
            self._problem(path, "must be a mapping of settings", "write its keys below it", _NOTHING, where(node))
            return
        seen: set[str] = set()
        for key_node, value_node in _pairs(node):
            name = join(path, str(key_node.value))
            if name in seen:
                self._problem(name, "duplicate key", "keep one of the two", _NOTHING, where(key_node))
            seen.add(name)
            if not path and key_node.value in LAUNCHERS and key_node.value != self.launcher:
                continue  # another launcher's block
            self._value(name, loader, value_node, where, key_node)

    def _value(
        self,
        key: str,
        loader: Any,
        node: yaml.Node,
        where: Callable[[yaml.Node], str],
        key_node: yaml.Node | None = None,
    ) -> None:
        origin = where(key_node or node)
        owner = self._owner(key)
        if owner is None:
            self._problem(key, "unknown key", self._known(key), _NOTHING, origin)
        elif owner not in self.fields:
            self._section(owner, loader, node, where)
        else:
            leaf = self.fields[owner]
            part = key[len(owner) + 1 :]
            try:
                value = _part_of_mapping(leaf, part, node) if part else _read(leaf, loader, node)
            except _WrongTypeError as error:
                self._problem(join(key, error.part) if error.part else key, error.rule, error.fix, error.value, origin)
                return
            if isinstance(value, list) and isinstance(node, yaml.SequenceNode):
                self.origins |= {f"{key}[{at}]": where(item) for at, item in enumerate(node.value)}
            elif isinstance(value, dict) and isinstance(node, yaml.MappingNode):
                self.origins |= {join(key, str(name.value)): where(name) for name, _ in _pairs(node)}
            self.values[owner] = {**self.values.get(owner, {}), **cast("Any", value)} if part else value
            self.origins[key] = origin

    def _known(self, key: str) -> str:
        """The legal names, the likeliest first."""
        section = key.rpartition(".")[0]
        while section and section not in section_paths(self.fields):
            section = section.rpartition(".")[0]
        known = {*self.fields, *section_paths(self.fields)} - {""}
        names = sorted({each.rpartition(".")[2] for each in known if each.rpartition(".")[0] == section})
        word, point, rest = key.removeprefix(f"{section}." if section else "").partition(".")
        close = next((each for each in names if each.startswith(word)), None) or nearest(word, names)
        if close and point and self._owner(f"{join(section, close)}.{rest}") is not None:
            close = f"{close}.{rest}"
        legal = ", ".join(names)
        place = f"below {section}" if section else "at the top level"
        return (f"did you mean {join(section, close)}? " if close else "") + f"{place} there are: {legal}"


class _WrongTypeError(Exception):
    def __init__(self, rule: str, fix: str, value: Any, part: str = "") -> None:
        super().__init__(rule)
        self.rule = rule
        self.fix = fix
        self.value = value
        self.part = part


def _read(leaf: Field, loader: Any, node: yaml.Node) -> Any:
    """The value of a setting. Texts are taken as they are written: ``time: 12:00:00`` is no number to base 60."""
    if node.tag == NULL_TAG:
        if is_optional(leaf.hint):
            return None
        raise _WrongTypeError(*wrong_type(leaf, None), None)
    if leaf.kind is list:
        if not isinstance(node, yaml.SequenceNode) or not all(map(_is_text, node.value)):
            value = node.value if _is_text(node) else _NOTHING
            raise _WrongTypeError("must be a list of texts", f"write [{node.value}]" if _is_text(node) else "", value)
        return [each.value for each in node.value]
    if leaf.kind is dict:
        if not isinstance(node, yaml.MappingNode):
            raise _WrongTypeError("must be a mapping of names to texts", "write NAME: VALUE below it", _NOTHING)
        odd = next((name for name, each in _pairs(node) if not _is_text(each)), None)
        if odd is not None:
            fix = 'write one text, in quotes where it holds a comma: "A,B"'
            raise _WrongTypeError("must be a text", fix, _NOTHING, str(odd.value))
        return {str(name.value): each.value for name, each in _pairs(node)}
    if not isinstance(node, yaml.ScalarNode) or node.tag not in _SCALARS:
        raise _WrongTypeError(f"must be {leaf.expected}", "", _NOTHING)
    if leaf.kind is str:
        return node.value
    value = loader.construct_object(node, deep=True)
    if isinstance(value, str) and value.startswith("${"):
        return value
    fits = {int: (int,), float: (int, float), bool: (bool,)}[leaf.kind]
    if not isinstance(value, fits) or isinstance(value, bool) != (leaf.kind is bool):
        raise _WrongTypeError(*wrong_type(leaf, value), value)
    return value


def _part_of_mapping(leaf: Field, part: str, node: yaml.Node) -> dict[str, str]:
    if not _is_text(node):
        raise _WrongTypeError("must be a text", "", _NOTHING)
    return {part: node.value}


def _is_text(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag in _SCALARS and node.tag != NULL_TAG


def _pairs(node: yaml.MappingNode) -> Iterator[tuple[yaml.Node, yaml.Node]]:
    yield from cast("list[tuple[yaml.Node, yaml.Node]]", node.value)


def _run_sections() -> set[str]:
    """The first parts of keys of the run's config."""
    return {path.partition(".")[0] for path in (*leaf_fields(), *ALIASES, *FOREIGN)}


def _built(settings: Any, values: Mapping[str, Any], section: str) -> Any:
    """Settings with these values put in."""
    for each in dataclasses.fields(settings):
        path = join(section, each.name)
        inner = getattr(settings, each.name)
        if dataclasses.is_dataclass(inner):
            _built(inner, values, path)
        elif path in values:
            setattr(settings, each.name, values[path])
    return settings

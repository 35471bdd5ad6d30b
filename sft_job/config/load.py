"""Loading the settings: defaults < YAML file < environment < command line, with the origin of every value.

OmegaConf converts and interpolates the values. It stops at its first error and knows no line numbers, so the YAML's
nodes are walked here (with the loader that OmegaConf itself uses) and all problems are collected.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import GrammarParseError, OmegaConfBaseException

from sft_job.config.fields import Field, leaf_fields, suggestion, value_at
from sft_job.config.keys import KEYS
from sft_job.config.schema import JobConfig
from sft_job.config.sets import FILES, owner_of, parents, shown_parts, with_part
from sft_job.config.settings import NULL_TAG, ForeignValue, NodeReader, Setting, wrong_type
from sft_job.config.source import UnreadableYamlError, find_config, read_text, yaml_nodes
from sft_job.config.verl import ALIASES
from sft_job.contract import Env, ExitCode, RunFolder
from sft_job.errors import Problem, raise_problems

_RUN_FOLDER_KEY = "trainer.default_local_dir"
_COMMAND_LINE = "command line"
_LONGEST_SHOWN = 500


@dataclass
class Loaded:
    """The settings as loaded, with everything there is to say about them.

    Attributes:
        config: typed settings, interpolations resolved; a setting with a problem keeps its default value.
        tree: the same with interpolations as written, which is what is saved.
        origins: full path -> where the value was set, for every setting that the file, the environment or the
            command line sets: ``sft_trainer.yaml:12``, ``environment CHECKPOINT_DIR``, ``command line``.
        mappings: lines that tell which other names were read as which key.
        ignored: lines that tell which settings were changed from their default and have no use, and why, and the
            same for every key of verl's that is no setting.
        problems: all problems found, exit code 2.
        path: the config file, None where none was found.
        readable: False where the file could not be read as YAML, so that nothing follows from what is missing.
    """

    config: JobConfig
    tree: DictConfig
    origins: dict[str, str] = field(default_factory=dict[str, str])
    mappings: list[str] = field(default_factory=list[str])
    ignored: list[str] = field(default_factory=list[str])
    problems: list[Problem] = field(default_factory=list[Problem])
    path: Path | None = None
    readable: bool = True

    def origin(self, key: str) -> str:
        """Where a setting (or a part of it: ``optim.betas[1]``, ``data.train_files.math.weight``) was set.

        An empty text for a default value.
        """
        while key and key not in self.origins:
            key = key[: max(key.rfind("."), key.rfind("["), 0)]
        return self.origins.get(key, "")


def load_config(config_arg: str | None, overrides: Sequence[str], environ: Mapping[str, str]) -> Loaded:
    """Find and load the settings of a run; never raises for what a user wrote.

    Args:
        config_arg: config file or folder from the command line, None = ``$CONFIG_PATH``.
        overrides: ``key=value`` from the command line; the value is read as YAML.
        environ: environment variables. ``${oc.env:NAME}`` in values is resolved by OmegaConf, which looks at the
            environment of the process.

    Returns:
        The settings and all problems with them.
    """
    path, problems = find_config(config_arg, environ)
    layers = _Layers(leaf_fields())
    layers.problems.extend(problems)
    readable = path is not None and layers.add_file(path)
    layers.add_run_folder(environ)
    layers.add_overrides(overrides)
    loaded = layers.loaded(path, readable)
    if readable and not loaded.config.trainer.default_local_dir:
        _require_run_folder(loaded)
    return loaded


def load_resolved(path: Path) -> JobConfig:
    """Read settings that ``dump_config`` wrote. The environment's ``CHECKPOINT_DIR`` is not looked at.

    Raises:
        ProblemsError: the file is missing or damaged, or a variable that it names in ``${oc.env:...}`` is not set.
    """
    layers = _Layers(leaf_fields())
    loaded = layers.loaded(path, layers.add_file(path))
    raise_problems(loaded.problems)
    return loaded.config


def dump_config(loaded: Loaded) -> str:
    """All settings as YAML. Interpolations stay as written, so that no secret from the environment lands on disk."""
    return OmegaConf.to_yaml(loaded.tree, resolve=False)


def origins_text(loaded: Loaded) -> str:
    """``key = value   (origin)`` for every value that is not a default; interpolations are shown as written."""
    rows: list[tuple[str, str]] = []
    for path, leaf in leaf_fields().items():
        value = _as_written(loaded.tree, path)
        if value == leaf.default:
            continue
        for part, shown in shown_parts(path, value) if path in FILES else [(path, value)]:
            origins = [at for key, at in loaded.origins.items() if key == part or key.startswith(f"{part}.")]
            text = ", ".join(dict.fromkeys(origins or [loaded.origin(part)]))
            rows.append((f"{part} = {_one_line(shown)}", text))
    width = min(max((len(text) for text, _ in rows), default=0), 80)
    return "\n".join(f"{text:<{width}}   ({origin})" for text, origin in rows)


def run_folder(config: JobConfig) -> RunFolder:
    """The run's folder, as an absolute path.

    Raises:
        ValueError: the settings name none, which ``load_config`` reports as a problem.
    """
    if config.trainer.default_local_dir is None:
        raise ValueError(f"{_RUN_FOLDER_KEY} is not set")
    return RunFolder(Path(config.trainer.default_local_dir).absolute())


class _Layers:
    """Puts layers of settings on top of each other; a later layer wins."""

    def __init__(self, fields: dict[str, Field]) -> None:
        self.fields = fields
        self.tree = cast("DictConfig", OmegaConf.structured(JobConfig))
        self.origins: dict[str, str] = {}
        self.names: dict[str, str] = {}
        self.foreign: dict[str, ForeignValue] = {}
        self.mappings: list[str] = []
        self.problems: list[Problem] = []

    def add_file(self, path: Path) -> bool:
        """Add the YAML file; False where it could not be read as a whole."""
        try:
            with yaml_nodes(read_text(path)) as (loader, root):
                if root is None or root.tag == NULL_TAG:
                    raise UnreadableYamlError("the file holds no settings", "write the settings, or name another file")
                reader = NodeReader(loader, self.fields, lambda node: f"{path.name}:{node.start_mark.line + 1}")
                reader.read_section("", root)
        except UnreadableYamlError as error:
            origin = "" if error.line is None else f"{path.name}:{error.line}"
            self.problems.append(Problem(ExitCode.CONFIG, str(path), error.rule, error.fix, origin=origin))
            return False
        self._add(reader)
        return isinstance(root, yaml.MappingNode)

    def add_run_folder(self, environ: Mapping[str, str]) -> None:
        """``$CHECKPOINT_DIR/sft`` beats the file's run folder."""
        given = environ.get(Env.CHECKPOINT_DIR, "")
        if not given:
            return
        if "${" in given:
            rule, fix = "holds ${...} that nobody expanded", "write the path out"
            problem = Problem(ExitCode.CONFIG, Env.CHECKPOINT_DIR, rule, fix, given, "environment")
            self.problems.append(problem)
            return
        folder = str(Path(given) / "sft")
        self._apply([Setting(_RUN_FOLDER_KEY, _RUN_FOLDER_KEY, folder, f"environment {Env.CHECKPOINT_DIR}")])

    def add_overrides(self, overrides: Sequence[str]) -> None:
        """Add ``key=value`` from the command line; of one key given twice the last one wins."""
        for override in overrides:
            key, equals, text = override.partition("=")
            key = key.strip()
            if not equals or not key:
                fix = f"write {suggested}" if (suggested := self._as_override(override)) else "write key=value"
                self._problem("override", "must have the form key=value", fix, override)
                continue
            try:
                self._add_override(key, text)
            except UnreadableYamlError as error:
                self._problem(key, f"the value {error.rule}", "put it in quotes within the shell's quotes", text)

    def _add_override(self, key: str, text: str) -> None:
        with yaml_nodes(text) as (loader, root):
            node = root if root is not None else yaml.ScalarNode(NULL_TAG, "")
            reader = NodeReader(loader, self.fields, lambda _: _COMMAND_LINE)
            reader.read(key, node, node)
        self._add(reader)

    def _add(self, reader: NodeReader) -> None:
        self.problems.extend(reader.problems)
        self.foreign.update({each.key: each for each in reader.foreign})
        self._apply(reader.settings)

    def _as_override(self, word: str) -> str:
        found = suggestion(word.strip(), self.fields).removeprefix("did you mean ").rstrip("?")
        return f"{found}=VALUE" if found else ""

    def _problem(self, subject: str, rule: str, fix: str, value: Any, origin: str = _COMMAND_LINE) -> None:
        self.problems.append(Problem(ExitCode.CONFIG, subject, rule, fix, value, origin))

    def _apply(self, settings: Sequence[Setting]) -> None:
        """Put one layer's settings into the tree."""
        seen: dict[str, Setting] = {}
        for setting in settings:
            if setting.unset:
                if not any(each.key == setting.key and not each.unset for each in settings):
                    self._unset(setting)
                continue
            other = seen.setdefault(setting.key, setting)
            if other is not setting and other.value != setting.value:
                rule = f"means the same as {other.written} = {other.value!r} ({other.origin}), which differs"
                self._problem(setting.written, rule, "keep one of the two", setting.value, setting.origin)
                continue
            if self._set(setting):
                stale = [at for at in self.origins if at.startswith((f"{setting.key}.", f"{setting.key}["))]
                for at in stale:
                    del self.origins[at]
                self.origins.update({setting.key: setting.origin, **setting.below})
                for at in parents(setting.key):
                    self.origins.setdefault(at, setting.origin)
                self.names[setting.key] = setting.written
                self.origins.update({f"{setting.key}[{at}]": origin for at, origin in enumerate(setting.items)})
            if setting.written != setting.key:
                self.mappings.append(_mapping(setting))

    def _unset(self, setting: Setting) -> None:
        """A later layer takes back what an earlier one set under this name; under another name it holds."""
        key = setting.key
        if key not in self.origins:
            return
        if self.names[key] == setting.written:
            OmegaConf.update(self.tree, key, copy.deepcopy(self.fields[key].default), merge=False)
            self.origins = {at: origin for at, origin in self.origins.items() if at.partition("[")[0] != key}
            return
        given = f"{setting.written} = {_one_line(setting.given)} ({setting.origin})"
        holds = f"{key} = {_one_line(_as_written(self.tree, key))} ({self.origins[key]})"
        self.mappings.append(f"{given} sets nothing: {holds} holds")

    def _set(self, setting: Setting) -> bool:
        if isinstance(setting.value, str) and not _encodable(setting.value):
            self._problem(setting.written, "is not UTF-8 text", "write it in UTF-8", setting.value, setting.origin)
            return False
        key, value = setting.key, setting.value
        owner = owner_of(key)
        if owner is not None:
            key, value = owner, with_part(_as_written(self.tree, owner), key.removeprefix(f"{owner}."), value)
            if value is None:
                fix = f"give {owner} as a mapping of names in the file, or set it as a whole"
                rule = f"{owner} has no named data sets, so there is no part to set"
                self._problem(setting.written, rule, fix, setting.value, setting.origin)
                return False
        try:
            OmegaConf.update(self.tree, key, value, merge=False)
        except OmegaConfBaseException as error:
            self._wrong_type(setting, error)
            return False
        except (ValueError, TypeError, RecursionError, OverflowError) as error:
            self._problem(setting.written, f"cannot be used: {error}", "", setting.value, setting.origin)
            return False
        return True

    def _wrong_type(self, setting: Setting, error: OmegaConfBaseException) -> None:
        leaf = self.fields.get(setting.key)
        item = re.fullmatch(rf"{re.escape(setting.key)}\[(\d+)\]", error.full_key or "")
        if leaf is None or isinstance(error, GrammarParseError):
            self._problem(setting.written, _first_line(error), "", setting.value, setting.origin)
        elif item:
            at = int(item[1])
            value = cast("list[Any]", setting.value)[at]
            rule, fix = wrong_type(Field(leaf.path, leaf.item, None), value)
            origin = setting.items[at] if setting.items else setting.origin
            self._problem(f"{setting.written}[{at}]", rule, fix, value, origin)
        else:
            self._problem(setting.written, *wrong_type(leaf, setting.value), setting.value, setting.origin)

    def loaded(self, path: Path | None, readable: bool) -> Loaded:
        """Resolve interpolations and hand everything out."""
        resolved = copy.deepcopy(self.tree)
        for key, leaf in self.fields.items():
            fault = _unresolved(self.tree, key)
            if fault:
                rule, fix = fault
                self._problem(key, rule, fix, _as_written(self.tree, key), self.origins.get(key, ""))
                OmegaConf.update(resolved, key, copy.deepcopy(leaf.default), merge=False)
        config = cast("JobConfig", OmegaConf.to_object(resolved))
        ignored = [
            f"{key} = {value_at(config, key)} ({self.origins.get(key, '')}): {KEYS[key].ignored}"
            for key, leaf in self.fields.items()
            if KEYS[key].ignored and value_at(config, key) != leaf.default
        ]
        self._judge_foreign()
        ignored += _foreign_lines(self.foreign.values())
        return Loaded(config, self.tree, self.origins, self.mappings, ignored, self.problems, path, readable)

    def _judge_foreign(self) -> None:
        for each in self.foreign.values():
            if not each.entry.holds(each.value):
                rule = f"only {each.entry.only}: {each.entry.why}"
                self._problem(each.key, rule, each.entry.fix, each.value, each.origin)


def _require_run_folder(loaded: Loaded) -> None:
    if any(problem.subject in (_RUN_FOLDER_KEY, Env.CHECKPOINT_DIR) for problem in loaded.problems):
        return
    rule = f"the run has no folder: neither {Env.CHECKPOINT_DIR} nor {_RUN_FOLDER_KEY} is set"
    fix = f"set {Env.CHECKPOINT_DIR} (the run folder is then ${Env.CHECKPOINT_DIR}/sft)"
    loaded.problems.append(Problem(ExitCode.CONFIG, _RUN_FOLDER_KEY, rule, fix, origin=loaded.origin(_RUN_FOLDER_KEY)))


def _mapping(setting: Setting) -> str:
    note = ALIASES[setting.written].note
    given = "" if setting.given == setting.value else f" = {_one_line(setting.given)}"
    line = f"{setting.written}{given} ({setting.origin}) -> {setting.key} = {_one_line(setting.value)}"
    return f"{line}; {note}" if note else line


def _foreign_lines(values: Iterable[ForeignValue]) -> list[str]:
    """Keys that are accepted and do nothing, one line for each reason."""
    by_reason: dict[str, list[ForeignValue]] = {}
    for each in values:
        if each.entry.holds(each.value):
            by_reason.setdefault(each.entry.why, []).append(each)
    return [
        f"ignored: {', '.join(f'{each.key} ({each.origin})' for each in found)}: {reason}"
        for reason, found in by_reason.items()
    ]


def _unresolved(tree: DictConfig, key: str) -> tuple[str, str] | None:
    """Rule and fix where a setting's interpolations cannot be resolved, else None."""
    try:
        value = OmegaConf.select(tree, key, throw_on_missing=True)
        if OmegaConf.is_config(value):
            OmegaConf.to_container(value, resolve=True, throw_on_missing=True)
    except Exception as error:  # a resolver that a value names may raise anything
        if "Missing mandatory value" in str(error):
            return "??? stands for a value that must be filled in", f"set {key}, in the file or as {key}=VALUE"
        said = re.sub(r"^\w+ raised while resolving interpolation: ", "", _first_line(error)).strip("\"'")
        return f"cannot be resolved: {said}", "set the variable or key that it names, or write the value"
    return None


def _as_written(tree: DictConfig, key: str) -> Any:
    """A setting's value with its interpolations unresolved."""
    section, _, name = key.rpartition(".")
    owner = OmegaConf.select(tree, section) if section else tree
    return cast("dict[str, Any]", OmegaConf.to_container(owner, resolve=False))[name]


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _one_line(value: Any) -> str:
    words = {None: "null", True: "true", False: "false"}
    text = words[value] if value is None or isinstance(value, bool) else str(value).replace("\n", "\\n")
    return text if len(text) <= _LONGEST_SHOWN else f"{text[: _LONGEST_SHOWN - 1]}…"

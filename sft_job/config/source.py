"""Finding the config file, and its text as YAML nodes with line numbers."""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf._yaml import get_yaml_loader  # not public, but the one way to read as OmegaConf reads

from sft_job.contract import DEFAULT_CONFIG_NAME, Env, ExitCode
from sft_job.errors import Problem

_MAX_BYTES = 1_000_000
_MAX_DEPTH = 50
_MAX_NODES = 100_000
_UNPRINTABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class UnreadableYamlError(Exception):
    """The text is no YAML that this job reads; ``line`` is None where no line is to blame."""

    def __init__(self, rule: str, fix: str = "", line: int | None = None) -> None:
        super().__init__(rule)
        self.rule = rule
        self.fix = fix
        self.line = line


def find_config(config_arg: str | None, environ: Mapping[str, str]) -> tuple[Path | None, list[Problem]]:
    """Find the config file: the argument, else ``$CONFIG_PATH``; either may be a folder that holds ``$CONFIG_NAME``.

    Returns:
        The file, or None and a problem that says what was looked for.
    """
    given = config_arg or environ.get(Env.CONFIG_PATH, "")
    subject, origin = ("CONFIG", "command line") if config_arg else (Env.CONFIG_PATH, "environment")
    if not given:
        rule = f"no config is named: {Env.CONFIG_PATH} is not set, and the command line names no file"
        return None, [Problem(ExitCode.CONFIG, subject, rule, f"sft-job train FILE.yaml, or set {Env.CONFIG_PATH}")]
    name = environ.get(Env.CONFIG_NAME) or DEFAULT_CONFIG_NAME
    path = Path(given)
    try:
        if path.is_file():
            return path, []
        is_folder = path.is_dir()
        if is_folder and (path / name).is_file():
            return path / name, []
        similar = _similar(path, name) if is_folder else _similar(path.parent, path.name)
    except (OSError, ValueError) as error:
        rule, fix = f"cannot be looked at: {error}", "check the path and its permissions"
        return None, [Problem(ExitCode.CONFIG, subject, rule, fix, given, origin)]
    if is_folder:
        rule = f"looked for {path / name}: the folder holds no such file"
        fix = f"set {Env.CONFIG_NAME} to the name of the YAML file, or name the file itself"
    else:
        rule, fix = "there is no such file or folder", "correct the path, or mount it into the container"
    if similar:
        fix = f"there is {', '.join(similar)}; {fix}"
    return None, [Problem(ExitCode.CONFIG, subject, rule, fix, given, origin)]


def named_bytes(path: Path) -> bytes:
    """Content of a small file that a setting names.

    Raises:
        OSError: it cannot be read, or is no such file: a device or a pipe may have no end.
    """
    if not path.is_file():
        path.stat()  # says what is wrong, where that is known
        raise OSError(errno.EINVAL, "it is a folder or a device, not a file")
    with path.open("rb") as stream:
        data = stream.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise OSError(errno.EFBIG, f"it is larger than {_MAX_BYTES:,} bytes")
    return data


def read_text(path: Path) -> str:
    """Text of the config file; a byte order mark is left to the YAML parser, which skips it.

    Raises:
        UnreadableYamlError: it cannot be opened, is too large, or is no UTF-8 text.
    """
    try:
        with path.open("rb") as stream:
            data = stream.read(_MAX_BYTES + 1)
    except OSError as error:
        fix = {errno.ENOENT: "correct the path", errno.EISDIR: "name the file in it"}.get(
            error.errno or 0, "check its permissions"
        )
        raise UnreadableYamlError(f"cannot be read: {error.strerror or error}", fix) from error
    if len(data) > _MAX_BYTES:
        raise UnreadableYamlError(f"is larger than {_MAX_BYTES:,} bytes", "name the config's YAML file")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UnreadableYamlError("is UTF-16 text", "save it as UTF-8", line=1)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        rule = f"is not UTF-8 text: byte 0x{data[error.start]:02x} cannot be read"
        raise UnreadableYamlError(rule, "save it as UTF-8", line) from error


@contextmanager
def yaml_nodes(text: str) -> Generator[tuple[Any, yaml.Node | None]]:
    """Compose a text into YAML nodes, with the loader that OmegaConf itself uses.

    Yields:
        The loader, which turns nodes into values, and the root node (None for an empty text).

    Raises:
        UnreadableYamlError: the text is no YAML, or its nesting or aliases are out of all proportion.
    """
    # The limit on aliases is checked here on nodes, because it must hold before any value is built.
    loader_class = get_yaml_loader(max_yaml_expanded_nodes=None)
    _check_characters(text)
    try:
        _check_depth(text, loader_class)
        loader = loader_class(text)
    except yaml.YAMLError as error:
        raise _unreadable(error, text) from error
    try:
        root = loader.get_single_node()
        if root is not None:
            _count_nodes(root, {}, set())
        yield loader, root
    except yaml.YAMLError as error:
        raise _unreadable(error, text) from error
    finally:
        loader.dispose()


def _similar(folder: Path, name: str) -> list[str]:
    """Files in a folder that may be the one that was meant."""
    if not folder.is_dir():
        return []
    names = [each.name for each in folder.iterdir() if each.is_file()]
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    configs = sorted(each for each in names if each.endswith((".yaml", ".yml")) and each not in close)
    return [*close, *configs][:5]


def _check_characters(text: str) -> None:
    found = _UNPRINTABLE.search(text)
    if found:
        line = text.count("\n", 0, found.start()) + 1
        rule = f"holds the unprintable character U+{ord(found.group()):04X}, which YAML does not allow"
        raise UnreadableYamlError(rule, "remove it", line)


def _check_depth(text: str, loader_class: Any) -> None:
    # Composing recurses in C without a limit of its own; the events before it do not.
    depth = 0
    events: Iterable[yaml.Event] = cast("Any", yaml).parse(text, Loader=loader_class)
    for event in events:
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > _MAX_DEPTH:
            line = event.start_mark.line + 1
            raise UnreadableYamlError(f"is nested more than {_MAX_DEPTH} levels deep", "flatten it", line)


def _count_nodes(node: yaml.Node, sizes: dict[int, int], inside: set[int]) -> int:
    """Number of nodes once aliases are written out."""
    if id(node) in inside:
        raise UnreadableYamlError("an alias contains itself", "remove the alias", node.start_mark.line + 1)
    if id(node) not in sizes:
        children: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            children = node.value
        elif isinstance(node, yaml.MappingNode):
            children = [each for pair in node.value for each in pair]
        inside.add(id(node))
        sizes[id(node)] = 1 + sum(_count_nodes(child, sizes, inside) for child in children)
        inside.remove(id(node))
    if sizes[id(node)] > _MAX_NODES:
        rule = f"aliases expand it to more than {_MAX_NODES:,} nodes"
        raise UnreadableYamlError(rule, "write the values out", node.start_mark.line + 1)
    return sizes[id(node)]


def _unreadable(error: yaml.YAMLError, text: str) -> UnreadableYamlError:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    line = None if mark is None else min(mark.line + 1, len(text.splitlines()) or 1)
    tabs = [number for number, content in enumerate(text.splitlines(), start=1) if re.match(r" *\t", content)]
    if tabs:
        lines = ", ".join(map(str, tabs[:10]))
        rule = f"tabs indent line{'s' if len(tabs) > 1 else ''} {lines}; YAML indents with spaces only"
        return UnreadableYamlError(rule, "replace each tab by spaces", tabs[0])
    said = [str(part) for part in (getattr(error, "context", None), getattr(error, "problem", None)) if part]
    fix = "check indentation, brackets and quotes on this line and the one above"
    return UnreadableYamlError(f"is no YAML: {', '.join(said) or error}", fix, line)

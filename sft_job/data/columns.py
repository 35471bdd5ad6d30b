"""Columns of text and messages in parquet files: which the config names, what types they may have, how they are read.

Free of torch and transformers, so that a config can be checked on a login node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import pyarrow as pa
from omegaconf import OmegaConf

from sft_job.config.schema import DataConfig, MultiturnConfig
from sft_job.config.sets import DataSet
from sft_job.data.faults import Fault


@dataclass(frozen=True)
class Column:
    """A column that holds text, at the top level or inside structs, or a conversation's messages, tools or switches.

    Attributes:
        option: the setting that names it, for messages: ``data.prompt_key``.
        name: its name in the parquet file.
        keys: keys to descend into structs, one after the other; empty = the column itself is text.
        kind: what its cells hold: text, a list of messages or tools, or a truth value.
        optional: files may be without it.
    """

    option: str
    name: str
    keys: tuple[str, ...] = ()
    kind: Literal["text", "list", "flag"] = "text"
    optional: bool = False

    @property
    def keys_option(self) -> str:
        """The setting that gives ``keys``."""
        return self.option.removesuffix("_key") + "_dict_keys"

    @property
    def label(self) -> str:
        """The path as people write it: ``extra_info.question``."""
        return ".".join((self.name, *self.keys))


@dataclass(frozen=True)
class Unreadable:
    """Why a cell gives no text."""

    reason: str
    fault: Fault = Fault.NO_TEXT


Cell = str | Unreadable


def plain(value: Any) -> Any:
    """A plain Python value in place of an OmegaConf container."""
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def text_columns(data: DataConfig) -> tuple[tuple[Column, ...], tuple[Column, ...]]:
    """The columns of the prompt and those of the response, in the config's order."""

    def columns(option: str, names: Any, keys: Any) -> tuple[Column, ...]:
        names, keys = plain(names), tuple(plain(keys) or ())
        return tuple(Column(option, str(name), keys) for name in (names if isinstance(names, list) else [names]))

    return (
        columns("data.prompt_key", data.prompt_key, data.prompt_dict_keys),
        columns("data.response_key", data.response_key, data.response_dict_keys),
    )


def message_columns(data: DataConfig) -> tuple[Column, ...]:
    """The columns of messages, tools and thinking; empty where prompts and responses are trained on.

    Files may be without tools and thinking, unless the config gives their columns names of its own.
    """
    names = data.multiturn
    if not names.enable:
        return ()
    usual = MultiturnConfig()
    tools, thinking = names.tools_key, names.enable_thinking_key
    return (
        Column("data.multiturn.messages_key", names.messages_key, kind="list"),
        Column("data.multiturn.tools_key", tools, kind="list", optional=tools == usual.tools_key),
        Column(
            "data.multiturn.enable_thinking_key",
            thinking,
            kind="flag",
            optional=thinking == usual.enable_thinking_key,
        ),
    )


def own_options(columns: Sequence[Column], of: DataSet) -> list[Column]:
    """The columns with the options of a named data set for those that its own entry names, for messages."""
    named: list[Column] = []
    for column in columns:
        key = column.option.rpartition(".")[2]
        own = of.name != "" and getattr(of.entry, key, None) is not None
        named.append(replace(column, option=f"{of.option}.{key}") if own else column)
    return named


def is_text(kind: pa.DataType) -> bool:
    """Whether cells of this Arrow type are text."""
    if isinstance(kind, pa.BaseExtensionType):
        return is_text(kind.storage_type)
    if pa.types.is_dictionary(kind):
        return is_text(kind.value_type)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def is_list(kind: pa.DataType) -> bool:
    """Whether cells of this Arrow type are lists."""
    return (
        pa.types.is_list(kind)
        or pa.types.is_large_list(kind)
        or pa.types.is_fixed_size_list(kind)
        or pa.types.is_list_view(kind)
        or pa.types.is_large_list_view(kind)
    )


@dataclass(frozen=True)
class TypeFault:
    """Why a column of this type cannot be read as text.

    Attributes:
        option: the setting at fault.
        path: where in the column, ``extra_info.question``.
        rule: what was found and what was expected.
        choices: the keys that are there, where a key is missing.
    """

    option: str
    path: str
    rule: str
    choices: tuple[str, ...] = ()


def type_fault(column: Column, kind: pa.DataType) -> TypeFault | None:
    """Walk a column's type along its keys; None if text lies at the end.

    Before each key a list of structs is taken for its only element, as verl does.
    """
    if column.kind != "text":
        return _cell_fault(column, kind)
    path = column.name
    for key in column.keys:
        while is_list(kind):
            kind = kind.value_type  # type: ignore[attr-defined]
        if not pa.types.is_struct(kind):
            return TypeFault(column.keys_option, path, f"{path} is {kind}, expected a struct with the key {key!r}")
        names = tuple(field.name for field in kind)  # type: ignore[attr-defined]
        if key not in names:
            return TypeFault(column.keys_option, f"{path}.{key}", f"{path} has no key {key!r}", names)
        kind = kind.field(key).type  # type: ignore[attr-defined]
        path = f"{path}.{key}"
    if is_text(kind):
        return None
    rule = f"{path} is {kind}, expected text (string, large_string, string_view or a dictionary of these)"
    if not column.keys and (pa.types.is_struct(kind) or is_list(kind)):
        rule += f"; {column.keys_option} descends into structs"
    return TypeFault(column.option, path, rule)


def _cell_fault(column: Column, kind: pa.DataType) -> TypeFault | None:
    """Why cells of this type cannot be a list of messages or tools, or a truth value."""
    if pa.types.is_null(kind) and column.kind == "flag":
        return None
    if column.kind == "flag":
        good = pa.types.is_boolean(kind) or pa.types.is_integer(kind)
        expected = "boolean"
    else:
        inner = kind.value_type if is_list(kind) else None  # type: ignore[attr-defined]
        good = is_text(kind) or (inner is not None and (pa.types.is_struct(inner) or is_text(inner)))
        # Tools of a file whose rows have none.
        good = good or (column.optional and (pa.types.is_null(kind) or (inner is not None and pa.types.is_null(inner))))
        expected = "a list of structs, or JSON text"
    if good:
        return None
    return TypeFault(column.option, column.name, f"{column.name} is {kind}, expected {expected}")


def read_texts(batch: pa.RecordBatch, columns: Sequence[Column]) -> list[Cell]:
    """One text a row; those of several columns are joined by a line break.

    Args:
        batch: holds every column by name.
        columns: at least one.
    """
    cells = [_column_texts(batch.column(column.name), column) for column in columns]
    if len(cells) == 1:
        return cells[0]
    return [_joined(row) for row in zip(*cells, strict=True)]


def _joined(cells: tuple[Cell, ...]) -> Cell:
    unreadable = next((cell for cell in cells if isinstance(cell, Unreadable)), None)
    return unreadable or "\n".join(cells)  # type: ignore[arg-type]


def _column_texts(array: pa.Array, column: Column) -> list[Cell]:
    return [_text(value, column) for value in python_values(array)]


def python_values(array: pa.Array) -> list[Any]:
    """Values of an array; a cell that is not valid UTF-8 (a lone surrogate) or nested too deeply becomes Unreadable."""
    try:
        return array.to_pylist()
    except (UnicodeDecodeError, RecursionError):
        return [_python_value(scalar) for scalar in array]


def _python_value(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return Unreadable(f"not valid UTF-8 at byte {error.start}", Fault.UNDECODABLE)
    except RecursionError:
        return Unreadable("is nested too deeply to be read")


def _text(value: Any, column: Column) -> Cell:
    path = column.name
    for key in column.keys:
        while isinstance(value, list):
            if len(value) != 1:
                return Unreadable(f"{path} is a list of {len(value)} elements, expected exactly one")
            value = value[0]
        if not isinstance(value, dict):
            break
        value = value.get(key)
        path = f"{path}.{key}"
    if isinstance(value, str | Unreadable):
        return value
    return Unreadable(f"{path} is null" if value is None else f"{path} is {type(value).__name__}, expected text")
